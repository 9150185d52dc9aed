"""What nodes did, and the judgement of it: of each acknowledged write, where it is or who superseded it; pure.

A write is accounted for where the bucket has it, in a file or in a conflict file, or where an operation that had seen
it replaced or removed it. What an operation has seen is what it read at the same handle before it wrote, or just before
a removal or rename, which have no handle. What remains is `lost`, unless a removal explains it: one that ran at the
same time may have seen it (`raced`, which is no error); one that did not can have deleted it on its way to the bucket,
also a rename at the old key (`window`: what README says of deletes on servers where they are not conditional).
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tests.nodes.content import Id

#: How old what a node knows may be: the TTL of attributes, and what it takes to ask.
KNOWN_S = 2.0
#: How long after its end a removal may still be on its way to the bucket.
LATE_S = 30.0


@dataclass(slots=True)
class Event:
    """One operation. Times are of one clock for all nodes; `errno` 0 is success."""

    node: int
    verb: str
    path: str = ""
    target: str = ""  # of a rename
    id: Id | None = None  # of a write or an append
    seen: tuple[Id, ...] = ()  # the records that were there, as the operation read them
    began: float = 0.0
    ended: float = float("inf")
    errno: int = 0
    acknowledged: bool = False  # by fsync or flush

    def replaces(self, path: str) -> bool:
        """Whether it is meant to end what is at `path`."""
        return path == (self.path if self.verb == "unlink" else self.target if self.verb == "rename" else None)

    def deletes(self, path: str) -> bool:
        """Whether it ends with a delete of the key that `path` has: a rename has moved what it knew there."""
        return self.replaces(path) or (self.verb == "rename" and _is_below(path, self.path))


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be, or, where `kind` is "raced" or "window", that is explained."""

    kind: str
    text: str
    id: Id | None = None  # of the write that it is about

    @property
    def is_error(self) -> bool:
        return self.kind not in ("raced", "window")


@dataclass
class History:
    """All events of all nodes."""

    events: list[Event] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.write_text("".join(json.dumps(asdict(event)) + "\n" for event in self.events))

    def acknowledge(self, node: int, until: float) -> None:
        """A flush that began at `until` succeeded: what the node had written before is in the bucket."""
        for event in self.events:
            if event.node == node and event.id is not None and not event.errno and event.ended <= until:
                event.acknowledged = True

    def judge(self, kept: Iterable[Id]) -> Iterator[Finding]:
        """The acknowledged writes that nothing accounts for; `kept` are those in the bucket."""
        there = set(kept)
        seen = {id for event in self.events for id in event.seen}
        superseding: dict[Id, list[Event]] = defaultdict(list)
        for event in self.events:
            happened = not event.errno or event.id in there or event.id in seen
            if happened and event.verb in ("write", "unlink", "rename"):
                for id in event.seen:
                    superseding[id].append(event)
        for event in self.events:
            if event.id is None or not event.acknowledged or event.id in there:
                continue
            if not any(other is not event for other in superseding[event.id]):
                yield self._missing(event)

    def _missing(self, write: Event) -> Finding:
        text = f"write {write.id} ({write.verb}) of {write.path}, {write.began:.3f} to {write.ended:.3f}"
        window = ""
        # Appends keep it: their content ends where theirs does.
        last = max([write.ended, *(one.ended for one in self.events if one.verb == "append" and write.id in one.seen)])
        paths = {write.path}  # where its content may be by and by: renames take it along
        for event in sorted(self.events, key=lambda event: event.ended):
            if event.errno or event.ended < write.began - LATE_S:
                continue
            near = write.began < event.ended and last > event.began - KNOWN_S
            if near and any(map(event.replaces, paths)):
                return Finding("raced", f"{text}: {_told(event)} ran at that time", write.id)
            if write.began < self._arrived(event) and last > event.began and any(map(event.deletes, paths)):
                window = window or f"{text}: {_told(event)} deleted its old key at that time"
            if event.verb == "rename" and event.ended > write.began:
                moved = {path for path in paths if _is_below(path, event.path)}
                paths |= {event.target + path[len(event.path) :] for path in moved}
        if window:
            return Finding("window", window, write.id)
        return Finding("lost", f"{text}: in no file, and nobody who had seen it replaced it", write.id)

    def _arrived(self, event: Event) -> float:
        """When an operation has arrived in the bucket at the latest: at the end of the next flush."""
        flushes = (
            one.ended
            for one in self.events
            if one.verb == "flush" and one.node == event.node and not one.errno and one.began >= event.ended
        )
        return min(flushes, default=event.ended + LATE_S)


def _is_below(path: str, top: str) -> bool:
    return path == top or path.startswith(f"{top}/")


def _told(event: Event) -> str:
    where = f"{event.path} -> {event.target}" if event.target else event.path
    return f"{event.verb} {where} of node {event.node} ({event.began:.3f} to {event.ended:.3f}, errno {event.errno})"
