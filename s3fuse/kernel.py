"""The kernel side of a mount, made by our own code: /dev/fuse, mount(2) or fusermount3, mountinfo, read-ahead.

The descriptor that `mount` gives is the connection; whoever holds it keeps the mount alive.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from s3fuse.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

FSTYPE = "fuse.s3fuse"
_libc = ctypes.CDLL(None, use_errno=True)
MNT_DETACH = 2
#: What a mount keeps from the bucket, whose metadata anybody may have written who may write objects: root's rights by
#: set-uid files or file capabilities, and devices of this host.
SAFE_FLAGS = ("nosuid", "nodev")
#: Flags of mounts by their names in fstab (<linux/mount.h>).
_FLAGS = {"ro": 1, "nosuid": 1 << 1, "nodev": 1 << 2, "noexec": 1 << 3, "noatime": 1 << 10}
_MS_REMOUNT = 1 << 5
_MS_BIND = 1 << 12
#: How long a stat of a mountpoint may take before its daemon counts as hung.
PROBE_S = 3.0


@dataclass(frozen=True)
class MountEntry:
    """One line of /proc/self/mountinfo; `device` is "MAJOR:MINOR", `propagation` such as "shared:1 master:2".

    `number` and `parent` are the kernel's numbers of this mount and of the one that it is mounted on; `flags` are those
    of the mount, such as "rw", "nosuid".
    """

    mountpoint: str
    device: str
    fstype: str
    source: str
    propagation: str = ""
    number: int = 0
    parent: int = 0
    flags: tuple[str, ...] = ()


def _unescape(text: str) -> str:
    """mountinfo writes blank, tab, newline and backslash as octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), text)


def parse_mountinfo(text: str) -> list[MountEntry]:
    """The mounts in a mountinfo file (format: proc(5)), in order; a later one on a mountpoint covers an earlier one."""
    entries = []
    for line in filter(None, text.split("\n")):  # names may hold the other characters that splitlines splits at
        fields = line.split(" ")
        dash = fields.index("-", 6)
        source = _unescape(fields[dash + 2])
        propagation = " ".join(fields[6:dash])
        numbers = int(fields[0]), int(fields[1])
        flags = tuple(fields[5].split(","))
        entries.append(
            MountEntry(_unescape(fields[4]), fields[2], fields[dash + 1], source, propagation, *numbers, flags)
        )
    return entries


def absolute(mountpoint: Path) -> Path:
    """The path as mountinfo has it, without symlinks. Never asks a filesystem that is mounted there: it may be dead."""
    path = Path(os.path.abspath(mountpoint))
    try:
        os.readlink(path)
    except OSError:
        return Path(os.path.realpath(path.parent), path.name)
    return Path(os.path.realpath(path))


def mount_entries() -> list[MountEntry]:
    """What is mounted now, in order."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape"))


def mount_entry(mountpoint: Path) -> MountEntry | None:
    """What is mounted on this path now. Never touches the filesystem that is mounted there."""
    wanted = os.path.abspath(mountpoint)
    found = [entry for entry in mount_entries() if entry.mountpoint == wanted]
    return found[-1] if found else None


def _statvfs_errno(path: Path) -> int:
    """The errno of a statvfs, 0 for success, ETIMEDOUT where it does not return (the thread is then left behind).

    Not of a stat: the kernel answers that from its cache for a while after the daemon has died.
    """
    result = [errno.ETIMEDOUT]

    def look() -> None:
        try:
            os.statvfs(path)
            result[0] = 0
        except OSError as error:
            result[0] = error.errno or errno.EIO

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return result[0]


def is_dead(mountpoint: Path) -> bool:
    """Whether a mount is there whose daemon is gone."""
    return mount_entry(mountpoint) is not None and _statvfs_errno(mountpoint) in (errno.ENOTCONN, errno.ECONNABORTED)


def dead_mounts() -> list[MountEntry]:
    """The s3fuse mounts whose daemon is gone, as far as this user may look."""
    ours = {entry.mountpoint: entry for entry in mount_entries() if entry.fstype == FSTYPE}
    return [entry for entry in ours.values() if is_dead(Path(entry.mountpoint))]


def check_mountpoint(mountpoint: Path, *, nonempty: bool) -> None:
    """Returns when a mount can be made there; a dead s3fuse mount is detached first.

    Raises UserError that names what is in the way.
    """
    if not os.path.exists("/dev/fuse"):
        raise UserError(
            "/dev/fuse does not exist; load the kernel module (modprobe fuse), in a container add --device /dev/fuse"
        )
    entry = mount_entry(mountpoint)
    if entry is not None and entry.fstype == FSTYPE and is_dead(mountpoint):
        unmount(mountpoint, lazy=True)
        entry = mount_entry(mountpoint)
    if entry is not None and entry.fstype.startswith("fuse"):
        raise UserError(
            f"mountpoint {mountpoint} is busy: {entry.source} ({entry.fstype}) is mounted there; unmount it first"
        )
    try:
        mode = os.stat(mountpoint).st_mode
        used = stat.S_ISDIR(mode) and not nonempty and os.listdir(mountpoint)
    except FileNotFoundError:
        raise UserError(f"mountpoint {mountpoint} does not exist; make it with: mkdir -p {mountpoint}") from None
    except OSError as error:
        raise UserError(f"mountpoint {mountpoint} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"mountpoint {mountpoint} is not a directory; choose a directory")
    if used:
        raise UserError(
            f"mountpoint {mountpoint} is not empty; choose an empty directory or add --nonempty to cover it"
        )


def mount(mountpoint: Path, *, source: str, allow_other: bool, flags: Collection[str] = SAFE_FLAGS) -> int:
    """Mounts and gives the descriptor of the connection (inheritable).

    `flags` are of fstab's: ro, nosuid, nodev, noexec, noatime. Raises UserError.
    """
    if os.geteuid() != 0:
        return _mount_by_helper(mountpoint, source=source, allow_other=allow_other, flags=flags)
    try:
        root_mode = stat.S_IFMT(os.stat(mountpoint).st_mode)
    except OSError as error:
        raise UserError(f"mountpoint {mountpoint} cannot be used: {error.strerror}") from None
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(
            f"/dev/fuse cannot be opened: {error.strerror}; in a container add --device /dev/fuse"
        ) from None
    options = f"fd={device},rootmode={root_mode:o},user_id=0,group_id=0,default_permissions,max_read=1048576"
    if allow_other:
        options += ",allow_other"
    arguments = (source.encode(), os.fsencode(mountpoint), FSTYPE.encode(), _number(flags), options.encode())
    if _libc.mount(*arguments):
        code = ctypes.get_errno()
        os.close(device)
        hint = "; mounting needs the capability CAP_SYS_ADMIN" if code == errno.EPERM else ""
        raise UserError(f"mounting on {mountpoint} failed: {os.strerror(code)}{hint}")
    os.set_inheritable(device, True)
    return device


def _number(flags: Iterable[str]) -> int:
    """Flags as mount(2) takes them."""
    return sum(_FLAGS[flag] for flag in flags)


def restrict(mountpoint: Path, device: str, flags: Collection[str]) -> bool:
    """Gives the mount with this device number flags that it lacks; those that it has stay. False where it has them all.

    Only the mount on this mountpoint: copies of it, which containers have since they were started, keep theirs. Asks
    nothing of whoever serves the mount. Raises OSError.
    """
    entry = mount_entry(mountpoint)
    if entry is None or entry.device != device or set(flags) <= set(entry.flags):
        return False
    number = _number({*flags, *(flag for flag in entry.flags if flag in _FLAGS)})
    if _libc.mount(None, os.fsencode(mountpoint), None, number | _MS_REMOUNT | _MS_BIND, None):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(mountpoint))
    return True


def _mount_by_helper(mountpoint: Path, *, source: str, allow_other: bool, flags: Collection[str]) -> int:
    """Has fusermount3 mount for a user who may not; it passes the descriptor over a socket (libfuse's protocol)."""
    if missing := [flag.removeprefix("no") for flag in SAFE_FLAGS if flag not in flags]:
        raise UserError(
            f"--{missing[0]} is for root: fusermount3 never lets a user mount with {missing[0]}; leave it out, or "
            "mount as root",
            ExitCode.USAGE,
        )
    helper = shutil.which("fusermount3")
    if helper is None:
        raise UserError("fusermount3 is not installed; install the package fuse3, or mount as root")
    options = ["default_permissions", f"fsname={source.replace(',', '_')}", "subtype=s3fuse", "max_read=1048576"]
    options += ["allow_other"] if allow_other else []
    options += flags
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = subprocess.run(
            [helper, "-o", ",".join(options), "--", str(mountpoint)],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise UserError(f"mounting on {mountpoint} failed: {reason[0]}")
        fds = array.array("i")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_LEN(fds.itemsize))
        for _level, _kind, content in ancillary:
            fds.frombytes(content[: fds.itemsize])
    if not fds:
        raise UserError(f"mounting on {mountpoint} failed: fusermount3 passed no descriptor")
    os.set_inheritable(fds[0], True)
    return fds[0]


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Detaches the mount; `lazy` also while files are open. Raises OSError(EBUSY, EINVAL where none is there)."""
    if os.geteuid() != 0:
        helper = shutil.which("fusermount3") or "fusermount3"
        done = subprocess.run(
            [helper, "-u", *(["-z"] if lazy else []), "--", str(mountpoint)], capture_output=True, text=True
        )
        if done.returncode:
            code = errno.EBUSY if "busy" in done.stderr.lower() else errno.EINVAL
            raise OSError(code, done.stderr.strip() or os.strerror(code), str(mountpoint))
        return
    if not lazy:
        _apart("os.fsencode(sys.argv[1])", "umount2", mountpoint, 0)
    elif _libc.umount2(os.fsencode(mountpoint), MNT_DETACH):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(mountpoint))


def detach(mountpoint: Path, device: str) -> None:
    """Lazily unmounts the mount with this device number; does nothing where another one or none is on top there."""
    entry = mount_entry(mountpoint)
    if entry is not None and entry.device == device:
        with suppress(OSError):
            unmount(mountpoint, lazy=True)


def write_back(mountpoint: Path) -> None:
    """Returns when the kernel has sent the daemon all that programs wrote there. Raises OSError.

    It blocks until the daemon has answered, so the daemon calls it in a thread.
    """
    _apart("os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)", "syncfs", mountpoint)


def _apart(argument: str, call: str, mountpoint: Path, *more: int) -> None:
    """Calls a function of libc in a process of its own, which may be what waits for the daemon after its death.

    Not even SIGKILL ends a process while one of its threads is in such a call, and no other one could take its place.
    Raises OSError.
    """
    numbers = "".join(f", {number}" for number in more)
    code = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
try:
    os._exit(ctypes.get_errno() if libc.{call}({argument}{numbers}) else 0)
except OSError as error:
    os._exit(error.errno)
"""
    done = subprocess.run([sys.executable, "-ISc", code, os.fspath(mountpoint)], stdin=subprocess.DEVNULL)
    if done.returncode:
        number = done.returncode if done.returncode > 0 else errno.EINTR
        raise OSError(number, os.strerror(number), str(mountpoint))


def set_read_ahead(mountpoint: Path, kib: int) -> bool:
    """Raises the mount's read-ahead to `kib`; False where this user may not."""
    entry = mount_entry(mountpoint)
    if entry is None:
        return False
    with suppress(OSError):
        Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").write_text(f"{kib}\n")
        return True
    return False
