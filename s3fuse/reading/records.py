"""The form of cached blocks on disk: records of neighbouring blocks of one version, each after its header; pure.

A header of HEADER_BYTES says whose bytes follow (key, etag, size, index of the first block), how many, and the CRC-32
of each block; its own CRC-32 comes last. So a file of records explains itself, and what was cut or changed is noticed.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s3fuse.store.base import Buffer

BLOCK_BYTES = 128 << 10
#: Room for the longest key, any etag, and the checksums of far more blocks than come with one GET.
HEADER_BYTES = 2048

# Magic, bytes of key and of etag, first block, count of blocks, bytes of data, bytes of the version.
_FIXED = struct.Struct("<4sHHIIIQ")
_MAGIC = b"s3b2"
#: What version 42383ae wrote, without the last number: taken where the record's end tells it.
_EARLIER_FIXED = struct.Struct("<4sHHIII")
_EARLIER_MAGIC = b"s3b1"
_CHECKSUM = struct.Struct("<I")


class Header(NamedTuple):
    """What a record holds.

    `size_bytes` are those of the whole version, -1 for unknown; `checksums` those of its blocks, all of BLOCK_BYTES but
    the last.
    """

    key: str
    etag: str
    size_bytes: int
    first: int
    data_bytes: int
    checksums: tuple[int, ...]


def checksum(data: Buffer) -> int:
    """The CRC-32 of a block."""
    return zlib.crc32(data)


def describe(version: tuple[str, str, int], first: int, blocks: Sequence[Buffer]) -> Header:
    """The header for these blocks, which are one or more."""
    return Header(*version, first, sum(map(len, blocks)), tuple(map(checksum, blocks)))


def fits(key: str, etag: str, blocks: int) -> bool:
    """Whether so many blocks of this version can be one record."""
    return _FIXED.size + len(key.encode()) + len(etag.encode()) + 4 * blocks + _CHECKSUM.size <= HEADER_BYTES


def encode(header: Header) -> bytes:
    """The header as HEADER_BYTES bytes. The caller has asked `fits`."""
    name, version, count = header.key.encode(), header.etag.encode(), len(header.checksums)
    numbers = len(name), len(version), header.first, count, header.data_bytes, header.size_bytes
    text = _FIXED.pack(_MAGIC, *numbers) + name + version
    text = (text + struct.pack(f"<{count}I", *header.checksums)).ljust(HEADER_BYTES - _CHECKSUM.size, b"\0")
    return text + _CHECKSUM.pack(zlib.crc32(text))


def decode(text: bytes) -> Header | None:
    """The header that these bytes are; None where anything in it is not as it was written."""
    end = HEADER_BYTES - _CHECKSUM.size
    if len(text) != HEADER_BYTES or _CHECKSUM.unpack_from(text, end)[0] != zlib.crc32(text[:end]):
        return None
    if text.startswith(_EARLIER_MAGIC):
        fixed = _EARLIER_FIXED
        _, name, version, first, count, data_bytes = fixed.unpack_from(text)
        size_bytes = first * BLOCK_BYTES + data_bytes if data_bytes % BLOCK_BYTES else -1
    else:
        fixed = _FIXED
        magic, name, version, first, count, data_bytes, size_bytes = fixed.unpack_from(text)
        if magic != _MAGIC:
            return None
    at = fixed.size + name + version
    if not fits("", "", count) or at + 4 * count > end:
        return None
    key, etag = text[fixed.size : fixed.size + name].decode(), text[fixed.size + name : at].decode()
    return Header(key, etag, size_bytes, first, data_bytes, struct.unpack_from(f"<{count}I", text, at))
