"""The form of cached blocks on disk: records of neighbouring blocks of one version, each after its header; pure.

A header of HEADER_BYTES says whose bytes follow (key, etag, index of the first block), how many, and the CRC-32 of
each block; its own CRC-32 comes last. So a file of records explains itself, and what was cut or changed is found out.
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

_FIXED = struct.Struct("<4sHHIII")  # magic, bytes of key and of etag, first block, count of blocks, bytes of data
_MAGIC = b"s3b1"
_CHECKSUM = struct.Struct("<I")


class Header(NamedTuple):
    """What a record holds. `checksums` are those of its blocks, all of BLOCK_BYTES but the last."""

    key: str
    etag: str
    first: int
    data_bytes: int
    checksums: tuple[int, ...]


def checksum(data: Buffer) -> int:
    """The CRC-32 of a block."""
    return zlib.crc32(data)


def describe(key: str, etag: str, first: int, blocks: Sequence[Buffer]) -> Header:
    """The header for these blocks, which are one or more."""
    return Header(key, etag, first, sum(map(len, blocks)), tuple(map(checksum, blocks)))


def fits(key: str, etag: str, blocks: int) -> bool:
    """Whether so many blocks of this version can be one record."""
    return _FIXED.size + len(key.encode()) + len(etag.encode()) + 4 * blocks + _CHECKSUM.size <= HEADER_BYTES


def encode(header: Header) -> bytes:
    """The header as HEADER_BYTES bytes. The caller has asked `fits`."""
    name, version, count = header.key.encode(), header.etag.encode(), len(header.checksums)
    text = _FIXED.pack(_MAGIC, len(name), len(version), header.first, count, header.data_bytes) + name + version
    text = (text + struct.pack(f"<{count}I", *header.checksums)).ljust(HEADER_BYTES - _CHECKSUM.size, b"\0")
    return text + _CHECKSUM.pack(zlib.crc32(text))


def decode(text: bytes) -> Header | None:
    """The header that these bytes are; None where anything in it is not as it was written."""
    end = HEADER_BYTES - _CHECKSUM.size
    if len(text) != HEADER_BYTES or _CHECKSUM.unpack_from(text, end)[0] != zlib.crc32(text[:end]):
        return None
    magic, name, version, first, count, data_bytes = _FIXED.unpack_from(text)
    at = _FIXED.size + name + version
    if magic != _MAGIC or not fits("", "", count) or at + 4 * count > end:
        return None
    key, etag = text[_FIXED.size : _FIXED.size + name].decode(), text[_FIXED.size + name : at].decode()
    return Header(key, etag, first, data_bytes, struct.unpack_from(f"<{count}I", text, at))
