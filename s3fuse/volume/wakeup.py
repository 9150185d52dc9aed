"""What wakes the task of a volume's mount before its time: a request that wants something, or a process that ends."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Iterable


class Wakeup:
    """The alarm of one task. A poke while the task is at work is not lost: it shortens the next sleep."""

    def __init__(self) -> None:
        self._poked = trio.Event()
        self._ended: set[int] = set()

    def poke(self) -> None:
        """There is something to do: the sleep ends at once."""
        self._poked.set()

    def arm(self) -> None:
        """The pokes until now are heard: the task looks now at what they are about."""
        self._poked = trio.Event()

    def expect_new_processes(self) -> None:
        """A process that starts now may have the pid of one that has ended."""
        self._ended.clear()

    async def sleep(self, pause_s: float, pids: Iterable[int]) -> None:
        """Until a poke since `arm`, the end of one of these processes that was not told yet, or `pause_s` later."""
        with trio.move_on_after(pause_s):
            async with trio.open_nursery() as nursery:
                for pid in set(pids) - self._ended:
                    nursery.start_soon(self._until_end_of, pid, nursery.cancel_scope)
                await self._poked.wait()
                nursery.cancel_scope.cancel()

    async def _until_end_of(self, pid: int, scope: trio.CancelScope) -> None:
        """Cancels `scope` when a process of the mount ends: what keeps it, or what serves it."""
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return
        try:
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            os.close(descriptor)
        self._ended.add(pid)  # it may stay as a zombie, where nobody looks after it
        await trio.sleep(0.2)  # the kernel, or what keeps the mount, has to notice it first
        scope.cancel()
