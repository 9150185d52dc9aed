"""Bind mounts of what `s3fuse mount --shared` mounts: what containers see after a new mount, and in between."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from s3fuse import kernel
from s3fuse.errors import UserError
from s3fuse.mountpoint import refuse_writes, share_above
from tests.fuse.conftest import mounts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fuse.harness import Mounts
    from tests.servers import Server

__all__ = ["mounts"]


def propagation(directory: Path) -> str:
    entry = kernel.mount_entry(directory)
    return "" if entry is None else entry.propagation


@pytest.fixture
def above(tmp_path: Path) -> Iterator[Path]:
    """A directory for mountpoints, in a mount that is private whatever this host does."""
    base = tmp_path / "private"
    base.mkdir()
    subprocess.run(["mount", "--bind", base, base], check=True)
    subprocess.run(["mount", "--make-private", base], check=True)
    above = base / "s3"
    above.mkdir()
    yield above
    for point in (above / "x", above, base):
        while kernel.mount_entry(point) is not None:
            kernel.unmount(point, lazy=True)
    refuse_writes(above / "x", on=False)


def test_a_container_that_follows(mounts: Mounts, minio_server: Server, above: Path) -> None:
    """As `--mount type=bind,src=/mnt/s3,dst=/m,bind-propagation=rslave`."""
    mount = mounts.new(minio_server, "--shared", start=False)
    mount.mountpoint.rmdir()
    mount.mountpoint = above / "x"
    mount.mountpoint.mkdir()
    mount.start()
    assert "shared:" in propagation(above)
    (mount.path / "file").write_text("one")
    follower = subprocess.Popen(
        ["unshare", "-m", "--propagation", "slave", "sh", "-c", "echo; exec sleep 1000"], stdout=subprocess.PIPE
    )

    def run(script: str) -> str:
        command = ["nsenter", "-m", "-t", str(follower.pid), "sh", "-ec", script]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    try:
        assert follower.stdout is not None
        follower.stdout.readline()
        assert run(f"cat {mount.path}/file") == "one"
        mount.stop()
        if refuse_writes(mount.path):
            with pytest.raises(subprocess.CalledProcessError):
                run(f"echo lost >{mount.path}/file")
        mount.start()
        assert run(f"cat {mount.path}/file") == "one"
    finally:
        follower.kill()
        follower.wait()
        if follower.stdout is not None:
            follower.stdout.close()
    mount.stop()


def test_what_is_shared_already_stays_as_it_is(above: Path) -> None:
    share_above(above / "x")
    first = propagation(above)
    share_above(above / "x")
    assert propagation(above) == first
    subprocess.run(["mount", "--make-private", above], check=True)
    share_above(above / "x")
    assert "shared:" in propagation(above)
    assert len([entry for entry in kernel.mount_entries() if entry.mountpoint == str(above)]) == 1


def test_mounts_of_others_are_never_covered(above: Path) -> None:
    (above / "x").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", above / "x"], check=True)
    with pytest.raises(UserError, match=f"{above} cannot be made a shared mount of its own, as {above}/x is mounted"):
        share_above(above / "y")
    assert propagation(above) == ""
