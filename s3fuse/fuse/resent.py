"""The kernel's requests that an earlier process has read and not answered, read without libfuse.

FUSE_NOTIFY_RESEND (Linux 6.9) has the kernel queue them once more, before all others, with the highest bit of
`unique` set. libfuse and pyfuse3 do not show that bit, so they are read here, and then queued once more for libfuse.
Source of the layouts: include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import os
import select
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from s3fuse.session import operations

NOTIFY_RESEND = 7
#: Bit of the flags of an INIT: the kernel can resend.
_HAS_RESEND = 1 << 39
_RESENT = 1 << 63
_FORGET, _INTERRUPT, _BATCH_FORGET, _RENAME2 = 2, 36, 42, 45
_OUT = struct.Struct("<IiQ")
_IN = struct.Struct("<IIQQIIIHH")
_FORGET_ONE = struct.Struct("<QQ")
#: How long what is in front of the names is, for each operation that has names.
_BEFORE_NAMES = {
    operations.SYMLINK: 0,
    operations.MKNOD: 16,
    operations.MKDIR: 8,
    operations.UNLINK: 0,
    operations.RMDIR: 0,
    operations.RENAME: 8,
    _RENAME2: 16,
    operations.LINK: 8,
    operations.SETXATTR: 8,
    operations.REMOVEXATTR: 0,
    operations.CREATE: 16,
}
_READ_BYTES = (1 << 20) + (64 << 10)


class Resent(NamedTuple):
    """One request: `what` is the name it is about (of a rename: `operations.renaming`), `flags` those of an open."""

    operation: int
    node: int
    pid: int
    what: bytes = b""
    flags: int = 0


@dataclass
class Pending:
    """What the kernel waits for, and what it has forgotten: inode numbers and counts."""

    resent: list[Resent] = field(default_factory=list)
    forgotten: list[tuple[int, int]] = field(default_factory=list)


def can_resend(init: bytes) -> bool:
    """Whether the kernel that sent this INIT request can resend."""
    body = init[_IN.size :]
    if len(body) < 24:
        return False
    _, _, _, flags, flags2 = struct.unpack_from("<IIIII", body)
    return bool((flags | flags2 << 32) & _HAS_RESEND)


def ask_again(device: int) -> None:
    """Has the kernel queue what was read and not answered. Raises OSError where it cannot."""
    os.write(device, _OUT.pack(_OUT.size, NOTIFY_RESEND, 0))


def read_pending(device: int) -> Pending:
    """Reads all that was resent; it is queued once more when this returns. Call it after `ask_again`."""
    pending = Pending()
    poll = select.poll()
    poll.register(device, select.POLLIN)
    while poll.poll(0):
        request = os.read(device, _READ_BYTES)
        operation, unique = struct.unpack_from("<IQ", request, 4)
        if operation in (_FORGET, _BATCH_FORGET):
            pending.forgotten += _forgotten(operation, request)
            continue
        if operation == _INTERRUPT:  # pyfuse3 has no use for them
            continue
        if not unique & _RESENT:
            break
        found = decode(request)
        if found is not None:
            pending.resent.append(found)
    ask_again(device)
    return pending


def decode(request: bytes) -> Resent | None:
    """The request, if it is one that counts here."""
    _, operation, _, node, _, _, pid, _, _ = _IN.unpack_from(request)
    body = request[_IN.size :]
    if operation in (operations.OPEN, operations.OPENDIR):
        return Resent(operation, node, pid, flags=struct.unpack_from("<I", body)[0])
    skipped = _BEFORE_NAMES.get(operation)
    if skipped is None:
        return None
    name, _, rest = body[skipped:].partition(b"\0")
    if operation in (operations.RENAME, _RENAME2):
        (new_parent,) = struct.unpack_from("<Q", body)
        what = operations.renaming(name, new_parent, rest.partition(b"\0")[0])
        return Resent(operations.RENAME, node, pid, what)
    flags = struct.unpack_from("<II", body)[1] if operation == operations.SETXATTR else 0
    return Resent(operation, node, pid, name, flags)


def _forgotten(operation: int, request: bytes) -> list[tuple[int, int]]:
    if operation == _FORGET:
        node = struct.unpack_from("<Q", request, 16)[0]
        return [(node, struct.unpack_from("<Q", request, _IN.size)[0])]
    (count,) = struct.unpack_from("<I", request, _IN.size)
    start = _IN.size + 8
    return [_FORGET_ONE.unpack_from(request, start + 16 * index) for index in range(count)]
