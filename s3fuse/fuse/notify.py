"""What the kernel is told without having asked. Source of the layouts: include/uapi/linux/fuse.h."""

from __future__ import annotations

import errno
import logging
import os
import struct
from functools import partial
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

_INVALIDATE_ENTRY: Final = 3
_HEAD = struct.Struct("<IiQ")
_ENTRY = struct.Struct("<QII")
#: The kernel does not know the name or its directory, it is a mountpoint, or the connection has ended.
_HARMLESS: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EBUSY, errno.ENODEV})


def invalidation(device: int, directory: int, name: bytes) -> Callable[[], None]:
    """What has the kernel look up a name anew: it blocks while the kernel has the directory for another request.

    Call what this gives once, in a thread. Neither raises. `device` is the connection, `directory` an inode number.
    The descriptor is duplicated now: by then that number may be another file's.
    """
    body = _ENTRY.pack(directory, len(name), 0) + name + b"\0"
    message = _HEAD.pack(_HEAD.size + len(body), _INVALIDATE_ENTRY, 0) + body
    try:
        return partial(_send, os.dup(device), message, name)
    except OSError as error:  # no descriptors are left: the belief in the name ends with the TTL
        return partial(log.info, "the kernel was not told that %r leads elsewhere: %s", name, error)


def _send(own: int, message: bytes, name: bytes) -> None:
    try:
        os.write(own, message)
    except OSError as error:
        if error.errno not in _HARMLESS:
            log.info("the kernel was not told that %r leads elsewhere: %s", name, error)
    finally:
        os.close(own)
