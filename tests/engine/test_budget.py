"""Writers wait for room as long as it may come, in the order of coming, and room that is there is found."""

from __future__ import annotations

import errno
import os
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio

from s3fuse.store.faulty import late, refused
from s3fuse.vfs import budget
from s3fuse.writing.ephemeral import MemoryStaging
from tests.engine.rig import MIB, SMALL_LIMITS, Bench, Rig, fails, until
from tests.engine.test_ledger import small_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KIB = 1 << 10
BUDGET = 64 * KIB
CACHE = "disk/cache"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MiB with few inodes; `CACHE` is on it."""
    with small_disk(tmp_path / "disk", "nr_inodes=64") as where:
        yield where


def held_bytes(rig: Rig) -> int:
    """What the disk or memory has for staged bytes."""
    staging = rig.core.staging
    if isinstance(staging, MemoryStaging):
        return sum(os.fstat(fd).st_blocks * 512 for fd in (staging.slab.descriptor, staging._large))
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(staging.directory))


async def small(bench: Bench, **options: object) -> Rig:
    return await bench.rig(**{"budget_bytes": BUDGET, "limits": SMALL_LIMITS, **options})


# -- waiting while data flows


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("operation", ["multipart_put", "put"])
async def test_nobody_gives_up_while_parts_arrive(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """One file takes several times as long as a writer's patience, parked in parts or uploaded in parts."""
    monkeypatch.setattr(budget, "STALL_S", 0.3)
    monkeypatch.setattr(budget, "LOOK_S", 0.05)
    size = 480 * KIB
    rig = await small(bench, budget_bytes=size + 4 * KIB)
    handle = await rig.create("large")
    for at in range(0, size, 16 * KIB):
        rig.core.syncer.parking.wanted.add(0)  # not yet
        await rig.files.write(handle, at, bytes(16 * KIB))
    rig.core.syncer.parking.wanted.clear()
    rig.line.quiet = False
    rig.line.schedule(operation, *[late(0.1)] * 64)
    if operation == "multipart_put":
        rig.close(handle)
    began = time.monotonic()
    other = await rig.create("other")
    with trio.fail_after(30):
        await rig.files.write(other, 0, bytes(64 * KIB))
    assert time.monotonic() - began > 3 * budget.STALL_S
    if operation == "put":
        rig.close(handle)
    rig.close(other)
    await rig.drained()
    assert bench.contents() == {"large": bytes(size), "other": bytes(64 * KIB)}
    rig.check_clean()


async def test_a_large_body_may_take_as_long_as_the_store_lets_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "STALL_S", 0.1)
    monkeypatch.setattr(budget, "LOOK_S", 0.05)
    monkeypatch.setattr(budget, "SLOWEST_BYTES_PER_S", 100 * KIB)
    rig = await bench.rig(budget_bytes=200 * KIB)
    await rig.put("large", bytes(200 * KIB))
    rig.line.quiet = False
    rig.line.schedule("put", late(1.0))
    with trio.fail_after(20):
        await rig.put("other", b"x")
    rig.line.cut = True
    with pytest.raises(OSError, match="nothing could be uploaded"), trio.fail_after(20):
        await rig.put("third", bytes(200 * KIB))


@pytest.mark.usefixtures("_small_parts")
async def test_what_is_sent_again_and_again_is_no_progress(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part arrives in every attempt, and the server always refuses the whole: a writer is told in the end."""
    monkeypatch.setattr(budget, "STALL_S", 0.5)
    monkeypatch.setattr(budget, "LOOK_S", 0.05)
    monkeypatch.setattr(random, "uniform", lambda least, most: 0.0)  # each attempt at once
    size = 100 * KIB
    rig = await small(bench, budget_bytes=size)
    await rig.put("large", bytes(size))
    rig.line.quiet = False
    rig.line.schedule("multipart_complete", *[refused()] * 100_000)
    with pytest.raises(OSError, match="nothing could be uploaded"), trio.fail_after(20):
        await rig.put("other", b"x")
    rig.line.quiet = True
    await rig.unlink("other")
    await rig.drained()
    assert bench.contents() == {"large": bytes(size)}


# -- waiting in order


async def test_every_waiter_is_woken_when_there_is_room(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LOOK_S", 1000.0)
    rig = await bench.rig(budget_bytes=MIB)
    await rig.put("first", bytes(MIB))
    handles = [await rig.create(f"f{n}") for n in range(20)]
    with rig.line.held("put") as gate:
        async with trio.open_nursery() as nursery:
            for handle in handles:
                nursery.start_soon(rig.files.write, handle, 0, bytes(40 * KIB))
            await gate.arrived()
            await until(lambda: rig.core.budget.waiting == 20)
            nursery.cancel_scope.deadline = trio.current_time() + 5
            gate.release()
        assert not nursery.cancel_scope.cancelled_caught
    assert rig.core.budget.waiting == 0


async def test_writes_are_taken_in_the_order_of_coming(bench: Bench) -> None:
    """A large one is not overtaken for ever by small ones."""
    rig = await bench.rig(budget_bytes=MIB)
    await rig.put("first", bytes(MIB))
    taken: list[int] = []

    async def write(number: int, size: int) -> None:
        handle = await rig.create(f"f{number}")
        await rig.files.write(handle, 0, bytes(size))
        taken.append(number)
        rig.close(handle)

    with rig.line.held("put") as gate:
        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(write, number, 700 * KIB if number % 4 == 1 else 10 * KIB)
                await until(lambda number=number: rig.core.budget.waiting == number + 1)
            await gate.arrived()
            gate.open()
            with trio.fail_after(20):
                await until(lambda: len(taken) == 12, 20)
    assert taken == list(range(12))


async def test_a_writer_that_goes_away_leaves_the_turn_to_the_next(bench: Bench) -> None:
    rig = await bench.rig(budget_bytes=MIB)
    await rig.put("first", bytes(MIB))
    with rig.line.held("put") as gate:
        async with trio.open_nursery() as nursery:
            leaving: list[trio.CancelScope] = []
            for number in range(6):
                handle = await rig.create(f"f{number}")
                scope = trio.CancelScope()
                nursery.start_soon(_write_in, scope, rig, handle)
                await until(lambda number=number: rig.core.budget.waiting == number + 1)
                if number % 2 == 0:
                    leaving.append(scope)
            for scope in leaving:
                scope.cancel()
            await until(lambda: rig.core.budget.waiting == 3)
            gate.open()
            with trio.fail_after(20):
                await until(lambda: rig.core.budget.waiting == 0, 20)


async def _write_in(scope: trio.CancelScope, rig: Rig, handle: int) -> None:
    with scope:
        await rig.files.write(handle, 0, b"x")


# -- room that is there


@pytest.mark.parametrize("size", [100, 5000, 60_000, 70_000])
async def test_a_burst_of_files_on_a_small_disk_leaves_room(
    bench: Bench, disk: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(budget, "OTHERS_STALL_S", 0.5)
    rig = await bench.rig(CACHE)
    count = min(600, 28 * MIB // size)
    for number in range(count):
        await rig.put(f"f{number}", bytes([number % 256]) * size)
    await rig.drained()
    await rig.put("large", bytes(16 * MIB))
    await rig.drained()
    assert held_bytes(rig) == rig.core.staging.ledger.held_bytes
    await rig.core.staging.give_back()
    assert held_bytes(rig) == 0
    rig.check_clean()


@pytest.mark.parametrize("is_ephemeral", [False, True])
async def test_what_is_cut_is_free(bench: Bench, is_ephemeral: bool) -> None:
    """A file that is written and cut again and again never takes more than the limit."""
    rig = await bench.rig(ephemeral=is_ephemeral, budget_bytes=MIB, paused=True)
    chance = random.Random(5)
    handle = await rig.create("f")
    expected = bytearray()
    for _ in range(60):
        data = chance.randbytes(chance.randrange(1, 900 * KIB))
        with trio.fail_after(5):
            await rig.files.write(handle, len(expected), data)
        expected += data
        assert held_bytes(rig) == rig.core.staging.ledger.held_bytes <= MIB
        size = chance.randrange(60 * KIB)
        await rig.truncate("f", size)
        expected = expected[:size].ljust(size, b"\0")
        assert await rig.pread(handle) == expected
    rig.close(handle)


async def test_a_disk_without_inodes_refuses_a_large_file_and_takes_small_ones(
    bench: Bench, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "OTHERS_STALL_S", 0.2)
    monkeypatch.setattr(budget, "STALL_S", 0.5)
    rig = await bench.rig(CACHE, paused=True)
    await rig.put("small", b"1")
    number = 0
    with suppress(OSError):
        for number in range(100):
            (disk / f"others{number}").touch()
    handle = await rig.create("large")
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            async def refused() -> None:
                with pytest.raises(OSError, match="no free inodes"):
                    await rig.files.write(handle, 0, bytes(100_000))
                nursery.cancel_scope.cancel()

            nursery.start_soon(refused)
            while True:  # others go on, and their progress does not keep the writer waiting
                await rig.put(f"small{number}", b"2")
                await rig.unlink(f"small{number}")
                await trio.sleep(0.01)
    (disk / "others0").unlink()
    await rig.files.write(handle, 0, bytes(100_000))
    rig.close(handle)


async def test_a_quota_is_as_good_as_a_full_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "OTHERS_STALL_S", 0.2)
    rig = await bench.rig()
    whole = os.pwrite
    refusals = 3

    def limited(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return whole(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    await rig.put("f", b"taken in the end")
    refusals = 1 << 30
    with fails(errno.ENOSPC):
        await rig.put("g", b"never")
    refusals = 0
    assert await rig.cat("f") == b"taken in the end"


# -- files that nobody uploads


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("failed_before", [False, True])
async def test_an_unlinked_file_that_is_read_does_not_stop_writers(
    bench: Bench, was_there: bool, failed_before: bool
) -> None:
    if was_there:
        await bench.upload("f", b"before")
    rig = await small(bench)
    data = random.Random(2).randbytes(BUDGET - 4 * KIB)
    if was_there:
        await rig.write("f", data)
    else:
        await rig.put("f", data)
    if failed_before:  # an upload was begun, and nobody knows what came of it
        rig.line.cut = True
        await rig.drain()
        rig.line.cut = False
    reader = await rig.open("f")
    await rig.unlink("f")
    for number in range(3):
        with trio.fail_after(20):
            await rig.put(f"g{number}", bytes([number]) * (BUDGET - 4 * KIB))
    assert await rig.pread(reader) == data
    assert rig.core.staging.ledger.held_bytes <= BUDGET
    rig.close(reader)
    await rig.drained()
    assert set(bench.contents()) == {"g0", "g1", "g2"}
    rig.check_clean()


# -- the whole


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("is_ephemeral", [False, True])
@pytest.mark.parametrize("seed", range(4))
async def test_any_load_is_counted_and_stays_below_the_limit(
    bench: Bench, disk: Path, seed: int, is_ephemeral: bool
) -> None:
    chance = random.Random(seed)
    limit = 256 * KIB
    rig = await small(bench, cache=CACHE, budget_bytes=limit, ephemeral=is_ephemeral)
    expected: dict[str, bytearray] = {}
    handles: dict[str, int] = {}
    unlinked: list[tuple[int, bytes]] = []
    for step in range(250):
        name = f"f{chance.randrange(6)}"
        kind = chance.choice(["write"] * 4 + ["open", "close", "truncate", "unlink", "read", "sync"])
        with trio.fail_after(20):
            if kind == "open" or name not in expected:
                if name not in handles:
                    handles[name] = await (rig.open(name, os.O_RDWR) if name in expected else rig.create(name))
                    expected.setdefault(name, bytearray())
            elif kind == "write":
                offset, data = chance.randrange(150 * KIB), chance.randbytes(chance.randrange(1, 60 * KIB))
                await rig.write(name, data, offset)
                expected[name].extend(bytes(max(0, offset + len(data) - len(expected[name]))))
                expected[name][offset : offset + len(data)] = data
            elif kind == "truncate":
                size = chance.randrange(100 * KIB)
                await rig.truncate(name, size)
                expected[name][:] = expected[name][:size].ljust(size, b"\0")
            elif kind == "unlink":
                unlinked.append((await rig.open(name), bytes(expected.pop(name))))
                await rig.unlink(name)
                if name in handles:
                    rig.close(handles.pop(name))
                if len(unlinked) > 2:
                    reader, data = unlinked.pop(0)
                    assert await rig.pread(reader) == data
                    rig.close(reader)
            elif kind == "sync":
                await rig.drain()
            elif kind == "read":
                assert await rig.cat(name) == expected[name]
            elif name in handles:
                rig.close(handles.pop(name))
        ledger = rig.core.staging.ledger
        assert held_bytes(rig) == ledger.held_bytes, (step, kind)
        # While a small file outgrows its slot it is in two places.
        assert ledger.held_bytes <= limit + 64 * KIB
    for handle in (*handles.values(), *(reader for reader, _ in unlinked)):
        rig.close(handle)
    await rig.drained()
    assert bench.contents() == {name: bytes(data) for name, data in expected.items()}
    await rig.core.staging.give_back()
    assert held_bytes(rig) == rig.core.staging.ledger.held_bytes == 0
    if not is_ephemeral:
        rig.check_clean()


@pytest.mark.parametrize("size", [1, 5000, 20_000, 60_000])
async def test_blocks_of_an_earlier_file_in_a_slot_are_room(bench: Bench, size: int) -> None:
    """A file that was cut to nothing has a slot with the blocks of the file before: they go when a write needs room."""
    rig = await bench.rig(budget_bytes=60_000)
    await rig.put("f", bytes(size))
    await rig.drained()
    handle = await rig.open("f", os.O_RDWR | os.O_TRUNC)
    with trio.fail_after(5):
        await rig.files.write(handle, 0, b"x")
    rig.close(handle)
    await rig.drained()
    assert bench.data("f") == b"x"
