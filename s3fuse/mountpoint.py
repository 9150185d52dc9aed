"""The directory below a mount, and the mount above it: what containers see while nothing is mounted, and afterwards.

Without care, what a program writes into the bare directory is on the host's disk, where nobody looks for it. The
filesystem's immutable flag makes such a write fail with EPERM; mounting on the directory still works. And a container
sees what is mounted after it was started only through a shared mount (bind-propagation `rslave`).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import TYPE_CHECKING

from s3fuse import kernel
from s3fuse.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

#: From <linux/fs.h>. The kernel moves an int, whatever the numbers say.
_GET_FLAGS = 0x80086601
_SET_FLAGS = 0x40086602
_IMMUTABLE = 0x10
#: From <linux/mount.h>.
_MS_BIND = 1 << 12
_MS_SHARED = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def refuse_writes(directory: Path, *, on: bool = True) -> bool:
    """Sets or clears the flag of a directory on which nothing is mounted. False where its filesystem has none, or this
    user may not."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        (flags,) = struct.unpack("I", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(8))[:4])
        wanted = flags | _IMMUTABLE if on else flags & ~_IMMUTABLE
        if wanted != flags:
            fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("II", wanted, 0))
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def share(mountpoint: Path) -> None:
    """Prepares a mountpoint for containers, for good: `refuse_writes` below it, `share_above` around it.

    Raises UserError.
    """
    share_above(mountpoint)
    if kernel.mount_entry(mountpoint) is None and mountpoint.is_dir() and not any(mountpoint.iterdir()):
        refuse_writes(mountpoint)


def share_above(mountpoint: Path) -> None:
    """Makes the directory above a mountpoint part of a shared mount, where it is not already (systemd shares all).

    Raises UserError where that would change more than this directory, or this user may not.
    """
    above = str(mountpoint.parent)
    mounts = kernel.mount_entries()
    points = [entry.mountpoint for entry in mounts]
    covering = [at for at, point in enumerate(points) if f"{above}/".startswith(f"{point.rstrip('/')}/")]
    if "shared:" in mounts[max(covering, key=lambda at: (len(points[at]), at))].propagation:
        return
    if above not in points:
        inside = [point for point in points if point.startswith(f"{above}/")]
        if inside:
            raise UserError(
                f"--shared: {above} cannot be made a shared mount of its own, as {inside[0]} is mounted in it; choose "
                "a directory that holds mountpoints of s3fuse only, or run: mount --make-shared /"
            )
        _mount(above, _MS_BIND)
    _mount(above, _MS_SHARED)


def _mount(directory: str, flags: int) -> None:
    path = os.fsencode(directory)
    if _libc.mount(path, path, None, flags, None):
        reason = os.strerror(ctypes.get_errno())
        raise UserError(f"--shared: {directory} cannot be made a shared mount: {reason}; it wants root")
