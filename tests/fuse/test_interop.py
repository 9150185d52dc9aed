"""Other programs on the same bucket: s3fs-fuse both ways, and the metadata of rclone and geesefs."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from s3fuse import kernel
from tests.fuse.harness import free_environment, run, sha256, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

MTIME_S = 1_234_567_890


@contextmanager
def s3fs(server: Server, bucket: str, folder: Path) -> Iterator[Path]:
    """Debian's s3fs mounts the bucket."""
    program = shutil.which("s3fs")
    if program is None:
        pytest.fail("s3fs is not installed: run make setup", pytrace=False)
    mountpoint = folder / "s3fs.mnt"
    mountpoint.mkdir(exist_ok=True)
    keys = folder / "s3fs.keys"
    keys.touch(0o600)
    keys.write_text(f"{server.access_key}:{server.secret_key}\n")
    options = f"passwd_file={keys},url={server.endpoint},use_path_request_style,use_xattr=1"
    log = (folder / "s3fs.log").open("ab")
    process = subprocess.Popen(
        [program, bucket, mountpoint, "-f", "-o", options], env=free_environment(), stdout=log, stderr=log
    )
    try:
        wait_for(lambda: kernel.mount_entry(mountpoint) is not None or process.poll() is not None)
        assert process.poll() is None, (folder / "s3fs.log").read_text()
        yield mountpoint
        run("fusermount3", "-u", mountpoint)
        process.wait(15)
    finally:
        process.kill()
        process.wait()
        log.close()
        if kernel.mount_entry(mountpoint) is not None:
            kernel.unmount(mountpoint, lazy=True)


def make(root: Path) -> None:
    """Files, modes, owners, times, symlinks, xattrs: what both programs can keep."""
    (root / "dir").mkdir()
    (root / "dir/sub dir").mkdir()
    (root / "dir/file").write_bytes(b"body" * 1000)
    (root / "dir/sub dir/ü+%41").write_bytes(b"odd name")
    (root / "empty").write_bytes(b"")
    (root / "dir/link").symlink_to("file")
    (root / "dangling").symlink_to("/no/such/ü target")
    (root / "dir/program").write_bytes(b"#!/bin/sh\n")
    os.chmod(root / "dir/program", 0o4755)
    os.chmod(root / "dir/file", 0o640)
    os.chmod(root / "dir/sub dir", 0o1770)
    os.chown(root / "dir/file", 1234, 4321)
    os.chown(root / "dir/sub dir", 12, 34)
    os.setxattr(root / "dir/file", "user.name", b"value \0\xff")
    os.utime(root / "dir/file", (MTIME_S + 1, MTIME_S))
    os.utime(root / "empty", (MTIME_S, MTIME_S + 2))
    os.utime(root / "dir/sub dir", (MTIME_S, MTIME_S + 3))


def check(root: Path) -> None:
    assert sorted(os.path.relpath(os.path.join(top, n), root) for top, d, f in os.walk(root) for n in d + f) == [
        "dangling", "dir", "dir/file", "dir/link", "dir/program", "dir/sub dir", "dir/sub dir/ü+%41", "empty",
    ]  # fmt: skip
    assert (root / "dir/file").read_bytes() == b"body" * 1000
    assert (root / "dir/sub dir/ü+%41").read_bytes() == b"odd name"
    assert (root / "empty").read_bytes() == b""
    assert os.readlink(root / "dir/link") == "file"
    assert (root / "dir/link").read_bytes() == b"body" * 1000
    assert os.readlink(root / "dangling") == "/no/such/ü target"
    file = os.stat(root / "dir/file")
    assert (oct(file.st_mode), file.st_uid, file.st_gid, file.st_size) == (oct(stat.S_IFREG | 0o640), 1234, 4321, 4000)
    assert int(file.st_mtime) == MTIME_S
    assert os.stat(root / "empty").st_mtime == MTIME_S + 2
    assert oct(os.stat(root / "dir/program").st_mode) == oct(stat.S_IFREG | 0o4755)
    folder = os.stat(root / "dir/sub dir")
    assert (oct(folder.st_mode), folder.st_uid, folder.st_gid) == (oct(stat.S_IFDIR | 0o1770), 12, 34)
    assert int(folder.st_mtime) == MTIME_S + 3
    assert os.getxattr(root / "dir/file", "user.name") == b"value \0\xff"


@pytest.mark.timeout(120)
def test_s3fs_reads_what_we_write(minio_server: Server, mounts: Mounts, tmp_path: Path) -> None:
    mount = mounts.new(minio_server)
    make(mount.path)
    mount.stop()
    with s3fs(minio_server, mount.bucket, tmp_path) as theirs:
        check(theirs)


@pytest.mark.timeout(120)
def test_we_read_what_s3fs_writes(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket], tmp_path: Path
) -> None:
    bucket = buckets(minio_server)
    with s3fs(minio_server, bucket.name, tmp_path) as theirs:
        make(theirs)
    mount = mounts.new(minio_server, bucket=bucket.name)
    check(mount.path)
    # And what we then change, s3fs sees.
    os.chmod(mount.path / "dir/file", 0o600)
    os.chmod(mount.path / "dir/file", 0o640)
    (mount.path / "dir/program").rename(mount.path / "dir/other")
    (mount.path / "dir/other").rename(mount.path / "dir/program")
    (mount.path / "dir").rename(mount.path / "moved")
    mount.flush()
    (mount.path / "moved").rename(mount.path / "dir")
    mount.stop()
    with s3fs(minio_server, bucket.name, tmp_path) as theirs:
        check(theirs)


@pytest.mark.timeout(120)
def test_both_at_once(minio_server: Server, mounts: Mounts, tmp_path: Path) -> None:
    mount = mounts.new(minio_server)
    with s3fs(minio_server, mount.bucket, tmp_path) as theirs:
        (theirs / "from them").write_bytes(b"them" * 100_000)
        wait_for(lambda: (mount.path / "from them").exists())
        assert sha256(mount.path / "from them") == sha256(theirs / "from them")
        (mount.path / "from us").write_bytes(b"us" * 100_000)
        mount.flush()
        wait_for(lambda: (theirs / "from us").exists())
        assert (theirs / "from us").read_bytes() == b"us" * 100_000
        (theirs / "from us").unlink()
        wait_for(lambda: not (mount.path / "from us").exists())


def test_metadata_of_rclone(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Its mtime has nanoseconds, its mode is octal text."""
    bucket = buckets(server)
    bucket.put("plain", b"x", {"mtime": "1234567890.123456789"})
    bucket.put("full", b"x", {"mtime": "1234567890.5", "mode": "100640", "uid": "12", "gid": "34"})
    mount = mounts.new(server, "--uid", "7", "--gid", "8", "--umask", "0027", bucket=bucket.name)
    status = os.stat(mount.path / "plain")
    assert status.st_mtime_ns == MTIME_S * 10**9 + 123_456_789
    assert (oct(status.st_mode), status.st_uid, status.st_gid) == (oct(0o100640), 7, 8)
    status = os.stat(mount.path / "full")
    assert status.st_mtime_ns == MTIME_S * 10**9 + 500_000_000
    assert (oct(status.st_mode), status.st_uid, status.st_gid) == (oct(0o100640), 12, 34)
    # A change of ours keeps its key and its other metadata.
    bucket.put("kept", b"x", {"mtime": "1234567890", "author": "somebody"})
    wait_for((mount.path / "kept").exists)
    (mount.path / "kept").chmod(0o600)
    mount.flush()
    metadata = bucket.metadata("kept")
    assert metadata["author"] == "somebody"
    assert metadata["mtime"] == "1234567890"


def test_metadata_of_geesefs(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """A symlink is an empty object with its target, percent-encoded, in metadata; a directory is an object `dir/`."""
    bucket = buckets(server)
    bucket.put("target file", b"body")
    bucket.put("link", b"", {"--symlink-target": "target%20file"})
    bucket.put("dir/", b"")
    bucket.put("dir/file", b"x", {"mtime": str(MTIME_S), "mode": "33188", "uid": "5", "gid": "6"})
    mount = mounts.new(server, bucket=bucket.name)
    assert os.readlink(mount.path / "link") == "target file"
    assert (mount.path / "link").read_bytes() == b"body"
    assert (mount.path / "dir").is_dir()
    status = os.stat(mount.path / "dir/file")
    assert (int(status.st_mtime), status.st_uid, status.st_gid) == (MTIME_S, 5, 6)
    assert {entry.name: entry.is_symlink() for entry in os.scandir(mount.path)} == {
        "target file": False, "link": True, "dir": False,
    }  # fmt: skip


def test_metadata_of_gcsfuse(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    bucket = buckets(minio_server)
    bucket.put("file", b"x", {"gcsfuse_mtime": "2009-02-13T23:31:30.25Z"})
    mount = mounts.new(minio_server, bucket=bucket.name)
    assert os.stat(mount.path / "file").st_mtime_ns == MTIME_S * 10**9 + 250_000_000


def test_content_type_of_what_we_write(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Other programs serve the bucket as web pages."""
    mount = mounts.new(server)
    (mount.path / "page.html").write_text("<p>")
    (mount.path / "picture.png").write_bytes(b"png")
    mount.flush()
    bucket = buckets(server, mount.bucket)
    assert bucket.head("page.html").content_type == "text/html"
    assert bucket.head("picture.png").content_type == "image/png"


def test_odd_keys(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """What the servers take of keys that are hardly paths: shown as they are, and a directory shadows a file."""
    bucket = buckets(server)
    # MinIO refuses a key below a file; SeaweedFS takes a backslash for a slash. Both refuse names over 255 bytes.
    keys = {"minio": ["good", "both/inside", "back\\slash"], "seaweedfs": ["good", "both", "both/inside"]}[server.kind]
    keys += ["control\x01\x1f", "new\nline", " blanks ", "...", "~"]
    for key in keys:
        bucket.put(key, key.encode())
    mount = mounts.new(server, bucket=bucket.name)
    mount.allowed.append("1 keys below .. cannot be shown as files")
    assert set(os.listdir(mount.path)) == {key.partition("/")[0] for key in keys}
    for key in keys:
        if key != "both":
            assert (mount.path / key).read_bytes() == key.encode()
    assert (mount.path / "both").is_dir()
    run("find", mount.path)
    assert mount.status()["hidden_keys"] == keys.count("both")
    mount.stop()
    assert bucket.keys() == set(keys)
