"""Kills at the worst moment: an operation has done its work in the bucket, and nobody has heard of it."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse.errors import AccessDenied, StoreError
from s3fuse.namespace import lateness
from s3fuse.namespace.changes import Changes
from s3fuse.store.faulty import LOST
from s3fuse.writing import leftovers
from tests.engine.rig import SMALL_LIMITS, Bench, Rig, fails, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def unheard(bench: Bench, *operations: str) -> Iterator[trio.Event]:
    """The bucket does what is asked, and the answer never comes; the event tells that it has been done."""
    done = trio.Event()

    def silent(work: Any) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            await work(*args, **kwargs)
            done.set()
            await trio.sleep_forever()

        return call

    with pytest.MonkeyPatch.context() as patch:
        for operation in operations:
            patch.setattr(bench.store, operation, silent(getattr(bench.store, operation)))
        yield done


async def begin(rig: Rig, done: trio.Event) -> None:
    """Everything dirty is asked for, and the unheard operation has done its work."""
    for inode in rig.dirty():
        rig.core.changes.queue(inode)
    with trio.fail_after(5):
        await done.wait()


async def test_removed_while_its_first_upload_is_under_way(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"data")
    with unheard(bench, "put") as done:
        await begin(rig, done)
        await rig.unlink("f")
        assert bench.listed() == ["f"]
        await rig.crash()
    await rig.start()
    assert await rig.ls() == []
    await rig.drained()
    assert bench.listed() == []
    rig.check_clean()


async def test_removed_while_it_is_overwritten(bench: Bench) -> None:
    await bench.upload("f", b"old")
    rig = await bench.rig()
    await rig.write("f", b"new!", flags=os.O_TRUNC)
    with unheard(bench, "put") as done:
        await begin(rig, done)
        await rig.unlink("f")
        await rig.crash()
    assert bench.contents() == {"f": b"new!"}
    await rig.start()
    await rig.drained()
    assert bench.listed() == []


async def test_renamed_while_its_first_upload_is_under_way(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"data")
    with unheard(bench, "put") as done:
        await begin(rig, done)
        await rig.rename("f", "g")
        await rig.crash()
    assert bench.listed() == ["f"]
    await rig.start()
    await rig.drained()
    assert bench.contents() == {"g": b"data"}
    rig.check_clean()


@pytest.mark.parametrize("truncate", [False, True])
async def test_renamed_while_it_is_overwritten(bench: Bench, truncate: bool) -> None:
    """Also where bytes of the new version are only in the object that was overwritten."""
    await bench.upload("f", b"old data")
    rig = await bench.rig()
    await rig.write("f", b"NEW", flags=os.O_TRUNC if truncate else 0)
    with unheard(bench, "put") as done:
        await begin(rig, done)
        await rig.rename("f", "g")
        await rig.crash()
    await rig.start()
    await rig.drained()
    assert bench.contents() == {"g": b"NEW" if truncate else b"NEW data"}
    rig.check_clean()


async def test_removed_while_it_is_renamed(bench: Bench, copying: str) -> None:
    await bench.upload("f", b"data")
    rig = await bench.rig()
    await rig.rename("f", "g")
    with unheard(bench, copying) as done:
        await begin(rig, done)
        await rig.unlink("g")
        await rig.crash()
    assert bench.listed() == ["f", "g"]
    await rig.start()
    await rig.drained()
    assert bench.listed() == []
    rig.check_clean()


async def test_renamed_again_while_it_is_renamed(bench: Bench, copying: str) -> None:
    await bench.upload("f", b"data")
    rig = await bench.rig()
    await rig.rename("f", "g")
    with unheard(bench, copying) as done:
        await begin(rig, done)
        await rig.rename("g", "h")
        await rig.crash()
    await rig.start()
    await rig.drained()
    assert bench.contents() == {"h": b"data"}
    rig.check_clean()


async def test_directory_removed_while_it_is_made(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.mkdir("d")
    with unheard(bench, "put") as done:
        await begin(rig, done)
        await rig.rmdir("d")
        await rig.crash()
    assert bench.listed() == ["d/"]
    await rig.start()
    await rig.drained()
    assert bench.listed() == []


async def test_what_others_put_at_the_name_stays(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"data")
    with unheard(bench, "put") as done:
        await begin(rig, done)
        await rig.unlink("f")
        await rig.crash()
    await bench.upload("f", b"theirs")
    await rig.start()
    await rig.drained()
    assert bench.contents() == {"f": b"theirs"}


@pytest.fixture
def expected_log() -> list[str]:
    return [r"was changed by somebody else before it could be deleted"]


def at_each(patch: pytest.MonkeyPatch, rig: Rig, owner: type, name: str, folder: Path) -> list[Path]:
    """Copies of the cache directory as a kill at each call of a method would leave it."""
    work = getattr(owner, name)
    copies: list[Path] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        copies.append(folder / f"copy{len(copies)}")
        shutil.copytree(rig.cache, copies[-1])
        return work(*args, **kwargs)

    patch.setattr(owner, name, call)
    return copies


@pytest.mark.parametrize("size", [10, 200_000])
async def test_rename_over_another_file_is_one_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    rig = await bench.rig()
    await rig.put("old", b"o" * size)
    await rig.put("new", b"n" * size)
    copies = at_each(monkeypatch, rig, Changes, "moved", tmp_path)
    await rig.rename("new", "old")
    (copy,) = copies
    await rig.restart(copy)
    assert await rig.cat("old") == b"o" * size
    assert await rig.cat("new") == b"n" * size
    await rig.drained()
    assert bench.contents() == {"old": b"o" * size, "new": b"n" * size}


async def test_bytes_are_there_until_the_journal_does_not_name_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rig = await bench.rig()
    await rig.put("f", b"x" * 200_000)
    copies = at_each(monkeypatch, rig, Changes, "synced", tmp_path)
    await rig.drained()
    await rig.restart(copies[0])
    assert await rig.cat("f") == b"x" * 200_000
    await rig.drained()
    assert bench.contents() == {"f": b"x" * 200_000}


# -- multipart uploads


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("operation", ["multipart_create", "multipart_put", "multipart_complete"])
async def test_leftover_of_a_crash_is_aborted(bench: Bench, operation: str) -> None:
    rig = await bench.rig(limits=SMALL_LIMITS)
    data = os.urandom(50_000)
    await rig.put("f", data)
    theirs = await bench.store.multipart_create("other", metadata={}, headers={})
    with unheard(bench, operation) as done:
        await begin(rig, done)
        await rig.unlink("f")  # so that nothing else brings it to an end
        await rig.crash()
    assert len(bench.store._uploads) == (1 if operation == "multipart_complete" else 2)
    await rig.start()
    await until(lambda: set(bench.store._uploads) == {theirs})
    await rig.drained()
    await until(lambda: bench.listed() == [])


@pytest.mark.usefixtures("_small_parts")
async def test_uploads_that_this_process_begins_are_not_leftovers(bench: Bench) -> None:
    rig = await bench.rig(limits=SMALL_LIMITS)
    data = os.urandom(50_000)
    await rig.put("f", data)
    with unheard(bench, "multipart_create") as done:
        await begin(rig, done)
        await rig.crash()
    await rig.start()
    with rig.line.held("multipart_complete"):
        rig.core.changes.queue(rig.dirty()[0])
        await until(lambda: len(bench.store._uploads) == 2 or rig.core.syncer.uploads.running != {})
        await until(lambda: len(bench.store._uploads) == 1)
        assert await rig.core.syncer.uploads._end(next(iter(rig.core.syncer.uploads.left.values()))) is False
    await rig.drained()
    assert bench.contents() == {"f": data}
    assert not bench.store._uploads


@pytest.mark.usefixtures("_small_parts")
async def test_uploads_of_others_under_the_same_key_stay(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that began before ours was asked for, or long after it."""
    old = await bench.store.multipart_create("f", metadata={}, headers={})
    bench.store._uploads[old].initiated_ns -= 10 * 10**9
    rig = await bench.rig(limits=SMALL_LIMITS)
    await rig.put("f", os.urandom(50_000))
    with unheard(bench, "multipart_create") as done:
        await begin(rig, done)
        await rig.unlink("f")
        await rig.crash()
    new = await bench.store.multipart_create("f", metadata={}, headers={})
    bench.store._uploads[new].initiated_ns += 100 * 10**9
    await rig.start()
    await until(lambda: set(bench.store._uploads) == {old, new})
    monkeypatch.setattr(leftovers, "LOOK_S", 0.0)
    monkeypatch.setattr(leftovers, "SLACK_S", 0.0)
    rig.core.syncer.uploads._wake.set()
    await until(lambda: not rig.core.syncer.uploads.left)
    assert set(bench.store._uploads) == {old, new}
    assert rig.journal.uploads() == []


@pytest.mark.usefixtures("_small_parts")
async def test_leftovers_are_tried_again_when_the_server_is_away(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leftovers, "RETRY_S", 0.001)
    rig = await bench.rig(limits=SMALL_LIMITS)
    await rig.put("f", os.urandom(50_000))
    with unheard(bench, "multipart_put") as done:
        await begin(rig, done)
        await rig.unlink("f")
        await rig.crash()
    asked = 0
    work = bench.store.multipart_abort

    async def away(key: str, upload_id: str) -> None:
        nonlocal asked
        asked += 1
        if asked < 5:
            raise StoreError("away", key)
        await work(key, upload_id)

    monkeypatch.setattr(bench.store, "multipart_abort", away)
    await rig.start()
    await until(lambda: not bench.store._uploads)
    assert asked == 5


# -- behind what fails


@contextmanager
def refusing(bench: Bench, operation: str, key: str) -> Iterator[None]:
    """The operation is refused for one key, its first argument."""
    work = getattr(bench.store, operation)

    async def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        if key == first or (isinstance(first, list) and key in first):
            raise AccessDenied(f"{operation} {key}: refused", key)
        return await work(first, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.store, operation, call)
        yield


async def check_reported(rig: Rig, *names: str) -> None:
    """A flush ends and names these, each with a reason; so does an fsync."""
    failed = await rig.drain()
    assert {inode.name for inode in failed} == set(names)
    assert all(inode.error for inode in failed)
    for name in names:
        with fails(5):
            await rig.fsync(name)


async def test_chain_of_renames_behind_one_that_fails(bench: Bench, copying: str) -> None:
    for name in "abc":
        await bench.upload(name, name.encode())
    rig = await bench.rig()
    await rig.rename("c", "d")
    await rig.rename("b", "c")
    await rig.rename("a", "b")
    with refusing(bench, copying, "c" if copying == "copy" else "d"):  # by the source, or the target
        await check_reported(rig, "d", "c", "b")
    await rig.drained()
    assert bench.contents() == {"b": b"a", "c": b"b", "d": b"c"}
    rig.check_clean()


async def test_new_file_under_the_name_of_one_whose_rename_fails(bench: Bench, copying: str) -> None:
    await bench.upload("a", b"old")
    rig = await bench.rig()
    await rig.rename("a", "b")
    await rig.put("a", b"new")
    with refusing(bench, copying, "a" if copying == "copy" else "b"):
        await check_reported(rig, "a", "b")
    await rig.drained()
    assert bench.contents() == {"a": b"new", "b": b"old"}


@pytest.mark.parametrize("refused", ["a", "b", "c"])
@pytest.mark.parametrize("operation", ["copy", "put"])
async def test_circle_of_renames_one_of_which_fails(bench: Bench, operation: str, refused: str) -> None:
    for name in "abc":
        await bench.upload(name, name.encode())
    rig = await bench.rig()
    for name in "abc":
        await rig.write(name, name.upper().encode())
    await rig.rename("c", "t")
    await rig.rename("b", "c")
    await rig.rename("a", "b")
    await rig.rename("t", "a")
    with refusing(bench, operation, refused):
        failed = await rig.drain(rounds=3)
        assert failed or operation == "copy"  # there the object that is set aside may be another one
        assert all(inode.error for inode in rig.dirty() if inode.linked)
    await rig.drained()
    assert bench.contents() == {"a": b"C", "b": b"A", "c": b"B"}
    rig.check_clean()


async def test_directory_behind_an_object_that_cannot_be_deleted(bench: Bench) -> None:
    for key in ("d/", "d/f"):
        await bench.upload(key)
    rig = await bench.rig()
    await rig.unlink("d/f")
    await rig.rmdir("d")
    with refusing(bench, "delete", "d/f"), refusing(bench, "delete_many", "d/f"):
        failed = await rig.drain(rounds=2)
        assert len(failed) == 2
    await rig.drained()
    assert bench.listed() == []
    rig.check_clean()


async def test_what_was_removed_is_not_taken_for_gone_where_the_bucket_is(bench: Bench) -> None:
    for key in ("one", "two", "d/"):
        await bench.upload(key)
    rig = await bench.rig()
    await rig.unlink("one")
    await rig.unlink("two")
    await rig.rmdir("d")
    bench.store.bucket_exists = False
    failed = await rig.drain(rounds=2)
    assert len(failed) == 3
    assert all(inode.error for inode in failed)
    bench.store.bucket_exists = True
    await rig.drained()
    assert bench.listed() == []


@pytest.mark.parametrize("what", ["unlink", "rename", "with its directory"])
async def test_a_file_on_its_way_is_not_seen_where_it_is_no_longer(bench: Bench, what: str) -> None:
    """Its upload has done its work in the bucket, its answer has not come."""
    rig = await bench.rig(ttl_s=0.0)
    await rig.mkdir("d")
    await rig.drained()
    await rig.put("d/f", b"data")
    with unheard(bench, "put") as done:
        await begin(rig, done)
        assert bench.listed() == ["d/", "d/f"]
        match what:
            case "unlink":
                await rig.unlink("d/f")
            case "rename":
                await rig.rename("d/f", "g")
            case _:
                await rig.unlink("d/f")
                await rig.rmdir("d")
        expected = (
            {"": ["d"], "d": []} if what == "unlink" else {"": ["d", "g"], "d": []} if what == "rename" else {"": []}
        )
        for folder, names in expected.items():
            assert await rig.ls(folder) == names
        assert not await rig.exists("d/f")


async def test_a_file_whose_first_upload_is_in_doubt_is_not_seen_after_it_was_removed(bench: Bench) -> None:
    rig = await bench.rig(ttl_s=0.0)
    await rig.put("f", b"data")
    rig.line.schedule("put", LOST)
    for inode in rig.dirty():
        rig.core.changes.queue(inode)
    await until(lambda: bench.listed() == ["f"] and not rig.core.changes.in_flight)
    await rig.unlink("f")
    assert await rig.ls() == []
    assert not await rig.exists("f")
    await rig.drained()
    assert bench.listed() == []


async def test_nothing_is_written_where_a_delete_of_a_dead_process_may_still_come(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await bench.rig()
    await rig.put("f", b"old")
    await rig.drained()
    with unheard(bench, "delete") as done:
        await rig.unlink("f")
        await begin(rig, done)
        await rig.crash()
    monkeypatch.setattr(lateness, "LATE_S", 0.4)
    began = trio.current_time()
    await rig.start()
    await rig.put("f", b"new")
    await rig.put("g", b"elsewhere")
    while rig.dirty():
        await rig.drain()
        if trio.current_time() - began < 0.3:
            assert "f" not in bench.listed()
    assert trio.current_time() - began >= 0.4
    assert bench.contents() == {"f": b"new", "g": b"elsewhere"}


async def test_a_new_file_where_others_have_deleted_what_was_to_be_deleted(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"old")
    await rig.drained()
    await rig.unlink("f")
    await bench.remove("f")
    await rig.put("f", b"new")
    await rig.drained()
    assert bench.contents() == {"f": b"new"}
    rig.check_clean()


async def test_a_new_file_where_others_have_replaced_what_was_to_be_deleted(
    bench: Bench, expected_log: list[str]
) -> None:
    expected_log.append("was changed by somebody else")
    rig = await bench.rig()
    await rig.put("f", b"old")
    await rig.drained()
    await rig.unlink("f")
    await bench.upload("f", b"theirs")
    await rig.put("f", b"new")
    await rig.drained()
    (conflict,) = set(bench.listed()) - {"f"}
    assert bench.contents() == {"f": b"theirs", conflict: b"new"}
