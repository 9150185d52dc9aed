"""What fsync, close and O_SYNC wait for in each mode, and who hears of an upload that fails."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import S3FUSE, run, wait_for
from tests.fuse.test_drain import FRESH, own_server, silent

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

__all__ = ["own_server"]
pytestmark = pytest.mark.timeout(120)


def code_of(call: Callable[[], object]) -> int:
    """The errno of a call, 0 for success."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


@pytest.mark.parametrize("flag", ["O_SYNC", "O_DSYNC"])
def test_synchronous_writes(server: Server, mounts: Mounts, buckets: Callable[..., Bucket], flag: str) -> None:
    """Each write(2) returns when the bucket has it."""
    mount = mounts.new(server)
    bucket = buckets(server, mount.bucket)
    file = os.open(mount.path / "file", os.O_CREAT | os.O_WRONLY | getattr(os, flag))
    try:
        os.write(file, b"one ")
        assert bucket.get("file") == b"one "
        os.write(file, b"two " * 50_000)
        assert bucket.get("file") == b"one " + b"two " * 50_000
        os.pwrite(file, b"new", 0)
        assert bucket.get("file") == b"new " + b"two " * 50_000
    finally:
        os.close(file)


def test_fsync(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(server)
    bucket = buckets(server, mount.bucket)
    file = os.open(mount.path / "file", os.O_CREAT | os.O_RDWR)
    os.write(file, b"fsync")
    os.fsync(file)
    assert bucket.get("file") == b"fsync"
    os.pwrite(file, b"FDATA", 0)
    os.fdatasync(file)
    assert bucket.get("file") == b"FDATA"
    os.fchmod(file, 0o640)
    os.fsync(file)
    assert int(bucket.metadata("file")["mode"]) & 0o777 == 0o640
    os.pwrite(file, b"moved", 0)
    os.rename(mount.path / "file", mount.path / "other")
    os.fsync(file)
    assert bucket.get("other") == b"moved"
    os.pwrite(file, b"later", 0)
    other = os.open(mount.path / "other", os.O_RDONLY)
    os.fsync(other)  # of a handle that wrote nothing
    assert bucket.get("other") == b"later"
    os.close(other)
    (mount.path / "other").unlink()
    os.pwrite(file, b"nowhere", 0)
    os.fsync(file)
    assert os.pread(file, 10, 0) == b"nowhere"
    os.close(file)
    mount.flush()
    assert bucket.keys() == set()


def test_fsync_of_a_directory(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(server)
    bucket = buckets(server, mount.bucket)
    (mount.path / "d").mkdir()
    (mount.path / "d/one").write_bytes(b"one")
    (mount.path / "d/two").write_bytes(b"two")
    directory = os.open(mount.path / "d", os.O_RDONLY)
    try:
        os.fsync(directory)
        assert bucket.keys() == {"d/", "d/one", "d/two"}
        os.rename(mount.path / "d/one", mount.path / "d/three")
        (mount.path / "d/two").unlink()
        os.fsync(directory)
        assert bucket.keys() == {"d/", "d/three"}
    finally:
        os.close(directory)


def test_sync_programs(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """sync(1) of a file waits for the bucket, `sync -f` for the daemon, `s3fuse flush` for the bucket to have all."""
    mount = mounts.new(server)
    bucket = buckets(server, mount.bucket)
    with (mount.path / "open").open("wb") as file:
        file.write(b"open")
        file.flush()
        run("sync", mount.path / "open")
        assert bucket.get("open") == b"open"
        file.write(b" more")
        file.flush()
        run("sync", "-f", mount.path)
        assert mount.status()["pending"]["bytes"] > 0
        assert any(item["name"] == "open" for item in mount.status()["pending"]["items"])
        mount.flush()
        assert bucket.get("open") == b"open more"


def test_close_upload(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """close(2) returns when the bucket has the file, so that another mount opens what was closed here."""
    mount = mounts.new(server, "--close", "upload")
    bucket = buckets(server, mount.bucket)
    other = mounts.new(server, "--attr-ttl", "0s", bucket=mount.bucket)
    for body in (b"", b"small", os.urandom(3 << 20)):
        (mount.path / "file").write_bytes(body)
        assert bucket.get("file") == body
        assert (other.path / "file").read_bytes() == body


def test_who_hears_of_a_failed_upload(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """fsync, a synchronous write and a strict close do; a plain close does not, and status and log name the file."""
    mount = mounts.new(minio_server, *FRESH)
    strict = mounts.new(minio_server, *FRESH, "--close", "upload", bucket=mount.bucket)
    bucket = buckets(minio_server, mount.bucket)
    for one in (mount, strict):
        os.listdir(one.path)
    for key in bucket.leases():  # a server removes no bucket that has objects
        bucket.delete(key)
    bucket.client.remove_bucket(bucket.name)
    try:
        file = os.open(mount.path / "fsync", os.O_CREAT | os.O_WRONLY)
        os.write(file, b"fsync")
        assert code_of(lambda: os.fsync(file)) == errno.EIO
        assert code_of(lambda: os.close(file)) == 0
        file = os.open(mount.path / "sync", os.O_CREAT | os.O_WRONLY | os.O_SYNC)
        assert code_of(lambda: os.write(file, b"sync")) == errno.EIO
        os.close(file)
        file = os.open(strict.path / "strict", os.O_CREAT | os.O_WRONLY)
        os.write(file, b"strict")
        assert code_of(lambda: os.close(file)) == errno.EIO
        (mount.path / "plain").write_bytes(b"plain")

        def told() -> bool:
            items = {item["name"]: item["error"] for item in mount.status()["pending"]["items"]}
            return "NoSuchBucket" in (items.get("plain") or "")

        wait_for(told, timeout_s=60)
        assert "'plain' is put off" in mount.log_text()
        assert mount.status()["last_error"]
        done = run(S3FUSE, "flush", mount.path, check=False)
        assert done.returncode == 1
        assert "plain" in done.stderr
        assert (mount.path / "fsync").read_bytes() == b"fsync"
    finally:
        bucket.client.make_bucket(bucket.name)
    for one in (mount, strict):
        one.flush()
    assert {key: bucket.get(key) for key in bucket.keys()} == {
        name: name.encode() for name in ("fsync", "sync", "strict", "plain")
    }


def test_fsync_local_needs_no_server(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """T08, the process half: what fsync and O_SYNC promised is uploaded by the mount after a crash."""
    mount = mounts.new(own_server, *FRESH, "--fsync", "local")
    os.listdir(mount.path)
    bodies = {f"file{n}": os.urandom(n * 20_000) for n in range(1, 9)}
    with silent(own_server):
        (mount.path / "d").mkdir()
        directory = os.open(mount.path / "d", os.O_RDONLY)
        os.fsync(directory)
        files = []
        for n, (name, body) in enumerate(bodies.items()):
            files.append(os.open(mount.path / name, os.O_CREAT | os.O_WRONLY | (os.O_SYNC if n % 2 else 0)))
            os.write(files[-1], body)
            if n % 2 == 0:
                os.fsync(files[-1])
        mount.kill()
        for file in (*files, directory):
            with suppress(OSError):
                os.close(file)
    mount.start()
    mount.flush()
    bucket = buckets(own_server, mount.bucket)
    assert {key: bucket.get(key) for key in bucket.keys()} == {"d/": b"", **bodies}


def test_a_write_that_is_not_closed_is_read_by_others(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """T17: `cat` between two writes of another program shows the first, and loses nothing."""
    mount = mounts.new(server)
    with (mount.path / "file").open("wb", buffering=0) as file:
        file.write(b"A")
        assert run("cat", mount.path / "file").stdout == "A"
        file.write(b"B")
    assert (mount.path / "file").read_bytes() == b"AB"
    mount.flush()
    assert buckets(server, mount.bucket).get("file") == b"AB"
    mount.remount(empty_cache=True)
    assert (mount.path / "file").read_bytes() == b"AB"
