"""Leases on a store in memory, whose clock is the server's and has nothing to do with that of a node."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from s3fuse.coherence import leases, renewal
from s3fuse.coherence.renewal import Renewal, identity, read_identity
from s3fuse.errors import AccessDenied, Unavailable, UserError
from s3fuse.store.base import Bytes
from s3fuse.store.memory import MINIO, SEAWEEDFS, MemoryStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s3fuse.store.base import Page

_NS = 1_000_000_000
_PART = st.text("ab.-_é ", min_size=1, max_size=4)


class Server(MemoryStore):
    """A bucket whose clock the test sets, and which can be away or refuse keys."""

    def __init__(self, capabilities: object = MINIO) -> None:
        self.now_s = 5_000_000.0
        super().__init__(capabilities, now_ns=lambda: int(self.now_s * _NS))  # type: ignore[arg-type]
        self.refuses_puts: Exception | None = None
        self.hidden: str | None = None

    async def put(self, key: str, body: Bytes, **more: object) -> str:  # type: ignore[override]
        if self.refuses_puts is not None:
            raise self.refuses_puts
        return await super().put(key, body, **more)  # type: ignore[arg-type]

    async def list_page(self, prefix: str, **more: object) -> Page:  # type: ignore[override]
        if self.hidden is not None and not prefix.startswith(self.hidden):
            raise AccessDenied("not yours", prefix)
        return await super().list_page(prefix, **more)  # type: ignore[arg-type]

    async def keys(self) -> set[str]:
        return {info.key for info in (await MemoryStore.list_page(self, "", delimiter="")).objects}


def lease(store: Server, prefix: str, name: str = "a" * 32, *, read_only: bool = False) -> Renewal:
    made = Renewal(store, prefix, None, Path("/mnt/x"), read_only=read_only)
    if not read_only:
        made.key = leases.lease_key(prefix, name)
    return made


async def uses(store: Server, prefix: str, own: Sequence[str] = ()) -> list[str]:
    now_ns = int(store.now_s * _NS)
    return [found.prefix for found in await leases.living_above(store, prefix, now_ns, own)]


@given(parts=st.lists(_PART, max_size=4), count=st.integers(0, 4))
def test_a_lease_tells_its_place(parts: list[str], count: int) -> None:
    prefix = "".join(f"{part}/" for part in parts)
    key = leases.lease_key(prefix, "x")
    assert leases.is_lease(key)
    assert not leases.is_purge(key)
    assert leases.Lease(key, "h", "/m", 0).prefix == prefix
    assert leases.above(prefix)[0] == prefix
    assert leases.above(prefix)[-1] == ""
    assert all(prefix.startswith(place) and place[-1:] in ("", "/") for place in leases.above(prefix))
    assert len(leases.above(prefix)) == len(parts) + 1


@pytest.mark.parametrize("key", ["lease-x", "x/lease-y", ".s3fuse/x/lease-y", "a.s3fuse/lease-y", ".s3fuse/release-"])
def test_what_is_no_lease(key: str) -> None:
    assert not leases.is_lease(key)


@pytest.mark.parametrize("can", [MINIO, SEAWEEDFS])
async def test_a_mount_counts_at_its_place_and_below_until_it_ends(can: object) -> None:
    store = Server(can)
    one = lease(store, "a/b/")
    await one.begin()
    assert await uses(store, "a/b/") == ["a/b/"]
    assert await uses(store, "a/b/c/") == ["a/b/"]
    assert await uses(store, "a/bb/") == []
    assert await uses(store, "a/") == []  # what is below is found by whoever lists it
    assert one.key is not None
    assert await uses(store, "a/b/", [one.key]) == []
    (found,) = await leases.living_above(store, "a/b/", int(store.now_s * _NS))
    assert found.mountpoint == "/mnt/x"
    assert found.host
    await one.end()
    assert await store.keys() == set()


async def test_a_lease_that_nobody_renews_counts_no_more(autojump_clock: trio.testing.MockClock) -> None:
    store = Server()
    await lease(store, "").begin()
    store.now_s += leases.EXPIRE_S
    assert await uses(store, "x/") == [""]
    store.now_s += 1
    assert await uses(store, "x/") == []


async def test_renewals_are_few_and_keep_it_alive(autojump_clock: trio.testing.MockClock) -> None:
    store = Server()
    one = lease(store, "")
    await one.begin()
    before = store.requests.total()
    start_s = store.now_s

    async def clock() -> None:
        while True:
            store.now_s = start_s + trio.current_time() - began
            assert await uses(store, "") == [""]
            await trio.sleep(61)

    began = trio.current_time()
    asked = 0
    with trio.move_on_after(6 * 3600):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run)
            nursery.start_soon(clock)
            asked = 6 * 3600 // 61 + 1
    assert (store.requests.total() - before - asked) / 6 <= 12


async def test_a_process_that_goes_on_renews_at_once(autojump_clock: trio.testing.MockClock) -> None:
    store = Server()
    with trio.move_on_after(1):
        await lease(store, "a/").run()
    assert await uses(store, "a/") == ["a/"]


async def test_a_server_that_is_away_is_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    store = Server()
    store.refuses_puts = Unavailable("away")
    one = lease(store, "a/")
    await one.begin()
    assert one.problem == "away"
    store.refuses_puts = None
    with trio.move_on_after(renewal.RETRY_S + 1):
        await one.run()
    assert one.problem == ""
    assert await uses(store, "a/") == ["a/"]


async def test_keys_that_may_only_read_have_no_lease(autojump_clock: trio.testing.MockClock) -> None:
    store = Server()
    store.refuses_puts = AccessDenied("only reading")
    one = lease(store, "a/")
    await one.begin()
    await one.run()  # it returns: nothing is tried again
    await one.end()
    assert one.problem == "only reading"
    assert store.requests.total() == 0
    reader = lease(store, "a/", read_only=True)
    await reader.begin()
    await reader.run()
    await reader.end()
    assert store.requests.total() == 0


async def test_keys_for_the_prefix_are_enough() -> None:
    store = Server()
    await lease(store, "").begin()
    store.hidden = "a/b/"
    one = lease(store, "a/b/")
    await one.begin()
    assert one.problem == ""
    assert await uses(store, "a/b/") == ["a/b/"]
    store.hidden = "other/"
    with pytest.raises(AccessDenied):
        await uses(store, "a/b/")


async def test_no_mount_begins_where_a_purge_is_under_way() -> None:
    store = Server()
    await leases.write(store, leases.purge_key("a/", "1"), "node\x1b[2J", "")
    for prefix in ("a/", "a/b/"):
        with pytest.raises(UserError, match=r"node node\\x1b\[2J is deleting"):
            await lease(store, prefix).begin()
    for prefix in ("", "ab/"):
        await lease(store, prefix).begin()
    assert {key for key in await store.keys() if leases.is_lease(key)} == {
        leases.lease_key(prefix, "a" * 32) for prefix in ("", "ab/")
    }
    store.now_s += leases.PURGE_EXPIRE_S + 1
    await lease(store, "a/").begin()


async def test_what_dead_mounts_left_is_removed() -> None:
    store = Server()
    await lease(store, "a/", "0" * 32).begin()
    await lease(store, "a/b/", "0" * 32).begin()
    store.now_s += 3 * leases.EXPIRE_S
    await lease(store, "a/", "1" * 32).begin()
    assert await store.keys() == {leases.lease_key("a/", "1" * 32), leases.lease_key("a/b/", "0" * 32)}


@given(holder=st.text(st.characters(codec="ascii"), max_size=100))
async def test_whatever_a_lease_says_it_counts(holder: str) -> None:
    store = Server()
    key = leases.lease_key("", "x")
    try:
        await store.put(key, Bytes(b""), metadata={"s3fuse-holder": holder}, headers={})
    except Exception:
        await store.put(key, Bytes(b""), metadata={}, headers={})
    (found,) = await leases.living_above(store, "", int(store.now_s * _NS))
    assert found.key == key


@given(host=st.text(max_size=300), mountpoint=st.text(max_size=5000))
async def test_any_host_and_mountpoint_can_be_told(host: str, mountpoint: str) -> None:
    store = Server()
    await leases.write(store, leases.lease_key("", "x"), host, mountpoint)
    assert len(await leases.living_above(store, "", int(store.now_s * _NS))) == 1


async def test_a_server_that_hangs_keeps_no_mount_waiting(autojump_clock: trio.testing.MockClock) -> None:
    store = Server()

    async def hang(*_: object, **more: object) -> str:
        await trio.sleep_forever()
        return ""

    store.put = hang  # type: ignore[method-assign]
    began = trio.current_time()
    one = lease(store, "a/")
    await one.begin()
    assert trio.current_time() - began <= renewal.BEGIN_S
    assert "did not answer" in one.problem


async def test_a_renewal_under_way_does_not_outlive_the_end(autojump_clock: trio.testing.MockClock) -> None:
    store = Server()
    one = lease(store, "a/")
    put, sent = store.put, trio.Event()

    async def slow(key: str, body: Bytes, **more: object) -> str:
        sent.set()
        await trio.sleep(1)
        return await put(key, body, **more)

    store.put = slow  # type: ignore[method-assign, assignment]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        await sent.wait()
        await one.end()
    assert await store.keys() == set()


async def test_a_cache_directory_has_a_name_as_long_as_there_may_be_a_lease(tmp_path: Path) -> None:
    store = Server()
    one = Renewal(store, "a/", tmp_path, Path("/mnt/x"), read_only=False)
    await one.begin()
    assert one.key == leases.lease_key("a/", read_identity(tmp_path) or "")
    again = Renewal(store, "a/", tmp_path, Path("/mnt/x"), read_only=False)  # after a crash
    assert again.key == one.key
    store.health.up = False
    await again.end()
    assert read_identity(tmp_path) is not None
    store.health.up = True
    await again.end()
    assert os.listdir(tmp_path) == []
    assert await store.keys() == set()


def test_a_cache_directory_keeps_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity(tmp_path)
    assert identity(tmp_path) == first == read_identity(tmp_path)
    with monkeypatch.context() as patch:  # a machine that was copied with its disk, and has another name
        patch.setattr(renewal.socket, "gethostname", lambda: "copy")
        assert read_identity(tmp_path) not in (None, first)
    for damage in (b"", b"short", b"\xff" * 32, b"../" * 20):
        (tmp_path / renewal.FILE).write_bytes(damage)
        assert read_identity(tmp_path) is None
        assert identity(tmp_path) not in (first, damage)
    assert read_identity(tmp_path / "missing") is None
    assert len(identity(tmp_path / "missing")) == 32
    assert identity(None) != identity(None)
