"""A version is known by key, etag and size: no read mixes two, and one that is gone is ESTALE, never EIO."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from s3fuse.reading.records import BLOCK_BYTES
from tests.engine.rig import Bench, Rig, fails, gather, until
from tests.engine.test_conflicts import FOLDER, run, slow
from tests.engine.test_syncer import in_background

if TYPE_CHECKING:
    from tests.engine.rig import Clock


def forge(bench: Bench, key: str, data: bytes) -> None:
    """Other bytes under the etag that the object has, as a server's racing copy may leave them."""
    bench.store._objects[key] = replace(bench.store._objects[key], data=data)


SIZES = [1, 1000, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 5]


@pytest.mark.parametrize("new", SIZES)
@pytest.mark.parametrize("old", SIZES)
@pytest.mark.parametrize("seen", [True, False])
async def test_one_etag_of_two_lengths_is_two_versions(
    bench: Bench, clock: Clock, seen: bool, old: int, new: int
) -> None:
    """Where both have the same length nothing can tell them apart."""
    if old == new:
        return
    await bench.upload("f", b"o" * old)
    rig = await bench.rig()
    handle = await rig.open("f")
    assert await rig.pread(handle, 0, 1) == b"o"
    forge(bench, "f", b"n" * new)
    if seen:
        clock.advance(2000)
        assert await rig.cat("f") == b"n" * new
    found = (await gather([lambda: rig.pread(handle)]))[0]
    if isinstance(found, bytes):
        assert found == b"o" * old
    else:
        assert isinstance(found, OSError)
        assert found.errno == errno.ESTALE
    rig.close(handle)
    clock.advance(2000)
    assert await rig.cat("f") == b"n" * new


async def test_a_session_names_the_version_with_its_own_size(bench: Bench) -> None:
    """An upload that arrived while the file was longer already, and then it got its old bytes back."""
    rig = await bench.rig(kept=True)
    inode = await rig.put("f", b"A" * 100)
    rig.core.known.counted(inode)
    await rig.drained()
    handle = await rig.open("f", os.O_RDWR)
    await rig.files.write(handle, 0, b"B" * 50)
    with rig.line.held("put") as gate:
        rig.core.changes.queue(inode)
        await gate.arrived()
        await rig.files.write(handle, 100, b"C" * 100)
        gate.open()
        await until(lambda: not rig.core.changes.in_flight)
    await rig.truncate("f", 100)
    await rig.files.fsync(handle)
    rig.core.known.counted(inode)
    rig.close(handle)
    assert not rig.dirty()
    number = inode.number
    await rig.restart()
    revived = rig.core.inodes.table[number]
    assert revived.remote is not None
    assert revived.remote.version == (await bench.info("f")).version
    assert revived.size == 100


# -- the end of a file that gets shorter while it is read


def forget_blocks(rig: Rig, *indexes: int) -> None:
    """These blocks, all by default, are not cached any more but for those on their way."""
    blocks = rig.core.blocks
    for key, block in list(blocks._blocks.items()):
        if block.fetch is None and (not indexes or key[-1] in indexes):
            del blocks._blocks[key]
            blocks._free.append(block.buffer)


@pytest.mark.parametrize("at", [2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 100, BLOCK_BYTES + 5])
@pytest.mark.parametrize("cut", [2 * BLOCK_BYTES, BLOCK_BYTES + 50, BLOCK_BYTES, 10, 0])
async def test_read_meets_a_truncate_and_its_upload(bench: Bench, nursery: trio.Nursery, cut: int, at: int) -> None:
    """The request for bytes is under way, another handle cuts the file, and the bucket has that first."""
    body = os.urandom(3 * BLOCK_BYTES)
    await bench.upload("f", body)
    rig = await bench.rig()
    await rig.cat("f")  # the upload needs no request
    forget_blocks(rig, 2)
    reader, writer = await rig.open("f"), await rig.open("f", os.O_RDWR)
    with rig.line.held("get") as gate:
        found = await in_background(nursery, lambda: rig.files.read(reader, at, 2 * BLOCK_BYTES))
        await gate.arrived()
        await rig.truncate("f", cut)
        await rig.files.fsync(writer)
        assert bench.data("f") == body[:cut]
        gate.open()
        await until(lambda: bool(found))
    [read] = found
    assert isinstance(read, (bytes, memoryview)), read
    assert bytes(read) == body[at:cut]
    for handle in (reader, writer):
        rig.close(handle)


offset = st.integers(0, 2 * BLOCK_BYTES)
STEP = st.tuples(st.sampled_from(["cut", "write", "sync", "sync"]), offset)


@given(st.lists(STEP, max_size=12), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_reads_of_one_handle_while_another_writes_and_syncs(script: list[tuple[str, int]], seed: int) -> None:
    run(play, script, seed)


async def play(script: list[tuple[str, int]], seed: int) -> None:
    """No read fails."""
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        async with trio.open_nursery() as nursery:
            bench = Bench(Path(folder), nursery)
            try:
                await bench.upload("f", random.Random(seed).randbytes(2 * BLOCK_BYTES))
                rig = await bench.rig()
                slow(rig, seed)
                async with trio.open_nursery() as readers:
                    readers.start_soon(keep_reading, rig, seed)
                    await change(rig, script)
                    readers.cancel_scope.cancel()
            finally:
                await bench.close()


async def keep_reading(rig: Rig, seed: int) -> None:
    handle = await rig.open("f")
    offsets = random.Random(seed)
    while True:
        await rig.files.read(handle, offsets.randrange(2 * BLOCK_BYTES), 5000)
        await trio.lowlevel.checkpoint()


async def change(rig: Rig, script: list[tuple[str, int]]) -> None:
    handle = await rig.open("f", os.O_RDWR)
    for kind, size in script:
        if kind == "cut":
            await rig.truncate("f", size)
        elif kind == "write":
            await rig.files.write(handle, size, b"new")
        else:
            await rig.files.fsync(handle)
            forget_blocks(rig)
        for _ in range(size % 40):
            await trio.lowlevel.checkpoint()


async def test_a_file_that_has_a_length_and_no_bytes_is_stale_not_zeros(
    bench: Bench, clock: Clock, expected_log: list[str]
) -> None:
    """Others deleted it while it was renamed here; a handle is open on it."""
    expected_log.append("deleted by somebody else")
    await bench.upload("f", b"o" * 100)
    rig = await bench.rig()
    handle = await rig.open("f")
    await rig.chmod("f", 0o600)
    await bench.remove("f")
    await rig.drained()
    with fails(errno.ESTALE):
        await rig.pread(handle)
    rig.close(handle)
