"""A call that waits ends when its caller has a signal to act on, and leaves nothing half done."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from s3fuse import waits
from tests.engine.rig import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.engine.rig import Bench

MINE, OTHER = 1001, 1002


@asynccontextmanager
async def watched() -> AsyncIterator[set[int]]:
    """Threads that are signalled as soon as they are added."""
    signalled: set[int] = set()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waits.watch, signalled.__contains__)
            yield signalled
            nursery.cancel_scope.cancel()


def call_of(*threads: int) -> None:
    """What this task waits for from now on, it waits for on behalf of these threads."""
    waits.caller.set((lambda: threads, ()))


async def test_the_wait_of_a_signalled_caller_ends(autojump_clock: trio.testing.MockClock) -> None:
    async with watched() as signalled:
        call_of(OTHER, MINE)
        signalled.add(MINE)
        with pytest.raises(waits.Interrupted, match="Interrupted system call"), waits.interruptible():
            await trio.sleep_forever()
    assert not waits._waiting


async def test_others_wait_on(autojump_clock: trio.testing.MockClock) -> None:
    async with watched() as signalled:
        signalled.add(MINE)
        call_of(OTHER)
        with waits.interruptible():
            await trio.sleep(10)
        waits.caller.set(None)
        with waits.interruptible():
            await trio.sleep(10)


async def test_a_signal_that_is_taken_meanwhile(autojump_clock: trio.testing.MockClock) -> None:
    """It was pending for one look only: another thread has taken it."""
    looks = iter([True, False, True, False, False])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits.watch, lambda thread: next(looks, False))
        call_of(MINE)
        with waits.interruptible():
            await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert next(looks, None) is None


async def test_a_failure_stays_a_failure() -> None:
    call_of(MINE)
    with pytest.raises(ValueError, match="mine"), waits.interruptible():
        raise ValueError("mine")
    assert not waits._waiting


async def test_a_listing_that_two_wait_for_and_one_gives_up(bench: Bench) -> None:
    await bench.upload("d/file", b"body")
    rig = await bench.rig()
    await rig.walk("d")
    names: list[list[str]] = []
    outcomes: list[str] = []

    async def first() -> None:
        call_of(MINE)
        try:
            await rig.ls("d")
        except waits.Interrupted:
            outcomes.append("interrupted")

    async def second() -> None:
        call_of(OTHER)
        names.append(await rig.ls("d"))

    async with watched() as signalled, trio.open_nursery() as nursery:
        with rig.line.held("list") as gate:
            nursery.start_soon(first)
            await gate.arrived()
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
            signalled.add(MINE)
            await until(lambda: bool(outcomes), 60)
            await gate.arrived()  # the other one's own
    assert outcomes == ["interrupted"]
    assert names == [["file"]]


async def test_fsync_gives_up_and_the_upload_goes_on(bench: Bench) -> None:
    rig = await bench.rig()
    handle = await rig.create("file")
    await rig.files.write(handle, 0, b"body")
    async with watched() as signalled:
        call_of(MINE)
        with rig.line.held("put") as gate:
            signalled.add(MINE)
            with pytest.raises(waits.Interrupted):
                await rig.files.fsync(handle)
            assert bench.contents() == {}
            await gate.arrived()
        signalled.clear()
        await rig.files.fsync(handle)
    assert bench.contents() == {"file": b"body"}
    assert bench.counted()["put"] == 1
    rig.close(handle)
    waits.caller.set(None)
    await rig.drained()
    rig.check_clean()


async def test_what_a_signalled_writer_wrote_is_taken(bench: Bench) -> None:
    """Above the limit, since an error would lose what write(2) has acknowledged long ago."""
    rig = await bench.rig(dirty_size_bytes=1 << 20, paused=True)
    await rig.put("full", bytes(1 << 20))
    handle = await rig.create("file")
    async with watched() as signalled:
        call_of(MINE)
        signalled.add(MINE)
        assert await rig.files.write(handle, 0, b"body") == 4
    assert await rig.pread(handle) == b"body"
