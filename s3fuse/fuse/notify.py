"""What the kernel is told without having asked. Source of the layouts: include/uapi/linux/fuse.h."""

from __future__ import annotations

import errno
import logging
import os
import struct
from typing import Final

log = logging.getLogger(__name__)

_INVALIDATE_ENTRY: Final = 3
_HEAD = struct.Struct("<IiQ")
_ENTRY = struct.Struct("<QII")
#: The kernel does not know the name or its directory, it is a mountpoint, or the connection has ended.
_HARMLESS: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EBUSY, errno.ENODEV, errno.EBADF})


def invalidate_entry(device: int, directory: int, name: bytes) -> None:
    """Has the kernel look up a name anew (blocks while it has the directory for another request). Never raises.

    `device` is its connection, `directory` the inode number.
    """
    body = _ENTRY.pack(directory, len(name), 0) + name + b"\0"
    try:
        os.write(device, _HEAD.pack(_HEAD.size + len(body), _INVALIDATE_ENTRY, 0) + body)
    except OSError as error:
        if error.errno not in _HARMLESS:
            log.info("the kernel was not told that %r leads elsewhere: %s", name, error)
