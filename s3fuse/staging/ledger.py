"""The account of staged bytes: what they take, what has left, and who waits for that.

Invariant: `held_bytes` is what the disk (or memory) holds for staged bytes, in whole blocks. Whoever makes a place
larger counts it before the bytes are written; whoever frees one counts that after the disk has it back. Nothing here
does I/O.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Iterator


class Arrived:
    """How much of one layer has arrived, in this attempt and in the best one.

    Only what is more than ever is progress: where each attempt fails at its end, nothing leaves, however much is sent.
    """

    __slots__ = ("_best_bytes", "_now_bytes")

    def __init__(self) -> None:
        self._best_bytes = self._now_bytes = 0

    def begin(self) -> None:
        """A new attempt."""
        self._now_bytes = 0

    def add(self, size_bytes: int) -> bool:
        """So much more has arrived; gives whether it is progress."""
        self._now_bytes += size_bytes
        if self._now_bytes <= self._best_bytes:
            return False
        self._best_bytes = self._now_bytes
        return True


class Ledger:
    """Counts the staged bytes of one mount. All fields are bytes, times are `time.monotonic()` seconds."""

    def __init__(self) -> None:
        self.staged_bytes = 0  # what the bucket still has to get
        self.held_bytes = 0  # what the places of staged bytes take, used or not
        self.idle_bytes = 0  # what of that is in places that nobody uses now
        self.progressed_at = time.monotonic()  # when staged bytes last left, or arrived in the bucket
        self._sending: dict[object, int] = {}  # the bodies that are being sent
        self._waiters: set[trio.Event] = set()

    def hold(self, size_bytes: int) -> None:
        """A place grows."""
        self.held_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """The disk has so much back."""
        self.held_bytes -= size_bytes
        self._wake()

    def idle(self, size_bytes: int) -> None:
        """So much of what is held is not used any more (less than 0: is used again)."""
        self.idle_bytes += size_bytes
        if size_bytes > 0:
            self._wake()

    def left(self) -> None:
        """Staged bytes are not needed here any more, or have arrived in the bucket."""
        self.progressed_at = time.monotonic()

    def _wake(self) -> None:
        """Every waiter looks again."""
        while self._waiters:
            self._waiters.pop().set()

    async def changed(self, timeout_s: float) -> None:
        """Returns when there is less, or after `timeout_s`. Each waiter has an event of its own."""
        event = trio.Event()
        self._waiters.add(event)
        try:
            with trio.move_on_after(timeout_s):
                await event.wait()
        finally:
            self._waiters.discard(event)

    @contextmanager
    def sending(self, size_bytes: int, arrived: Arrived) -> Iterator[None]:
        """The block sends bytes of a layer; they have `arrived` when it ends without an exception."""
        whose = object()
        self._sending[whose] = size_bytes
        try:
            yield
            if arrived.add(size_bytes):
                self.left()
        finally:
            del self._sending[whose]

    @property
    def largest_sending_bytes(self) -> int:
        """The size of the largest body that is being sent."""
        return max(self._sending.values(), default=0)
