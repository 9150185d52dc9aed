"""Sends one version of one file to the bucket: a single PUT, or a multipart upload whose parts go in parallel.

The version is the object the file is based on plus the layers up to the frozen one. Bytes are read piece by piece
while they are sent, so memory is bounded by `CHUNK_BYTES` for each part in flight, whatever the size of the file.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import trio

from s3fuse.store.base import Bytes, Condition, Part
from s3fuse.writing.layers import BASE
from s3fuse.writing.plan import CopyPart, Limits, Multipart, SendPart, SinglePut, plan_upload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from s3fuse.store.base import Body, Buffer, ObjectInfo, Store
    from s3fuse.writing.dirty import DirtyFile
    from s3fuse.writing.layers import Piece
    from s3fuse.writing.leftovers import Uploads

    ReadBase: TypeAlias = Callable[[ObjectInfo, int, int], Awaitable[Buffer]]

CHUNK_BYTES = 1 << 20
PARTS_AT_ONCE = 4
#: A body with more of the base than this has it read from the bucket, twice: the checksum goes ahead of the bytes.
CACHED_BASE_BYTES = 16 << 20


@dataclass(frozen=True)
class Version:
    """What to upload: the pieces of the whole file in order, from staging files (none: `data` None) and from `base`."""

    data: DirtyFile | None
    base: ObjectInfo | None
    size_bytes: int
    pieces: Sequence[Piece]
    read_base: ReadBase | None = None  # instead of a request

    @classmethod
    def frozen(cls, data: DirtyFile, base: ObjectInfo | None, read_base: ReadBase | None = None) -> Version:
        """The oldest layer of `data` on its base. The caller has frozen it."""
        size = data.layers[0].size_bytes
        return cls(data, base, size, data.pieces(0, size, layers=1), read_base)

    def sending(self, size_bytes: int) -> AbstractContextManager[None]:
        """The block brings so much of it to the bucket: whoever waits for room sees that as progress."""
        return nullcontext() if self.data is None else self.data.staging.ledger.sending(size_bytes, self.data.arrived)


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of a version, as a request body."""

    store: Store
    version: Version
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start

    async def chunks(self) -> AsyncIterator[Buffer]:
        read_base = self.version.read_base if self._base_bytes() <= CACHED_BASE_BYTES else None
        for piece in self.version.pieces:
            start, stop = max(piece.start, self.start), min(piece.stop, self.stop)
            while start < stop:
                end = min(stop, start + CHUNK_BYTES)
                yield await self._read(piece._replace(start=start, stop=end), read_base)
                start = end

    def _base_bytes(self) -> int:
        """How much of the body is of the base."""
        return self._bytes_of(piece for piece in self.version.pieces if piece.source == BASE)

    @property
    def local_bytes(self) -> int:
        """How much of the body was staged."""
        return self._bytes_of(piece for piece in self.version.pieces if piece.source >= 0)

    def _bytes_of(self, pieces: Iterable[Piece]) -> int:
        return sum(max(0, min(piece.stop, self.stop) - max(piece.start, self.start)) for piece in pieces)

    async def _read(self, piece: Piece, read_base: ReadBase | None) -> Buffer:
        base, data, parked = self.version.base, self.version.data, piece.parked
        if piece.is_local:
            assert data is not None
            return data.read_piece(piece)
        if parked is None and base is not None and read_base is not None:
            return await read_base(base, piece.start, piece.stop)
        buffer = bytearray(piece.stop - piece.start)
        if parked is not None:
            await self.store.get_into(
                parked.key,
                piece.start - parked.shift,
                [memoryview(buffer)],
                etag=parked.etag,
                size_bytes=parked.size_bytes,
            )
        else:
            assert base is not None
            await self.store.get_into(
                base.key, piece.start, [memoryview(buffer)], etag=base.etag, size_bytes=base.size_bytes
            )
        return buffer


@dataclass(frozen=True)
class Target:
    """Where a version goes and with what."""

    key: str
    metadata: Mapping[str, str]
    headers: Mapping[str, str]
    condition: Condition


async def upload(store: Store, uploads: Uploads, version: Version, target: Target, limits: Limits) -> str:
    """Brings the version to the bucket and gives its etag; on failure nothing of it stays there.

    Raises StoreError; OSError(EFBIG) above the store's largest object, OSError(EIO) where staging was damaged.
    """
    plan = plan_upload(version.pieces, version.size_bytes, limits)
    in_memory = version.size_bytes <= CHUNK_BYTES
    if not in_memory and isinstance(plan, SinglePut) and any(piece.source == BASE for piece in version.pieces):
        # MinIO locks the key for as long as a conditional PUT lasts: reading the base for its body would wait for it.
        plan = Multipart((SendPart(0, version.size_bytes),))
    if isinstance(plan, Multipart):
        return await send_parts(store, uploads, version, target, plan)
    body: Body = Range(store, version, 0, version.size_bytes)
    if in_memory:
        body = Bytes(b"".join([bytes(chunk) async for chunk in body.chunks()]))
    with version.sending(version.size_bytes):
        return await store.put(
            target.key, body, metadata=target.metadata, headers=target.headers, condition=target.condition
        )


async def send_parts(store: Store, uploads: Uploads, version: Version, target: Target, plan: Multipart) -> str:
    """Makes the target of the planned parts and gives its etag; on failure nothing of it stays. Raises StoreError."""
    parts: list[Part] = []
    async with uploads.begin(target.key, target.metadata, target.headers) as upload_id:
        limit = trio.CapacityLimiter(PARTS_AT_ONCE)
        with uploads.sending() as sent:
            try:
                async with trio.open_nursery() as nursery:
                    for number, part in enumerate(plan.parts, 1):
                        await limit.acquire_on_behalf_of(number)
                        nursery.start_soon(
                            _send, store, uploads, version, target.key, upload_id, number, part, limit, parts, sent
                        )
            except BaseExceptionGroup as group:
                raise first_failure(group) from None
            parts.sort(key=lambda part: part.number)
            return await store.multipart_complete(
                target.key, upload_id, parts, condition=target.condition, metadata=target.metadata
            )


async def _send(
    store: Store,
    uploads: Uploads,
    version: Version,
    key: str,
    upload_id: str,
    number: int,
    part: CopyPart | SendPart,
    limit: trio.CapacityLimiter,
    parts: list[Part],
    sent: Callable[[int], None],
) -> None:
    try:
        if isinstance(part, CopyPart):
            source = part.parked or version.base
            assert source is not None
            shift = part.parked.shift if part.parked is not None else 0
            start, stop = part.start - shift, part.stop - shift
            async with uploads.copying:
                with version.sending(stop - start):
                    done = await store.multipart_copy(
                        key, upload_id, number, source=source.key, source_etag=source.etag, start=start, stop=stop
                    )
        else:
            body = Range(store, version, part.start, part.stop)
            with version.sending(body.size_bytes):
                done = await store.multipart_put(key, upload_id, number, body)
            sent(body.local_bytes)
        parts.append(done)
    finally:
        limit.release_on_behalf_of(number)


def first_failure(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The reason why the nursery ended: the first failure, or the cancellation where there was none."""
    leaves: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        step = stack.pop()
        if isinstance(step, BaseExceptionGroup):
            stack.extend(step.exceptions)
        else:
            leaves.append(step)
    return next((leaf for leaf in leaves if not isinstance(leaf, trio.Cancelled)), leaves[0])
