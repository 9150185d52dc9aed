"""Answers that an earlier process could not give any more: a request that it had carried out is not carried out again.

The kernel holds the lock of a directory (for extended attributes, of the inode) during a request that changes it, so
of such requests at most one a directory is unanswered, and it is the last one recorded there or a later one. A thread
that opens a file waits for that alone.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from s3fuse.session import operations

if TYPE_CHECKING:
    from collections.abc import Iterable

    from s3fuse.fuse.resent import Resent
    from s3fuse.namespace.known import Known


class Repeats:
    """What was recorded of the requests that come once more."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._steps: dict[tuple[int, int, bytes], int] = {}
        self._opens: dict[tuple[int, int, int], int] = {}
        self._halves: set[tuple[int, bytes]] = set()  # links whose copy was begun
        self._made: set[tuple[int, bytes, int]] = set()  # extended attributes that were to be new, and by whom

    def expect(self, resent: Iterable[Resent]) -> None:
        """These requests will come once more."""
        for request in resent:
            if request.operation in (operations.OPEN, operations.OPENDIR):
                flags = request.flags if request.operation == operations.OPEN else os.O_DIRECTORY
                opened = self._known.last_opened(request.pid)
                if opened is not None and (opened.number, opened.flags) == (request.node, flags):
                    self._opens[request.node, request.pid, flags] = opened.handle
                continue
            step = self._known.steps.get(request.node)
            if step is None or step.what != request.what:
                continue
            if step.operation != request.operation:
                if request.operation == operations.LINK:
                    self._halves.add((request.node, request.what))
                continue
            self._steps[request.operation, request.node, request.what] = step.number
            if request.operation == operations.SETXATTR and request.flags & os.XATTR_CREATE:
                self._made.add((request.node, request.what, request.pid))

    def done(self, operation: int, node: int, what: bytes) -> int | None:
        """For a request that comes now: the inode it made (0: none) if it is carried out already, else None."""
        number = self._steps.pop((operation, node, what), None) if self._steps else None
        if number is None:
            self._known.begin(operation, node, what)
        return number

    def is_half_linked(self, node: int, name: bytes) -> bool:
        """Whether a copy was begun for a link that comes now, which nobody knows of: it is to be removed."""
        half = (node, name) in self._halves
        self._halves.discard((node, name))
        return half

    def opened(self, node: int, pid: int, flags: int) -> int | None:
        """For an open that comes now: the handle, if it has one already."""
        handle = self._opens.pop((node, pid, flags), None) if self._opens else None
        if handle is None:
            self._known.begin_open(node, pid, flags)
        return handle

    def was_absent(self, node: int, name: bytes, pid: int) -> bool:
        """Whether this thread sets an extended attribute that must be new, and it is there by its own doing."""
        return bool(self._made) and (node, name, pid) in self._made

    def is_set(self, node: int, name: bytes, pid: int) -> None:
        """The request that `was_absent` told of is answered."""
        self._made.discard((node, name, pid))
