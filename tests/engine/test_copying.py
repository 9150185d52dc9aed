"""Copies of objects: in parts where they are large, bounded, and with nothing left behind."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse.errors import AccessDenied
from s3fuse.store import memory
from s3fuse.store.base import ObjectInfo, Part
from s3fuse.store.faulty import refused
from s3fuse.store.memory import MemoryStore
from s3fuse.store.s3checks import multipart_etag, same_bytes
from s3fuse.writing import copying, leftovers
from tests.engine.rig import SMALL_LIMITS, Bench, Clock, fails, until
from tests.engine.test_syncer import in_background, mode_in_bucket

if TYPE_CHECKING:
    from s3fuse.store.base import Capabilities

#: Most that the server copies at once: 5 GiB in small.
TOP_LIMITS = replace(SMALL_LIMITS, max_copy_bytes=32 << 10, send_copy_bytes=1 << 10)


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("able", [memory.MINIO, memory.ATOMIC])
async def test_an_object_too_large_for_one_copy_goes_in_parts(bench: Bench, able: Capabilities) -> None:
    bench.store = MemoryStore(able)
    rig = await bench.rig(limits=TOP_LIMITS)
    data = os.urandom(100_000)
    await rig.put("f", data)
    await rig.drained()
    for path, before in (("g", "f"), ("h", "g")):
        bench.counted()
        await rig.rename(before, path)
        await rig.drained()
        counts = bench.counted()
        assert counts["multipart_copy"] == -(-100_000 // TOP_LIMITS.copy_part_bytes)
        assert counts.get("copy", 0) == counts.get("put", 0) == counts.get("multipart_put", 0) == 0
        assert bench.contents() == {path: data}
    assert not bench.store._uploads
    rig.check_clean()


@pytest.mark.usefixtures("_small_parts")
async def test_attributes_of_a_large_object_leave_its_etag(bench: Bench) -> None:
    """What other mounts have cached and opened stays good: the copied parts are those of the upload."""
    bench.limits = replace(SMALL_LIMITS, part_bytes=8 << 10, send_copy_bytes=1 << 10)
    rig = await bench.rig()
    await rig.put("f", os.urandom(100_000))
    await rig.drained()
    etag = (await bench.info("f")).etag
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "_USUAL_PART_BYTES", (8 << 10,))
        await rig.chmod("f", 0o600)
        await rig.drained()
    assert (await bench.info("f")).etag == etag
    assert mode_in_bucket(bench, "f") == stat.S_IFREG | 0o600


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("operation", ["multipart_create", "multipart_copy", "multipart_complete"])
@pytest.mark.parametrize("how", ["refused", "crash"])
async def test_an_upload_begun_for_a_copy_is_not_left_behind(
    bench: Bench, nursery: trio.Nursery, operation: str, how: str
) -> None:
    rig = await bench.rig(limits=TOP_LIMITS)
    await rig.put("f", b"x" * 100_000)
    await rig.drained()
    await rig.rename("f", "g")
    if how == "refused":
        rig.line.schedule(operation, refused(AccessDenied("no", "g")))
        rig.line.quiet = False
        await rig.drain()
        rig.line.quiet = True
    else:
        with rig.line.held(operation) as gate:
            await in_background(nursery, rig.drain)
            rig.core.changes.queue(rig.dirty()[0])
            await gate.arrived()
            await rig.crash()
        await rig.start()
    await rig.drained()
    await until(lambda: not bench.store._uploads)
    assert bench.contents() == {"g": b"x" * 100_000}


@pytest.mark.usefixtures("_small_parts")
async def test_so_many_parts_are_copied_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await bench.rig(limits=TOP_LIMITS)
    for number in range(6):
        await rig.put(f"f{number}", b"x" * 100_000)
    await rig.drained()
    work, under_way, most = bench.store.multipart_copy, 0, 0

    async def copy(*args: Any, **kwargs: Any) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        under_way -= 1
        return await work(*args, **kwargs)

    monkeypatch.setattr(bench.store, "multipart_copy", copy)
    for number in range(6):
        await rig.rename(f"f{number}", f"g{number}")
    await rig.drained()
    assert most == leftovers.COPIES_AT_ONCE


@pytest.mark.parametrize("how", ["read", "looked up", "listed"])
async def test_a_change_of_attributes_by_another_node_leaves_open_files(bench: Bench, clock: Clock, how: str) -> None:
    """A plain object becomes one of a single part, whose etag is another one: it is known for the same bytes."""
    data = os.urandom(300_000)
    etag = await bench.upload("f", data)
    ours, theirs = await bench.rig("ours"), await bench.rig("theirs", ttl_s=1.0)
    handle = await theirs.open("f")
    inode = await theirs.walk("f")
    assert await theirs.pread(handle, 0, 10) == data[:10]
    await ours.chmod("f", 0o600)
    await ours.drained()
    assert (await bench.info("f")).etag == multipart_etag([Part(1, etag)])
    theirs.core.blocks._blocks.clear()  # others have taken the room
    if how != "read":
        clock.advance(5)
        await (theirs.ls() if how == "listed" else theirs.walk("f"))
    assert await theirs.pread(handle) == data
    clock.advance(5)
    assert await theirs.walk("f") is inode
    await theirs.attributes.getattr(inode)
    assert stat.S_IMODE(inode.mode) == 0o600
    await bench.upload("f", data[::-1])  # and what is another version stays one
    theirs.core.blocks._blocks.clear()
    with fails(errno.ESTALE):
        await theirs.pread(handle)


@pytest.mark.parametrize("moved", [False, True])
def test_same_bytes(moved: bool) -> None:
    one = ObjectInfo("f", 5, "0" * 32, 0)
    part = ObjectInfo("g" if moved else "f", 5, multipart_etag([Part(1, "0" * 32)]) or "", 0)
    assert same_bytes(one, one)
    assert same_bytes(one, part) == same_bytes(part, one) == (not moved)
    assert not same_bytes(one, replace(part, size_bytes=6))
    assert not same_bytes(one, replace(one, etag="1" * 32))
    assert not same_bytes(replace(one, etag=""), replace(one, etag="x-1"))
