"""What goes wrong at the start: within 10 s one line that names it and the remedy, an exit code, nothing changed."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from s3fuse import control, kernel
from tests.fuse.harness import S3FUSE, free_environment, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

FAILED, USAGE, REFUSED = 1, 2, 4


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def refused(
    server: Server, bucket: str, mountpoint: Path, *options: str, code: int, names: tuple[str, ...], **changes: str
) -> str:
    """Mounts, which must fail as it should; gives the line."""
    cache = mountpoint.parent / "cache"
    options = options if "--cache-dir" in options else ("--cache-dir", str(cache), *options)
    before = kernel.mount_entry(mountpoint)
    start = time.monotonic()
    done = run(
        S3FUSE,
        "mount",
        *options,
        bucket,
        mountpoint,
        env=free_environment(**(server.environment | changes)),
        check=False,
    )
    took_s = time.monotonic() - start
    assert done.returncode == code, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("s3fuse: ")
    for name in names:
        assert name in lines[0]
    assert took_s < 10
    assert kernel.mount_entry(mountpoint) == before
    if before is None:
        assert not control.socket_path(mountpoint).exists()
    assert server.secret_key not in done.stderr
    daemons = subprocess.run(["pgrep", "-f", f"mount.*{mountpoint}"], capture_output=True, text=True).stdout.split()
    assert before is not None or not daemons
    return lines[0]


def test_no_such_bucket(server: Server, mountpoint: Path) -> None:
    refused(
        server, "no-such-bucket", mountpoint, code=REFUSED, names=("no-such-bucket", server.endpoint, "--create-bucket")
    )
    assert not (mountpoint.parent / "cache").exists()


def test_cache_directory_where_it_must_not_be(
    minio_server: Server, buckets: Callable[..., Bucket], mountpoint: Path, tmp_path: Path
) -> None:
    bucket = buckets(minio_server).name
    for place in (mountpoint, mountpoint / "below"):
        names = ("cache directory", "below the mountpoint", "--cache-dir")
        refused(minio_server, bucket, mountpoint, "--cache-dir", str(place), code=FAILED, names=names)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "photo").write_text("precious")
    refused(minio_server, bucket, mountpoint, "--cache-dir", str(theirs), code=FAILED, names=("photo", "--cache-dir"))
    assert os.listdir(theirs) == ["photo"]
    assert os.listdir(mountpoint) == []


def test_create_bucket(server: Server, mounts: Mounts, bucket_name: str) -> None:
    mount = mounts.new(server, "--create-bucket", bucket=bucket_name)
    (mount.path / "a").write_text("a")
    mount.remount()
    assert (mount.path / "a").read_text() == "a"


def test_name_that_no_bucket_can_have(minio_server: Server, mountpoint: Path) -> None:
    refused(minio_server, "Not_A_Bucket", mountpoint, code=USAGE, names=("Not_A_Bucket",))


def test_wrong_secret(server: Server, mountpoint: Path, buckets: Callable[..., Bucket]) -> None:
    wrong = "wrong" * 8
    line = refused(
        server, buckets(server).name, mountpoint, code=REFUSED, names=(server.endpoint,), AWS_SECRET_ACCESS_KEY=wrong
    )
    assert "credentials" in line
    assert wrong not in line


def test_wrong_access_key(server: Server, mountpoint: Path, buckets: Callable[..., Bucket]) -> None:
    line = refused(
        server, buckets(server).name, mountpoint, code=REFUSED, names=(server.endpoint,), AWS_ACCESS_KEY_ID="nobody"
    )
    assert "credentials" in line


def test_no_keys(minio_server: Server, mountpoint: Path) -> None:
    environment = free_environment(AWS_ENDPOINT_URL=minio_server.endpoint, HOME="/nonexistent")
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "XDG_CACHE_HOME": str(mountpoint.parent / "cache")}
    start = time.monotonic()
    done = run(S3FUSE, "mount", "some-bucket", mountpoint, env=environment, check=False)
    assert time.monotonic() - start < 10
    assert done.returncode in (USAGE, REFUSED)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "AWS_ACCESS_KEY_ID" in done.stderr
    assert kernel.mount_entry(mountpoint) is None


def test_no_endpoint(minio_server: Server, mountpoint: Path) -> None:
    environment = free_environment(AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
    done = run(S3FUSE, "mount", "some-bucket", mountpoint, env=environment, check=False)
    assert done.returncode == USAGE, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "--endpoint" in done.stderr


def test_closed_port(minio_server: Server, mountpoint: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"  # bound and not listening: nobody else gets it
        refused(
            minio_server,
            "some-bucket",
            mountpoint,
            "--endpoint",
            endpoint,
            code=REFUSED,
            names=(endpoint, "--endpoint"),
        )


def test_server_that_does_not_answer(minio_server: Server, mountpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        refused(
            minio_server,
            "some-bucket",
            mountpoint,
            "--endpoint",
            endpoint,
            code=REFUSED,
            names=(endpoint, "--endpoint"),
        )


def test_server_that_speaks_something_else(minio_server: Server, mountpoint: Path) -> None:
    """TLS asked from a server without it."""
    endpoint = minio_server.endpoint.replace("http:", "https:")
    refused(minio_server, "some-bucket", mountpoint, "--endpoint", endpoint, code=REFUSED, names=(endpoint,))


def test_unknown_host(minio_server: Server, mountpoint: Path) -> None:
    endpoint = "http://no-such-host.invalid:9000"
    refused(
        minio_server, "some-bucket", mountpoint, "--endpoint", endpoint, code=REFUSED, names=("no-such-host.invalid",)
    )


def test_endpoint_that_is_none(minio_server: Server, mountpoint: Path) -> None:
    refused(minio_server, "some-bucket", mountpoint, "--endpoint", "ftp://x", code=USAGE, names=("ftp://x",))


def test_missing_mountpoint(minio_server: Server, mountpoint: Path, buckets: Callable[..., Bucket]) -> None:
    missing = mountpoint / "missing"
    refused(minio_server, buckets(minio_server).name, missing, code=FAILED, names=(str(missing), "mkdir -p"))
    assert not missing.exists()


def test_mountpoint_is_a_file(minio_server: Server, mountpoint: Path, buckets: Callable[..., Bucket]) -> None:
    file = mountpoint / "file"
    file.write_text("kept")
    refused(minio_server, buckets(minio_server).name, file, code=FAILED, names=(str(file), "directory"))
    assert file.read_text() == "kept"


def test_mountpoint_not_empty(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(minio_server, start=False)
    (mount.path / "file").write_text("kept")
    refused(minio_server, mount.bucket, mount.path, code=FAILED, names=(str(mount.path), "--nonempty"))
    mount.start("--nonempty")
    assert os.listdir(mount.path) == []
    mount.stop()
    assert (mount.path / "file").read_text() == "kept"


def test_busy_mountpoint(minio_server: Server, mounts: Mounts) -> None:
    mount = mounts.new(minio_server)
    (mount.path / "file").write_text("kept")
    refused(minio_server, mount.bucket, mount.path, code=FAILED, names=(str(mount.path), mount.bucket))
    assert (mount.path / "file").read_text() == "kept"


def test_cache_directory_in_use(minio_server: Server, mounts: Mounts, mountpoint: Path) -> None:
    mount = mounts.new(minio_server)
    refused(
        minio_server, mount.bucket, mountpoint, "--cache-dir", str(mount.cache), code=FAILED,
        names=(str(mount.cache), "in use", "--cache-dir"),
    )  # fmt: skip
    (mount.path / "works").write_text("still")


def test_cache_directory_of_another_bucket(
    minio_server: Server, mounts: Mounts, mountpoint: Path, buckets: Callable[..., Bucket]
) -> None:
    mount = mounts.new(minio_server)
    mount.stop()
    other = buckets(minio_server).name
    refused(
        minio_server, other, mountpoint, "--cache-dir", str(mount.cache), code=FAILED,
        names=(str(mount.cache), mount.bucket, other, "--cache-dir"),
    )  # fmt: skip
    mount.start()


def test_cache_directory_that_cannot_be(minio_server: Server, mountpoint: Path, buckets: Callable[..., Bucket]) -> None:
    file = mountpoint.parent / "file"
    file.write_text("")
    refused(
        minio_server, buckets(minio_server).name, mountpoint, "--cache-dir", str(file / "cache"), code=FAILED,
        names=(str(file / "cache"), "--cache-dir"),
    )  # fmt: skip


def test_damaged_journal(minio_server: Server, mounts: Mounts, mountpoint: Path) -> None:
    mount = mounts.new(minio_server)
    mount.stop()
    for name in os.listdir(mount.cache):
        if name.startswith("journal.sqlite"):
            (mount.cache / name).write_bytes(b"this is no database" * 500)
    refused(
        minio_server, mount.bucket, mountpoint, "--cache-dir", str(mount.cache), code=FAILED, names=(str(mount.cache),)
    )
    assert (mount.cache / "journal.sqlite").read_bytes().startswith(b"this is no")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--memory", "much"), ("--memory", "much", "64MiB")),
        (("--memory", "1MiB"), ("--memory", "16MiB")),
        (("--drain-timeout", "soon"), ("--drain-timeout", "soon", "30s")),
        (("--file-mode", "9"), ("--file-mode", "9", "0644")),
        (("--max-requests", "0"), ("--max-requests", "2")),
        (("-o", "nonsense=1"), ("nonsense",)),
        (("-o", "memory=x"), ("--memory", "x")),
        (("-o", "read-only=1"), ("read-only",)),
    ],
)
def test_wrong_options(
    minio_server: Server, mountpoint: Path, options: tuple[str, ...], names: tuple[str, ...]
) -> None:
    refused(minio_server, "some-bucket", mountpoint, *options, code=USAGE, names=names)


@pytest.mark.parametrize("verb", ["umount", "flush", "status"])
def test_verbs_where_nothing_is_mounted(verb: str, mountpoint: Path) -> None:
    done = run(S3FUSE, verb, mountpoint, check=False)
    assert done.returncode == FAILED
    assert done.stderr.splitlines() == [f"s3fuse: {mountpoint} is not mounted by s3fuse; see s3fuse status"]


def test_umount_of_a_mount_in_use(minio_server: Server, mounts: Mounts) -> None:
    mount = mounts.new(minio_server)
    with (mount.path / "open").open("w") as file:
        done = run(S3FUSE, "umount", mount.path, check=False)
        assert done.returncode == FAILED
        assert len(done.stderr.splitlines()) == 1
        assert str(mount.path) in done.stderr
        assert "in use" in done.stderr
        file.write("still works")
    assert (mount.path / "open").read_text() == "still works"


def test_read_only(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    bucket = buckets(minio_server)
    bucket.put("d/file", b"body")
    mount = mounts.new(minio_server, "--read-only", bucket=bucket.name)
    assert (mount.path / "d/file").read_bytes() == b"body"
    for change in (
        lambda: (mount.path / "new").write_text("x"),
        lambda: (mount.path / "d/file").write_text("x"),
        lambda: (mount.path / "d/file").unlink(),
        lambda: (mount.path / "d").rename(mount.path / "e"),
        lambda: (mount.path / "d/file").chmod(0o600),
        lambda: (mount.path / "new").mkdir(),
    ):
        with pytest.raises(OSError, match="Read-only file system"):
            change()
    mount.stop()
    assert bucket.keys() == {"d/file"}
