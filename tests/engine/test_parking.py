"""Files larger than the dirty budget stream through, nothing of them shows before it is whole, nothing is lost."""

from __future__ import annotations

import errno
import os
import random
from typing import TYPE_CHECKING

import pytest
import trio

from s3fuse import caches, keys
from s3fuse.store.faulty import refused
from s3fuse.vfs import budget
from tests.engine.rig import SMALL_LIMITS, Bench, Rig, fails, until

if TYPE_CHECKING:
    from pathlib import Path

KIB = 1 << 10
BUDGET = 64 * KIB

pytestmark = pytest.mark.usefixtures("_small_parts")


async def small(bench: Bench, **options: object) -> Rig:
    return await bench.rig(budget_bytes=BUDGET, limits=SMALL_LIMITS, **options)


def temporary(bench: Bench) -> list[str]:
    return [key for key in bench.listed() if key.startswith(f"{keys.RESERVED}/")]


def shown(bench: Bench) -> dict[str, bytes]:
    return {key: data for key, data in bench.contents().items() if not key.startswith(f"{keys.RESERVED}/")}


class Writer:
    """An open file and what it must hold."""

    def __init__(self, rig: Rig, handle: int, data: bytes = b"") -> None:
        self.rig = rig
        self.handle = handle
        self.data = bytearray(data)

    async def write(self, offset: int, data: bytes) -> None:
        with trio.fail_after(60):
            await self.rig.files.write(self.handle, offset, data)
        self.data.extend(bytes(max(0, offset + len(data) - len(self.data))))
        self.data[offset : offset + len(data)] = data
        assert self.rig.core.staging.staged_bytes <= BUDGET

    async def stream(self, size: int, step: int = 16 * KIB, seed: int = 1) -> None:
        chance = random.Random(seed)
        for at in range(0, size, step):
            await self.write(at, chance.randbytes(min(step, size - at)))

    async def check(self) -> None:
        assert await self.rig.pread(self.handle) == self.data


async def create(rig: Rig, path: str = "f") -> Writer:
    return Writer(rig, await rig.create(path))


async def test_a_file_of_many_budgets(bench: Bench) -> None:
    rig = await small(bench)
    writer = await create(rig)
    await writer.stream(20 * BUDGET)
    assert shown(bench) == {}
    assert temporary(bench)
    await writer.check()
    assert rig.core.budget.waiting == 0
    rig.close(writer.handle)
    sent = bench.store.requests["put"]
    bench.counted()
    await rig.drained()
    counts = bench.counted()
    assert bench.contents() == {"f": bytes(writer.data)}
    assert counts["multipart_copy"] >= sent - 2  # every byte was sent once, and is copied once
    assert counts.get("get", 0) == 0
    assert await rig.cat("f") == writer.data
    rig.check_clean()


async def test_a_name_is_taken_by_a_whole_file_at_once(bench: Bench) -> None:
    """What the bucket had before stays until the close."""
    before = bytes(5 * BUDGET)
    await bench.upload("f", before)
    rig = await small(bench)
    writer = Writer(rig, await rig.open("f", os.O_RDWR), before)
    await writer.stream(4 * BUDGET)
    assert shown(bench) == {"f": before}
    await writer.check()
    rig.close(writer.handle)
    await rig.drained()
    assert bench.contents() == {"f": bytes(writer.data)}
    rig.check_clean()


async def test_overwrites_truncates_and_syncs_between(bench: Bench) -> None:
    chance = random.Random(3)
    rig = await small(bench)
    writer = await create(rig)
    for step in range(120):
        if step % 40 == 17:
            size = chance.randrange(len(writer.data) + 20 * KIB)
            await rig.truncate("f", size)
            del writer.data[size:]
            writer.data.extend(bytes(size - len(writer.data)))
        elif step % 40 == 29:
            await rig.fsync("f")
            assert shown(bench) == {"f": bytes(writer.data)}
        elif step == 77:
            await rig.rename("f", "g")
        elif step == 78:
            await rig.rename("g", "f")
        else:
            await writer.write(chance.randrange(4 * BUDGET), chance.randbytes(chance.randrange(1, 20 * KIB)))
        if step % 10 == 0:
            await writer.check()
    rig.close(writer.handle)
    await rig.drained()
    assert bench.contents() == {"f": bytes(writer.data)}
    rig.check_clean()


async def test_many_small_open_files(bench: Bench) -> None:
    """None of them can be uploaded before it is closed, and together they are more than the budget."""
    rig = await small(bench)
    writers = [await create(rig, f"f{n}") for n in range(40)]
    for n, writer in enumerate(writers):
        await writer.write(0, bytes([n]) * 10 * KIB)
    for writer in writers:
        await writer.check()
        rig.close(writer.handle)
    await rig.drained()
    assert bench.contents() == {f"f{n}": bytes([n]) * 10 * KIB for n in range(40)}
    rig.check_clean()


async def test_an_unlinked_file_leaves_nothing(bench: Bench) -> None:
    rig = await small(bench)
    writer = await create(rig)
    await writer.stream(2 * BUDGET)
    await rig.unlink("f")
    await writer.stream(6 * BUDGET, seed=2)
    await writer.check()
    rig.close(writer.handle)
    await rig.drained()
    assert bench.contents() == {}
    rig.check_clean()


async def test_unlinked_and_closed_while_it_is_parked(bench: Bench) -> None:
    rig = await small(bench)
    writer = await create(rig)
    with rig.line.held("put") as gate:
        await writer.write(0, bytes(BUDGET // 2 + KIB))
        await gate.arrived()
        await rig.unlink("f")
        rig.close(writer.handle)
        gate.release()
    await until(lambda: not rig.core.changes.in_flight)
    await rig.drained()
    assert bench.contents() == {}
    rig.check_clean()


async def test_closed_while_it_is_parked(bench: Bench) -> None:
    rig = await small(bench)
    writer = await create(rig)
    with rig.line.held("put") as gate:
        await writer.write(0, b"x" * (BUDGET // 2 + KIB))
        await gate.arrived()
        await writer.write(KIB, b"y" * KIB)
        rig.close(writer.handle)
        gate.release()
    await rig.drained()
    assert bench.contents() == {"f": bytes(writer.data)}
    rig.check_clean()


async def test_parking_that_fails_is_tried_again_and_half_a_file_never_shows(bench: Bench) -> None:
    rig = await small(bench)
    writer = await create(rig)
    rig.line.quiet = False
    rig.line.schedule("put", *[refused()] * 3)
    await writer.write(0, b"x" * (BUDGET // 2 + KIB))
    await until(lambda: rig.line.failures["put"] > 0)
    await writer.write(BUDGET // 2 + KIB, b"y" * KIB)
    rig.close(writer.handle)
    sizes: set[int] = set()
    for _ in range(12):
        await rig.drain()
        sizes.update(len(data) for data in shown(bench).values())
    await rig.drained()
    assert sizes == {len(writer.data)}
    assert bench.contents() == {"f": bytes(writer.data)}
    rig.check_clean()


async def test_many_writers_wait_and_all_go_on(bench: Bench) -> None:
    rig = await small(bench)
    writers = [await create(rig, f"f{n}") for n in range(8)]
    async with trio.open_nursery() as nursery:
        for n, writer in enumerate(writers):
            nursery.start_soon(writer.stream, 3 * BUDGET, 8 * KIB, n)
    for writer in writers:
        await writer.check()
        rig.close(writer.handle)
    await rig.drained()
    assert bench.contents() == {f"f{n}": bytes(writer.data) for n, writer in enumerate(writers)}
    rig.check_clean()


async def test_a_write_gives_up_when_nothing_leaves(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "STALL_S", 0.3)
    monkeypatch.setattr(budget, "LOOK_S", 0.05)
    rig = await small(bench)
    writer = await create(rig)
    rig.line.cut = True
    with pytest.raises(OSError, match="uploaded"):
        await writer.stream(2 * BUDGET)
    assert rig.core.budget.waiting == 0
    assert await rig.pread(writer.handle, size=len(writer.data)) == writer.data  # what was taken is there
    with fails(errno.EIO):
        await writer.check()  # the kernel believes that the rest is, too
    rig.line.cut = False
    rig.close(writer.handle)
    assert await rig.drain()
    assert shown(bench) == {}
    await rig.truncate("f", len(writer.data))
    await rig.drained()
    assert bench.contents() == {"f": bytes(writer.data)}


async def test_clean_files_are_uploaded_for_a_writer(bench: Bench) -> None:
    rig = await small(bench)
    for n in range(30):
        with trio.fail_after(30):
            await rig.put(f"f{n}", bytes([n]) * 9 * KIB)
        assert rig.core.staging.staged_bytes <= BUDGET
    await rig.drained()
    assert len(bench.contents()) == 30
    rig.check_clean()


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("calls", range(0, 44, 3))
async def test_crash_anywhere(bench: Bench, calls: int, base: bool) -> None:
    """The line is cut after so many requests, the daemon dies: what was acknowledged is there, and nothing else."""
    before = random.Random(9).randbytes(3 * BUDGET) if base else b""
    if base:
        await bench.upload("f", before)
    rig = await small(bench)
    writer = Writer(rig, await (rig.open("f", os.O_RDWR) if base else rig.create("f")), before)
    chance = random.Random(calls)
    rig.line.calls_left = calls
    async with trio.open_nursery() as nursery:

        async def work() -> None:
            for step in range(60):
                await writer.write(chance.randrange(3 * BUDGET), chance.randbytes(chance.randrange(1, 16 * KIB)))
                if step == 40:
                    await rig.truncate("f", BUDGET)
                    del writer.data[BUDGET:]
            rig.close(writer.handle)
            await rig.drain()
            nursery.cancel_scope.cancel()

        async def watch() -> None:
            await until(lambda: rig.line.cut, timeout_s=60)
            nursery.cancel_scope.cancel()

        nursery.start_soon(work)
        nursery.start_soon(watch)
    for seen in shown(bench).values():
        assert seen in (before, writer.data)
    await rig.restart()
    assert await rig.cat("f") == writer.data
    await rig.drained()
    assert bench.contents() == {"f": bytes(writer.data)}
    rig.forget()
    assert await rig.cat("f") == writer.data
    rig.check_clean()


async def test_crash_again_and_again(bench: Bench) -> None:
    rig = await small(bench)
    writer = await create(rig)
    for turn in range(6):
        await writer.stream(3 * BUDGET, seed=turn)
        await rig.restart()
        assert await rig.cat("f") == writer.data
        writer = Writer(rig, await rig.open("f", os.O_RDWR), bytes(writer.data))
    rig.close(writer.handle)
    await rig.drained()
    assert bench.contents() == {"f": bytes(writer.data)}
    rig.check_clean()


async def test_copied_out_with_a_list_of_what_is_parked(bench: Bench, tmp_path: Path) -> None:
    rig = await small(bench)
    writer = await create(rig)
    await writer.stream(5 * BUDGET)
    await rig.crash()
    (copied,) = [one for one in caches.copy_out(rig.cache, tmp_path / "out") if one.name == "f"]
    assert not copied.whole
    found = bytearray(len(writer.data))
    for path in (tmp_path / "out/f.parts").iterdir():
        if path.name != caches.PARKED_LIST:
            found[int(path.name) : int(path.name) + path.stat().st_size] = path.read_bytes()
    for line in (tmp_path / "out/f.parts" / caches.PARKED_LIST).read_text().splitlines():
        start, stop, key, offset = line.split()
        found[int(start) : int(stop)] = bench.data(key)[int(offset) :][: int(stop) - int(start)]
    assert found == writer.data


async def test_no_descriptors_are_held_for_files_that_wait(bench: Bench) -> None:
    rig = await bench.rig()
    for n in range(40):
        await rig.put(f"f{n}", bytes([n]) * 70_000)
    rig.line.cut = True
    assert len(await rig.drain()) == 40
    assert rig.core.staging.open_files == set()
    await rig.restart()
    assert rig.core.staging.open_files == set()
    await rig.drained()
    assert bench.contents() == {f"f{n}": bytes([n]) * 70_000 for n in range(40)}
    rig.check_clean()


async def test_an_open_file_with_little_staged_is_parked_for_a_large_write(bench: Bench) -> None:
    """Less than half of the limit is taken, and yet there is no room: on a nearly full disk the limit is small."""
    rig = await bench.rig(budget_bytes=60_000, limits=SMALL_LIMITS)
    handle = await rig.create("a")
    await rig.files.write(handle, 0, b"small")
    with trio.fail_after(20):
        await rig.files.write(handle, 10, bytes(59_999))
    rig.close(handle)
    await rig.drained()
    assert bench.contents() == {"a": b"small" + bytes(5 + 59_999)}
    rig.check_clean()
