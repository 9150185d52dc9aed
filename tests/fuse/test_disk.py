"""Clean blocks on disk: served after a remount, and never wrong bytes, whatever happens to the files (trial T59)."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mount, Mounts
    from tests.servers import Server

SIZES = [100, 4096, 300_000, 3 << 20, 9 << 20]


def drop_page_cache(mount: Mount) -> None:
    """The kernel forgets what it has of the mount's files, so that the daemon is asked."""
    for path in mount.path.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def contents(mount: Mount) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in mount.path.iterdir()}


def blocks(mount: Mount) -> list[Path]:
    return [path for path in (mount.cache / "blocks").iterdir() if path.is_file()]


def stored(mount: Mount, least_bytes: int) -> None:
    wait_for(lambda: mount.status()["cache"]["disk_bytes"] >= least_bytes, timeout_s=60)


def damage(path: Path, chance: random.Random) -> None:
    kind = chance.choice(["remove", "cut", "flip"]) if path.stat().st_size else "remove"
    if kind == "remove":
        path.unlink()
    elif kind == "cut":
        os.truncate(path, chance.randrange(path.stat().st_size + 1))
    else:
        with path.open("r+b") as file:
            for _ in range(20):
                at = chance.randrange(path.stat().st_size)
                file.seek(at)
                byte = file.read(1)
                file.seek(at)
                file.write(bytes([byte[0] ^ 1 << chance.randrange(8)]))


@pytest.mark.timeout(240)
def test_read_from_disk_after_a_remount(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    bucket = buckets(server)
    files = {f"f{size}": random.Random(size).randbytes(size) for size in SIZES}
    for name, data in files.items():
        bucket.put(name, data)
    mount = mounts.new(server, bucket=bucket.name)
    assert contents(mount) == files
    stored(mount, sum(SIZES))
    mount.remount(empty_cache=False)
    stored(mount, sum(SIZES))
    assert contents(mount) == files
    status = mount.status()
    assert status["requests"].get("get", 0) == 0
    assert status["cache"]["disk_hits"] > 0
    assert status["cache"]["disk_damaged"] == 0


@pytest.mark.timeout(240)
def test_damaged_blocks_are_fetched_again(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    bucket = buckets(server)
    chance = random.Random(5)
    files = {f"f{size}": chance.randbytes(size) for size in SIZES}
    for name, data in files.items():
        bucket.put(name, data)
    mount = mounts.new(server, "--memory", "16MiB", bucket=bucket.name)
    mount.allowed.append("are damaged")
    mount.allowed.append("are not cached")
    for _ in range(2):
        assert contents(mount) == files
        for path in blocks(mount):  # while it is mounted
            damage(path, chance)
        drop_page_cache(mount)
        assert contents(mount) == files
        mount.stop()
        for path in blocks(mount):  # between mounts
            damage(path, chance)
        mount.start()
    assert contents(mount) == files


@pytest.mark.timeout(120)
def test_no_disk_tier(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    bucket = buckets(server)
    bucket.put("f", b"data")
    mount = mounts.new(server, "--cache-size", "0", bucket=bucket.name)
    assert (mount.path / "f").read_bytes() == b"data"
    assert not (mount.cache / "blocks").exists()
    assert mount.status()["cache"]["disk_limit_bytes"] == 0
