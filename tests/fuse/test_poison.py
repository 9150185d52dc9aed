"""Bytes that a program wrote and that the daemon could not take: nobody ever sees zeros in their place."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import S3FUSE, run, wait_for
from tests.fuse.test_limits import MIB, fill, greedy, small_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mount, Mounts
    from tests.servers import Server

PART = 8 * MIB


def drop_cached(path: Path) -> None:
    """The kernel forgets the file's pages, so that the daemon is asked."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def check_is_poisoned(mount: Mount, bucket: Bucket, body: bytes, old: bytes) -> None:
    """What could not be taken cannot be read, the rest can, and the bucket has the version before."""
    (item,) = mount.status()["pending"]["items"]
    assert item["name"] == "f"
    found = re.search(r"bytes (\d+) to (\d+) that a program wrote could not be taken \(.*full", item["error"])
    assert found
    lost = int(found[1])  # some of it may have found room before others took that
    assert PART <= lost < int(found[2]) == 2 * PART
    drop_cached(mount.path / "f")
    with (mount.path / "f").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), PART, 0) == body[:PART]
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.pread(file.fileno(), 4096, lost + 4096)
        assert os.pread(file.fileno(), PART, 2 * PART) == body[2 * PART :]
    assert run(S3FUSE, "flush", mount.path, check=False).returncode == 1
    assert bucket.get("f") == old
    assert f"bytes {lost}" in run(S3FUSE, "status", mount.path).stdout.replace("\n", "")


@pytest.mark.timeout(240)
def test_a_cache_disk_that_others_have_filled(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], tmp_path: Path
) -> None:
    """The program ignores every error; its file stays what it was until the range is written anew."""
    body, old = random.Random(4).randbytes(3 * PART), b"old" * 1000
    disk = tmp_path / "disk"
    with small_disk(disk, 64 * MIB):
        mount = mounts.new(server, start=False)
        mount.cache = disk / "cache"
        bucket = buckets(server, mount.bucket)
        bucket.put("f", old)
        mount.start()
        descriptor = os.open(mount.path / "f", os.O_RDWR)
        os.pwrite(descriptor, body[:PART], 0)
        run("sync", "-f", mount.path)
        others = fill(disk)
        with greedy(others):
            os.pwrite(descriptor, body[PART : 2 * PART], PART)
            run("sync", "-f", mount.path, check=False)
        others.unlink()
        os.pwrite(descriptor, body[2 * PART :], 2 * PART)
        with pytest.raises(OSError, match="No space left"):
            os.fsync(descriptor)
        with suppress(OSError):
            os.close(descriptor)
        check_is_poisoned(mount, bucket, body, old)
        mount.allowed.append("the worker died: killed by SIGKILL")
        os.kill(mount.worker_pid, signal.SIGKILL)
        wait_for(lambda: mount.status()["process"]["restarts"])
        check_is_poisoned(mount, bucket, body, old)
        mount.kill()
        assert f"to {2 * PART}" in run(S3FUSE, "cache", "list", mount.cache).stdout
        mount.start()
        check_is_poisoned(mount, bucket, body, old)
        with (mount.path / "f").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), body[PART : 2 * PART], PART)
        run(S3FUSE, "flush", mount.path)
        assert bucket.get("f") == body
        mount.stop()


@pytest.mark.timeout(120)
def test_with_64_descriptors_nothing_is_lost(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """More files are open and large than the daemon may have descriptors for; connections need some, too."""
    mount = mounts.new(server)
    resource.prlimit(mount.worker_pid, resource.RLIMIT_NOFILE, (64, 64))
    bodies = {f"f{n}": random.Random(n).randbytes(300_000) for n in range(100)}
    files = {name: (mount.path / name).open("wb", buffering=0) for name in bodies}
    refused = set()
    for name, file in files.items():
        file.write(bodies[name])
    for name, file in files.items():
        try:
            os.fsync(file.fileno())
        except OSError:
            refused.add(name)
        file.close()
    run(S3FUSE, "flush", mount.path, check=False)
    bucket = buckets(server, mount.bucket)
    stored = {key: bucket.get(key) for key in bucket.keys()}
    assert all(stored[name] == bodies[name] for name in stored)
    assert not refused
    assert stored == bodies
