"""The segment files of the disk tier: what its worker threads do with them. All of it blocks and may raise OSError."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from s3fuse.reading.records import BLOCK_BYTES, HEADER_BYTES, Header, checksum, decode, describe, encode

if TYPE_CHECKING:
    from collections.abc import Sequence


class Record(NamedTuple):
    """Where the blocks from `first` on of one version are: in a segment, from `offset` on."""

    segment: int
    offset: int
    first: int
    data_bytes: int
    checksums: tuple[int, ...]


class Write(NamedTuple):
    """A record to be written at `offset` of the file `path`."""

    path: str
    offset: int
    version: tuple[str, str, int]
    first: int
    blocks: Sequence[memoryview]


class Found(NamedTuple):
    """A segment of an earlier mount: its headers, each with where its data begins, and the length of the file."""

    number: int
    headers: list[tuple[Header, int]]
    size_bytes: int


def unlink(paths: Sequence[str]) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            os.unlink(path)


def write(writes: Sequence[Write], directory: str, reserve_bytes: int) -> list[Header]:
    """Writes records and gives their headers. Raises OSError(ENOSPC) where `reserve_bytes` would not stay free."""
    disk = os.statvfs(directory)
    if disk.f_bavail * disk.f_frsize < reserve_bytes + sum(len(block) for w in writes for block in w.blocks):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), directory)
    headers = []
    for one in writes:
        header = describe(one.version, one.first, one.blocks)
        fd = os.open(one.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.pwritev(fd, [encode(header), *one.blocks], one.offset) != HEADER_BYTES + header.data_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), one.path)
        finally:
            os.close(fd)
        headers.append(header)
    return headers


def read(path: str, record: Record, index: int, buffers: Sequence[memoryview]) -> str | None:
    """Fills the buffers with the blocks of the record from `index` on; gives what is wrong with the file, or None."""
    wanted = sum(map(len, buffers))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            got = os.preadv(fd, buffers, record.offset + (index - record.first) * BLOCK_BYTES)
        finally:
            os.close(fd)
    except OSError as error:
        return str(error.strerror)
    if got != wanted:
        return f"{got} bytes of {wanted}"
    for buffer, expected in zip(buffers, record.checksums[index - record.first :], strict=False):
        if checksum(buffer) != expected:
            return "a wrong checksum"
    return None


def scan(directory: str, numbers: Sequence[int]) -> list[Found]:
    """Reads the headers of these segments, up to the first that is not whole; a file without any is removed."""
    found = []
    for number in numbers:
        path = os.path.join(directory, str(number))
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(fd).st_size
                headers = _headers(fd, size)
            finally:
                os.close(fd)
            if headers:
                found.append(Found(number, headers, size))
            else:
                os.unlink(path)
    return found


def _headers(fd: int, size: int) -> list[tuple[Header, int]]:
    headers: list[tuple[Header, int]] = []
    at = 0
    while at < size:
        header = decode(os.pread(fd, HEADER_BYTES, at))
        at += HEADER_BYTES
        if header is None or at + header.data_bytes > size:
            break
        headers.append((header, at))
        at += header.data_bytes
    return headers
