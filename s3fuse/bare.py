"""The directory that is below a mount.

Without care, what a program writes there while nothing is mounted is on the host's disk, where nobody looks for it. The
filesystem's immutable flag makes such a write fail with EPERM; mounting on the directory still works.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

#: From <linux/fs.h>. The kernel moves an int, whatever the numbers say.
_GET_FLAGS = 0x80086601
_SET_FLAGS = 0x40086602
_IMMUTABLE = 0x10


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
