"""How the bucket follows the tree: in which order, with how many requests, and what survives crashes and others."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse import attrs
from s3fuse.errors import AccessDenied, NotFound, PreconditionFailed, StoreError, Unavailable
from s3fuse.namespace import changes, lateness
from s3fuse.store.base import UNMADE_ETAG, ObjectInfo
from s3fuse.store.faulty import LOST, refused
from s3fuse.store.memory import SEAWEEDFS, MemoryStore
from tests.engine.rig import SMALL_LIMITS, Bench, Clock, Rig, fails, gather, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from s3fuse.store.base import Bytes

CONFLICT = r"was changed by somebody else"


async def in_background(nursery: trio.Nursery, call: Callable[[], Awaitable[object]]) -> list[object]:
    """Starts a call; what it gives or raises is appended to the list."""
    results: list[object] = []

    async def run() -> None:
        try:
            results.append(await call())
        except Exception as error:
            results.append(error)

    nursery.start_soon(run)
    return results


async def idle(rig: Rig) -> None:
    """Returns when no operation is under way."""
    await until(lambda: not rig.core.changes.in_flight)


def mode_in_bucket(bench: Bench, key: str) -> int:
    return int(bench.store._objects[key].metadata["mode"])


# -- what is never sent


async def test_file_that_is_gone_before_it_is_sent_costs_nothing(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("tmp", b"data")
    await rig.rename("tmp", "tmp2")
    await rig.unlink("tmp2")
    bench.counted()
    await rig.drained()
    assert bench.counted() == {}
    rig.check_clean()


async def test_many_writes_are_one_put(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"a")
    for index in range(20):
        await rig.write("f", b"b", index)
    await rig.chmod("f", 0o600)
    await rig.utimens("f", 10**18)
    bench.counted()
    await rig.drained()
    assert bench.counted() == {"put": 1}
    assert bench.contents() == {"f": b"b" * 20}
    assert mode_in_bucket(bench, "f") == stat.S_IFREG | 0o600
    rig.check_clean()


async def test_ctime_alone_is_not_worth_a_request(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"a")
    await rig.drained()
    inode = await rig.walk("f")
    await rig.chmod("f", stat.S_IMODE(inode.mode))
    assert not rig.dirty()


# -- replacing


@pytest.mark.parametrize("natural", [False, True])
async def test_rename_over_is_one_conditional_put(bench: Bench, natural: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the order in which changes settle by themselves: nobody ever sees the name missing."""
    rig = await bench.rig()
    await rig.put("f", b"old")
    await rig.drained()
    etag = (await bench.info("f")).etag
    await rig.put("f.tmp", b"new")
    await rig.rename("f.tmp", "f")
    conditions = []
    put = rig.line.put

    async def watched(key: str, body: Bytes, **options: object) -> str:
        conditions.append((key, options["condition"]))
        return await put(key, body, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.line, "put", watched)
    bench.counted()
    if natural:
        monkeypatch.setattr("s3fuse.namespace.changes.SETTLE_S", 0.0)
        rig.core.changes._wake.set()
        await until(lambda: not rig.dirty())
    else:
        await rig.drained()
    assert bench.counted() == {"put": 1}
    assert [(key, condition.etag) for key, condition in conditions] == [("f", etag)]  # type: ignore[attr-defined]
    assert bench.contents() == {"f": b"new"}
    rig.check_clean()


async def test_rename_chain(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("a", b"one")
    await rig.drained()
    await rig.rename("a", "b")
    await rig.put("a", b"two")
    await rig.drained()
    assert bench.contents() == {"a": b"two", "b": b"one"}
    rig.check_clean()


async def test_log_rotation(bench: Bench) -> None:
    rig = await bench.rig()
    for name, data in (("log", b"0"), ("log.1", b"1"), ("log.2", b"2")):
        await rig.put(name, data)
    await rig.drained()
    await rig.rename("log.2", "log.3")
    await rig.rename("log.1", "log.2")
    await rig.rename("log", "log.1")
    await rig.put("log", b"new")
    await rig.drained()
    assert bench.contents() == {"log": b"new", "log.1": b"0", "log.2": b"1", "log.3": b"2"}
    rig.check_clean()


@pytest.mark.parametrize("count", [2, 3, 5])
async def test_circle(bench: Bench, count: int) -> None:
    """a -> b -> c -> a through a temporary name, all at once."""
    rig = await bench.rig()
    names = [f"n{index}" for index in range(count)]
    for name in names:
        await rig.put(name, name.encode())
    await rig.drained()
    await rig.rename(names[-1], "t")
    for index in reversed(range(count - 1)):
        await rig.rename(names[index], names[index + 1])
    await rig.rename("t", names[0])
    expected = {name: names[index - 1].encode() for index, name in enumerate(names)}
    assert {name: await rig.cat(name) for name in names} == expected
    await rig.drained()
    assert bench.contents() == expected
    assert {name: await rig.cat(name) for name in names} == expected
    rig.check_clean()


async def test_circle_of_directories(bench: Bench) -> None:
    rig = await bench.rig()
    for name in "xy":
        await rig.mkdir(name)
        await rig.put(f"{name}/f", name.encode())
    await rig.drained()
    await rig.rename("x", "t")
    await rig.rename("y", "x")
    await rig.rename("t", "y")
    await rig.drained()
    assert bench.contents() == {"x/": b"", "y/": b"", "x/f": b"y", "y/f": b"x"}
    rig.check_clean()


async def test_there_and_back_again(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("a", b"one")
    await rig.drained()
    await rig.rename("a", "b")
    await rig.rename("b", "a")
    await rig.drained()
    assert bench.contents() == {"a": b"one"}
    assert await rig.ls() == ["a"]
    rig.check_clean()


async def test_file_makes_way_for_a_directory_of_its_name(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("n", b"file")
    await rig.drained()
    await rig.unlink("n")
    await rig.mkdir("n")
    await rig.put("n/child", b"c")
    await rig.drained()
    assert bench.contents() == {"n/": b"", "n/child": b"c"}
    assert await rig.ls() == ["n"]
    await rig.unlink("n/child")
    await rig.rmdir("n")
    await rig.put("n", b"again")
    await rig.drained()
    assert bench.contents() == {"n": b"again"}
    rig.check_clean()


async def test_rm_rf_is_a_few_requests(bench: Bench) -> None:
    rig = await bench.rig()
    for index in range(2500):
        await bench.upload(f"d/{index:04}", b"x")
    names = await rig.ls("d")
    assert len(names) == 2500
    for name in names:
        await rig.unlink(f"d/{name}")
    await rig.rmdir("d")
    bench.counted()
    await rig.drained()
    counts = bench.counted()
    assert counts["delete_many"] <= 4
    assert sum(counts.values()) <= 30  # what others changed is looked for by listings, not by a request for each file
    assert bench.listed() == []
    rig.check_clean()


async def test_a_key_that_delete_many_could_not_delete_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await bench.rig()
    for name in "abc":
        await rig.put(name, b"x")
    await rig.drained()
    delete_many = rig.line.delete_many

    async def partly(keys: list[str], **etags: Any) -> dict[str, StoreError]:
        await delete_many([key for key in keys if key != "b"], **etags)
        return {"b": AccessDenied("refused", "b")}

    monkeypatch.setattr(rig.line, "delete_many", partly)
    for name in "abc":
        await rig.unlink(name)
    failed = await rig.drain()
    assert [inode.remote.key for inode in failed if inode.remote] == ["b"]
    assert bench.listed() == ["b"]
    assert await rig.ls() == []
    monkeypatch.undo()
    await rig.drained()
    assert bench.listed() == []
    rig.check_clean()


# -- open files


async def test_unlinked_open_file_and_its_successor(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"old bytes")
    await rig.drained()
    handle = await rig.open("f", os.O_RDWR)
    await rig.unlink("f")
    await rig.put("f", b"new")
    await rig.drain()
    assert bench.data("f") == b"new"
    assert await rig.pread(handle) == b"old bytes"
    await rig.files.write(handle, 4, b"B")
    assert await rig.pread(handle) == b"old Bytes"
    assert await rig.cat("f") == b"new"
    rig.close(handle)
    await rig.drained()
    assert bench.contents() == {"f": b"new"}
    rig.check_clean()


async def test_rename_over_an_open_file(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"old bytes")
    await rig.put("g", b"new")
    await rig.drained()
    handle = await rig.open("f")
    await rig.rename("g", "f")
    await rig.drain()
    assert await rig.pread(handle) == b"old bytes"
    assert bench.data("f") == b"new"
    rig.close(handle)
    await rig.drained()
    assert bench.contents() == {"f": b"new"}
    rig.check_clean()


async def test_open_file_is_renamed_and_read_on(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"bytes")
    await rig.drained()
    handle = await rig.open("f")
    await rig.rename("f", "g")
    await rig.drained()
    assert await rig.pread(handle) == b"bytes"
    rig.close(handle)
    rig.check_clean()


async def test_unlink_while_the_first_upload_is_under_way(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"data")
    with rig.line.held("put") as gate:
        rig.core.changes.queue(rig.dirty()[0])
        await gate.arrived()
        await rig.unlink("f")
        assert await rig.ls() == []
    await idle(rig)
    await rig.drained()
    assert bench.listed() == []
    rig.check_clean()


async def test_rename_while_the_first_upload_is_under_way(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"data")
    with rig.line.held("put") as gate:
        rig.core.changes.queue(rig.dirty()[0])
        await gate.arrived()
        await rig.rename("f", "g")
    await idle(rig)
    await rig.drained()
    assert bench.contents() == {"g": b"data"}
    assert await rig.ls() == ["g"]
    rig.check_clean()


@pytest.mark.parametrize("how", ["unlink", "rename over"])
async def test_fsync_ends_when_the_file_is_unlinked_meanwhile(bench: Bench, nursery: trio.Nursery, how: str) -> None:
    rig = await bench.rig()
    handle = await rig.create("f")
    await rig.files.write(handle, 0, b"data")
    await rig.put("g", b"g")
    with rig.line.held("put") as gate:
        results = await in_background(nursery, lambda: rig.files.fsync(handle))
        await gate.arrived()
        await (rig.unlink("f") if how == "unlink" else rig.rename("g", "f"))
    await until(lambda: bool(results), timeout_s=3)
    rig.close(handle)
    await rig.drained()
    rig.check_clean()


async def test_drain_ends_when_a_file_is_unlinked_meanwhile(bench: Bench, nursery: trio.Nursery) -> None:
    rig = await bench.rig()
    handle = await rig.create("f")
    await rig.files.write(handle, 0, b"data")
    with rig.line.held("put") as gate:
        results = await in_background(nursery, lambda: rig.core.syncer.arrivals.drain(give_up=True))
        await gate.arrived()
        await rig.unlink("f")
    await until(lambda: bool(results), timeout_s=3)
    assert results == [[]]
    rig.close(handle)
    await rig.drained()
    assert bench.listed() == []
    rig.check_clean()


async def test_written_while_it_uploads_is_sent_again_never_mixed(bench: Bench) -> None:
    rig = await bench.rig()
    handle = await rig.create("f")
    await rig.files.write(handle, 0, b"1" * 100)
    sent: list[bytes] = []
    with rig.line.held("put") as gate:
        rig.core.changes.queue(rig.dirty()[0])
        await gate.arrived()
        await rig.files.write(handle, 50, b"2" * 100)
        gate.release()
        await until(lambda: "f" in bench.listed())
        await idle(rig)
        sent.append(bench.data("f"))
        assert await rig.pread(handle) == b"1" * 50 + b"2" * 100
        rig.core.changes.queue(rig.dirty()[0])
        await gate.arrived()
        await rig.files.write(handle, 0, b"3")
        gate.release()
        await idle(rig)
        sent.append(bench.data("f"))
        assert await rig.pread(handle) == b"3" + b"1" * 49 + b"2" * 100
    rig.close(handle)
    await rig.drained()
    sent.append(bench.data("f"))
    assert sent == [b"1" * 100, b"1" * 50 + b"2" * 100, b"3" + b"1" * 49 + b"2" * 100]
    rig.check_clean()


async def test_truncated_while_it_uploads(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"1" * 100)
    with rig.line.held("put") as gate:
        rig.core.changes.queue(rig.dirty()[0])
        await gate.arrived()
        await rig.truncate("f", 10)
        await rig.truncate("f", 20)
    await idle(rig)
    assert await rig.cat("f") == b"1" * 10 + bytes(10)
    await rig.drained()
    assert bench.contents() == {"f": b"1" * 10 + bytes(10)}
    rig.check_clean()


async def test_versions_count_what_was_sent(bench: Bench) -> None:
    rig = await bench.rig()
    inode = await rig.put("f", b"1")
    assert inode.version > inode.synced_version
    await rig.drained()
    assert inode.version == inode.synced_version
    with rig.line.held("put") as gate:
        await rig.write("f", b"2")
        rig.core.changes.queue(inode)
        await gate.arrived()
        await rig.write("f", b"3")
    await idle(rig)
    assert inode.dirty
    assert bench.data("f") == b"2"
    bench.counted()
    await rig.drained()
    assert bench.counted() == {"put": 1}
    assert not inode.dirty
    await rig.drained()
    assert bench.counted() == {}


async def test_chmod_during_the_upload_is_sent_after_it(bench: Bench, copying: str) -> None:
    rig = await bench.rig()
    await rig.put("f", b"1")
    with rig.line.held("put") as gate:
        rig.core.changes.queue(rig.dirty()[0])
        await gate.arrived()
        await rig.chmod("f", 0o640)
    await idle(rig)
    bench.counted()
    await rig.drained()
    counts = bench.counted()
    assert sum(counts.pop(request, 0) for request in ("multipart_create", "multipart_copy", "get")) <= 2
    assert counts == {copying: 1}
    assert mode_in_bucket(bench, "f") == stat.S_IFREG | 0o640


# -- crashes


async def test_crash_between_copy_and_delete_of_a_rename(bench: Bench, nursery: trio.Nursery) -> None:
    rig = await bench.rig()
    await rig.put("a", b"data")
    await rig.drained()
    await rig.rename("a", "b")
    with rig.line.held("delete") as gate:
        await in_background(nursery, rig.drain)
        rig.core.changes.queue(rig.dirty()[0])
        await gate.arrived()
        assert bench.contents() == {"a": b"data", "b": b"data"}
        await rig.crash()
    await rig.start()
    assert await rig.ls() == ["b"]
    await rig.drained()
    assert bench.contents() == {"b": b"data"}
    assert await rig.ls() == ["b"]
    rig.check_clean()


@pytest.mark.parametrize("operation", ["put", "copy", "self-copy", "delete", "mkdir", "over"])
async def test_crash_after_a_request_whose_answer_was_lost(bench: Bench, operation: str, copying: str) -> None:
    """The operation is repeated, or its result recognised; no conflict file, nothing left over."""
    rig = await bench.rig()
    await rig.put("f", b"data")
    await rig.drained()
    expected = {"f": b"data"}
    request = operation
    match operation:
        case "put":
            await rig.put("g", b"new")
            expected["g"] = b"new"
        case "copy":
            await rig.rename("f", "g")
            expected = {"g": b"data"}
            request = copying
        case "self-copy":
            await rig.chmod("f", 0o600)
            request = copying
        case "delete":
            await rig.unlink("f")
            expected = {}
        case "mkdir":
            await rig.mkdir("d")
            expected["d/"] = b""
            request = "put"
        case "over":
            await rig.put("g", b"new")
            await rig.rename("g", "f")
            expected = {"f": b"new"}
            request = "put"
    rig.line.schedule(request, LOST)
    rig.line.quiet = False
    for inode in rig.dirty():
        rig.core.changes.queue(inode)
    await until(lambda: rig.line.failures[request] == 1)
    await rig.restart()
    await rig.drained()
    assert bench.contents() == expected
    assert await rig.ls() == sorted(key.rstrip("/") for key in expected)
    rig.check_clean()


async def test_bytes_written_after_the_crash_survive_a_recognised_upload(bench: Bench) -> None:
    """The token of the upload that arrived says nothing of what was written since."""
    rig = await bench.rig()
    await rig.put("f", b"first")
    rig.line.schedule("put", LOST)
    rig.line.quiet = False
    rig.core.changes.queue(rig.dirty()[0])
    await until(lambda: rig.line.failures["put"] == 1)
    await rig.restart()
    await rig.write("f", b"SECOND", 2)
    await rig.drained()
    assert await rig.cat("f") == b"fiSECOND"
    assert bench.contents() == {"f": b"fiSECOND"}
    rig.check_clean()


async def test_set_aside_is_not_left_behind_by_a_crash(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"old")
    await rig.drained()
    handle = await rig.open("f")
    await rig.unlink("f")
    await rig.put("f", b"new")
    await rig.drain()
    assert len([key for key in bench.listed() if key.startswith(".s3fuse/")]) == 1
    assert await rig.pread(handle) == b"old"
    await rig.restart()
    await rig.drained()
    assert bench.contents() == {"f": b"new"}
    rig.check_clean()


async def test_set_aside_whose_answer_was_lost_is_not_left_behind(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"old")
    await rig.drained()
    handle = await rig.open("f")
    await rig.unlink("f")
    await rig.put("f", b"new")
    rig.line.schedule("copy", LOST)
    rig.line.quiet = False
    await rig.drain(rounds=3)
    assert await rig.pread(handle) == b"old"
    rig.close(handle)
    await rig.drained()
    assert bench.contents() == {"f": b"new"}


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("then", ["unlink", "rename", "rename over"])
async def test_put_whose_answer_was_lost_and_the_name_goes(bench: Bench, then: str, crash: bool) -> None:
    """The object that may be in the bucket does not come back under a name that is gone."""
    rig = await bench.rig()
    await rig.put("f", b"data")
    await rig.put("over", b"over")
    rig.line.schedule("put", LOST)
    rig.line.quiet = False
    rig.core.changes.queue(await rig.walk("f"))
    await until(lambda: rig.line.failures["put"] == 1)
    await idle(rig)
    if crash:
        await rig.restart()
    expected = {"over": b"over"}
    match then:
        case "unlink":
            await rig.unlink("f")
        case "rename":
            await rig.rename("f", "g")
            expected["g"] = b"data"
        case "rename over":
            await rig.rename("over", "f")
            expected = {"f": b"over"}
    await rig.drained()
    assert bench.contents() == expected
    assert await rig.ls() == sorted(expected)
    rig.check_clean()


async def test_copy_whose_answer_was_lost_and_another_rename(bench: Bench, copying: str) -> None:
    rig = await bench.rig()
    await rig.put("a", b"data")
    await rig.drained()
    await rig.rename("a", "b")
    rig.line.schedule(copying, LOST)
    rig.line.quiet = False
    rig.core.changes.queue(rig.dirty()[0])
    await until(lambda: rig.line.failures[copying] == 1)
    await idle(rig)
    await rig.rename("b", "c")
    await rig.drained()
    assert bench.contents() == {"c": b"data"}


async def test_copy_whose_answer_was_lost_and_a_chmod(bench: Bench, copying: str) -> None:
    rig = await bench.rig()
    await rig.put("a", b"data")
    await rig.drained()
    await rig.rename("a", "b")
    rig.line.schedule(copying, LOST)
    rig.line.quiet = False
    rig.core.changes.queue(rig.dirty()[0])
    await until(lambda: rig.line.failures[copying] == 1)
    await idle(rig)
    await rig.chmod("b", 0o600)
    await rig.drained()
    assert bench.contents() == {"b": b"data"}
    assert mode_in_bucket(bench, "b") == stat.S_IFREG | 0o600


async def test_removed_directory_stays_removed_after_a_crash(bench: Bench) -> None:
    rig = await bench.rig(ttl_s=0.0)
    await rig.mkdir("d")
    await rig.put("d/f", b"data")
    await rig.drained()
    await rig.unlink("d/f")
    await rig.rmdir("d")
    rig.paused = True
    await rig.restart()
    assert await rig.ls() == []
    assert not await rig.exists("d")
    rig.paused = False
    await rig.restart()
    await rig.drained()
    assert bench.listed() == []
    assert await rig.ls() == []


async def test_recovered_rename_of_a_tree(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.mkdir("d")
    await rig.mkdir("d/s")
    await rig.put("d/s/f", b"data")
    await rig.drained()
    await rig.rename("d", "e")
    await rig.put("e/s/g", b"more")
    rig.paused = True
    await rig.restart()
    assert await rig.ls() == ["e"]
    assert await rig.ls("e/s") == ["f", "g"]
    assert await rig.cat("e/s/f") == b"data"
    rig.paused = False
    await rig.restart()
    await rig.drained()
    assert bench.contents() == {"e/": b"", "e/s/": b"", "e/s/f": b"data", "e/s/g": b"more"}
    rig.check_clean()


# -- others


async def test_two_writers_of_a_new_name(bench: Bench, expected_log: list[str]) -> None:
    expected_log.append(CONFLICT)
    one, two = await bench.rig("one"), await bench.rig("two")
    await one.put("f", b"one")
    await two.put("f", b"two")
    await one.fsync("f")
    with fails(errno.EIO):
        await two.fsync("f")
    await two.drained()
    keys = bench.listed()
    assert keys[0] == "f"
    assert keys[1].startswith("f.conflict-")
    assert list(bench.contents().values()) == [b"one", b"two"]
    assert len(two.core.syncer.conflicts.resolved) == 1
    assert await two.ls() == keys
    assert await two.cat("f") == b"one"
    one.check_clean()
    two.check_clean()


async def test_two_writers_of_one_version(bench: Bench, clock: Clock, expected_log: list[str]) -> None:
    expected_log.append(CONFLICT)
    one, two = await bench.rig("one"), await bench.rig("two")
    await one.put("f", b"base")
    await one.drained()
    assert await two.cat("f") == b"base"
    await one.write("f", b"one!")
    await two.write("f", b"two!")
    await one.fsync("f")
    with fails(errno.EIO):
        await two.fsync("f")
    await two.drained()
    assert list(bench.contents().values()) == [b"one!", b"two!"]
    clock.advance(2000)
    assert await two.cat("f") == b"one!"
    assert await one.ls() == bench.listed()
    two.check_clean()


async def test_fsync_of_the_directory_tells_of_a_conflict(bench: Bench, expected_log: list[str]) -> None:
    expected_log.append(CONFLICT)
    rig = await bench.rig()
    for name in "abc":
        await rig.put(name, b"ours")
    await bench.upload("a", b"theirs")
    with fails(errno.EIO):
        await rig.files.sync_directory(rig.core.inodes.root)
    await rig.drained()
    assert bench.data("a") == b"theirs"
    assert len(bench.listed()) == 4


@pytest.mark.parametrize("queued", ["tree first", "victim first"])
async def test_rename_over_does_not_destroy_a_version_that_nobody_here_saw(
    bench: Bench, queued: str, expected_log: list[str]
) -> None:
    expected_log.append(CONFLICT)
    rig = await bench.rig()
    await rig.put("f", b"base")
    await rig.drained()
    await rig.put("f.tmp", b"ours")
    await rig.rename("f.tmp", "f")
    await bench.upload("f", b"theirs")
    dirty = sorted(rig.dirty(), key=lambda inode: inode.linked, reverse=queued == "tree first")
    for inode in dirty:
        rig.core.changes.queue(inode)
        await idle(rig)
        await until(lambda: not rig.core.changes.in_flight)
    await rig.drained()
    assert sorted(bench.contents().values()) == [b"ours", b"theirs"]
    assert bench.data("f") == b"theirs"
    rig.check_clean()


async def test_unlink_does_not_destroy_a_version_that_nobody_here_saw(
    bench: Bench, clock: Clock, expected_log: list[str]
) -> None:
    expected_log.append("")
    rig = await bench.rig()
    await rig.put("f", b"base")
    await rig.drained()
    await rig.unlink("f")
    await bench.upload("f", b"theirs")
    await rig.drained()
    assert bench.contents() == {"f": b"theirs"}
    clock.advance(2000)
    assert await rig.cat("f") == b"theirs"
    rig.check_clean()


async def test_source_of_a_rename_that_somebody_replaced_meanwhile(
    bench: Bench, nursery: trio.Nursery, expected_log: list[str]
) -> None:
    """After our copy and before the look that precedes our delete; what comes in between those two S3 cannot tell."""
    expected_log.append(CONFLICT)
    rig = await bench.rig()
    await rig.put("a", b"ours")
    await rig.drained()
    await rig.rename("a", "b")
    with rig.line.held("head") as gate:
        nursery.start_soon(rig.drain)
        await gate.arrived()
        while "b" not in bench.listed():  # looks that are not that one
            gate.release()
            await gate.arrived()
        assert bench.listed() == ["a", "b"]
        await bench.upload("a", b"theirs")
    await rig.drained()
    assert bench.contents() == {"a": b"theirs", "b": b"ours"}
    rig.check_clean()


async def test_theirs_is_shown_after_we_stepped_aside(bench: Bench, clock: Clock, expected_log: list[str]) -> None:
    """Also where the file was renamed away and back before."""
    expected_log.append(CONFLICT)
    rig = await bench.rig()
    await rig.put("a", b"base")
    await rig.drained()
    await rig.rename("a", "b")
    await rig.rename("b", "a")
    await rig.write("a", b"ours", flags=os.O_TRUNC)
    await bench.upload("a", b"theirs")
    await rig.drain(rounds=3)
    clock.advance(2000)
    assert await rig.ls() == bench.listed()
    assert await rig.cat("a") == b"theirs"
    await rig.drained()
    rig.check_clean()


async def test_deleted_elsewhere_and_written_here(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"base")
    await rig.drained()
    await rig.write("f", b"whole new", flags=os.O_TRUNC)
    await bench.remove("f")
    await rig.drained()
    assert bench.contents() == {"f": b"whole new"}
    rig.check_clean()


async def test_metadata_change_meets_another_version(bench: Bench, clock: Clock) -> None:
    """The attributes go onto the new version; an open handle keeps its bytes or gets ESTALE."""
    rig = await bench.rig()
    await rig.put("f", b"old version")
    await rig.drained()
    handle = await rig.open("f", os.O_RDWR)
    await rig.files.write(handle, 0, b"O")
    await rig.drained()
    await rig.chmod("f", 0o600)
    await bench.upload("f", b"theirs")
    await rig.drained()
    assert bench.contents() == {"f": b"theirs"}
    assert mode_in_bucket(bench, "f") == stat.S_IFREG | 0o600
    found = (await gather([lambda: rig.pread(handle)]))[0]
    assert found == b"Old version" or (isinstance(found, OSError) and found.errno == errno.ESTALE)
    rig.close(handle)
    clock.advance(2000)
    assert await rig.cat("f") == b"theirs"


async def test_metadata_change_keeps_what_is_not_ours(bench: Bench, copying: str) -> None:
    rig = await bench.rig()
    await bench.upload("f", b"data", colour="green", mtime="12.5")
    await rig.chmod("f", 0o600)
    bench.counted()
    await rig.drained()
    counts = bench.counted()
    assert counts.pop("head", 0) <= 1
    assert sum(counts.pop(request, 0) for request in ("multipart_create", "multipart_copy", "get")) <= 2
    assert counts == {copying: 1}
    info = await bench.info("f")
    assert info.metadata is not None
    assert info.metadata["colour"] == "green"
    assert info.metadata["mtime"] == "12.500000000"
    assert info.metadata["mode"] == str(stat.S_IFREG | 0o600)
    assert info.headers == {"content-type": "text/x-theirs"}
    await rig.write("f", b"D")
    await rig.drained()
    info = await bench.info("f")
    assert info.metadata is not None
    assert info.metadata["colour"] == "green"
    assert info.headers == {"content-type": "text/x-theirs"}
    await rig.rename("f", "g")
    await rig.drained()
    info = await bench.info("g")
    assert info.metadata is not None
    assert info.metadata["colour"] == "green"
    assert info.headers == {"content-type": "text/x-theirs"}
    rig.check_clean()


async def test_objects_left_behind_by_a_moved_directory_go_together(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, copying: str
) -> None:
    monkeypatch.setattr(changes, "GATHER_S", 3600.0)
    for number in range(50):
        await bench.upload(f"old/{number:02}", b"x", mode="33188")
    rig = await bench.rig()
    await rig.rename("old", "new")
    for inode in rig.dirty():
        rig.core.changes.queue(inode)
    await until(lambda: bench.store.requests[copying] == 50 and not rig.core.changes.in_flight)
    counted = bench.counted()
    assert "delete" not in counted
    assert "delete_many" not in counted
    dues = [due for due, _, _ in rig.core.changes._timed]
    assert len(dues) == 50
    assert max(dues) - min(dues) < 0.001
    assert await rig.drain() == []
    counted = bench.counted()
    assert counted["delete_many"] == 1
    assert counted["list"] <= 5
    assert sum(counted.values()) <= 20  # ten are looked at one by one
    assert bench.listed() == [f"new/{number:02}" for number in range(50)]


async def test_a_drain_ends_when_what_moves_leave_behind_is_gone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "GATHER_S", 3600.0)
    await bench.upload("old", b"x", mode="33188")
    rig = await bench.rig()
    await rig.rename("old", "new")
    await rig.drain()
    assert bench.listed() == ["new"]
    assert rig.dirty() == []


@pytest.mark.parametrize("what", ["file", "symlink", "fifo", "directory"])
async def test_rename_of_a_tree_keeps_metadata_where_listings_have_none(bench: Bench, what: str) -> None:
    bench.store = MemoryStore(SEAWEEDFS)
    rig = await bench.rig("one")
    await rig.mkdir("d")
    match what:
        case "file":
            await rig.put("d/x", b"data")
            await rig.chmod("d/x", 0o600)
        case "symlink":
            await rig.symlink("d/x", b"target")
        case "fifo":
            await rig.mkfifo("d/x")
        case "directory":
            await rig.mkdir("d/x", 0o700)
    before = (await rig.walk("d/x")).mode
    await rig.drained()
    other = await bench.rig("two")
    await other.rename("d", "e")
    await other.drained()
    fresh = await bench.rig("three")
    assert oct((await fresh.walk("e/x")).mode) == oct(before)
    assert oct((await other.walk("e/x")).mode) == oct(before)


# -- large files


@pytest.mark.usefixtures("_small_parts")
async def test_small_change_in_a_large_file_is_copied_on_the_server(bench: Bench) -> None:
    rig = await bench.rig(limits=SMALL_LIMITS)
    data = os.urandom(100_000)
    await rig.put("f", data)
    bench.counted()
    await rig.drained()
    counts = bench.counted()
    assert counts == {"multipart_create": 1, "multipart_put": -(-100_000 // 8192), "multipart_complete": 1}
    assert bench.data("f") == data
    await rig.write("f", b"changed", 50_000)
    await rig.drained()
    counts = bench.counted()
    assert counts["multipart_copy"] >= 4
    assert counts["multipart_put"] <= 2
    assert counts["multipart_complete"] == 1
    assert counts.get("put", 0) == 0
    expected = data[:50_000] + b"changed" + data[50_007:]
    assert bench.data("f") == expected
    assert await rig.cat("f") == expected
    assert not bench.store._uploads
    rig.check_clean()


@pytest.mark.usefixtures("_small_parts")
async def test_parts_that_have_arrived_wait_no_more(bench: Bench) -> None:
    """So that the progress of a drain moves while there is one large file."""
    rig = await bench.rig(limits=SMALL_LIMITS)
    await rig.put("f", os.urandom(100_000))

    def pending() -> tuple[int, int]:
        said = rig.mount.answers.status()["pending"]
        return said["files"], said["bytes"]

    assert pending() == (1, 100_000)
    async with trio.open_nursery() as nursery:
        with rig.line.held("multipart_complete") as gate:
            nursery.start_soon(rig.drained)
            await gate.arrived()
            assert pending() == (1, 0)
            gate.open()
    await rig.write("f", b"more", 100_000)
    assert pending() == (1, 4)
    await rig.drained()
    assert pending() == (0, 0)


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("operation", ["multipart_create", "multipart_put", "multipart_complete"])
@pytest.mark.parametrize("lost", [False, True])
async def test_failed_multipart_upload_is_aborted_and_repeated(bench: Bench, operation: str, lost: bool) -> None:
    rig = await bench.rig(limits=SMALL_LIMITS)
    data = os.urandom(50_000)
    await rig.put("f", data)
    rig.line.schedule(operation, LOST if lost else refused())
    rig.line.quiet = False
    assert await rig.drain()
    await rig.drained()
    assert bench.contents() == {"f": data}
    await until(lambda: not bench.store._uploads)  # where nobody knows its id it is looked for
    rig.check_clean()


async def test_holes_and_truncations_of_a_base(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"x" * 100)
    await rig.drained()
    await rig.truncate("f", 10)
    await rig.truncate("f", 30)
    await rig.write("f", b"y", 50)
    expected = b"x" * 10 + bytes(40) + b"y"
    assert await rig.cat("f") == expected
    await rig.drained()
    assert bench.contents() == {"f": expected}
    rig.check_clean()


# -- errors


async def test_fsync_fails_while_the_bucket_does_and_then_not(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"data")
    rig.line.schedule("put", refused())
    rig.line.quiet = False
    with pytest.raises(OSError, match="made to fail"):
        await rig.fsync("f")
    await rig.fsync("f")
    assert bench.contents() == {"f": b"data"}
    rig.check_clean()


async def test_what_is_refused_for_good_does_not_hold_up_the_rest(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"data")
    await rig.put("g", b"data")
    rig.line.schedule("put", refused(AccessDenied("no")), refused(AccessDenied("no")))
    rig.line.quiet = False
    with trio.fail_after(5):
        failed = await rig.core.syncer.arrivals.drain()
    assert len(failed) == 2
    assert all(inode.error for inode in failed)
    await rig.drained()
    assert bench.listed() == ["f", "g"]


@pytest.mark.parametrize("refusal", [AccessDenied("no"), Unavailable("away")])
async def test_drain_ends_where_the_next_file_of_a_name_cannot_be_sent(bench: Bench, refusal: StoreError) -> None:
    rig = await bench.rig()
    await rig.put("f", b"old")
    await rig.drained()
    await rig.unlink("f")
    await rig.put("f", b"new")
    rig.line.schedule("put", *[refused(refusal)] * 50)
    rig.line.quiet = False
    with trio.fail_after(3):
        failed = await rig.core.syncer.arrivals.drain(give_up=True)
    assert [inode.name for inode in failed if inode.linked] == ["f"]
    assert bench.contents() == {"f": b"old"}
    rig.line.quiet = True
    await rig.drained()
    assert bench.contents() == {"f": b"new"}
    rig.check_clean()


async def test_local_fsync_sends_nothing(bench: Bench) -> None:
    rig = await bench.rig(fsync_to="local")
    await rig.put("f", b"data")
    bench.counted()
    await rig.fsync("f")
    await rig.files.sync_directory(rig.core.inodes.root)
    assert bench.counted() == {}
    await rig.restart()
    assert await rig.cat("f") == b"data"


async def test_fsync_of_a_directory_sends_what_happened_in_it(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.mkdir("d")
    await rig.put("d/gone", b"1")
    await rig.put("d/moved", b"2")
    await rig.put("elsewhere", b"3")
    await rig.files.sync_directory(await rig.walk("d"))
    assert bench.listed() == ["d/", "d/gone", "d/moved"]
    await rig.unlink("d/gone")
    await rig.rename("d/moved", "moved")
    await rig.put("d/new", b"4")
    await rig.files.sync_directory(await rig.walk("d"))
    assert bench.listed() == ["d/", "d/new", "moved"]


async def test_writers_wait_at_the_dirty_limit(bench: Bench, nursery: trio.Nursery) -> None:
    rig = await bench.rig(dirty_size_bytes=1 << 20)
    await rig.put("big", bytes(1 << 20))
    handle = await rig.create("f")
    with rig.line.held("put") as gate:
        results = await in_background(nursery, lambda: rig.files.write(handle, 0, b"data"))
        await gate.arrived()
        assert not results
        assert rig.core.staging.staged_bytes == 1 << 20
    await until(lambda: bool(results))
    assert results == [4]
    rig.close(handle)
    await rig.drained()
    rig.check_clean()


async def test_encoded_attributes_come_back(bench: Bench) -> None:
    rig = await bench.rig("one")
    await rig.put("f", b"x")
    await rig.setxattr("f", b"user.colour", b"\0\xff")
    await rig.utimens("f", -1_500_000_001)
    await rig.symlink("l", b"to/\xff")
    await rig.drained()
    other = await bench.rig("two")
    inode = await other.walk("f")
    assert inode.mtime_ns == -1_500_000_001
    assert await other.attributes.getxattr(inode, b"user.colour") == b"\0\xff"
    assert (inode.uid, inode.gid) == (7, 8)
    assert await other.attributes.readlink(await other.walk("l")) == b"to/\xff"
    link = await bench.info("l")
    defaults = attrs.Defaults(0, 0, 0, 0)
    assert stat.S_ISLNK(attrs.decode(link.metadata, is_directory=False, modified_ns=0, defaults=defaults).mode)
    with pytest.raises(NotFound):
        await bench.info("missing")


async def test_a_new_directory_arrives_before_what_is_in_it(bench: Bench) -> None:
    """SeaweedFS loses a marker that comes at the same moment as the first object below it."""
    rig = await bench.rig()
    await rig.mkdir("d")
    await rig.mkdir("d/e")
    await rig.put("d/e/f", b"1")
    with rig.line.held("put") as gate:
        for inode in reversed(rig.core.changes.dirty.values()):
            rig.core.changes.queue(inode)
        await gate.arrived()
        assert bench.listed() == []
        gate.release()
        await gate.arrived()
        assert bench.listed() == ["d/"]
        gate.release()
        await gate.arrived()
        assert bench.listed() == ["d/", "d/e/"]
        gate.open()
    await rig.drained()
    assert bench.listed() == ["d/", "d/e/", "d/e/f"]


@pytest.mark.parametrize("way", ["renamed", "into it", "removed", "open"])
async def test_nothing_is_below_a_file_while_that_is_there(
    bench: Bench, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MinIO shows nothing of a directory while there is an object of its name."""
    await bench.upload("f", b"data")
    rig = await bench.rig(paused=True)
    put, copy = bench.store.put, bench.store.copy

    def checked(call: Any) -> Any:
        async def check(*args: Any, **kwargs: Any) -> Any:
            result = await call(*args, **kwargs)
            keys = bench.listed()
            below = [key for key in keys if key.startswith("f/")]
            assert not (below and "f" in keys), keys
            return result

        return check

    handle = await rig.open("f") if way == "open" else None
    if way in ("renamed", "into it"):
        await rig.rename("f", "g")
    else:
        await rig.unlink("f")
    await rig.mkdir("f")
    await rig.put("f/a", b"below")
    if way == "into it":
        await rig.rename("g", "f/g")
    else:
        monkeypatch.setattr(bench.store, "put", checked(put))
        monkeypatch.setattr(bench.store, "copy", checked(copy))
    monkeypatch.setattr(lateness, "LATE_S", 0.2)
    rig.core.changes.late.expect([("g", lateness.DELETE)])  # it has to wait for its place
    rig.mount.nursery.start_soon(rig.core.syncer.run)
    await rig.drain(rounds=12)
    contents = {"f/": b"", "f/a": b"below"}
    contents |= {"renamed": {"g": b"data"}, "into it": {"f/g": b"data"}}.get(way, {})
    if handle is not None:
        assert await rig.pread(handle) == b"data"
        rig.close(handle)
    await rig.drained()
    assert bench.contents() == contents


async def test_a_directory_made_anew_is_seen_while_what_was_below_the_old_one_is_still_to_go(bench: Bench) -> None:
    """Also once nothing is known of it any more: an error in a lookup has the kernel forget it."""
    rig = await bench.rig(ttl_s=0.0)
    await rig.mkdir("d")
    await rig.put("d/a", b"old")
    await rig.drained()
    await rig.unlink("d/a")
    await rig.rmdir("d")
    again = await rig.mkdir("d")
    rig.core.changes.queue(again)
    await until(lambda: not again.dirty)
    assert bench.listed() == ["d/", "d/a"]
    rig.forget()
    assert again.number not in rig.core.inodes.table
    assert await rig.exists("d")
    assert await rig.ls() == ["d"]
    assert await rig.ls("d") == []
    await rig.drained()
    assert bench.listed() == ["d/"]
    rig.check_clean()


async def test_a_marker_that_is_gone_already_takes_no_file_along(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """SeaweedFS deletes an empty file "n" when it is asked to delete "n/"; the delete may be one that is repeated."""
    rig = await bench.rig()
    directory = await rig.mkdir("n")
    await rig.drained()
    delete, delete_many = bench.store.delete, bench.store.delete_many

    async def one(key: str, **etag: Any) -> None:
        await delete(key)
        if key.endswith("/"):
            await delete(key[:-1])

    async def many(keys: Any, **etags: Any) -> Any:
        return await delete_many([*keys, *(key[:-1] for key in keys if key.endswith("/"))])

    await rig.rmdir("n")
    rig.core.changes.queue(directory, 0.3)
    await delete("n/")  # what an attempt did whose answer was lost
    monkeypatch.setattr(bench.store, "delete", one)
    monkeypatch.setattr(bench.store, "delete_many", many)
    file = await rig.put("n", b"")
    rig.core.changes.queue(file)
    await until(lambda: not file.dirty)
    assert directory.dirty
    await rig.drained()
    assert bench.listed() == ["n"]
    rig.check_clean()


async def test_an_empty_directory_without_marker_gives_way_to_a_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SeaweedFS keeps one where an object was the last below it, lists it as a prefix and refuses the file."""
    rig = await bench.rig()
    hidden = {"n/"}
    head, put, delete = bench.store.head, bench.store.put, bench.store.delete
    list_page = bench.store.list_page

    async def listing(prefix: str, **options: Any) -> Any:
        page = await list_page(prefix, **options)
        return replace(page, objects=(ObjectInfo(prefix, 0, "", 0), *page.objects)) if prefix in hidden else page

    async def heading(key: str) -> Any:
        return ObjectInfo(key, 0, UNMADE_ETAG, 0) if key in hidden else await head(key)

    async def putting(key: str, *args: Any, **kwargs: Any) -> Any:
        if f"{key}/" in hidden:
            raise PreconditionFailed("there is a directory", key)
        return await put(key, *args, **kwargs)

    async def deleting(key: str, **etag: Any) -> None:
        hidden.discard(key)
        await delete(key)

    monkeypatch.setattr(bench.store, "list_page", listing)
    monkeypatch.setattr(bench.store, "head", heading)
    monkeypatch.setattr(bench.store, "put", putting)
    monkeypatch.setattr(bench.store, "delete", deleting)
    await rig.put("n", b"")
    await rig.drained()
    assert bench.contents() == {"n": b""}
    assert not hidden
    rig.check_clean()


def refuse_files_over_directories(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has a file or a directory of a name, as SeaweedFS."""
    put, copy = bench.store.put, bench.store.copy

    def check(key: str) -> None:
        if any(other.startswith(f"{key}/") for other in bench.listed()):
            raise PreconditionFailed("there is a directory", key)

    async def putting(key: str, *args: Any, **kwargs: Any) -> Any:
        check(key)
        return await put(key, *args, **kwargs)

    async def copying(source: str, target: str, **kwargs: Any) -> Any:
        check(target)
        return await copy(source, target, **kwargs)

    monkeypatch.setattr(bench.store, "put", putting)
    monkeypatch.setattr(bench.store, "copy", copying)


@pytest.mark.parametrize("theirs", ["n/", "n/theirs"])
@pytest.mark.parametrize("how", ["new", "renamed"])
async def test_a_file_steps_aside_for_a_directory_of_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, expected_log: list[str], theirs: str, how: str
) -> None:
    expected_log.append("n/ was changed by somebody else")
    refuse_files_over_directories(bench, monkeypatch)
    rig = await bench.rig()
    if how == "renamed":
        await rig.put("old", b"ours")
        await rig.drained()
    assert not await rig.exists("n")
    await bench.upload(theirs, b"")
    if how == "renamed":
        await rig.rename("old", "n")
    else:
        await rig.put("n", b"ours")
    await rig.drained()
    (ours,) = (key for key in bench.listed() if key != theirs)
    assert ours.startswith("n.conflict-")
    assert bench.data(ours) == b"ours"
    assert set(await rig.ls()) == {"n", ours}
    rig.check_clean()


async def test_a_file_waits_for_what_is_still_in_a_removed_directory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_files_over_directories(bench, monkeypatch)
    rig = await bench.rig()
    await rig.mkdir("n")
    below = await rig.put("n/in it", b"old")
    await rig.drained()
    await rig.unlink("n/in it")
    await rig.rmdir("n")
    with rig.line.held("delete") as gate:
        rig.core.changes.queue(below)
        await gate.arrived()
        file = await rig.put("n", b"new")
        rig.core.changes.queue(file)
        bench.counted()
        await trio.sleep(0.2)
        assert bench.counted().get("put", 0) == 0
        assert file.dirty
    await rig.drained()
    assert bench.contents() == {"n": b"new"}
    rig.check_clean()


async def test_a_directory_is_not_deleted_before_a_write_below_it_has_ended(bench: Bench) -> None:
    """SeaweedFS would make it anew for that, and keep it for minutes."""
    rig = await bench.rig()
    directory = await rig.mkdir("d")
    await rig.drained()
    below = await rig.put("d/f", b"body")
    rig.line.quiet = False
    with rig.line.held("put") as gate:
        rig.core.changes.queue(below)
        await gate.arrived()
        await rig.unlink("d/f")
        await rig.rmdir("d")
        rig.core.changes.queue(directory)
        await trio.sleep(0.2)
        assert bench.listed() == ["d/"]
    await rig.drained()
    assert bench.listed() == []
    rig.check_clean()


async def test_a_marker_takes_no_empty_file_along_that_was_renamed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SeaweedFS deletes an empty file "n" for "n/" also while that file's object still has to follow its new name."""
    rig = await bench.rig()
    directory = await rig.mkdir("n")
    await rig.drained()
    delete, delete_many = bench.store.delete, bench.store.delete_many

    async def one(key: str, **etag: Any) -> None:
        await delete_many([key, *([key[:-1]] if key.endswith("/") else [])])

    await rig.rmdir("n")
    rig.core.changes.queue(directory, 3600.0)
    await delete("n/")
    monkeypatch.setattr(bench.store, "delete", one)
    file = await rig.put("n", b"")
    rig.core.changes.queue(file)
    await until(lambda: not file.dirty)
    await rig.rename("n", "m")
    rig.core.changes.queue(directory)
    await until(lambda: not directory.dirty)
    await rig.drained()
    assert bench.listed() == ["m"]
    rig.check_clean()


async def test_a_conflict_at_the_longest_key_is_resolved(bench: Bench) -> None:
    """A marker of that name would be longer than S3 allows: nobody may ask for it."""
    rig = await bench.rig()
    folders = ["d" * 254] * 4
    for depth in range(1, 5):
        await rig.mkdir("/".join(folders[:depth]))
    path = "/".join([*folders, "long"])
    assert len(path) == 1024
    await rig.put(path, b"old")
    await rig.drained()
    await bench.store.delete(path)
    await rig.write(path, b"new", flags=os.O_TRUNC)
    await rig.drained()
    assert bench.data(path) == b"new"
    rig.check_clean()
