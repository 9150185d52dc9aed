"""The fault wrapper itself: tests that use it must be able to rely on it."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from s3fuse.errors import AccessDenied, BadResponse, NotFound, StoreError, Unavailable
from s3fuse.store.base import Bytes
from s3fuse.store.faulty import LOST, SHORT, FaultyStore, late, refused, stalled
from s3fuse.store.memory import MemoryStore


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore())


async def put(store: FaultyStore, key: str = "k", data: bytes = b"hello") -> str:
    return await store.put(key, Bytes(data), metadata={}, headers={})


async def test_without_faults_it_is_the_inner_store(store: FaultyStore) -> None:
    etag = await put(store)
    assert (await store.head("k")).etag == etag
    assert store.requests == {"put": 1, "head": 1}
    assert not store.failures


async def test_schedule_is_by_operation_and_in_order(store: FaultyStore) -> None:
    denied = AccessDenied("no")
    store.schedule("put", None, refused(), refused(denied))
    await put(store)
    with pytest.raises(Unavailable):
        await put(store)
    with pytest.raises(AccessDenied) as caught:
        await put(store)
    assert caught.value is denied
    await put(store)
    assert store.requests == {"put": 2}
    assert store.failures == {"put": 2}


async def test_lost_answer_means_that_it_happened(store: FaultyStore) -> None:
    store.schedule("put", LOST)
    with pytest.raises(Unavailable):
        await put(store)
    assert (await store.head("k")).size_bytes == 5


async def test_short_body_fills_half(store: FaultyStore) -> None:
    etag = await put(store, data=b"0123456789")
    store.schedule("get", SHORT)
    memory = bytearray(10)
    view = memoryview(memory)
    with pytest.raises(BadResponse):
        await store.get_into("k", 0, [view[:3], view[3:7], view[7:]], etag=etag)
    assert memory[:5] == b"01234"
    assert b"5" not in memory
    await store.get_into("k", 0, [view], etag=etag)
    assert memory == b"0123456789"


async def test_late_and_stalled(store: FaultyStore, autojump_clock: trio.testing.MockClock) -> None:
    store.schedule("put", late(5))
    started = trio.current_time()
    await put(store)
    assert trio.current_time() - started == pytest.approx(5)
    store.schedule("head", stalled(30))
    with pytest.raises(Unavailable):
        await store.head("k")
    assert trio.current_time() - started == pytest.approx(35)
    store.schedule("head", stalled())
    with trio.move_on_after(1) as scope:
        await store.head("k")
    assert scope.cancelled_caught


async def test_gate(store: FaultyStore) -> None:
    done: list[str] = []

    async def work(key: str) -> None:
        await put(store, key)
        done.append(key)

    async with trio.open_nursery() as nursery:
        with store.held("put") as gate:
            for key in ("a", "b", "c"):
                nursery.start_soon(work, key)
                await trio.testing.wait_all_tasks_blocked()
            await gate.arrived(3)
            assert not done
            assert not store.requests
            with pytest.raises(NotFound):
                await store.head("a")
            gate.release()
            await trio.testing.wait_all_tasks_blocked()
            assert done == ["a"]
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(done) == ["a", "b", "c"]


async def test_gate_forgets_cancelled_calls(store: FaultyStore) -> None:
    with store.held("put") as gate:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(put, store, "a")
            await gate.arrived()
            nursery.cancel_scope.cancel()
        gate.release()
        await put(store, "b")
    assert [entry.key for entry in (await store.list_page("")).objects] == ["b"]


async def outcomes(seed: int) -> list[str]:
    store = FaultyStore(MemoryStore(), seed=seed, rate=0.3)
    results = []
    for number in range(200):
        try:
            await put(store, f"k{number}")
            await store.head(f"k{number}")
            results.append("done")
        except StoreError as exc:
            results.append(type(exc).__name__)
    store.quiet = True
    await put(store)
    return results


async def test_seed_repeats(autojump_clock: trio.testing.MockClock) -> None:
    first = await outcomes(1)
    assert first == await outcomes(1)
    assert first != await outcomes(2)
    assert {"done", "Unavailable", "BadResponse"} <= set(first)
