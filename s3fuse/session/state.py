"""What the records of a session come to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from s3fuse.session import records
from s3fuse.session.log import read

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from s3fuse.session.records import Node, Opened, Step


@dataclass
class State:
    """A session as its last worker left it."""

    facts: dict[str, Any] = field(default_factory=dict)
    nodes: dict[int, Node] = field(default_factory=dict)
    lookups: dict[int, int] = field(default_factory=dict)
    opened: dict[int, Opened] = field(default_factory=dict)  # by handle
    last_open: dict[int, int] = field(default_factory=dict)  # thread -> the handle that it got last, if still open
    places: dict[int, list[tuple[int, str]]] = field(default_factory=dict)  # of a directory's handle: the last two
    steps: dict[int, Step] = field(default_factory=dict)  # by `Step.node`: the last one there
    highest_number: int = 0
    order: int = 0  # of the last step
    #: How the last step ended, where its record is missing: STEP_END or STEP_UNDONE.
    open_end: int | None = None

    def known(self) -> dict[int, Node]:
        """The inodes that the kernel knows or has open, and the directories that they are in."""
        kept: dict[int, Node] = {}
        opened = {opened.number for opened in self.opened.values()}
        for number, node in self.nodes.items():
            if number in kept or not (self.lookups.get(number) or number in opened):
                continue
            step: Node | None = node
            while step is not None and step.number not in kept:
                kept[step.number] = step
                step = self.nodes.get(step.parent) if step.flags & records.LINKED else None
        return kept


def replay(content: Iterable[tuple[int, bytes]], is_done: int) -> State:
    """The state after these records. A last step without an end counts where its order is not above `is_done`."""
    state = State()
    pending: list[tuple[int, bytes]] | None = None
    order = 0
    for kind, record in content:
        if kind == records.STEP:
            order = records.decode_step(record).order
            pending = [(kind, record)]
        elif pending is None:
            _apply(state, kind, record)
        elif kind in (records.STEP_END, records.STEP_UNDONE):
            _apply_all(state, pending if kind == records.STEP_END else [])
            pending = None
        else:
            pending.append((kind, record))
    if pending is not None:
        state.open_end = records.STEP_END if order <= is_done else records.STEP_UNDONE
        _apply_all(state, pending if order <= is_done else [])
    state.order = max(order, is_done)
    return state


def _apply_all(state: State, content: list[tuple[int, bytes]]) -> None:
    for kind, record in content:
        _apply(state, kind, record)


def _apply(state: State, kind: int, record: bytes) -> None:
    if kind == records.NODE:
        node = records.decode_node(record)
        state.nodes[node.number] = node
        state.lookups[node.number] = node.lookups
        state.highest_number = max(state.highest_number, node.number)
    elif kind == records.COUNTS:
        state.lookups.update(records.decode_counts(record))
    elif kind == records.OPENED:
        opened = records.decode_opened(record)
        state.opened[opened.handle] = opened
        state.last_open[opened.pid] = opened.handle
    elif kind == records.CLOSED:
        _close(state, records.decode_number(record))
    elif kind == records.PLACE:
        handle, cookie, name = records.decode_place(record)
        state.places[handle] = [*state.places.get(handle, [])[-1:], (cookie, name)]
    elif kind == records.STEP:
        step = records.decode_step(record)
        state.steps[step.node] = step
        state.highest_number = max(state.highest_number, step.number)
    elif kind == records.VOID_STEP:
        state.steps.pop(records.decode_number(record), None)
    elif kind == records.VOID_OPEN:
        state.last_open.pop(records.decode_number(record), None)
    elif kind == records.FACTS:
        state.facts.update(json.loads(record))


def _close(state: State, handle: int) -> None:
    opened = state.opened.pop(handle, None)
    state.places.pop(handle, None)
    if opened is not None and state.last_open.get(opened.pid) == handle:
        del state.last_open[opened.pid]


def load(path: Path, is_done: int) -> State:
    """Raises UserError for a session that nobody may start from, OSError where it cannot be read."""
    return replay(read(path), is_done)
