"""Who holds a mount, as the kernel tells it."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from s3fuse import kernel
from s3fuse.mountpoint import refuse_writes
from s3fuse.volume import inuse
from tests.volume.harness import container

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_fuse = pytest.mark.skipif(
    not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="mounting wants root and /dev/fuse"
)

LINES = r"""21 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
40 21 0:50 / /mnt/a\040b rw,relatime shared:7 master:3 - fuse.s3fuse s3fuse#b rw
41 21 0:51 / /mnt/c rw - fuse.s3fuse s3fuse#c rw
42 21 0:52 / /mnt/d rw - fuse.sshfs fuse.s3fuse rw
43 21 0:53 /sub /mnt/e rw unbindable - fuse.s3fuse s3fuse#e rw
"""


def test_devices_and_their_peer_groups() -> None:
    assert inuse.devices(LINES) == [("0:50", {"7", "3"}), ("0:51", set()), ("0:53", set())]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A mount without a daemon, and its device number."""
    path = tmp_path / "mnt"
    path.mkdir()
    descriptor = kernel.mount(path, source="s3fuse#test", allow_other=False, read_only=True)
    entry = kernel.mount_entry(path)
    assert entry is not None
    yield path, entry.device
    os.close(descriptor)
    kernel.unmount(path, lazy=True)


@needs_fuse
def test_a_container_holds_the_mount_as_long_as_it_lives(mount: tuple[Path, str], tmp_path: Path) -> None:
    path, device = mount
    assert device not in inuse.held()
    with container(path, tmp_path / "data"):
        assert device in inuse.held()
    assert device not in inuse.held()


@needs_fuse
def test_what_is_bound_elsewhere_on_the_host_is_held(mount: tuple[Path, str], tmp_path: Path) -> None:
    path, device = mount
    (tmp_path / "other").mkdir()
    subprocess.run(["mount", "--bind", path, tmp_path / "other"], check=True)
    try:
        assert device in inuse.held()
    finally:
        kernel.unmount(tmp_path / "other", lazy=True)
    assert device not in inuse.held()


@needs_fuse
async def test_an_answer_is_given_again_for_a_while(mount: tuple[Path, str], tmp_path: Path) -> None:
    path, device = mount
    holders = inuse.Holders()
    assert not await holders.have(device)
    with container(path, tmp_path / "data"):
        assert not await holders.have(device, age_s=1000)
        assert await holders.have(device)


@needs_fuse
def test_a_copy_that_follows_by_propagation_is_no_holder(tmp_path: Path) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)
    try:
        subprocess.run(["mount", "--make-shared", tmp_path], check=True)
        descriptor = kernel.mount(path, source="s3fuse#test", allow_other=False, read_only=True)
        entry = kernel.mount_entry(path)
        assert entry is not None
        follower = subprocess.Popen(
            ["unshare", "-m", "--propagation", "slave", "sh", "-c", "echo; exec sleep 1000"], stdout=subprocess.PIPE
        )
        try:
            assert follower.stdout is not None
            follower.stdout.readline()
            with open(f"/proc/{follower.pid}/mountinfo") as lines:
                assert entry.device in [device for device, _ in inuse.devices(lines.read())]
            assert entry.device not in inuse.held()
        finally:
            follower.kill()
            follower.wait()
            follower.stdout.close()
        os.close(descriptor)
        kernel.unmount(path, lazy=True)
    finally:
        kernel.unmount(tmp_path, lazy=True)


@needs_fuse
def test_a_bare_mountpoint_refuses_writes_and_takes_a_mount(tmp_path: Path) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    if not refuse_writes(path):
        pytest.skip("this filesystem has no immutable flag")
    try:
        with pytest.raises(PermissionError):
            (path / "x").write_text("lost")
        os.close(kernel.mount(path, source="s3fuse#test", allow_other=False, read_only=True))
        kernel.unmount(path, lazy=True)
    finally:
        assert refuse_writes(path, on=False)
    (path / "x").write_text("fine")


def test_what_cannot_be_flagged_is_no_error(tmp_path: Path) -> None:
    assert not refuse_writes(tmp_path / "missing")
