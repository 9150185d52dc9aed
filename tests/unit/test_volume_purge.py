"""What a purge deletes and what it leaves, on a store in memory whose clock has nothing to do with this host's."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from s3fuse.coherence import leases
from s3fuse.errors import BadResponse, Refused, Unavailable, UserError
from s3fuse.store.base import Bytes, Capabilities
from s3fuse.store.memory import MINIO, SEAWEEDFS, MemoryStore
from s3fuse.volume import ownership
from s3fuse.volume.jobs import Job
from s3fuse.volume.purge import InUse, look, purge

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from s3fuse.store.base import Page

_NS = 1_000_000_000
PREFIX = "a/b/"


class Server(MemoryStore):
    """A bucket with a clock of its own, which each change moves on."""

    def __init__(self, capabilities: Capabilities = MINIO) -> None:
        self.now_s = 5_000_000
        super().__init__(capabilities, now_ns=lambda: self.now_s * _NS)
        self.before_delete: Callable[[Sequence[str]], None] | None = None
        self.deleted: list[str] = []

    async def write(self, *keys: str) -> None:
        for key in keys:
            await self.put(key, Bytes(key.encode()), metadata={}, headers={})

    async def delete_many(self, keys: Sequence[str]) -> Mapping[str, str]:
        if self.before_delete is not None:
            self.before_delete(keys)
        self.deleted += keys
        return await super().delete_many(keys)

    def tick(self, seconds: int = 1) -> None:
        self.now_s += seconds

    async def keys(self) -> set[str]:
        return {info.key async for info in leases.listed(self, "")}

    async def data(self) -> set[str]:
        """All keys but s3fuse's own."""
        return {key for key in await self.keys() if ".s3fuse/" not in key}


def job(store: Server | None = None, **more: Any) -> Job:
    """A purge of what was there until now."""
    if store is not None and "removed_ns" not in more:
        more.setdefault("not_after_ns", store.now_s * _NS)
    return Job(do="purge", volume="vol", **more)


async def made(store: Server, *keys: str) -> None:
    """Makes the volume, and then these objects at its place."""
    await ownership.own(store, PREFIX, "vol")
    store.tick()
    await store.write(*(f"{PREFIX}{key}" for key in keys))
    store.tick()


_KEYS = st.sets(st.sampled_from([f"{folder}{name}" for folder in ("", "d/", "d/e/") for name in ("x", "y", "z")]))


@settings(deadline=None)
@given(
    before=_KEYS,
    changed=_KEYS,
    during=_KEYS,
    after=_KEYS,
    everything=st.booleans(),
    pause_s=st.integers(0, 2),
    can=st.sampled_from([MINIO, SEAWEEDFS]),
)
async def test_only_what_came_after_the_volume_and_before_its_removal_goes(
    before: set[str],
    changed: set[str],
    during: set[str],
    after: set[str],
    everything: bool,
    pause_s: int,
    can: Capabilities,
) -> None:
    store = Server(can)
    others = ["a/bb", "a/", "a/b", "c/x"]
    await store.write(*others, *(PREFIX + key for key in before))
    store.tick(pause_s)
    await made(store, *(changed & before), *during)
    for twin in ("other", "vol"):  # another node makes the volume, too, and another volume is made
        await ownership.own(store, PREFIX, twin)
    task = job(store, everything=everything)
    store.tick()
    await store.write(*(PREFIX + key for key in after))
    result = await purge(store, PREFIX, task)
    stays = after if everything else after | before
    assert await store.data() == {*others, *(PREFIX + key for key in stays)}
    assert result["kept"] == (0 if everything else len(before))
    assert {key for key in await store.keys() if ".s3fuse/" in key} <= {ownership.mark_key(PREFIX, "other")}


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("place", "in_use"),
    [("", True), ("a/", True), (PREFIX, True), (f"{PREFIX}c/d/", True), ("a/bb/", False), ("a/b/.s3fuse/x/", False)],
)
async def test_a_living_mount_at_above_or_below_keeps_everything(everything: bool, place: str, in_use: bool) -> None:
    store = Server()
    await made(store, "x", "c/y")
    store.tick()
    if place.endswith("x/"):  # something there that is no lease
        await store.write(f"{place}lease")
    else:
        await leases.write(store, leases.lease_key(place, "1"), "nodeB", "/var/lib/x")
    task = job(store, everything=everything)
    if not in_use:
        await look(store, PREFIX, task)
        assert await store.data() == {"a/b/x", "a/b/c/y"}
        await purge(store, PREFIX, task)
        assert await store.data() == set()
        return
    for ask in (look, purge):
        with pytest.raises(InUse, match=rf"node nodeB has /{place} mounted on /var/lib/x.*min more"):
            await ask(store, PREFIX, task)
    assert store.deleted == [key for key in store.deleted if ".s3fuse/" in key]
    assert await store.data() == {"a/b/x", "a/b/c/y"}
    # Its own leases are no use, and an old one is none either.
    own = job(store, own=(leases.lease_key(place, "1"),))
    await look(store, PREFIX, own)
    store.tick(int(leases.EXPIRE_S) + 1)
    await purge(store, PREFIX, task)
    assert await store.data() == set()


@pytest.mark.parametrize("place", ["", PREFIX, "a/b/e/"])
async def test_a_mount_that_begins_meanwhile_keeps_what_is_left(place: str) -> None:
    store = Server()
    await made(store, *(f"{letter}/{number:03}" for letter in "cdef" for number in range(600)))

    def mount(keys: Sequence[str]) -> None:
        if store.before_delete is not None and any(key.endswith("/000") for key in keys):
            store.before_delete = None
            key = leases.lease_key(place, "1")
            MemoryStore._store(store, key, b"", "etag", {}, {})

    store.before_delete = mount
    with pytest.raises(InUse):
        await purge(store, PREFIX, job(store))
    left = await store.data()
    assert 2400 - 1000 <= len(left) < 2400
    assert not any(leases.is_purge(key) for key in await store.keys())


async def test_while_it_deletes_it_says_so() -> None:
    store = Server()
    await made(store, "x")
    seen: list[bool] = []

    def look_around(keys: Sequence[str]) -> None:
        if f"{PREFIX}x" in keys:
            seen.append(any(leases.is_purge(key) for key in store._objects))

    store.before_delete = look_around
    await purge(store, PREFIX, job(store))
    assert seen == [True]
    assert await store.keys() == set()


async def test_without_proof_nothing_goes() -> None:
    store = Server()
    await store.write(f"{PREFIX}x")
    store.tick()
    assert await purge(store, PREFIX, job(store)) == {"unowned": True}
    for content in (b"", b"junk", b"x\x9cjunk", b"x\x9c\x03\x00\x00\x00\x00\x01"):
        await store.put(ownership.mark_key(PREFIX, "vol"), Bytes(content), metadata={}, headers={})
        assert await purge(store, PREFIX, job(store)) == {"unowned": True}
    await ownership.own(store, PREFIX, "volume")  # another name's is no proof
    assert await purge(store, PREFIX, job(store)) == {"unowned": True}
    assert await store.data() == {f"{PREFIX}x"}
    await purge(store, PREFIX, job(store, everything=True))
    assert await store.data() == set()


async def test_too_much_to_remember(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "MOST_BEFORE", 3)
    store = Server()
    await store.write(*(f"{PREFIX}{name}" for name in "abc"))
    await ownership.own(store, PREFIX, "vol")
    await store.write(f"{PREFIX}d")
    await ownership.own(store, PREFIX, "vol")  # it is made
    with pytest.raises(UserError, match="purge=all"):
        await ownership.own(store, PREFIX, "other")
    assert {key for key in await store.keys() if ownership.is_mark(key, PREFIX)} == {ownership.mark_key(PREFIX, "vol")}


@pytest.mark.parametrize("ago_s", [2, 3600, 10**6])
async def test_a_removal_that_the_server_did_not_see_is_told_by_how_long_ago_it_was(ago_s: int) -> None:
    store = Server()
    await made(store, "old")
    store.tick(5)
    removed_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ago_s * _NS
    store.tick(ago_s)
    await store.write(f"{PREFIX}new")
    await purge(store, PREFIX, job(removed_ns=removed_ns))
    assert await store.data() == {f"{PREFIX}new"}


async def test_uploads_of_the_volume_are_aborted_and_no_others() -> None:
    store = Server()
    for place in (PREFIX, "a/"):
        await store.multipart_create(f"{place}before", metadata={}, headers={})
    store.tick()
    await made(store)
    await store.multipart_create(f"{PREFIX}during", metadata={}, headers={})
    task = job(store)
    store.tick()
    await store.multipart_create(f"{PREFIX}after", metadata={}, headers={})
    await purge(store, PREFIX, task)
    assert [one.key for one in await store.list_uploads("a/")] == [f"{PREFIX}before", "a/before", f"{PREFIX}after"]


async def test_what_a_killed_purge_left_goes_with_the_next() -> None:
    store = Server()
    await made(store, "x")
    await leases.write(store, leases.purge_key(PREFIX, "killed"), "host", "")
    task = job(store)
    store.tick(int(leases.PURGE_EXPIRE_S) + 1)
    await purge(store, PREFIX, task)
    assert await store.keys() == set()


async def test_a_try_whose_end_was_lost_leaves_nothing_when_it_is_done_again() -> None:
    """The proof goes with the last request, so that the next try finds it, or nothing at all."""
    store = Server()
    await made(store, "x")
    task = job(store)

    def fail(keys: Sequence[str]) -> None:
        if any(leases.is_purge(key) for key in keys):
            raise Unavailable("away")

    store.before_delete = fail
    with pytest.raises(Unavailable):
        await purge(store, PREFIX, task)
    store.before_delete = None
    assert await purge(store, PREFIX, task) == {"deleted": 0, "kept": 0}
    assert await store.keys() == set()


async def test_a_server_that_does_not_delete_is_no_endless_loop() -> None:
    store = Server()
    await made(store, "x")
    store.delete_many = _nothing  # type: ignore[method-assign, assignment]
    with trio.fail_after(5), pytest.raises(Refused, match="still there"):
        await purge(store, PREFIX, job(store))


async def _nothing(keys: Sequence[str]) -> Mapping[str, str]:
    await trio.lowlevel.checkpoint()
    return {}


@pytest.mark.parametrize("unreadable", [True, False])
async def test_a_server_that_lists_nonsense_keeps_everything(unreadable: bool) -> None:
    """What cannot be read could be the lease of a mount; pages that repeat themselves would never end."""
    store = Server()
    await made(store, "x", "y")
    task = job(store)
    honest = store.list_page

    async def lie(prefix: str, **more: Any) -> Page:
        page = await honest(prefix, **more)
        return replace(page, unreadable=("z",)) if unreadable else replace(page, next_token="again")

    store.list_page = lie  # type: ignore[method-assign]
    with trio.fail_after(5), pytest.raises(BadResponse):
        await purge(store, PREFIX, task)
    store.list_page = honest  # type: ignore[method-assign]
    assert f"{PREFIX}y" in await store.keys()


async def test_a_purge_that_fails_in_the_middle_goes_on_later() -> None:
    store = Server()
    await made(store, *(f"{number:04}" for number in range(1500)))

    def fail(keys: Sequence[str]) -> None:
        if f"{PREFIX}1499" in keys:
            raise Unavailable("away")

    store.before_delete = fail
    with pytest.raises(Unavailable):
        await purge(store, PREFIX, job(store))
    assert 0 < len(await store.data()) < 1500
    store.before_delete = None
    await purge(store, PREFIX, job(store))
    assert await store.keys() == set()


async def test_what_it_costs() -> None:
    """Two listings of everything before the first deletion, one after, and five requests for each 1000 objects."""
    store = Server()
    await made(store, *(f"{number:05}" for number in range(3000)))
    store.requests.clear()
    await purge(store, PREFIX, job(store))
    assert store.requests["delete_many"] <= 3 + 3
    assert store.requests.total() < 60
