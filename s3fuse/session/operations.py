"""Requests whose repetition would fail, or do something else, once they are done: by their number in the protocol.

Source: include/uapi/linux/fuse.h.
"""

from __future__ import annotations

SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK = 6, 8, 9, 10, 11, 12, 13
OPEN, SETXATTR, REMOVEXATTR, OPENDIR, CREATE = 14, 21, 24, 27, 35


def renaming(name: bytes, new_parent: int, new_name: bytes) -> bytes:
    """What tells one rename from a directory from another."""
    return b"%b\0%d\0%b" % (name, new_parent, new_name)
