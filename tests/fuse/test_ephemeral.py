"""`--ephemeral` on a real mount: no file of ours anywhere, and the status says so."""

from __future__ import annotations

import hashlib
import os
import random
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import S3FUSE, free_environment, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuse.harness import Bucket, Gate, Mounts
    from tests.servers import Server


@pytest.mark.timeout(180)
def test_nothing_on_disk(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    mount = mounts.new(server, "--ephemeral", "--dirty-size", "8MiB", "--memory", "32MiB")
    body = random.Random(1).randbytes(40 << 20)
    (mount.path / "secret").write_bytes(b"secret")
    (mount.path / "large").write_bytes(body)
    folder = f"/proc/{mount.worker_pid}/fd"
    open_files = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
    kept = [name for name in open_files if name.startswith("/") and not name.startswith(("/dev/", "/memfd:"))]
    assert set(kept) <= {str(mount.log)}
    status = mount.status()
    assert status["cache"]["ephemeral"]
    assert "kept in memory only" in run(S3FUSE, "status", mount.path, env=free_environment()).stdout
    assert "a crash loses what is not uploaded" in mount.log_text()
    mount.flush()
    bucket = buckets(server, mount.bucket)
    assert bucket.get("secret") == b"secret"
    assert bucket.digest("large") == hashlib.sha256(body).hexdigest()
    assert mount.memory_peak_bytes() < (32 + 8 + 160) << 20
    mount.stop()
    assert not (tmp_path / "caches").exists()
    assert not mount.cache.exists()


def test_what_is_left_is_said_to_be_lost(minio_server: Server, mounts: Mounts, gate: Gate) -> None:
    mount = mounts.new(gate.server, "--ephemeral", "--create-bucket")
    mount.allowed.append("not in the bucket yet: secret .*; it is lost with --ephemeral")
    os.listdir(mount.path)
    gate.hold()
    try:
        (mount.path / "secret").write_bytes(b"secret")
        done = run(S3FUSE, "umount", "--drain-timeout", "1s", mount.path, env=free_environment(), check=False)
    finally:
        gate.open()
    assert done.returncode == 3
    assert "these are lost (--ephemeral)" in done.stderr
    assert "secret" in done.stderr
    mount.wait_for_end()


def test_a_dead_daemon_is_said_to_have_lost_what_it_had(minio_server: Server, mounts: Mounts) -> None:
    mount = mounts.new(minio_server, "--ephemeral", "--create-bucket")
    mount.kill()
    done = run(S3FUSE, "umount", mount.path, env=free_environment(), check=False)
    assert done.returncode == 3
    assert "is lost (--ephemeral)" in done.stderr
