"""What is cached of a file stays good when our own upload replaces the object: nothing is fetched again."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from s3fuse.reading.records import BLOCK_BYTES

if TYPE_CHECKING:
    from tests.engine.rig import Bench

MIB = 1 << 20


async def test_synced_appends_fetch_nothing(bench: Bench) -> None:
    rig = await bench.rig()
    handle = await rig.create("log")
    body = b""
    bench.counted()
    for number in range(40):
        line = b"%d" % number * random.Random(number).choice((1, 100, 9_000))
        await rig.files.write(handle, len(body), line)
        body += line
        await rig.files.fsync(handle)
        assert await rig.pread(handle) == body
        assert bench.data("log") == body
    assert bench.counted() == {"put": 40}


async def test_a_synced_overwrite_of_a_file_that_was_read_fetches_nothing(bench: Bench) -> None:
    body = bytearray(os.urandom(24 * BLOCK_BYTES + 77))
    await bench.upload("file", bytes(body))
    rig = await bench.rig()
    handle = await rig.open("file", os.O_RDWR)
    assert await rig.pread(handle) == body
    bench.counted()
    for at in (5, 3 * BLOCK_BYTES - 2, 24 * BLOCK_BYTES + 70):
        body[at : at + 4] = b"1234"
        await rig.files.write(handle, at, b"1234")
        await rig.files.fsync(handle)
        assert await rig.pread(handle) == body
    await rig.chmod("file", 0o600)
    await rig.drained()
    assert await rig.pread(handle) == body
    await rig.rename("file", "other")
    await rig.drained()
    assert await rig.pread(handle) == body
    assert bench.data("other") == body
    counted = bench.counted()
    assert "get" not in counted, counted


async def test_an_overwrite_of_a_large_file_reads_what_it_sends_once(bench: Bench) -> None:
    body = bytearray(os.urandom(40 * MIB))
    await bench.upload("file", bytes(body))
    rig = await bench.rig()
    handle = await rig.open("file", os.O_RDWR)
    for round_, most in ((0, 8), (1, 0), (2, 0)):
        body[20 * MIB : 20 * MIB + 4] = b"%04d" % round_
        await rig.files.write(handle, 20 * MIB, b"%04d" % round_)
        bench.counted()
        await rig.files.fsync(handle)
        assert bench.counted().get("get", 0) <= most
        assert bench.data("file") == body


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_is_done_reads_are_right(bench: Bench, seed: int) -> None:
    """One mount writes, syncs and reads; where all of it fits into what uploads keep, nothing is ever fetched."""
    rng = random.Random(seed)
    limit = rng.choice((3_000, BLOCK_BYTES + 10, 7 * BLOCK_BYTES, 20 * BLOCK_BYTES))
    rig = await bench.rig()
    handle = await rig.create("file")
    body = bytearray()
    for _ in range(60):
        kind = rng.choice(("write", "write", "append", "cut", "grow", "sync", "sync", "chmod", "read"))
        if kind in ("write", "append"):
            start = rng.randrange(len(body) + 1) if kind == "write" else len(body)
            data = rng.randbytes(rng.randrange(1, max(2, min(200_000, limit - start))))
            await rig.files.write(handle, start, data)
            body[start : start + len(data)] = data
        elif kind == "cut":
            del body[rng.randrange(len(body) + 1) :]
            await rig.truncate("file", len(body))
        elif kind == "grow":
            body.extend(bytes(rng.randrange(max(1, limit - len(body)))))
            await rig.truncate("file", len(body))
        elif kind == "chmod":
            await rig.chmod("file", rng.choice((0o600, 0o644)))
        elif kind == "sync":
            await rig.files.fsync(handle)
            assert bench.data("file") == body
        start = rng.randrange(len(body) + 1)
        stop = rng.randrange(start, len(body) + 1)
        assert await rig.pread(handle, start, stop - start) == body[start:stop], kind
    await rig.files.fsync(handle)
    assert await rig.pread(handle) == body
    assert bench.data("file") == body
    if limit <= 7 * BLOCK_BYTES:
        assert "get" not in bench.counted()
