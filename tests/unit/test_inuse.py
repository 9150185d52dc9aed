"""Who holds a mount, as the kernel tells it."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
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
30 21 0:40 / /mnt rw shared:5 master:6 propagate_from:7 - tmpfs t rw
40 21 0:50 / /mnt/a\040b rw,relatime shared:7 master:3 - fuse.s3fuse s3fuse#b rw
41 30 0:51 / /mnt/c rw - fuse.s3fuse s3fuse#c rw
42 21 0:52 / /mnt/d rw - fuse.sshfs fuse.s3fuse rw
43 99 0:53 /sub / rw unbindable - fuse.s3fuse s3fuse#e rw
"""


def test_devices_and_the_peer_groups_of_what_they_are_on() -> None:
    assert inuse.devices(LINES) == [("0:50", {"1"}), ("0:51", {"5", "6", "7"}), ("0:53", set())]
    assert inuse.devices("") == []


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A mount without a daemon, and its device number."""
    path = tmp_path / "mnt"
    path.mkdir()
    descriptor = kernel.mount(path, source="s3fuse#test", allow_other=False, flags=("ro",))
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


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A mount without a daemon on a shared mount, as all are where systemd runs; and its device number."""
    path = tmp_path / "mnt"
    path.mkdir()
    subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)
    subprocess.run(["mount", "--make-shared", tmp_path], check=True)
    descriptor = kernel.mount(path, source="s3fuse#test", allow_other=False, flags=("ro",))
    entry = kernel.mount_entry(path)
    assert entry is not None
    yield path, entry.device
    os.close(descriptor)
    for mounted in (path, tmp_path):
        with suppress(OSError):
            kernel.unmount(mounted, lazy=True)


def _in_namespace(script: str, *arguments: Path) -> subprocess.Popen[bytes]:
    """A process in a mount namespace that is a slave of this one, as those of services and containers are."""
    words = ["sh", "-ec", f"{script}; echo; exec sleep 1000", "sh", *map(str, arguments)]
    process = subprocess.Popen(["unshare", "-m", "--propagation", "slave", *words], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@needs_fuse
def test_a_copy_that_follows_by_propagation_is_no_holder(shared: tuple[Path, str]) -> None:
    path, device = shared
    follower = _in_namespace(":")
    try:
        with open(f"/proc/{follower.pid}/mountinfo") as lines:
            assert device in [found for found, _ in inuse.devices(lines.read())]
        assert device not in inuse.held()
        kernel.unmount(path, lazy=True)
        with open(f"/proc/{follower.pid}/mountinfo") as lines:
            assert device not in [found for found, _ in inuse.devices(lines.read())]
    finally:
        _end(follower)


@needs_fuse
def test_a_containers_copy_is_a_slave_of_ours_and_stays(shared: tuple[Path, str], tmp_path: Path) -> None:
    path, device = shared
    (tmp_path / "root").mkdir()
    script = 'mount -t tmpfs t "$2"; mkdir "$2/data"; mount --bind "$1" "$2/data"; umount -l "$1"'
    container = _in_namespace(script, path, tmp_path / "root")
    try:
        with open(f"/proc/{container.pid}/mountinfo") as lines:
            line = next(line for line in lines if f" {tmp_path}/root/data " in line)
        assert "master:" in line
        assert device in inuse.held()
        kernel.unmount(path, lazy=True)
        assert device in inuse.held(), "it is held still"
    finally:
        _end(container)
    assert device not in inuse.held()


@needs_fuse
def test_a_bare_mountpoint_refuses_writes_and_takes_a_mount(tmp_path: Path) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    if not refuse_writes(path):
        pytest.skip("this filesystem has no immutable flag")
    try:
        with pytest.raises(PermissionError):
            (path / "x").write_text("lost")
        os.close(kernel.mount(path, source="s3fuse#test", allow_other=False, flags=("ro",)))
        kernel.unmount(path, lazy=True)
    finally:
        assert refuse_writes(path, on=False)
    (path / "x").write_text("fine")


def test_what_cannot_be_flagged_is_no_error(tmp_path: Path) -> None:
    assert not refuse_writes(tmp_path / "missing")
