"""Requests of the kernel, read as bytes: layouts of include/uapi/linux/fuse.h."""

from __future__ import annotations

import os
import struct

import pytest

from s3fuse.fuse import resent
from s3fuse.fuse.resent import Resent
from s3fuse.session import operations


def request(operation: int, node: int, body: bytes, *, pid: int = 77) -> bytes:
    return struct.pack("<IIQQIIIHH", 40 + len(body), operation, 1 << 63 | 4, node, 0, 0, pid, 0, 0) + body


@pytest.mark.parametrize(
    ("operation", "body", "what", "flags"),
    [
        (operations.CREATE, struct.pack("<IIII", os.O_RDWR, 0o644, 0o22, 0) + b"name\0", b"name", 0),
        (operations.MKDIR, struct.pack("<II", 0o755, 0o22) + b"dir\0", b"dir", 0),
        (operations.MKNOD, struct.pack("<IIII", 0o10644, 5, 0, 0) + b"fifo\0", b"fifo", 0),
        (operations.SYMLINK, b"link\0to/there\0", b"link", 0),
        (operations.UNLINK, b"gone\0", b"gone", 0),
        (operations.RMDIR, b"gone\0", b"gone", 0),
        (operations.RENAME, struct.pack("<Q", 9) + b"old\0new\0", operations.renaming(b"old", 9, b"new"), 0),
        (operations.SETXATTR, struct.pack("<II", 3, os.XATTR_CREATE) + b"user.a\0abc", b"user.a", os.XATTR_CREATE),
        (operations.REMOVEXATTR, b"user.a\0", b"user.a", 0),
        (operations.OPEN, struct.pack("<II", os.O_RDWR, 0), b"", os.O_RDWR),
        (operations.OPENDIR, struct.pack("<II", os.O_RDONLY, 0), b"", os.O_RDONLY),
    ],
)
def test_requests(operation: int, body: bytes, what: bytes, flags: int) -> None:
    assert resent.decode(request(operation, 5, body)) == Resent(operation, 5, 77, what, flags)


def test_a_rename_with_flags_is_a_rename() -> None:
    body = struct.pack("<QII", 9, 1, 0) + b"old\0new\0"
    what = operations.renaming(b"old", 9, b"new")
    assert resent.decode(request(45, 5, body)) == Resent(operations.RENAME, 5, 77, what)


def test_what_may_be_repeated_is_left_out() -> None:
    assert resent.decode(request(15, 5, bytes(40))) is None  # READ


def test_forgets() -> None:
    assert resent._forgotten(2, request(2, 5, struct.pack("<Q", 3))) == [(5, 3)]
    body = struct.pack("<II", 2, 0) + struct.pack("<QQQQ", 5, 3, 6, 1)
    assert resent._forgotten(42, request(42, 0, body)) == [(5, 3), (6, 1)]


@pytest.mark.parametrize(("flags2", "can"), [(0, False), (1 << 7, True)])
def test_whether_the_kernel_can_send_again(flags2: int, can: bool) -> None:
    init = request(26, 0, struct.pack("<IIIII", 7, 45, 1 << 20, 0, flags2) + bytes(44))
    assert resent.can_resend(init) is can
    assert not resent.can_resend(request(26, 0, struct.pack("<II", 7, 8)))
