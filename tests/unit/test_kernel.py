"""The kernel side: mountinfo, checks of a mountpoint, and mounts that the kernel really makes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from s3fuse import kernel
from s3fuse.errors import UserError
from s3fuse.kernel import FSTYPE, MountEntry, check_mountpoint, mount_entry, parse_mountinfo, set_read_ahead

if TYPE_CHECKING:
    from collections.abc import Iterator

MOUNTINFO = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
90 22 0:45 / /mnt/a\040b\011c\012d\134e rw shared:7 master:2 propagate_from:3 - fuse.s3fuse s3fuse#bu\040cket rw
91 22 0:46 / /mnt/plain rw - fuse.s3fuse  rw
""".lstrip("\n")


@contextmanager
def unanswered_mount(mountpoint: Path) -> Iterator[int]:
    """A mount whose daemon (this test) answers nothing."""
    descriptor = kernel.mount(mountpoint, source="s3fuse#test", allow_other=False, flags=("ro",))
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            os.close(descriptor)
        while mount_entry(mountpoint) is not None:
            kernel.unmount(mountpoint, lazy=True)


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "a b\\c\td"
    path.mkdir()
    return path


# -- mountinfo


def test_mountinfo() -> None:
    assert parse_mountinfo(MOUNTINFO) == [
        MountEntry("/", "254:0", "ext4", "/dev/vda", "shared:1", 22, 1, ("rw", "relatime")),
        MountEntry(
            "/mnt/a b\tc\nd\\e",
            "0:45",
            "fuse.s3fuse",
            "s3fuse#bu cket",
            "shared:7 master:2 propagate_from:3",
            90,
            22,
            ("rw",),
        ),
        MountEntry("/mnt/plain", "0:46", "fuse.s3fuse", "", "", 91, 22, ("rw",)),
    ]


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\r", "\x1c", "\x85", "\u2028"])
def test_mountinfo_has_lines_only_at_newlines(character: str) -> None:
    assert parse_mountinfo(f"1 2 0:45 / /mnt/a{character}b rw - tmpfs t rw\n")[0].mountpoint == f"/mnt/a{character}b"


def test_the_later_mount_covers_the_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "1 2 0:1 / /mnt rw - ext4 old rw\n3 1 0:2 / /mnt rw - tmpfs new rw\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda *args, **kwargs: text)
    assert mount_entry(Path("/mnt")) == MountEntry("/mnt", "0:2", "tmpfs", "new", "", 3, 1, ("rw",))
    assert mount_entry(Path("/mnt/x")) is None


def test_absolute_names_a_mountpoint_as_mountinfo_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real/mnt").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "direct").symlink_to("real/mnt")
    monkeypatch.chdir(tmp_path)
    for text in ("real/mnt", "link/mnt", "direct", "./real/../real/mnt/"):
        assert kernel.absolute(Path(text)) == tmp_path / "real/mnt"
    assert kernel.absolute(Path("link/new")) == tmp_path / "real/new"


# -- checks


def test_a_mountpoint_that_can_be_used(mountpoint: Path) -> None:
    check_mountpoint(mountpoint, nonempty=False)
    (mountpoint / "file").touch()
    check_mountpoint(mountpoint, nonempty=True)


def test_what_is_in_the_way_is_named(mountpoint: Path) -> None:
    file = mountpoint / "file"
    file.touch()
    for path, text in (
        (mountpoint, "is not empty; choose an empty directory or add --nonempty"),
        (mountpoint / "nowhere", "does not exist; make it with: mkdir -p"),
        (file, "is not a directory"),
        (file / "below", "cannot be used: Not a directory"),
    ):
        with pytest.raises(UserError) as raised:
            check_mountpoint(path, nonempty=False)
        assert text in str(raised.value)
        assert f"mountpoint {path} " in str(raised.value)


def test_a_directory_that_cannot_be_read(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(UserError, match="cannot be used: Permission denied"):
        check_mountpoint(mountpoint, nonempty=False)


def test_no_device(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.exists", lambda path: path != "/dev/fuse")
    with pytest.raises(UserError, match="/dev/fuse does not exist; load"):
        check_mountpoint(mountpoint, nonempty=False)


# -- mounts


def test_a_mount_is_made_and_unmade(mountpoint: Path) -> None:
    with unanswered_mount(mountpoint) as descriptor:
        entry = mount_entry(mountpoint)
        assert entry is not None
        assert (entry.mountpoint, entry.fstype) == (str(mountpoint), FSTYPE)
        assert os.get_inheritable(descriptor)
        assert len(os.read(descriptor, 1 << 20)) >= 56, "the kernel's INIT request is there"
        kernel.unmount(mountpoint, lazy=True)
        assert mount_entry(mountpoint) is None
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)) as raised:
            kernel.unmount(mountpoint)
        assert raised.value.errno == errno.EINVAL


def test_a_living_mount_is_busy(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "PROBE_S", 0.01)
    with (
        unanswered_mount(mountpoint),
        pytest.raises(UserError, match=r"is busy: s3fuse#test \(fuse\.s3fuse\) is mounted there; unmount it first"),
    ):
        check_mountpoint(mountpoint, nonempty=False)


def test_a_dead_mount_is_detached(mountpoint: Path) -> None:
    with unanswered_mount(mountpoint) as descriptor:
        assert not kernel.is_dead(mountpoint.parent)
        os.close(descriptor)
        assert kernel.is_dead(mountpoint)
        check_mountpoint(mountpoint, nonempty=False)
        assert mount_entry(mountpoint) is None


def test_mounting_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        kernel.mount(tmp_path / "nowhere", source="s3fuse#test", allow_other=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may set the read-ahead")
def test_read_ahead(mountpoint: Path) -> None:
    with unanswered_mount(mountpoint):
        entry = mount_entry(mountpoint)
        assert entry is not None
        assert set_read_ahead(mountpoint, 1024)
        assert Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").read_text() == "1024\n"
    assert not set_read_ahead(mountpoint, 1024)


#: In a mount namespace of its own, where /dev/fuse is open to all, as udev makes it.
FOR_USERS = """
set -e
mount -t tmpfs tmpfs /mnt
mknod -m 666 /mnt/fuse c 10 229
mount --bind /mnt/fuse /dev/fuse
mkdir /mnt/user
chown 65534:65534 /mnt/user
exec "$@" /mnt/user
"""
AS_USER = """
import os, sys
from pathlib import Path
from s3fuse import kernel
os.setgid(65534)
os.setuid(65534)
where = Path(sys.argv[1])
flags = ("nosuid", "nodev", "noexec", "noatime")
descriptor = kernel.mount(where, source="s3fuse#a,b", allow_other=False, flags=flags)
entry = kernel.mount_entry(where)
print(entry.fstype, entry.source, os.get_inheritable(descriptor), kernel.set_read_ahead(where, 1024))
print(set(flags) - set(entry.flags), kernel.restrict(where, entry.device, kernel.SAFE_FLAGS))
kernel.unmount(where, lazy=True)
print(kernel.mount_entry(where))
try:
    kernel.unmount(where)
except OSError as error:
    print(error.errno)
for flags in (("nosuid",), ("nodev",)):
    try:
        kernel.mount(where, source="s3fuse#a,b", allow_other=False, flags=flags)
    except kernel.UserError as error:
        print(error, int(error.exit_code))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_user_mounts_through_the_helper() -> None:
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", FOR_USERS, "sh"]
    done = subprocess.run([*command, sys.executable, "-c", AS_USER], capture_output=True, text=True, timeout=30)
    why = "--{0} is for root: fusermount3 never lets a user mount with {0}; leave it out, or mount as root 2"
    assert done.stdout.splitlines() == [
        "fuse.s3fuse s3fuse#a_b True False",
        "set() False",
        "None",
        str(errno.EINVAL),
        why.format("dev"),
        why.format("suid"),
    ], done.stderr
