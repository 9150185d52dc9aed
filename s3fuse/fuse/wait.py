"""Waits for the next request of the kernel: looks at the device for a moment before it asks trio.

trio needs an epoll round trip and two task switches to say that the device is readable, more than most requests
cost. A program on the mount sends its next request 10-20 us after an answer, so a look at the device, kept up for
`SPIN_S`, mostly finds it. Other tasks and threads must not starve meanwhile: after `TURN_S` of answering without a
pause every other task that can run gets one turn, and while requests rarely come within `SPIN_S` the look is a
single poll(2).
"""

from __future__ import annotations

import contextlib
import select
import time
import types
from typing import TYPE_CHECKING

import pyfuse3
import trio

if TYPE_CHECKING:
    from collections.abc import Iterator

SPIN_S = 40e-6
#: Longest time that requests are answered without a turn for the other tasks.
TURN_S = 5e-3


class DeviceWait:
    """A stand-in for `trio.lowlevel.wait_readable` for one descriptor."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._known: set[int] = set()
        self._turn_at = time.perf_counter()
        self._luck = 8  # successes of recent spins; at 0 it stops spinning until a single poll finds something

    async def wait_readable(self, fd: int) -> None:
        if fd not in self._known:
            self._poll.register(fd, select.POLLIN)
            self._known.add(fd)
        poll = self._poll.poll
        now = time.perf_counter()
        if now >= self._turn_at:
            await trio.lowlevel.checkpoint()
            now = time.perf_counter()
            self._turn_at = now + TURN_S
        if poll(0):
            self._luck = min(16, self._luck + 1)
            return
        if self._luck > 0:
            end = now + SPIN_S
            while time.perf_counter() < end:
                if poll(0):
                    self._luck = min(16, self._luck + 1)
                    return
            self._luck -= 1
        await trio.lowlevel.wait_readable(fd)
        self._turn_at = time.perf_counter() + TURN_S


class _Lock:
    """The device lock; pyfuse3 uses no more of `trio.Lock` than this.

    It is free at once when it is given back, so that the task that answers a request without waiting for anything
    reads the next one too. A waiting task is woken once and looks for itself when it comes to run, which it does as
    soon as the other waits for something: trio's lock would hand over, at the cost of a task switch a request.
    """

    def __init__(self) -> None:
        self._held = self._woken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiting.park()
            self._woken = False
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False
        if self._waiting and not self._woken:
            self._woken = True
            self._waiting.unpark()


@contextlib.contextmanager
def quick_device() -> Iterator[None]:
    """Gives pyfuse3 the quick wait for as long as the block lasts; trio itself stays as it is."""
    shim = types.SimpleNamespace(**vars(trio))
    shim.lowlevel = types.SimpleNamespace(**vars(trio.lowlevel))
    shim.lowlevel.wait_readable = DeviceWait().wait_readable
    shim.Lock = _Lock
    setattr(pyfuse3, "trio", shim)  # noqa: B010 - its stubs do not name the global
    try:
        yield
    finally:
        setattr(pyfuse3, "trio", trio)  # noqa: B010
