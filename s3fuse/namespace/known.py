"""Records what the kernel knows, so that another process can serve it: see `session`.

Every inode whose number the kernel was given is recorded before the answer with it is sent, and again whenever its
place or its version changes. Counts may come out too high where a process is killed between record and answer, which
costs memory; they are never too low, which would lose inodes that are in use.

A change of names goes into the journal and into the session, and a killed process may have come to one of them only.
So it is a step: the session has it first, and counts it once the journal, which commits its number with it, agrees.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from s3fuse.session import records
from s3fuse.session.log import Log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.session.state import State
    from s3fuse.writing.journal import Journal

log = logging.getLogger(__name__)

#: A log is written anew when it is longer than this and so many times as long as it would be then.
SHORT_BYTES = 4 << 20
GROWTH = 4
#: What an inode takes in it: a node with a name of some length and the etag.
NODE_BYTES = 150
LOOK_S = 1.0
#: How many inodes are written between two turns of the other tasks.
SLICE = 500


def _size(inode: Inode) -> int:
    """That of the version which the record names; what is on top of it the journal knows."""
    return inode.remote.size_bytes if inode.remote is not None and inode.is_regular else inode.size


class Known:
    """The record of one mount's session; without a `path` nothing is recorded."""

    def __init__(self, inodes: Inodes, journal: Journal, path: Path | None, earlier: State | None = None) -> None:
        self.inodes = inodes
        self.journal = journal
        self.opened: dict[int, records.Opened] = {}
        self.steps: dict[int, records.Step] = {}
        self.places: dict[int, list[tuple[int, str]]] = {}
        self.facts: dict[str, Any] = {}
        self._last_open: dict[int, int] = {}
        self._order = 0
        self._told = False
        self._copy: Log | None = None
        self._log: Log | None = None
        self._short_bytes = 0  # how long it was when this process wrote it anew
        if path is None:
            return
        if earlier is None:
            self._log = Log(path, new=True)
            journal.put_step(0)
        else:
            self._log = Log(path, new=False)
            if earlier.open_end is not None:
                self._append(earlier.open_end, b"")
            self._order, self.steps = earlier.order, earlier.steps
            self.opened, self.places, self._last_open = earlier.opened, earlier.places, earlier.last_open
            self.facts = earlier.facts

    @property
    def is_kept(self) -> bool:
        """Whether another process can start from the record."""
        return self._log is not None and not self._log.broken

    @property
    def used_bytes(self) -> int:
        return 0 if self._log is None else self._log.used_bytes

    def _append(self, kind: int, content: bytes) -> None:
        if self._log is None:
            return
        self._log.append(kind, content)
        if self._copy is not None:
            self._copy.append(kind, content)
        if self._log.broken and not self._told:
            self._told = True
            log.error("%s is full: until the next mount this one ends with its process", self._log.path.parent)

    # -- inodes

    def changed(self, inode: Inode) -> None:
        """The inode, which the kernel knows, is somewhere else, or has other content."""
        self._append(records.NODE, self._node(inode))

    def counted(self, inode: Inode) -> None:
        """The kernel knows the inode one time more, or fewer times."""
        if inode.known is not None:
            self._append(records.COUNTS, records.encode_count(inode.number, inode.lookups))
        elif self._log is not None:
            self._begin(inode)

    def all_counted(self, inodes: list[Inode]) -> None:
        """`counted` for many at once."""
        if self._log is None:
            return
        counts: list[int] = []
        for inode in inodes:
            if inode.known is not None:
                counts += (inode.number, inode.lookups)
            else:
                self._begin(inode)
        if counts:
            self._append(records.COUNTS, records.encode_counts(counts))

    def _begin(self, inode: Inode) -> None:
        parent = inode.parent
        if parent is not None and parent.known is None:
            self._begin(parent)
        inode.known = self
        self.changed(inode)

    @staticmethod
    def _node(inode: Inode) -> bytes:
        remote, parent = inode.remote, inode.parent
        flags = records.LINKED if inode.linked else 0
        key = etag = ""
        if remote is not None:
            flags |= records.IN_BUCKET
            etag = remote.etag
            if not inode.linked:
                key = remote.key
        if inode.xattrs or not inode.attributes_known:
            flags |= records.INCOMPLETE
        return records.pack_node(
            inode.number,
            parent.number if parent is not None else 0,
            inode.lookups,
            inode.mode,
            inode.uid,
            inode.gid,
            inode.rdev,
            flags,
            _size(inode),
            inode.atime_ns,
            inode.mtime_ns,
            inode.ctime_ns,
            inode.name,
            etag,
            key,
        )

    # -- handles

    def begin_open(self, number: int, pid: int, flags: int) -> None:
        """A thread opens what it has just opened: so it has got the answer to that."""
        last = self.last_opened(pid)
        if last is not None and (last.number, last.flags) == (number, flags):
            del self._last_open[pid]
            self._append(records.VOID_OPEN, records.encode_number(pid))

    def last_opened(self, pid: int) -> records.Opened | None:
        """What this thread opened last, if that is still open and nothing tells that it was answered."""
        return self.opened.get(self._last_open.get(pid, -1))

    def handle_given(self, inode: Inode, opened: records.Opened) -> None:
        """A handle is given out."""
        if self._log is None:
            return
        if inode.known is None:
            self._begin(inode)
        self.opened[opened.handle] = opened
        self._last_open[opened.pid] = opened.handle
        self._append(records.OPENED, records.encode_opened(opened))

    def handle_gone(self, handle: int) -> None:
        """A handle is gone."""
        opened = self.opened.pop(handle, None)
        if opened is not None:
            self.places.pop(handle, None)
            if self._last_open.get(opened.pid) == handle:
                del self._last_open[opened.pid]
            self._append(records.CLOSED, records.encode_number(handle))

    def read_up_to(self, handle: int, cookie: int, name: str) -> None:
        """The open directory was read up to entry `cookie`, which is `name`."""
        if self._log is not None:
            self.places[handle] = [*self.places.get(handle, [])[-1:], (cookie, name)]
            self._append(records.PLACE, records.encode_place(handle, cookie, name))

    # -- steps

    def begin(self, operation: int, node: int, what: bytes) -> None:
        """A request comes that is the same as the last one there: so that one was answered."""
        last = self.steps.get(node)
        if last is not None and (last.operation, last.what) == (operation, what):
            self._void(node)

    def _void(self, node: int) -> None:
        del self.steps[node]
        self._append(records.VOID_STEP, records.encode_number(node))

    @contextmanager
    def step(self, operation: int, node: int, what: bytes, number: int = 0) -> Iterator[None]:
        """One transaction of the journal, and what is recorded meanwhile counts if that is committed. No awaits.

        `node` is the inode whose lock the kernel holds for the request, `number` the inode that it makes.
        """
        if self._log is None:
            with self.journal.transaction():
                yield
            return
        self._order += 1
        step = records.Step(self._order, operation, node, number, what)
        with self.journal.transaction():
            self.journal.undo.call(partial(self._append, records.STEP_UNDONE, b""))
            self.journal.after_commit(partial(self._step_done, step))
            self._append(records.STEP, records.encode_step(step))
            self.journal.put_step(self._order)
            yield

    def _step_done(self, step: records.Step) -> None:
        self._append(records.STEP_END, b"")
        self.steps[step.node] = step

    def note(self, **facts: Any) -> None:
        """Records facts (JSON) about the mount for whoever comes next."""
        self.facts.update(facts)
        if self._log is not None:
            self._append(records.FACTS, json.dumps(self.facts).encode())

    # -- keeping it short

    async def keep_short(self) -> None:
        """Writes the log anew where it has become long; runs until cancelled."""
        while True:
            await trio.sleep(LOOK_S)
            current = self._log
            if current is None or current.broken:
                return
            self._forget_steps()
            short_bytes = max(self._short_bytes, NODE_BYTES * len(self.inodes.table))
            if current.used_bytes > max(SHORT_BYTES, GROWTH * short_bytes):
                try:
                    await self.rewrite()
                except OSError as error:
                    log.warning("the session %s cannot be written anew: %s", current.path, error)
                    self._short_bytes = current.used_bytes

    def _forget_steps(self) -> None:
        """Forgets those of inodes that are gone: the kernel knows the inode of a request that it waits for."""
        for node in [node for node in self.steps if node not in self.inodes.table]:
            del self.steps[node]

    async def rewrite(self) -> None:
        """Writes the log anew. What is recorded meanwhile goes into both, and says how things are from then on."""
        assert self._log is not None
        part = self._log.path.with_name(self._log.path.name + ".part")
        copy = self._copy = Log(part, new=True)
        try:
            copy.append(records.FACTS, json.dumps(self.facts).encode())
            self._forget_steps()
            for step in self.steps.values():
                copy.append(records.STEP, records.encode_step(step))
                copy.append(records.STEP_END, b"")
            inodes = list(self.inodes.table.values())
            for at in range(0, len(inodes), SLICE):
                for inode in inodes[at : at + SLICE]:
                    if inode.known is not None and inode.number in self.inodes.table:
                        copy.append(records.NODE, self._node(inode))
                await trio.lowlevel.checkpoint()
            last = set(self._last_open.values())
            for handle, opened in sorted(self.opened.items(), key=lambda one: one[0] in last):
                copy.append(records.OPENED, records.encode_opened(opened))
                if handle not in last:
                    copy.append(records.VOID_OPEN, records.encode_number(opened.pid))
                for cookie, name in self.places.get(handle, ()):
                    copy.append(records.PLACE, records.encode_place(handle, cookie, name))
            if copy.broken:
                raise OSError(28, os.strerror(28), str(part))
            self._log.replace(copy)
            self._log = copy
            self._short_bytes = copy.used_bytes
        except BaseException:
            copy.close()
            part.unlink(missing_ok=True)
            raise
        finally:
            self._copy = None

    def end(self) -> None:
        """The mount has ended: nobody needs the session any more."""
        if self._log is not None:
            self._log.path.unlink(missing_ok=True)
            self.leave()

    def leave(self) -> None:
        """Another process goes on with it."""
        if self._log is not None:
            self._log.close()
            self._log = None
