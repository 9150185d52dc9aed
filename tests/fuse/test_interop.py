"""Metadata that other tools wrote is read, and s3fs-fuse (Debian's) reads what we write.

s3fs drops nothing of a file; of directories SeaweedFS itself drops the metadata, so these run on MinIO.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.fuse.harness import run, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

TIME_NS = 1_234_567_890_123_456_789


@contextmanager
def s3fs(server: Server, bucket: str, folder: Path) -> Iterator[Path]:
    keys, mountpoint = folder / "s3fs.passwd", folder / "s3fs.mnt"
    keys.touch(0o600)
    keys.write_text(f"{server.access_key}:{server.secret_key}")
    mountpoint.mkdir()
    options = f"url={server.endpoint},use_path_request_style,passwd_file={keys},use_xattr"
    run("s3fs", bucket, str(mountpoint), "-o", options)
    try:
        wait_for(lambda: os.path.ismount(mountpoint))
        yield mountpoint
    finally:
        run("umount", str(mountpoint))


def make(folder: Path) -> None:
    """A file, a directory and a symlink with everything that both keep."""
    (folder / "d").mkdir()
    (folder / "d" / "f").write_bytes(b"bytes")
    (folder / "l").symlink_to("d/f")
    os.setxattr(folder / "d" / "f", "user.colour", b"\x00blue")
    for name, mode in (("d/f", 0o640), ("d", 0o750)):
        os.chown(folder / name, 33, 44)
        os.chmod(folder / name, mode)
        os.utime(folder / name, ns=(TIME_NS, TIME_NS))


def check(folder: Path) -> None:
    for name, mode in (("d/f", 0o640), ("d", 0o750)):
        found = os.stat(folder / name)
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (mode, 33, 44), name
        assert found.st_mtime_ns == TIME_NS, name
    assert (folder / "d" / "f").read_bytes() == b"bytes"
    assert os.readlink(folder / "l") == "d/f"
    assert os.getxattr(folder / "d" / "f", "user.colour") == b"\x00blue"


def test_s3fs_reads_ours(minio_server: Server, mounts: Mounts, tmp_path: Path) -> None:
    mount = mounts.new(minio_server)
    make(mount.path)
    mount.flush()
    with s3fs(minio_server, mount.bucket, tmp_path) as theirs:
        check(theirs)


def test_we_read_what_s3fs_wrote(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket], tmp_path: Path
) -> None:
    bucket = buckets(minio_server)
    with s3fs(minio_server, bucket.name, tmp_path) as theirs:
        make(theirs)
    mount = mounts.new(minio_server, bucket=bucket.name)
    check(mount.path)


def test_we_read_what_rclone_and_geesefs_wrote(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    bucket = buckets(minio_server)
    bucket.put("rclone", b"1", {"mtime": "1234567890.123456789"})
    bucket.put("link", b"", {"--symlink-target": "a/b%20c"})
    mount = mounts.new(minio_server, bucket=bucket.name)
    assert os.stat(mount.path / "rclone").st_mtime_ns == TIME_NS
    assert os.readlink(mount.path / "link") == "a/b c"
