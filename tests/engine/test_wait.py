"""The quick wait for the device: other tasks and threads go on, and nothing of it stays behind."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pyfuse3
import pytest
import trio

from s3fuse.fuse import wait
from s3fuse.fuse.wait import TURN_S, DeviceWait, quick_device

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Read and write end."""
    ends = os.pipe()
    yield ends
    for end in ends:
        with suppress(OSError):
            os.close(end)


async def spin(device: DeviceWait, fd: int) -> None:
    """A loop that always has a request."""
    while True:
        await device.wait_readable(fd)


async def test_other_tasks_get_turns_while_requests_never_pause(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"x")  # stays readable
    gaps: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spin, DeviceWait(), reading)
        before = time.perf_counter()
        while len(gaps) < 20:
            await trio.lowlevel.checkpoint()
            now = time.perf_counter()
            gaps.append(now - before)
            before = now
        nursery.cancel_scope.cancel()
    # The machine is shared, so the best of many tell what the code does and the worst only that it ends.
    assert sorted(gaps)[10] < 4 * TURN_S
    assert max(gaps) < 1


async def test_the_turn_is_not_at_each_request(pipe: tuple[int, int]) -> None:
    """That the wait does not go through trio each time is what makes it quick."""
    reading, writing = pipe
    os.write(writing, b"x")
    turns = 0
    waits = 0
    device = DeviceWait()
    done = trio.Event()

    async def count() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        end = time.perf_counter() + 10 * TURN_S
        while time.perf_counter() < end:
            await device.wait_readable(reading)
            waits += 1
        done.set()
    assert turns >= 3
    assert waits > 20 * turns


async def test_threads_come_back_while_requests_never_pause(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"x")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(spin, DeviceWait(), reading)
            for number in range(10):
                assert await trio.to_thread.run_sync(lambda n: n + 1, number) == number + 1
            nursery.cancel_scope.cancel()


async def test_loop_that_never_pauses_can_be_cancelled(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.write(writing, b"x")
    with trio.fail_after(10), trio.move_on_after(0.01) as scope:
        await spin(DeviceWait(), reading)
    assert scope.cancelled_caught


async def test_waits_in_trio_where_nothing_comes(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = pipe
    asked: list[int] = []
    wait_readable = trio.lowlevel.wait_readable

    async def watched(fd: int) -> None:
        asked.append(fd)
        await wait_readable(fd)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", watched)
    device = DeviceWait()
    returned = trio.Event()

    async def one() -> None:
        await device.wait_readable(reading)
        returned.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()
        assert asked == [reading]
        assert not returned.is_set()
        os.write(writing, b"x")
        with trio.fail_after(5):
            await returned.wait()


async def test_bad_luck_ends_the_spinning(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where requests come rarely the look at the device is a single poll; one found by it begins the spinning anew."""
    reading, writing = pipe

    async def late(fd: int) -> None:
        await trio.lowlevel.checkpoint()

    device = DeviceWait()
    with monkeypatch.context() as patch:
        patch.setattr(trio.lowlevel, "wait_readable", late)
        for _ in range(20):
            await device.wait_readable(reading)
        assert device._luck == 0
        patch.setattr(wait, "SPIN_S", 60.0)  # it would hang here if it spun
        await device.wait_readable(reading)
    os.write(writing, b"x")
    await device.wait_readable(reading)
    assert device._luck == 1


async def test_quick_device_is_undone() -> None:
    before = vars(pyfuse3)["trio"]
    assert before is trio
    with quick_device():
        shim = vars(pyfuse3)["trio"]
        assert shim is not trio
        assert shim.lowlevel.wait_readable is not trio.lowlevel.wait_readable
        assert shim.open_nursery is trio.open_nursery
        assert trio.lowlevel.wait_readable.__module__.startswith("trio")
    assert vars(pyfuse3)["trio"] is trio
    with pytest.raises(ValueError, match="in between"), quick_device():
        raise ValueError("in between")
    assert vars(pyfuse3)["trio"] is trio


async def test_lock_is_a_lock() -> None:
    inside = 0
    most = 0
    with quick_device():
        lock = vars(pyfuse3)["trio"].Lock()

    async def use() -> None:
        nonlocal inside, most
        async with lock:
            inside += 1
            most = max(most, inside)
            await trio.lowlevel.checkpoint()
            inside -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(use)
    assert (most, inside) == (1, 0)
    with pytest.raises(ValueError, match="held"):
        async with lock:
            raise ValueError("held")
    await use()
