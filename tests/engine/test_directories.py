"""Lookups and listings: how many requests they cost, how fresh they are, and what is merged into them."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from s3fuse.errors import Unavailable
from s3fuse.session import operations
from s3fuse.store.faulty import refused
from s3fuse.store.memory import SEAWEEDFS, MemoryStore
from tests.engine.rig import Bench, Clock, Rig, fails, gather, until

if TYPE_CHECKING:
    from s3fuse.store.base import Page

TTL_S = 1000.0
LATER_S = TTL_S + 1


async def filled(bench: Bench, count: int, directory: str = "d") -> Rig:
    """A mount of a directory with that many files of others."""
    for index in range(count):
        await bench.upload(f"{directory}/{index:05}", b"x")
    rig = await bench.rig(ttl_s=TTL_S)
    await rig.walk(directory)
    bench.counted()
    return rig


# -- what a question costs


async def test_lookup_is_one_listing_and_then_free(bench: Bench) -> None:
    await bench.upload("f", b"data", mode=str(stat.S_IFREG | 0o640))
    rig = await bench.rig()
    inode = await rig.walk("f")
    assert bench.counted() == {"list": 1}
    assert (inode.size, stat.S_IMODE(inode.mode)) == (4, 0o640)
    assert await rig.walk("f") is inode
    await rig.attributes.getattr(inode)
    assert bench.counted() == {}


async def test_absent_name_is_remembered(bench: Bench, clock: Clock) -> None:
    rig = await bench.rig(ttl_s=TTL_S)
    assert not await rig.exists("f")
    assert bench.counted() == {"list": 1}
    assert not await rig.exists("f")
    assert rig.core.directories.absent_for_s(rig.core.inodes.root, b"f") == pytest.approx(TTL_S, abs=1)
    assert bench.counted() == {}
    await bench.upload("f", b"x")
    assert not await rig.exists("f")
    clock.advance(LATER_S)
    assert await rig.exists("f")


async def test_created_name_is_no_longer_absent(bench: Bench) -> None:
    rig = await bench.rig()
    assert not await rig.exists("f")
    await rig.put("f")
    assert await rig.exists("f")
    await rig.unlink("f")
    assert not await rig.exists("f")


async def test_everything_in_a_listed_directory_is_free(bench: Bench) -> None:
    rig = await filled(bench, 50)
    names = await rig.ls("d")
    assert bench.counted() == {"list": 1}
    for name in names:
        await rig.attributes.getattr(await rig.walk(f"d/{name}"))
    assert not await rig.exists("d/other")
    assert await rig.ls("d") == names
    assert bench.counted() == {}


async def test_pages_of_a_large_directory(bench: Bench) -> None:
    rig = await filled(bench, 2500)
    assert len(await rig.ls("d")) == 2500
    assert bench.counted() == {"list": 3}


async def test_file_by_file_a_directory_is_listed_soon(bench: Bench) -> None:
    """Single names until they have cost as much as a listing, then the listing."""
    rig = await filled(bench, 300)
    for index in range(300):
        await rig.walk(f"d/{index:05}")
    assert sum(bench.counted().values()) <= 3


async def test_few_names_of_a_huge_directory_do_not_list_it(bench: Bench) -> None:
    rig = await filled(bench, 6000)
    for index in range(0, 6000, 2000):
        await rig.walk(f"d/{index:05}")
    assert sum(bench.counted().values()) <= 6


async def test_small_directory_is_asked_as_a_whole_when_old(bench: Bench, clock: Clock) -> None:
    rig = await filled(bench, 50)
    names = await rig.ls("d")
    clock.advance(LATER_S)
    bench.counted()
    for name in names:
        await rig.walk(f"d/{name}")
    assert bench.counted() == {"list": 2}  # d itself and what is in it


async def test_old_name_of_a_huge_directory_is_one_head(bench: Bench, clock: Clock) -> None:
    rig = await filled(bench, 4000)
    await rig.ls("d")
    clock.advance(LATER_S)
    directory = await rig.walk("d")
    bench.counted()
    assert await rig.names.lookup(directory, b"00007") is not None
    assert bench.counted() == {"head": 1}


async def test_concurrent_listings_are_one(bench: Bench) -> None:
    rig = await filled(bench, 1500)
    results = await gather([partial(rig.ls, "d") for _ in range(10)])
    assert all(isinstance(result, list) and len(result) == 1500 for result in results)
    assert bench.counted() == {"list": 2}


async def test_failed_listing_fails_for_all_who_waited_for_it(bench: Bench) -> None:
    """The store has tried until its deadline; one after the other would take a multiple of that."""
    rig = await filled(bench, 10)
    rig.line.schedule("list", refused())
    rig.line.quiet = False
    results = await gather([partial(rig.ls, "d") for _ in range(5)])
    assert all(isinstance(result, Unavailable) for result in results)
    assert len(await rig.ls("d")) == 10


async def test_absence_is_not_said_while_others_are_answered(bench: Bench, clock: Clock) -> None:
    """One failed question is no outage: what another node has made meanwhile is not taken for missing."""
    rig = await filled(bench, 3)
    await rig.ls("d")
    await bench.upload("d/theirs")
    clock.advance(LATER_S)
    directory = await rig.walk("d")
    with rig.line.held("list") as gate:
        rig.line.schedule("list", refused())
        rig.line.quiet = False
        results: list[object] = []
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                results.extend(await gather([partial(rig.names.lookup, directory, b"theirs")]))

            nursery.start_soon(look)
            await gate.arrived()
            await rig.line.head("d/00001")
            gate.release()
    assert isinstance(results[0], Unavailable)
    assert await rig.exists("d/theirs")


async def test_what_was_believed_in_an_outage_is_asked_for_after_it(bench: Bench, clock: Clock) -> None:
    rig = await filled(bench, 3)
    await rig.ls("d")
    clock.advance(LATER_S)
    rig.line.cut = True
    assert not await rig.exists("d/theirs")
    await rig.put("d/ours", b"1")
    await bench.upload("d/theirs")
    rig.line.cut = False
    await rig.line.head("d/00001")  # any answer
    assert await rig.exists("d/theirs")
    await rig.drained()
    assert bench.contents()["d/ours"] == b"1"


async def test_new_directory_is_not_asked_for(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.mkdir("d")
    bench.counted()
    for index in range(20):
        await rig.put(f"d/{index}")
    assert len(await rig.ls("d")) == 20
    assert bench.counted() == {}


async def test_names_that_share_a_prefix(bench: Bench, expected_log: list[str]) -> None:
    """A file before `name/` in key order, and many keys between them."""
    expected_log.append("1 keys below '' cannot be shown")
    for name in ["n", "n!", *(f"n{c}" for c in "#$%&'()*+,-"), "n/x", "n0"]:
        await bench.upload(name)
    rig = await bench.rig()
    assert (await rig.walk("n")).is_directory
    assert await rig.exists("n/x")
    assert not (await rig.walk("n0")).is_directory
    assert not await rig.exists("n1")


# -- what others do


async def test_remote_change_is_a_new_inode(bench: Bench, clock: Clock) -> None:
    await bench.upload("f", b"one")
    rig = await bench.rig(ttl_s=TTL_S)
    before = await rig.walk("f")
    handle = await rig.open("f")
    await bench.upload("f", b"other bytes")
    assert await rig.walk("f") is before
    clock.advance(LATER_S)
    after = await rig.walk("f")
    assert after.number != before.number
    assert (before.linked, before.size, after.size) == (False, 3, 11)
    assert await rig.cat("f") == b"other bytes"
    with fails(errno.ESTALE):
        await rig.pread(handle)
    rig.close(handle)
    assert before.number in rig.core.inodes.table  # the kernel still refers to it
    rig.core.inodes.forget(before.number, before.lookups)
    assert before.number not in rig.core.inodes.table


async def test_read_blocks_of_a_changed_object_are_served_to_its_handle(bench: Bench, clock: Clock) -> None:
    await bench.upload("f", b"one")
    rig = await bench.rig(ttl_s=TTL_S)
    handle = await rig.open("f")
    assert await rig.pread(handle) == b"one"
    await bench.upload("f", b"other bytes")
    clock.advance(LATER_S)
    assert await rig.cat("f") == b"other bytes"
    assert await rig.pread(handle) == b"one"
    rig.close(handle)


async def test_remote_metadata_change_keeps_the_inode(bench: Bench, clock: Clock) -> None:
    await bench.upload("f", b"data", mode=str(stat.S_IFREG | 0o600))
    rig = await bench.rig(ttl_s=TTL_S)
    before = await rig.walk("f")
    await bench.upload("f", b"data", mode=str(stat.S_IFREG | 0o644))
    clock.advance(LATER_S)
    assert await rig.walk("f") is before
    assert stat.S_IMODE(before.mode) == 0o644


async def test_remote_deletion(bench: Bench, clock: Clock) -> None:
    for key in ("f", "d/x"):
        await bench.upload(key)
    rig = await bench.rig(ttl_s=TTL_S)
    assert await rig.ls() == ["d", "f"]
    await rig.walk("d/x")
    await bench.remove("f", "d/x")
    clock.advance(LATER_S)
    assert await rig.ls() == []
    assert not await rig.exists("d")


async def test_rmdir_asks_whether_others_emptied_it(bench: Bench, clock: Clock) -> None:
    await bench.upload("d/")
    await bench.upload("d/x")
    rig = await bench.rig(ttl_s=TTL_S)
    await rig.walk("d/x")
    await bench.remove("d/x")
    clock.advance(LATER_S)
    await rig.rmdir("d")
    await rig.drained()
    assert bench.listed() == []


async def test_rmdir_sees_what_others_put_into_it(bench: Bench, clock: Clock) -> None:
    await bench.upload("d/")
    rig = await bench.rig(ttl_s=TTL_S)
    assert await rig.ls("d") == []
    await bench.upload("d/x")
    clock.advance(LATER_S)
    with fails(errno.ENOTEMPTY):
        await rig.rmdir("d")
    assert bench.listed() == ["d/", "d/x"]


async def test_directory_shadows_a_file_of_its_name(bench: Bench, clock: Clock, expected_log: list[str]) -> None:
    expected_log.append("1 keys below '' cannot be shown")
    await bench.upload("n", b"file")
    rig = await bench.rig(ttl_s=TTL_S)
    assert not (await rig.walk("n")).is_directory
    await bench.upload("n/x", b"x")
    clock.advance(LATER_S)
    assert (await rig.walk("n")).is_directory
    assert await rig.ls() == ["n"]
    assert await rig.ls("n") == ["x"]
    await bench.remove("n/x")
    clock.advance(LATER_S)
    assert await rig.cat("n") == b"file"


async def test_hidden_keys_are_counted_and_keep_their_directory(bench: Bench, expected_log: list[str]) -> None:
    expected_log.append("cannot be shown")
    bench.store = MemoryStore(odd_keys=True)
    await bench.upload("d/ok")
    for key in ("d//x", "d/../y", f"d/{'z' * 256}"):
        await bench.upload(key)
    rig = await bench.rig()
    assert await rig.ls("d") == ["ok"]
    assert rig.core.directories.hidden[(await rig.walk("d")).number] == 3
    await rig.unlink("d/ok")
    with fails(errno.ENOTEMPTY):
        await rig.rmdir("d")
    with fails(errno.EBUSY):
        await rig.rename("d", "e")


async def test_reserved_name_is_hidden_in_the_root_only(bench: Bench) -> None:
    await bench.upload(".s3fuse/x")
    await bench.upload("d/.s3fuse", b"theirs")
    rig = await bench.rig()
    assert await rig.ls() == ["d"]
    assert not await rig.exists(".s3fuse")
    with pytest.raises(PermissionError):
        await rig.mkdir(".s3fuse")
    assert await rig.cat("d/.s3fuse") == b"theirs"


# -- directories without markers


async def test_directory_that_exists_by_its_content_stays_when_we_empty_it(bench: Bench, clock: Clock) -> None:
    await bench.upload("d/x")
    rig = await bench.rig(ttl_s=TTL_S)
    await rig.unlink("d/x")
    assert await rig.ls() == ["d"]
    await rig.drained()
    assert bench.listed() == ["d/"]
    clock.advance(LATER_S)
    assert await rig.ls() == ["d"]
    rig.check_clean()


async def test_directory_that_exists_by_its_content_stays_when_all_is_moved_out(bench: Bench) -> None:
    await bench.upload("d/s/x", b"data")
    rig = await bench.rig()
    await rig.rename("d/s", "t")
    await rig.drained()
    assert bench.listed() == ["d/", "t/x"]


async def test_directory_without_a_marker_gets_one_by_chmod(bench: Bench) -> None:
    await bench.upload("d/x")
    rig = await bench.rig()
    await rig.chmod("d", 0o700)
    await rig.drained()
    assert bench.listed() == ["d/", "d/x"]
    other = await bench.rig("other")
    assert (await other.walk("d")).mode == stat.S_IFDIR | 0o700


async def test_marker_of_others_keeps_its_attributes_when_its_directory_is_emptied(bench: Bench) -> None:
    await bench.upload("d/", mode=str(stat.S_IFDIR | 0o700))
    await bench.upload("d/x")
    rig = await bench.rig()
    await rig.unlink("d/x")
    await rig.drained()
    assert bench.listed() == ["d/"]
    assert (await bench.info("d/")).metadata == {"mode": str(stat.S_IFDIR | 0o700)}


# -- listings without metadata


async def test_heads_only_where_attributes_are_wanted_and_in_parallel(bench: Bench) -> None:
    bench.store = MemoryStore(SEAWEEDFS)
    for index in range(30):
        await bench.upload(f"d/{index:02}", b"x", mode=str(stat.S_IFREG | 0o600))
    rig = await bench.rig()
    directory = await rig.walk("d")
    bench.counted()
    children = await rig.names.entries(directory)
    assert bench.counted() == {"list": 1}
    with rig.line.held("head") as gate:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.core.directories.learn_all, children)
            await gate.arrived(30)
            gate.open()
    assert bench.counted() == {"head": 30}
    assert {stat.S_IMODE(child.mode) for child in children} == {0o600}
    for child in children:
        await rig.attributes.getattr(child)
    assert bench.counted() == {}


async def test_unchanged_objects_are_not_asked_for_again(bench: Bench, clock: Clock) -> None:
    """The etag and time of a listing tell that the metadata cannot have changed."""
    bench.store = MemoryStore(SEAWEEDFS)
    for index in range(5):
        await bench.upload(f"d/{index}", b"x")
    rig = await bench.rig(ttl_s=TTL_S)
    children = await rig.names.entries(await rig.walk("d"))
    await rig.core.directories.learn_all(children)
    clock.advance(LATER_S)
    directory = await rig.walk("d")
    bench.counted()
    children = await rig.names.entries(directory)
    await rig.core.directories.learn_all(children)
    assert bench.counted() == {"list": 1}


# -- what is not there yet, and listings that began before it was


async def test_pending_deletes_are_not_listed(bench: Bench) -> None:
    for name in "abc":
        await bench.upload(f"d/{name}", name.encode())
    rig = await bench.rig(ttl_s=0.0, paused=True)
    await rig.unlink("d/a")
    await rig.rename("d/b", "d/z")
    assert await rig.ls("d") == ["c", "z"]
    assert not await rig.exists("d/a")
    assert not await rig.exists("d/b")
    await rig.unlink("d/c")
    await rig.unlink("d/z")
    await rig.rmdir("d")
    assert await rig.ls() == []
    assert not await rig.exists("d")
    assert bench.listed() == ["d/a", "d/b", "d/c"]
    await rig.mkdir("d")
    assert await rig.ls("d") == []


async def test_removed_directory_is_not_shown_while_its_objects_go(bench: Bench, nursery: trio.Nursery) -> None:
    for name in "abc":
        await bench.upload(f"d/s/{name}")
    rig = await bench.rig(ttl_s=0.0)
    for name in "abc":
        await rig.unlink(f"d/s/{name}")
    await rig.rmdir("d/s")
    await rig.rmdir("d")
    with rig.line.held("delete_many") as gate:
        nursery.start_soon(rig.drain)
        await gate.arrived()
        assert await rig.ls() == []
        assert not await rig.exists("d")
        assert bench.listed() != []
    await until(lambda: not rig.dirty())
    assert bench.listed() == []
    assert await rig.ls() == []
    rig.check_clean()


async def test_removed_directory_of_which_others_keep_something_comes_back(bench: Bench) -> None:
    await bench.upload("d/x")
    rig = await bench.rig(ttl_s=0.0)
    await rig.unlink("d/x")
    await rig.rmdir("d")
    await bench.upload("d/theirs")
    await rig.drained()
    assert await rig.ls() == ["d"]
    assert await rig.ls("d") == ["theirs"]


class LatePages(MemoryStore):
    """Listings say how the bucket is when they are asked, but while `late` their answers do not come."""

    late: trio.Event | None = None

    async def list_page(
        self, prefix: str, *, delimiter: str = "/", token: str | None = None, start_after: str = "", limit: int = 1000
    ) -> Page:
        page = await super().list_page(prefix, delimiter=delimiter, token=token, start_after=start_after, limit=limit)
        if self.late is not None:
            await self.late.wait()
        return page


@pytest.mark.parametrize(
    "what", ["create", "create and forget", "rewrite", "unlink", "rename", "mkdir", "rmdir", "chmod"]
)
async def test_listing_begun_before_a_change_arrived_does_not_undo_it(
    bench: Bench, nursery: trio.Nursery, what: str
) -> None:
    store = bench.store = LatePages()
    rig = await bench.rig(ttl_s=0.0)
    await rig.put("f", b"old")
    await rig.mkdir("g")
    await rig.drained()
    inode = await rig.walk("f")
    directory = await rig.walk("g")
    store.late = trio.Event()
    results: list[list[str]] = []

    async def list_names() -> None:
        results.append(await rig.ls())

    nursery.start_soon(list_names)
    await until(lambda: bool(rig.core.directories._pages._loaded))
    await trio.testing.wait_all_tasks_blocked()
    root = rig.core.inodes.root
    expected = {"f", "g"}
    match what:
        # `names` would wait for the listing where it looks a name up, so its parts after that are called.
        case "create" | "create and forget":
            rig.names._add(operations.CREATE, root, "new", stat.S_IFREG | 0o644, 0, 0).lookups = int(what == "create")
            expected |= {"new"}
        case "rewrite":
            handle = rig.files.open_known(inode, writes=True)
            await rig.files.write(handle, 0, b"NEW!")
            rig.close(handle)
        case "unlink":
            rig.names.remove(inode)
            expected -= {"f"}
        case "rename":
            rig.names._move(inode, root, "h", 0)
            expected = {"g", "h"}
        case "mkdir":
            rig.names._add(operations.MKDIR, root, "new", stat.S_IFDIR | 0o755, 0, 0).lookups = 1
            expected |= {"new"}
        case "rmdir":
            rig.names.remove(directory)
            expected -= {"g"}
        case "chmod":
            inode.mode = stat.S_IFREG | 0o600
            rig.core.changes.changed(inode)
    with trio.fail_after(5):
        while rig.dirty():
            for changed in rig.dirty():
                rig.core.changes.queue(changed)
            await trio.sleep(0.01)
            if what == "rmdir" or rig.core.changes.in_flight:
                break  # its check needs a listing too, which is late
    store.late.set()
    store.late = None
    await until(lambda: bool(results))
    assert set(results[0]) == expected
    await rig.drained()
    assert set(await rig.ls()) == expected
    if what == "rewrite":
        assert await rig.cat("f") == b"NEW!"
        assert (await rig.walk("f")).number == inode.number
    if what == "chmod":
        assert (await rig.walk("f")).mode == stat.S_IFREG | 0o600
    rig.check_clean()


async def test_dirty_file_is_not_replaced_by_an_older_listing(bench: Bench, clock: Clock) -> None:
    rig = await bench.rig(ttl_s=TTL_S)
    await rig.put("f", b"old")
    await rig.drained()
    inode = await rig.walk("f")
    await rig.write("f", b"new", flags=os.O_TRUNC)
    clock.advance(LATER_S)
    assert await rig.ls() == ["f"]
    assert await rig.walk("f") is inode
    assert await rig.cat("f") == b"new"


# -- the kernel's references


async def test_forgotten_inodes_are_freed_and_found_again(bench: Bench, clock: Clock) -> None:
    rig = await filled(bench, 20)
    for name in await rig.ls("d"):
        await rig.walk(f"d/{name}")
    clock.advance(LATER_S)
    rig.forget()
    assert len(rig.core.inodes.table) == 1
    assert len(await rig.ls("d")) == 20


async def test_dirty_and_open_inodes_outlive_the_kernels_references(bench: Bench, clock: Clock) -> None:
    rig = await bench.rig(ttl_s=TTL_S)
    await rig.put("dirty", b"1")
    await rig.put("open", b"2")
    handle = await rig.open("open")
    clock.advance(LATER_S)
    rig.forget()
    assert await rig.ls() == ["dirty", "open"]
    assert await rig.pread(handle) == b"2"
    rig.close(handle)
    await rig.drained()
    assert bench.contents() == {"dirty": b"1", "open": b"2"}


async def test_what_is_known_is_served_while_the_bucket_does_not_answer(bench: Bench, clock: Clock) -> None:
    rig = await filled(bench, 3)
    names = await rig.ls("d")
    assert await rig.cat("d/00001") == b"x"
    clock.advance(LATER_S)
    rig.line.cut = True
    assert await rig.ls("d") == names
    assert await rig.cat("d/00001") == b"x"
    with pytest.raises(Unavailable):
        await rig.walk("never/seen")


class Ghosts(MemoryStore):
    """Shows some objects, or what is left of them, as prefixes with nothing below, as MinIO does for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.ghosts: set[str] = set()

    async def list_page(
        self, prefix: str, *, delimiter: str = "/", token: str | None = None, start_after: str = "", limit: int = 1000
    ) -> Page:
        page = await super().list_page(prefix, delimiter=delimiter, token=token, start_after=start_after, limit=limit)
        shown = {f"{key}/" for key in self.ghosts if key.startswith(prefix)}
        objects = tuple(info for info in page.objects if info.key not in self.ghosts)
        return dataclasses.replace(page, objects=objects, prefixes=tuple(sorted({*page.prefixes, *shown})))


@pytest.mark.parametrize("how", ["listing", "lookup"])
async def test_a_file_that_minio_shows_as_a_prefix_for_a_moment_stays_one(bench: Bench, how: str) -> None:
    store = bench.store = Ghosts()
    await bench.upload("f", b"data")
    rig = await bench.rig(ttl_s=0.0)
    assert await rig.ls() == ["f"]
    store.ghosts = {"f"}  # somebody overwrites it
    if how == "listing":
        assert await rig.ls() == ["f"]
    else:
        rig.core.inodes.root.folder().complete = False
        assert not (await rig.walk("f")).is_directory
    assert await rig.cat("f") == b"data"


@pytest.mark.parametrize("how", ["listing", "lookup"])
async def test_a_file_that_was_removed_is_no_directory(bench: Bench, how: str) -> None:
    store = bench.store = Ghosts()
    rig = await bench.rig(ttl_s=0.0)
    await rig.put("f", b"data")
    await rig.drained()
    await rig.unlink("f")
    await rig.drained()
    store.ghosts = {"f"}
    if how == "listing":
        assert await rig.ls() == []
    else:
        assert not await rig.exists("f")


async def test_what_minio_shows_as_a_prefix_for_ever_is_no_directory(bench: Bench) -> None:
    """After a new start nobody knows that there was a file; the name can be used again."""
    store = bench.store = Ghosts()
    await bench.upload("d/g", b"data")
    store.ghosts = {"f", "h"}
    rig = await bench.rig()
    assert not await rig.exists("f")
    assert (await rig.walk("d")).is_directory
    await rig.core.directories.learn_all(await rig.names.entries(await rig.walk("")))
    assert await rig.ls() == ["d"]
    store.ghosts = {"h"}
    await rig.put("f", b"again")
    await rig.drained()
    assert await rig.cat("f") == b"again"
    await rig.mkdir("h")
    await rig.drained()
    assert sorted(await rig.ls()) == ["d", "f", "h"]


async def test_a_file_that_becomes_a_directory_elsewhere_is_seen(bench: Bench) -> None:
    await bench.upload("f", b"data")
    rig = await bench.rig(ttl_s=0.0)
    assert await rig.ls() == ["f"]
    await bench.remove("f")
    await bench.upload("f/g", b"data")
    assert (await rig.walk("f")).is_directory
    assert await rig.ls("f") == ["g"]
