"""Gives an object another key, or other metadata: as a new version that undoes nobody's write.

A server's own copy looks at the target and writes a moment later, whatever has come there meanwhile (`store.s3races`).
So it is used only where racing has shown that it does not, and for keys that nobody else knows. Elsewhere the new
version is made by what does hold: a conditional PUT of the bytes, or a multipart upload of parts that the server
copies, whose completion is conditional. On MinIO (2 cores, loopback, eight at a time) an object takes, in ms:

| | 4 KiB | 300 KB | 1 MiB | 5 MiB | 16 MiB | requests |
|---|---|---|---|---|---|---|
| copy, which is not safe, and the HEAD before it | 3.0 | 8.8 | 18 | 43 | 142 | 2 |
| GET and PUT | 3.1 | 8.5 | 20 | 81 | 216 | 2 |
| PUT of cached bytes | 1.9 | 5.1 | 16 | 39 | 198 | 1 |
| multipart upload of one copied part | 7.8 | 9.1 | 19 | 47 | 139 | 3 |

A farther server costs more for each byte; hence `Limits.send_copy_bytes`. An empty object has no part to copy.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import TYPE_CHECKING

from s3fuse.store.base import ANY, Bytes
from s3fuse.store.s3checks import md5_of
from s3fuse.writing.layers import BASE, Piece
from s3fuse.writing.plan import CopyPart, Multipart
from s3fuse.writing.upload import Range, Version, send_parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from s3fuse.store.base import Capabilities, ObjectInfo, Store
    from s3fuse.writing.leftovers import Uploads
    from s3fuse.writing.plan import Limits
    from s3fuse.writing.upload import Target

_MD5 = re.compile("[0-9a-f]{32}")
_PARTS = re.compile("[0-9a-f]{32}-([0-9]+)")
#: Sizes of parts that programs use, s3fuse's own first: with the same parts a copy gets the same etag.
_USUAL_PART_BYTES = tuple(mib << 20 for mib in (8, 5, 16, 10, 15, 32, 50, 64, 100, 128, 256, 512, 1024))


class Form(Enum):
    """How a copy is made."""

    #: The bytes go through here: one conditional PUT, and a GET where they are not cached.
    SEND = auto()
    #: Parts that the server copies, and a conditional completion.
    PARTS = auto()
    #: The server's own copy.
    WHOLE = auto()


def form(size_bytes: int, able: Capabilities, limits: Limits, *, alone: bool) -> Form:
    """The cheapest form that cannot undo a write of others; `alone`: nobody else knows the target.

    Where no such form is there, the one that looks just before it writes.
    """
    if size_bytes == 0:
        return Form.SEND
    if alone or able.atomic_copy:
        return Form.WHOLE if size_bytes <= limits.max_copy_bytes else Form.PARTS
    if able.atomic_put and size_bytes <= limits.send_copy_bytes:
        return Form.SEND
    if able.atomic_multipart:
        return Form.PARTS
    if able.atomic_put and size_bytes <= limits.max_put_bytes:
        return Form.SEND
    return Form.PARTS if able.conditional_multipart or size_bytes > limits.max_copy_bytes else Form.WHOLE


def part_bytes(source: ObjectInfo, limits: Limits, *, moves: bool) -> int:
    """How long the copied parts are: as the source was made, where it stays at its key and that can be guessed.

    Then the etag stays: what other mounts have cached and opened of the object stays good.
    """
    size = source.size_bytes
    found = None if moves else _PARTS.fullmatch(source.etag)
    if found is not None and (count := int(found[1])) <= limits.max_parts:
        if count == 1 and size <= limits.max_part_bytes:
            return size
        for usual in _USUAL_PART_BYTES:
            if limits.min_part_bytes <= usual and -(-size // usual) == count:
                return usual
    return max(limits.copy_part_bytes, -(-size // limits.max_parts))


def conflict_check(able: Capabilities, limits: Limits) -> str:
    """What `status` says of how surely a write of ours sees one of others."""
    if not able.conditional_put:
        return "best effort (HEAD before each upload)"
    if not able.atomic_put:
        return "best effort (the server looks before it writes, and undoes what comes in between)"
    if not able.atomic_multipart:
        mib = limits.single_put_bytes >> 20
        return f"atomic; best effort for uploads above {mib} MiB (the server undoes what comes while it joins parts)"
    return "atomic"


def delete_check(able: Capabilities) -> str:
    """What `status` says of how surely a delete of ours leaves what others wrote meanwhile."""
    if not able.conditional_delete:
        return "best effort (looked at just before each delete)"
    return "atomic" if able.conditional_delete_many else "atomic; of many at once best effort (looked at just before)"


class Copies:
    """Makes copies for the syncer. `cached` gives the bytes of a version that are in memory, None if not all are."""

    def __init__(
        self,
        store: Store,
        uploads: Uploads,
        limits: Limits,
        cached: Callable[[ObjectInfo], bytes | None] = lambda version: None,
    ) -> None:
        self.store = store
        self.uploads = uploads
        self.limits = limits
        self.cached = cached

    async def copy(self, source: ObjectInfo, target: Target) -> str:
        """Makes the target from that version of the source, with the target's metadata and headers; gives the etag.

        Raises StoreError: NotFound or PreconditionFailed where the version is gone or the target's condition fails.
        """
        size = source.size_bytes
        match form(size, self.store.capabilities, self.limits, alone=target.condition == ANY):
            case Form.SEND:
                return await self._send(source, target)
            case Form.PARTS:
                step = part_bytes(source, self.limits, moves=source.key != target.key)
                parts = tuple(CopyPart(start, min(start + step, size)) for start in range(0, size, step))
                version = Version(None, source, size, ())
                return await send_parts(self.store, self.uploads, version, target, Multipart(parts))
            case Form.WHOLE:
                return await self.store.copy(
                    source.key,
                    target.key,
                    source_etag=source.etag,
                    metadata=target.metadata,
                    headers=target.headers,
                    condition=target.condition,
                )

    async def _send(self, source: ObjectInfo, target: Target) -> str:
        size = source.size_bytes
        body: Bytes | Range = Bytes(b"")
        if size > self.limits.send_copy_bytes:
            # Read while it is sent, and before that for its checksum. SeaweedFS answers reads of a key meanwhile.
            body = Range(self.store, Version(None, source, size, [Piece(BASE, 0, size)]), 0, size)
        elif size:
            body = Bytes(await self._bytes(source))
        return await self.store.put(
            target.key, body, metadata=target.metadata, headers=target.headers, condition=target.condition
        )

    async def _bytes(self, source: ObjectInfo) -> bytes | bytearray:
        """The bytes of a small version. Cached ones only where the etag proves them: they are to be in the bucket."""
        cached = self.cached(source) if _MD5.fullmatch(source.etag) else None
        if cached is not None and await md5_of(Bytes(cached)) == source.etag:
            return cached
        buffer = bytearray(source.size_bytes)
        await self.store.get_into(source.key, 0, [memoryview(buffer)], etag=source.etag, size_bytes=source.size_bytes)
        return buffer
