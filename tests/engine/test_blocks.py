"""The block cache: one fetch for many, a hard limit, and nobody waits for ever."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from s3fuse.errors import BadResponse, PreconditionFailed, Unavailable
from s3fuse.reading.blocks import BLOCK_BYTES, RANGE_BYTES, BlockCache
from s3fuse.store.base import Bytes, ObjectInfo
from s3fuse.store.faulty import SHORT, FaultyStore, refused
from s3fuse.store.memory import MemoryStore
from tests.engine.rig import gather, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from s3fuse.store.base import Store

LIMIT_BLOCKS = 64  # the least that a cache has


def content(size: int) -> bytes:
    """Bytes that tell where they are from."""
    return b"".join(index.to_bytes(8, "big") for index in range(-(-size // 8)))[:size]


class Cache(BlockCache):
    """Checks its limit at every allocation."""

    most_blocks = 0

    def _buffers(self, wanted: int) -> list[bytearray]:
        got = super()._buffers(wanted)
        self.most_blocks = max(self.most_blocks, self._allocated)
        return got

    def check_idle(self) -> None:
        """Every buffer is a ready block or free, none is lost."""
        assert all(block.fetch is None for block in self._blocks.values())
        assert len(self._blocks) + len(self._free) == self._allocated <= LIMIT_BLOCKS


async def make(nursery: trio.Nursery, sizes: dict[str, int]) -> tuple[Cache, FaultyStore, dict[str, ObjectInfo]]:
    """A cache of the least size over a store with objects of these sizes."""
    store = FaultyStore(MemoryStore())
    for key, size in sizes.items():
        await store.put(key, Bytes(content(size)), metadata={}, headers={})
    infos = {key: await store.head(key) for key in sizes}
    store.requests.clear()
    return Cache(cast("Store", store), nursery, 0), store, infos


def reading(cache: BlockCache, info: ObjectInfo, start: int, stop: int) -> Callable[[], Awaitable[bytes]]:
    async def read() -> bytes:
        return bytes(await cache.read(info, start, stop))

    return read


async def test_many_waiters_share_one_fetch(nursery: trio.Nursery) -> None:
    cache, store, infos = await make(nursery, {"f": BLOCK_BYTES})
    with store.held("get") as gate:
        nursery.start_soon(gate.arrived)
        calls = [partial(cache.read, infos["f"], 8 * n, 8 * n + 8) for n in range(50)]
        results: list[object] = []

        async def run() -> None:
            results.extend(bytes(r) for r in await gather(calls))  # type: ignore[arg-type]

        nursery.start_soon(run)
        await gate.arrived()
        await trio.testing.wait_all_tasks_blocked()
        gate.release()
        await until(lambda: len(results) == 50)
    assert results == [n.to_bytes(8, "big") for n in range(50)]
    assert store.requests["get"] == 1
    cache.check_idle()


async def test_neighbours_come_with_one_request(nursery: trio.Nursery) -> None:
    cache, store, infos = await make(nursery, {"f": 10 * BLOCK_BYTES})
    assert bytes(await cache.read(infos["f"], 0, 10 * BLOCK_BYTES)) == content(10 * BLOCK_BYTES)
    assert store.requests["get"] == 1
    assert bytes(await cache.read(infos["f"], 5, 10 * BLOCK_BYTES - 5)) == content(10 * BLOCK_BYTES)[5:-5]
    assert store.requests["get"] == 1
    assert (cache.misses, cache.hits) == (10, 10)


async def test_a_gap_is_fetched_as_two_ranges(nursery: trio.Nursery) -> None:
    cache, store, infos = await make(nursery, {"f": 3 * BLOCK_BYTES})
    await cache.read(infos["f"], BLOCK_BYTES, BLOCK_BYTES + 1)
    assert bytes(await cache.read(infos["f"], 0, 3 * BLOCK_BYTES)) == content(3 * BLOCK_BYTES)
    assert store.requests["get"] == 3


async def test_long_runs_are_cut(nursery: trio.Nursery) -> None:
    size = RANGE_BYTES  # as much as the smallest cache holds
    cache, store, infos = await make(nursery, {"f": size, "g": 4 * BLOCK_BYTES})
    cache.prefetch(infos["f"], 0, size)
    assert bytes(await cache.read(infos["f"], 0, size)) == content(size)
    assert store.requests["get"] == 1


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_slices(data: st.DataObject) -> None:
    """Any range of any file, in any order and at once, with prefetches between."""
    size = data.draw(st.sampled_from([1, 7, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES + 17]))
    near = st.sampled_from([0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 4 * BLOCK_BYTES, size])
    offset = st.one_of(st.integers(0, size), near).map(lambda at: min(at, size))
    ranges = data.draw(
        st.lists(st.tuples(offset, offset).map(sorted).filter(lambda r: r[0] < r[1]), min_size=1, max_size=6)
    )
    ahead = data.draw(st.lists(st.tuples(offset, offset).map(sorted), max_size=2))

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            cache, _, infos = await make(nursery, {"f": size})
            for start, stop in ahead:
                cache.prefetch(infos["f"], start, stop)
            results = await gather([reading(cache, infos["f"], *r) for r in ranges])
            assert results == [content(size)[start:stop] for start, stop in ranges]
            await until(lambda: all(block.fetch is None for block in cache._blocks.values()))
            cache.check_idle()

    trio.run(scenario)


async def test_limit_holds_and_old_blocks_go(nursery: trio.Nursery) -> None:
    size = 3 * LIMIT_BLOCKS * BLOCK_BYTES
    cache, store, infos = await make(nursery, {"f": size})
    expected = content(size)
    for start in range(0, size, BLOCK_BYTES):
        assert bytes(await cache.read(infos["f"], start, start + 8)) == expected[start : start + 8]
    assert store.requests["get"] == 3 * LIMIT_BLOCKS
    assert cache.most_blocks == LIMIT_BLOCKS
    assert cache.used_bytes == cache.limit_bytes
    await cache.read(infos["f"], size - LIMIT_BLOCKS * BLOCK_BYTES, size)
    assert store.requests["get"] == 3 * LIMIT_BLOCKS  # the youngest are there
    await cache.read(infos["f"], 0, 1)
    assert store.requests["get"] == 3 * LIMIT_BLOCKS + 1  # the oldest is not
    cache.check_idle()


async def test_a_read_keeps_a_block_young(nursery: trio.Nursery) -> None:
    cache, store, infos = await make(nursery, {"f": (LIMIT_BLOCKS + 1) * BLOCK_BYTES})
    for index in range(LIMIT_BLOCKS):
        await cache.read(infos["f"], index * BLOCK_BYTES, index * BLOCK_BYTES + 1)
    await cache.read(infos["f"], 0, 1)
    await cache.read(infos["f"], LIMIT_BLOCKS * BLOCK_BYTES, LIMIT_BLOCKS * BLOCK_BYTES + 1)
    store.requests.clear()
    await cache.read(infos["f"], 0, 1)
    assert not store.requests
    await cache.read(infos["f"], BLOCK_BYTES, BLOCK_BYTES + 1)
    assert store.requests["get"] == 1


@pytest.mark.parametrize("fault", [refused(), SHORT, refused(PreconditionFailed("changed"))])
async def test_error_reaches_all_waiters_and_is_asked_again(nursery: trio.Nursery, fault: object) -> None:
    cache, store, infos = await make(nursery, {"f": 2 * BLOCK_BYTES})
    store.schedule("get", fault)  # type: ignore[arg-type]
    results = await gather([partial(cache.read, infos["f"], n, BLOCK_BYTES + n + 1) for n in range(5)])
    assert all(isinstance(r, (Unavailable, BadResponse, PreconditionFailed)) for r in results)
    assert len(results) == 5
    assert store.requests["get"] == (1 if store.failures["get"] and fault is SHORT else 0)
    cache.check_idle()
    assert bytes(await cache.read(infos["f"], 0, 2 * BLOCK_BYTES)) == content(2 * BLOCK_BYTES)


async def test_prefetch_takes_only_what_is_free(nursery: trio.Nursery) -> None:
    size = 2 * LIMIT_BLOCKS * BLOCK_BYTES
    cache, store, infos = await make(nursery, {"f": size})
    with store.held("get") as gate:
        cache.prefetch(infos["f"], 0, size)  # does not wait: it is no coroutine
        await gate.arrived()
        await trio.testing.wait_all_tasks_blocked()
        assert cache.used_bytes == cache.limit_bytes
        cache.prefetch(infos["f"], 0, size)
        assert cache.most_blocks == LIMIT_BLOCKS
    assert bytes(await cache.read(infos["f"], size - 9, size)) == content(size)[-9:]
    await until(lambda: all(block.fetch is None for block in cache._blocks.values()))
    cache.check_idle()


async def test_prefetch_failure_is_nobodys_error(nursery: trio.Nursery) -> None:
    cache, store, infos = await make(nursery, {"f": BLOCK_BYTES})
    store.schedule("get", refused())
    cache.prefetch(infos["f"], 0, BLOCK_BYTES)
    await until(lambda: store.failures["get"] == 1 and not cache._blocks)
    assert bytes(await cache.read(infos["f"], 0, 8)) == content(8)


async def test_two_readers_wait_for_buffers_and_both_go_on(nursery: trio.Nursery) -> None:
    cache, store, infos = await make(nursery, {"f": LIMIT_BLOCKS * BLOCK_BYTES, "g": 4 * BLOCK_BYTES})
    done: list[bytes] = []

    async def read(start: int) -> None:
        done.append(bytes(await cache.read(infos["g"], start, start + 8)))

    with store.held("get") as gate:
        cache.prefetch(infos["f"], 0, infos["f"].size_bytes)  # every buffer is under way
        await gate.arrived()
        nursery.start_soon(read, 0)
        nursery.start_soon(read, BLOCK_BYTES)
        await trio.testing.wait_all_tasks_blocked()
        cache.prefetch(infos["g"], 2 * BLOCK_BYTES, 3 * BLOCK_BYTES)
    await until(lambda: len(done) == 2, timeout_s=3)


async def test_many_readers_of_pairs_in_a_full_cache(nursery: trio.Nursery) -> None:
    """Buffers come free one by one, and everybody wants two: nobody may keep one and wait for the other."""
    readers = 200
    cache, store, infos = await make(nursery, {"f": LIMIT_BLOCKS * BLOCK_BYTES, "g": 2 * readers * BLOCK_BYTES})
    expected = content(infos["g"].size_bytes)
    done: list[int] = []

    async def read(start: int) -> None:
        assert (
            bytes(await cache.read(infos["g"], start, start + BLOCK_BYTES + 9))
            == (expected[start : start + BLOCK_BYTES + 9])
        )
        done.append(start)

    with store.held("get") as gate:
        for index in range(LIMIT_BLOCKS):
            cache.prefetch(infos["f"], index * BLOCK_BYTES, (index + 1) * BLOCK_BYTES)
        await gate.arrived(LIMIT_BLOCKS)
        for index in range(readers):
            nursery.start_soon(read, 2 * index * BLOCK_BYTES)
        for _ in range(LIMIT_BLOCKS):
            gate.release()
            await trio.testing.wait_all_tasks_blocked()
    await until(lambda: len(done) == readers, timeout_s=10)
    cache.check_idle()


async def test_reader_cancelled_while_it_waits_for_a_fetch(nursery: trio.Nursery) -> None:
    cache, store, infos = await make(nursery, {"f": BLOCK_BYTES})
    with store.held("get") as gate:
        with trio.move_on_after(0.01) as scope:
            await cache.read(infos["f"], 0, 8)
        assert scope.cancelled_caught
        await gate.arrived()
    assert bytes(await cache.read(infos["f"], 0, 8)) == content(8)
    assert store.requests["get"] == 1  # the fetch went on without its reader
    cache.check_idle()


async def test_reader_cancelled_while_it_waits_for_buffers(nursery: trio.Nursery) -> None:
    cache, store, infos = await make(nursery, {"f": (LIMIT_BLOCKS - 1) * BLOCK_BYTES, "g": 2 * BLOCK_BYTES})
    with store.held("get") as gate:
        cache.prefetch(infos["f"], 0, infos["f"].size_bytes)
        await gate.arrived()
        with trio.move_on_after(0.01) as scope:
            await cache.read(infos["g"], 0, 2 * BLOCK_BYTES)
        assert scope.cancelled_caught
    assert bytes(await cache.read(infos["g"], 0, 2 * BLOCK_BYTES)) == content(2 * BLOCK_BYTES)
    await until(lambda: all(block.fetch is None for block in cache._blocks.values()))
    cache.check_idle()


async def test_closing_mount_fails_readers() -> None:
    errors: list[BaseException] = []
    async with trio.open_nursery() as outer:
        async with trio.open_nursery() as nursery:
            cache, store, infos = await make(nursery, {"f": BLOCK_BYTES})

            async def read() -> None:
                try:
                    await cache.read(infos["f"], 0, 8)
                except Exception as error:
                    errors.append(error)

            with store.held("get") as gate:
                outer.start_soon(read)
                await gate.arrived()
                nursery.cancel_scope.cancel()
                await trio.lowlevel.checkpoint_if_cancelled()
        await until(lambda: bool(errors))
    assert "closing" in str(errors[0])
