"""Checksums of bodies, and the comparison of what was sent with what a server says that it stored."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import zlib
from typing import TYPE_CHECKING

import trio

from s3fuse.errors import BadResponse
from s3fuse.store.base import Bytes, Part
from s3fuse.store.body import iterating
from s3fuse.store.s3fields import etag_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s3fuse.store.base import Body, ObjectInfo

_MD5 = re.compile("[0-9a-f]{32}")
#: Other tasks get a turn after so many checksummed bytes: about 1 ms.
_FAIR_BYTES = 8 << 20


async def crc32_header(body: Body) -> str:
    """The value of x-amz-checksum-crc32."""
    crc = 0
    if isinstance(body, Bytes) and len(body.data) <= _FAIR_BYTES:
        crc = zlib.crc32(body.data)
    else:
        async with iterating(body) as chunks:
            async for chunk in chunks:
                crc = zlib.crc32(chunk, crc)
                await trio.lowlevel.checkpoint()
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def md5_header(data: bytes) -> str:
    """The value of Content-MD5."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


async def md5_of(body: Body) -> str:
    """The hex MD5 of a body: its etag on every server that does not encrypt with keys of its own."""
    digest = hashlib.md5(usedforsecurity=False)
    async with iterating(body) as chunks:
        async for chunk in chunks:
            digest.update(chunk)
            await trio.lowlevel.checkpoint()
    return digest.hexdigest()


def multipart_etag(parts: Sequence[Part]) -> str | None:
    """The etag that an object made of these parts gets, if their own etags are MD5 sums."""
    if not all(_MD5.fullmatch(part.etag) for part in parts):
        return None
    joined = b"".join(binascii.unhexlify(part.etag) for part in sorted(parts, key=lambda part: part.number))
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}"


def same_bytes(one: ObjectInfo, other: ObjectInfo) -> bool:
    """Whether two versions of a key have the same bytes: of one etag, or one made of the other as its only part.

    So is an object whose attributes were changed by a copy of its one part (`writing.copying`).
    """
    if (one.key, one.size_bytes) != (other.key, other.size_bytes):
        return False
    return one.etag == other.etag or _as_part(one.etag) == other.etag or _as_part(other.etag) == one.etag


def _as_part(etag: str) -> str | None:
    """The etag of an object of which the object with this etag is the only part."""
    return multipart_etag([Part(1, etag)])


async def check_stored(headers: Mapping[str, str], crc32: str, body: Body, key: str) -> str:
    """The etag of what was stored. Raises BadResponse if that is not what was sent."""
    if not headers.get("etag", "").strip('"'):
        raise BadResponse("the answer to a write has no etag", key)
    etag = etag_of(headers["etag"])
    echoed = headers.get("x-amz-checksum-crc32")
    if echoed is not None:
        stored = echoed == crc32
    else:
        # With keys of its own (SSE-KMS, SSE-C) a server's etag is no MD5; it says so in these headers.
        foreign = any(name.startswith("x-amz-server-side-encryption") for name in headers)
        stored = foreign or not _MD5.fullmatch(etag) or etag == await md5_of(body)
    if not stored:
        raise BadResponse("the server stored other bytes than were sent", key)
    return etag
