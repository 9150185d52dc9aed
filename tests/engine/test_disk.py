"""The disk tier: what it gives is right, whatever was done to its files; it keeps its limit; it survives a restart."""

from __future__ import annotations

import os
import random
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, cast

import pytest
import trio

from s3fuse.reading import calm, disk
from s3fuse.reading.blocks import BlockCache
from s3fuse.reading.disk import DiskTier
from s3fuse.reading.records import BLOCK_BYTES, HEADER_BYTES
from s3fuse.store.base import Bytes, ObjectInfo
from s3fuse.store.memory import MemoryStore
from tests.engine.rig import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from s3fuse.store.base import Store

MIB = 1 << 20
SIZE = 5 * BLOCK_BYTES + 17


@pytest.fixture(autouse=True)
def _calm(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once() -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(disk, "until_calm", at_once)


class Bench:
    """A store and a cache directory; `cache` gives a new block cache on it, as a new mount would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = MemoryStore()
        self.random = random.Random(1)

    async def put(self, key: str, size: int = SIZE) -> tuple[ObjectInfo, bytes]:
        data = self.random.randbytes(size)
        await self.store.put(key, Bytes(data), metadata={}, headers={})
        info = await self.store.head(key)
        self.store.requests.clear()
        return info, data

    @asynccontextmanager
    async def cache(
        self, limit: int = 64 * MIB, others: Callable[[], int] = lambda: 0, **options: int
    ) -> AsyncIterator[tuple[BlockCache, DiskTier]]:
        tier = DiskTier(self.directory, limit, others_bytes=others, **options)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.run)
            await until(tier._idle.is_set)
            yield BlockCache(cast("Store", self.store), nursery, 0, tier), tier
            await tier.settle()
            nursery.cancel_scope.cancel()

    def files(self) -> list[Path]:
        return sorted(self.directory.iterdir())

    def disk_bytes(self) -> int:
        sizes = 0
        for path in self.files():
            with suppress(FileNotFoundError):  # a thread has just removed it
                sizes += path.stat().st_size
        return sizes


@pytest.fixture
def place(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "blocks")


async def test_read_again_after_a_restart_without_a_request(place: Bench) -> None:
    info, data = await place.put("f")
    async with place.cache() as (cache, tier):
        assert bytes(await cache.read(info, 0, SIZE)) == data
        await tier.settle()
        assert tier.used_bytes == SIZE + HEADER_BYTES == place.disk_bytes()
        assert all(block.stored for block in cache._blocks.values())
    assert place.store.requests == {"get": 1}
    async with place.cache() as (cache, tier):
        assert tier.used_bytes == SIZE + HEADER_BYTES
        assert bytes(await cache.read(info, 3 * BLOCK_BYTES + 1, SIZE)) == data[3 * BLOCK_BYTES + 1 :]
        assert bytes(await cache.read(info, 0, SIZE)) == data
        assert tier.hits == 6
    assert place.store.requests == {"get": 1}


async def test_another_version_is_not_served(place: Bench) -> None:
    info, _ = await place.put("f")
    async with place.cache() as (cache, _tier):
        await cache.read(info, 0, SIZE)
    info, data = await place.put("f")
    async with place.cache() as (cache, _tier):
        assert bytes(await cache.read(info, 0, SIZE)) == data
    assert place.store.requests == {"get": 1}


async def test_part_on_disk_part_in_the_store(place: Bench) -> None:
    info, data = await place.put("f")
    async with place.cache() as (cache, _tier):
        await cache.read(info, BLOCK_BYTES, 2 * BLOCK_BYTES)
        await cache.read(info, 3 * BLOCK_BYTES, 4 * BLOCK_BYTES)
    place.store.requests.clear()
    async with place.cache() as (cache, tier):
        assert bytes(await cache.read(info, 0, SIZE)) == data
        assert tier.hits == 2
    assert place.store.requests == {"get": 3}


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_all(path: Path) -> None:
    """A byte in each block, and none in the headers."""
    text = bytearray(path.read_bytes())
    for at in range(HEADER_BYTES + 100, len(text), BLOCK_BYTES // 2):
        text[at] ^= 0x40
    path.write_bytes(text)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def swap(path: Path) -> None:
    """What a file of another version would look like here."""
    path.write_bytes(path.read_bytes().replace(b"f", b"g", 1))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("damage", [remove, cut, flip_all, zero, swap])
async def test_damage_is_found_and_the_blocks_are_fetched_again(
    place: Bench, damage: Callable[[Path], None], restart: bool, expected_log: list[str]
) -> None:
    expected_log.append("are damaged")
    info, data = await place.put("f")
    for _ in range(2):
        async with place.cache() as (cache, tier):
            if not restart:
                assert bytes(await cache.read(info, 0, SIZE)) == data
                await tier.settle()
                cache._blocks.clear()
                for path in place.files():
                    damage(path)
            assert bytes(await cache.read(info, 0, SIZE)) == data
            assert restart or tier.damaged or damage is swap
        for path in place.files():
            damage(path)
    async with place.cache() as (cache, _tier):
        assert bytes(await cache.read(info, 0, SIZE)) == data


async def test_random_damage(place: Bench, expected_log: list[str]) -> None:
    """Whatever bits are flipped where: right bytes."""
    expected_log.append("are damaged")
    files = [await place.put(f"f{n}", place.random.randrange(1, SIZE)) for n in range(8)]
    for _ in range(15):
        async with place.cache() as (cache, tier):
            for info, data in files:
                assert bytes(await cache.read(info, 0, info.size_bytes)) == data
            await tier.settle()
        for path in place.files():
            text = bytearray(path.read_bytes())
            for _ in range(place.random.randrange(4)):
                text[place.random.randrange(len(text))] ^= 1 << place.random.randrange(8)
            path.write_bytes(text)


async def test_limit_holds_and_the_oldest_go(place: Bench) -> None:
    limit = 8 * MIB
    files = [await place.put(f"f{n}", MIB) for n in range(20)]
    async with place.cache(limit) as (cache, tier):
        for info, data in files:
            assert bytes(await cache.read(info, 0, MIB)) == data
            await tier.settle()
            assert tier.used_bytes <= limit
            assert place.disk_bytes() <= limit
        assert tier.find(files[0][0], 0) is None
        assert tier.find(files[-1][0], 0) is not None
        assert tier.used_bytes > limit // 2
    async with place.cache(limit // 2) as (_cache, tier):  # the next mount may have less
        await until(lambda: tier.used_bytes <= limit // 2)
        await tier.settle()
        await until(lambda: place.disk_bytes() <= limit // 2)


async def test_what_is_staged_takes_room_from_it(place: Bench) -> None:
    staged = 0
    files = [await place.put(f"f{n}", MIB) for n in range(6)]
    async with place.cache(8 * MIB, lambda: staged) as (cache, tier):
        for info, _ in files:
            await cache.read(info, 0, MIB)
        await tier.settle()
        assert tier.used_bytes > 5 * MIB
        staged = 6 * MIB
        tier.make_room()
        await until(lambda: place.disk_bytes() <= 2 * MIB)
        assert tier.used_bytes <= 2 * MIB
        staged = 9 * MIB
        tier.make_room()
        await until(lambda: place.disk_bytes() == 0)


async def test_a_full_disk_costs_only_the_cache(place: Bench) -> None:
    info, data = await place.put("f")
    async with place.cache(reserve_bytes=1 << 60) as (cache, tier):
        assert bytes(await cache.read(info, 0, SIZE)) == data
        await tier.settle()
        assert tier.dropped == 6
        assert tier.used_bytes == 0
        assert place.files() == []
        assert all(block.stored for block in cache._blocks.values())


async def test_no_folder_costs_only_the_cache(place: Bench, expected_log: list[str]) -> None:
    expected_log.append("are not cached")
    info, data = await place.put("f")
    async with place.cache() as (cache, tier):
        place.directory.rmdir()
        assert bytes(await cache.read(info, 0, SIZE)) == data
        await tier.settle()
        assert tier.used_bytes == 0
        place.directory.mkdir()
        again, data = await place.put("g")
        assert bytes(await cache.read(again, 0, SIZE)) == data
        await tier.settle()
        assert tier.used_bytes == place.disk_bytes() > 0


async def test_more_than_the_queue_holds_is_dropped_and_nobody_waits(place: Bench) -> None:
    info, data = await place.put("f")
    async with place.cache(queue_bytes=BLOCK_BYTES) as (cache, tier):
        assert bytes(await cache.read(info, 0, SIZE)) == data
        assert tier.dropped == 6
        assert bytes(await cache.read(info, 0, SIZE)) == data
        assert tier.used_bytes == 0


async def test_buffers_are_not_used_again_before_they_are_written(
    place: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is far smaller than what is read while the disk is slow: what it writes is right all the same."""
    gate = trio.Event()
    monkeypatch.setattr(disk, "until_calm", gate.wait)
    info, data = await place.put("f", 32 * BLOCK_BYTES)
    other, _ = await place.put("g", 200 * BLOCK_BYTES)
    async with place.cache(queue_bytes=32 * BLOCK_BYTES) as (cache, tier):
        await cache.read(info, 0, info.size_bytes)
        for index in range(200):
            await cache.read(other, index * BLOCK_BYTES, (index + 1) * BLOCK_BYTES)
        assert cache.used_bytes <= cache.limit_bytes
        gate.set()
        await tier.settle()
    place.store.requests.clear()
    async with place.cache() as (cache, _tier):
        assert bytes(await cache.read(info, 0, info.size_bytes)) == data
    assert not place.store.requests


async def test_writing_does_not_wait_for_ever_for_calm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calm, "SPARE_CPUS", 1e9)
    monkeypatch.setattr(calm, "PATIENCE_S", 0.05)
    with trio.fail_after(60):
        await calm.until_calm()
