"""Metadata of directory markers (keys that end in "/") on servers that lose it.

SeaweedFS (4.48) makes a directory of a marker: user metadata and tags (the x-amz-tagging header) are dropped, PUT
?tagging answers 500 and a copy 404. There the metadata is that of an empty object beside the marker, its sidecar:
`.s3fuse/directories/a/b` for `a/b/`. A marker without metadata has none.

Of two requests the marker's comes first. Whoever is interrupted in between, or looks then, finds the metadata as it
was before; a sidecar without a marker means nothing, and is replaced or deleted when its marker is made again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from s3fuse.errors import NotFound, PreconditionFailed, Refused
from s3fuse.store.base import ANY, MAX_KEY_BYTES, NO_ETAGS, UNMADE_ETAG, Bytes, Page
from s3fuse.store.s3headers import write_headers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s3fuse.errors import StoreError
    from s3fuse.store.base import Body, Condition, ObjectInfo

_RESERVED = ".s3fuse/"
#: Where sidecars are, from the root of the bucket.
SIDECARS = f"{_RESERVED}directories/"
_WITHOUT = (SIDECARS, f"{_RESERVED}probe-")


class Objects(Protocol):
    """The part of `base.Store` that differs for markers."""

    async def head(self, key: str) -> ObjectInfo: ...

    async def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str],
        headers: Mapping[str, str],
        condition: Condition = ANY,
    ) -> str: ...

    async def copy(
        self,
        source: str,
        target: str,
        *,
        source_etag: str,
        metadata: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        condition: Condition = ANY,
    ) -> str: ...

    async def delete(self, key: str, *, etag: str = "") -> None: ...

    async def delete_many(
        self, keys: Sequence[str], *, etags: Mapping[str, str] = NO_ETAGS
    ) -> Mapping[str, StoreError]: ...


class Routed:
    """The methods of `Objects` for a store, each done by who is in charge of its keys."""

    def _for(self, *keys: str) -> Objects:
        raise NotImplementedError

    async def head(self, key: str) -> ObjectInfo:
        return await self._for(key).head(key)

    async def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str],
        headers: Mapping[str, str],
        condition: Condition = ANY,
    ) -> str:
        return await self._for(key).put(key, body, metadata=metadata, headers=headers, condition=condition)

    async def copy(
        self,
        source: str,
        target: str,
        *,
        source_etag: str,
        metadata: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        condition: Condition = ANY,
    ) -> str:
        return await self._for(source, target).copy(
            source, target, source_etag=source_etag, metadata=metadata, headers=headers, condition=condition
        )

    async def delete(self, key: str, *, etag: str = "") -> None:
        await self._for(key).delete(key, etag=etag)

    async def delete_many(
        self, keys: Sequence[str], *, etags: Mapping[str, str] = NO_ETAGS
    ) -> Mapping[str, StoreError]:
        return await self._for(*keys).delete_many(keys, etags=etags)


def sidecar_key(key: str) -> str | None:
    """Where the metadata of a marker is kept; None for other keys, sidecars and what the probe makes.

    A sidecar's key may be longer than S3 allows; then its marker can have no metadata.
    """
    if not key.endswith("/") or key == _RESERVED or key.startswith(_WITHOUT):
        return None
    return SIDECARS + key[:-1]


def without_marker_metadata(page: Page) -> Page:
    """The page with the metadata of markers as unknown: whoever needs it asks by HEAD."""
    return replace(
        page,
        objects=tuple(
            replace(entry, metadata=None) if entry.metadata is not None and sidecar_key(entry.key) else entry
            for entry in page.objects
        ),
    )


class Markers:
    """`Objects` that keep the metadata of markers in sidecars, made of `plain` ones that lose it."""

    def __init__(self, plain: Objects) -> None:
        self._plain = plain

    async def head(self, key: str) -> ObjectInfo:
        found = await self._plain.head(key)
        sidecar = sidecar_key(key)
        if sidecar is None or _too_long(sidecar):
            return found
        try:
            return replace(found, metadata=(await self._plain.head(sidecar)).metadata)
        except NotFound:
            return found

    async def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str],
        headers: Mapping[str, str],
        condition: Condition = ANY,
    ) -> str:
        sidecar = sidecar_key(key)
        if sidecar is None:
            return await self._plain.put(key, body, metadata=metadata, headers=headers, condition=condition)
        # What the sidecar would refuse must be refused before the marker is there.
        write_headers(metadata, {}, key)
        if metadata and _too_long(sidecar):
            raise Refused(f"the metadata of {key[:40]}... has no place: the key is too long", key)
        etag = await self._put_marker(key, body, headers, condition)
        if metadata:
            await self._plain.put(sidecar, Bytes(b""), metadata=metadata, headers={})
        elif not _too_long(sidecar):
            await self._plain.delete(sidecar)
        return etag

    async def copy(
        self,
        source: str,
        target: str,
        *,
        source_etag: str,
        metadata: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        condition: Condition = ANY,
    ) -> str:
        """Makes the target by PUT: the server copies no markers, and those have no content."""
        found = await (self if metadata is None else self._plain).head(source)
        if found.etag != source_etag:
            raise PreconditionFailed(f"{source} is version {found.etag}", source)
        if found.size_bytes:
            raise Refused(f"{source} has content that this server cannot copy from or to a directory marker", source)
        if metadata is None:
            if source == target:
                raise Refused(f"copy {source}: a copy to itself must change something", source)
            metadata, headers = found.metadata or {}, found.headers
        if source == target and condition.etag == source_etag:
            condition = ANY
        return await self.put(target, Bytes(b""), metadata=metadata, headers=headers or {}, condition=condition)

    async def _put_marker(self, key: str, body: Body, headers: Mapping[str, str], condition: Condition) -> str:
        """A directory without a marker is none for If-Match and one for If-None-Match: then HEAD tells."""
        try:
            return await self._plain.put(key, body, metadata={}, headers=headers, condition=condition)
        except PreconditionFailed:
            if not (condition.absent or condition.etag == UNMADE_ETAG) or not await self._unmade(key):
                raise
        return await self._plain.put(key, body, metadata={}, headers=headers)

    async def _unmade(self, key: str) -> bool:
        try:
            return (await self._plain.head(key)).etag == UNMADE_ETAG
        except NotFound:
            return False

    async def delete(self, key: str, *, etag: str = "") -> None:
        await self._plain.delete(key, etag=etag)
        sidecar = sidecar_key(key)
        if sidecar is not None and not _too_long(sidecar):
            await self._plain.delete(sidecar)

    async def delete_many(
        self, keys: Sequence[str], *, etags: Mapping[str, str] = NO_ETAGS
    ) -> Mapping[str, StoreError]:
        """One request more where there are markers among the keys."""
        failed = dict(await self._plain.delete_many(keys, etags=etags))
        sidecars = {
            sidecar: key
            for key in keys
            if key not in failed and (sidecar := sidecar_key(key)) is not None and not _too_long(sidecar)
        }
        if sidecars:
            left = await self._plain.delete_many(list(sidecars))
            failed |= {sidecars[sidecar]: reason for sidecar, reason in left.items()}
        return failed


def _too_long(sidecar: str) -> bool:
    return len(sidecar.encode(errors="surrogatepass")) > MAX_KEY_BYTES
