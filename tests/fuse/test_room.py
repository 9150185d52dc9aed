"""Room that is there is found, as programs on a real mount see it (A18)."""

from __future__ import annotations

import os
import random
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import run, wait_for
from tests.fuse.test_limits import MIB, small_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mount, Mounts
    from tests.servers import Server


def on(disk: Path, mounts: Mounts, server: Server, *options: str) -> Mount:
    """A mount with its cache on a disk."""
    mount = mounts.new(server, *options, start=False)
    mount.cache = disk / "cache"
    return mount.start()


def staged_on_disk(mount: Mount) -> int:
    return sum(entry.stat().st_blocks * 512 for entry in os.scandir(mount.cache / "staging"))


@pytest.mark.timeout(180)
def test_a_burst_of_small_files_leaves_the_disk_free(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 96 * MIB):
        mount = on(disk, mounts, server, "--cache-size", "0")
        for number in range(1000):
            (mount.path / f"small{number}").write_bytes(bytes([number % 256]) * 60_000)
        mount.flush()
        wait_for(lambda: staged_on_disk(mount) == 0)
        assert mount.status()["cache"]["held_bytes"] == 0
        began = time.monotonic()
        body = random.Random(1).randbytes(48 * MIB)
        with (mount.path / "large").open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        assert time.monotonic() - began < 60
        bucket = buckets(server, mount.bucket)
        assert bucket.get("large") == body
        assert bucket.get("small77") == bytes([77]) * 60_000
        mount.stop()


@pytest.mark.timeout(120)
def test_what_a_program_cuts_off_takes_no_memory(minio_server: Server, mounts: Mounts) -> None:
    """The issue's example: a limit of 1 MiB, and 30 MiB in memory."""
    mount = mounts.new(minio_server, "--ephemeral", "--dirty-size", "1MiB")
    with (mount.path / "f").open("wb", buffering=0) as file:
        for number in range(30):
            file.seek(number * MIB)
            file.write(random.Random(number).randbytes(900 << 10))
            run("sync", "-f", mount.path / "f")
            file.truncate(0)
    folder = f"/proc/{mount.worker_pid}/fd"
    memory = [os.stat(f"{folder}/{fd}") for fd in os.listdir(folder) if "s3fuse" in os.readlink(f"{folder}/{fd}")]
    held = sum(found.st_blocks * 512 for found in memory if found.st_nlink == 0)
    assert held == mount.status()["cache"]["held_bytes"] <= MIB
    mount.flush()
    mount.stop()


@pytest.mark.timeout(120)
def test_a_file_without_a_name_that_is_read_stops_nobody(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    mount = mounts.new(minio_server, "--dirty-size", "4MiB")
    body = random.Random(1).randbytes(4 * MIB - 64)
    descriptor = os.open(mount.path / "gone", os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, body)
    reader = os.open(mount.path / "gone", os.O_RDONLY)
    os.unlink(mount.path / "gone")
    os.close(descriptor)
    began = time.monotonic()
    for number in range(4):
        (mount.path / f"f{number}").write_bytes(body)
    assert time.monotonic() - began < 60
    os.posix_fadvise(reader, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(reader, len(body), 0) == body
    os.close(reader)
    mount.flush()
    bucket = buckets(minio_server, mount.bucket)
    assert wait_for(lambda: bucket.keys() == {f"f{number}" for number in range(4)})
    mount.stop()


@pytest.mark.timeout(120)
def test_a_disk_without_inodes_is_told(minio_server: Server, mounts: Mounts, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 96 * MIB):
        run("mount", "-o", "remount,nr_inodes=40", disk)
        mount = on(disk, mounts, minio_server)
        mount.allowed.append("cannot be kept in order")
        number = 0
        with suppress(OSError):
            for number in range(100):
                (disk / f"others{number}").touch()
        assert number < 99
        (mount.path / "small").write_bytes(b"small")
        began = time.monotonic()
        descriptor = os.open(mount.path / "large", os.O_CREAT | os.O_WRONLY)
        with pytest.raises(OSError, match="No space left"):
            os.write(descriptor, bytes(2 * MIB))
            os.fsync(descriptor)
        assert time.monotonic() - began < 40
        os.close(descriptor)
        assert "the cache disk has no free inodes; remove files from the disk of" in mount.log_text()
        (mount.path / "large").unlink()
        (disk / "others0").unlink()
        (mount.path / "large").write_bytes(bytes(2 * MIB))
        wait_for(lambda: mount.status()["pending"]["files"] == 0)
        mount.stop()
