"""A mount tells other nodes that it is there, in an object that nobody sees on the mount, and takes it away."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from s3fuse import control
from tests.fuse.harness import S3FUSE, Gate, run, wait_for
from tests.proxy import Fault, proxied

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server


def test_a_lease_lives_as_long_as_the_mount(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(server)
    mount.allowed.append("the worker died")
    bucket = buckets(server, mount.bucket)
    (key,) = bucket.leases()
    said = bucket.metadata(key)["s3fuse-holder"]
    assert str(mount.path) in said
    assert os.uname().nodename in said
    assert os.listdir(mount.path) == []
    assert not (mount.path / ".s3fuse").exists()
    assert mount.status()["lease"] == {"key": key, "problem": ""}

    def renewed() -> bool:
        return bucket.leases() == {key}

    bucket.delete(key)  # so that a renewal shows
    run(S3FUSE, "restart", mount.path)
    wait_for(renewed)
    worker = mount.worker_pid
    bucket.delete(key)
    os.kill(worker, signal.SIGKILL)
    wait_for(renewed)
    assert mount.worker_pid != worker
    assert os.listdir(mount.path) == []
    mount.stop()
    assert bucket.every_key() == set()


def test_below_a_prefix_and_after_a_crash(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    bucket = buckets(server)
    mount = mounts.new(server, bucket=f"{bucket.name}/a/b")
    (key,) = bucket.leases()
    assert key.startswith("a/b/.s3fuse/")
    mount.kill()
    assert bucket.leases() == {key}
    mount.start()
    assert bucket.leases() == {key}, "the next mount of the cache directory goes on with it"
    other = mounts.new(server, bucket=f"{bucket.name}/a/b")
    assert len(bucket.leases()) == 2
    other.stop()
    assert bucket.leases() == {key}
    mount.stop()
    assert bucket.leases() == set()


def test_what_waits_for_upload_keeps_the_lease(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """An unmount that leaves something in the journal is no end of the use; the next one is."""
    gate = Gate(minio_server)
    try:
        mount = mounts.new(gate.server)
        mount.allowed.append("not in the bucket yet")
        bucket = buckets(minio_server, mount.bucket)
        gate.hold()
        (mount.path / "file").write_text("waits")
        assert run(S3FUSE, "umount", "--drain-timeout", "0s", mount.path, check=False).returncode == 3
        assert len(bucket.leases()) == 1
        gate.open()
        mount.start().stop()
        assert bucket.every_key() == {"file"}
    finally:
        gate.close()


def test_a_read_only_mount_has_none(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(minio_server, "--read-only")
    assert buckets(minio_server, mount.bucket).leases() == set()
    assert mount.status()["lease"]["key"] is None


def test_keys_that_may_only_read_mount_without_one(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    bucket = buckets(minio_server)
    bucket.put("file", b"x")
    with proxied(minio_server) as proxy:
        for operation in ("put", "delete", "delete_many", "multipart_create"):
            proxy.fail(Fault.DENIED, operation)
        mount = mounts.new(proxy.server, bucket=bucket.name)
        assert (mount.path / "file").read_bytes() == b"x"
        lease = mount.status()["lease"]
        assert lease["key"] is None
        assert "AccessDenied" in lease["problem"]
        assert "do not know of this mount" in run(S3FUSE, "status", mount.path).stdout
        mount.stop()
    assert bucket.every_key() == {"file"}


def test_an_ephemeral_mount_has_one(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(minio_server, "--ephemeral")
    bucket = buckets(minio_server, mount.bucket)
    assert len(bucket.leases()) == 1
    mount.stop()
    assert bucket.every_key() == set()


def test_a_mount_that_fails_leaves_none(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(minio_server, start=False)
    mount.allowed.append("the daemon failed")
    socket = control.socket_path(mount.path)
    socket.parent.mkdir(parents=True, exist_ok=True)
    socket.mkdir()  # so that it cannot listen
    try:
        done = run(*mount.command(), env=os.environ | mount.server.environment, check=False)
    finally:
        socket.rmdir()
    assert done.returncode
    assert not mount.mounted
    assert buckets(minio_server, mount.bucket).every_key() == set()
