"""A big file in and out while memory stays below its limit. `S3FUSE_TEST_BIG_BYTES` sets another size."""

from __future__ import annotations

import hashlib
import os
import random
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

SIZE_BYTES = int(os.environ.get("S3FUSE_TEST_BIG_BYTES", 256 << 20))
CHUNK_BYTES = 4 << 20
MEMORY_BYTES = 64 << 20
#: What the daemon needs beside cached blocks: the interpreter and libraries (60 MiB), buffers of requests under way.
BASE_BYTES = 160 << 20


@pytest.mark.timeout(max(120, SIZE_BYTES >> 20))
def test_in_and_out(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(server, "--memory", str(MEMORY_BYTES))
    written = hashlib.sha256()
    source = random.Random(1)
    chunk = bytearray(source.randbytes(CHUNK_BYTES))
    with (mount.path / "big").open("wb", buffering=0) as file:
        for number in range(SIZE_BYTES // CHUNK_BYTES):
            chunk[:8] = number.to_bytes(8)
            written.update(chunk)
            assert file.write(chunk) == CHUNK_BYTES
    mount.flush()
    assert mount.memory_peak_bytes() < MEMORY_BYTES + BASE_BYTES
    assert buckets(server, mount.bucket).digest("big") == written.hexdigest()
    mount.remount(empty_cache=True)
    read = hashlib.sha256()
    with (mount.path / "big").open("rb", buffering=0) as file:
        while data := file.read(CHUNK_BYTES):
            read.update(data)
    assert read.hexdigest() == written.hexdigest()
    peak = mount.memory_peak_bytes()
    status = mount.status()
    assert status["cache"]["memory_bytes"] <= MEMORY_BYTES
    assert peak < MEMORY_BYTES + BASE_BYTES
    # The bytes came once each, in large ranges.
    assert status["requests"]["get"] <= SIZE_BYTES // (2 << 20) + 16


@pytest.mark.timeout(120)
def test_small_change_in_a_big_file(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Most of it is copied on the server, and every byte is right afterwards."""
    bucket = buckets(server)
    body = bytearray(random.Random(2).randbytes(40 << 20))
    bucket.put("big", bytes(body))
    mount = mounts.new(server, bucket=bucket.name)
    with (mount.path / "big").open("r+b", buffering=0) as file:
        for offset in (0, 12_345_678, len(body) - 3):
            file.seek(offset)
            file.write(b"abc")
            body[offset : offset + 3] = b"abc"
    os.truncate(mount.path / "big", len(body) + 10)
    body += bytes(10)
    with (mount.path / "big").open("ab") as file:
        file.write(b"end")
    body += b"end"
    assert (mount.path / "big").read_bytes() == body
    mount.flush()
    assert bucket.digest("big") == hashlib.sha256(body).hexdigest()
    mount.remount(empty_cache=True)
    assert (mount.path / "big").read_bytes() == body


@pytest.mark.parametrize("size_bytes", [(1 << 20) + 1, 3 << 20, 6 << 20, 12 << 20])
def test_small_change_in_a_middling_file(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], size_bytes: int
) -> None:
    """The upload must not read its base while it holds the key: MinIO locks it from the head of a conditional PUT."""
    bucket = buckets(server)
    body = bytearray(random.Random(3).randbytes(size_bytes))
    bucket.put("file", bytes(body))
    mount = mounts.new(server, bucket=bucket.name)
    with (mount.path / "file").open("r+b", buffering=0) as file:
        file.seek(size_bytes // 2)
        file.write(b"changed")
        start = time.monotonic()
        os.fsync(file.fileno())
        assert time.monotonic() - start < 5
    body[size_bytes // 2 : size_bytes // 2 + 7] = b"changed"
    assert bucket.digest("file") == hashlib.sha256(body).hexdigest()
