"""A store in memory that behaves as `S3Store` does on MinIO or SeaweedFS; the conformance suite verifies that."""

from __future__ import annotations

import hashlib
import itertools
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import trio

from s3fuse.errors import BadResponse, NoSuchBucket, NotFound, PreconditionFailed, Refused
from s3fuse.store.base import (
    ANY,
    MAX_KEY_BYTES,
    MAX_METADATA_BYTES,
    MAX_PARTS,
    MIN_PART_BYTES,
    NO_ETAGS,
    Capabilities,
    Condition,
    ObjectInfo,
    Page,
    Part,
    Upload,
)
from s3fuse.store.body import iterating
from s3fuse.store.health import Health
from s3fuse.store.s3checks import multipart_etag
from s3fuse.store.s3headers import write_headers
from s3fuse.store.s3markers import Markers, Routed, sidecar_key

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from s3fuse.errors import StoreError
    from s3fuse.store.base import Body
    from s3fuse.store.s3markers import Objects

_META = "x-amz-meta-"

#: What MinIO can do where its events work.
MINIO = Capabilities("memory", True, True, True, True, True)
#: What SeaweedFS can do.
SEAWEEDFS = Capabilities(
    "memory",
    False,
    True,
    True,
    False,
    False,
    marker_metadata=False,
    atomic_multipart=False,
    conditional_delete=True,
    conditional_delete_many=True,
)
#: A server whose conditions all hold, copies and deletes among them.
ATOMIC = Capabilities("memory", True, True, True, True, True, True, True, True, True, True, True)


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    etag: str
    modified_ns: int
    metadata: Mapping[str, str]
    headers: Mapping[str, str]

    def info(self, key: str) -> ObjectInfo:
        return ObjectInfo(key, len(self.data), self.etag, self.modified_ns, self.metadata, self.headers)


@dataclass(slots=True)
class _Upload:
    key: str
    initiated_ns: int
    metadata: Mapping[str, str]
    headers: Mapping[str, str]
    parts: dict[int, bytes] = field(default_factory=dict)


class _Bucket:
    """All of the store, with markers that lose their metadata unless the capabilities say otherwise.

    What is not atomic looks, lets others run, and writes whatever is there by then, as the servers do.
    """

    def __init__(
        self,
        capabilities: Capabilities = MINIO,
        *,
        conditional_copy: bool | None = None,
        bucket_exists: bool = True,
        odd_keys: bool = False,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.requests: Counter[str] = Counter()
        self.health = Health()
        self.capabilities = capabilities
        self.bucket_exists = bucket_exists
        self._conditional_copy = capabilities.atomic_copy if conditional_copy is None else conditional_copy
        self._odd_keys = odd_keys
        self._now_ns = now_ns
        self._objects: dict[str, _Object] = {}
        self._uploads: dict[str, _Upload] = {}
        self._upload_ids = itertools.count(1)

    def check_key(self, key: str) -> None:
        odd = not {"", ".", ".."}.isdisjoint(key.removesuffix("/").split("/"))
        if key and odd and not self._odd_keys:
            raise Refused(f"{key}: a segment of the key is empty, '.' or '..'", key)

    async def check(self) -> None:
        await self._request("list")

    async def probe(self) -> Capabilities:
        await self._request("list")
        return self.capabilities

    async def create_bucket(self) -> None:
        await trio.lowlevel.checkpoint()
        self.bucket_exists = True

    async def list_page(
        self, prefix: str, *, delimiter: str = "/", token: str | None = None, start_after: str = "", limit: int = 1000
    ) -> Page:
        await self._request("list")
        # S3 sorts by UTF-8 bytes; so does Python by code points.
        keys = sorted(self._objects)
        after = token if token is not None else start_after
        index = max(bisect_left(keys, prefix), bisect_right(keys, after))
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        last = ""
        while index < len(keys) and keys[index].startswith(prefix):
            if len(objects) + len(prefixes) == limit:
                return Page(tuple(objects), tuple(prefixes), last)
            last = key = keys[index]
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                objects.append(self._listed(key))
                index += 1
            else:
                common = key[: cut + len(delimiter)]
                prefixes.append(common)
                while index < len(keys) and keys[index].startswith(common):
                    last = keys[index]
                    index += 1
        return Page(tuple(objects), tuple(prefixes), None)

    def _listed(self, key: str) -> ObjectInfo:
        found = self._objects[key]
        known = self.capabilities.list_metadata and (self.capabilities.marker_metadata or not sidecar_key(key))
        metadata = found.metadata if known else None
        return ObjectInfo(key, len(found.data), found.etag, found.modified_ns, metadata)

    async def head(self, key: str) -> ObjectInfo:
        await self._request("head", key)
        return self._found(key).info(key)

    async def get_into(
        self, key: str, offset: int, buffers: Sequence[memoryview], *, etag: str, size_bytes: int | None = None
    ) -> None:
        wanted = sum(map(len, buffers))
        if not wanted:
            await trio.lowlevel.checkpoint()
            return
        await self._request("get", key)
        found = self._version(key, etag)
        if size_bytes not in (None, len(found.data)):
            raise PreconditionFailed(f"{key} has {len(found.data)} bytes, not {size_bytes}", key)
        if offset + wanted > len(found.data):
            raise BadResponse(f"get {key}: {len(found.data)} bytes where {wanted} from {offset} were due", key)
        for buffer in buffers:
            buffer[:] = found.data[offset : offset + len(buffer)]
            offset += len(buffer)

    async def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str],
        headers: Mapping[str, str],
        condition: Condition = ANY,
    ) -> str:
        kept = _kept(metadata, headers, key)
        data = await _read(body)
        if not self.capabilities.conditional_put:
            await self._look(key, condition)
        await self._request("put", key)
        self._require(key, condition)
        return self._store(key, data, hashlib.md5(data, usedforsecurity=False).hexdigest(), metadata, kept)

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
        kept = None if metadata is None else _kept(metadata, headers or {}, target)
        if not self._conditional_copy and not (source == target and condition.etag == source_etag):
            await self._look(target, condition)
        await self._request("copy", target)
        found = self._version(source, source_etag)
        if self._conditional_copy:
            self._require(target, condition)
        if metadata is None or kept is None:
            if source == target:
                raise Refused(f"copy {source}: a copy to itself must change something", source)
            metadata, kept = found.metadata, dict(found.headers)
        if not self.capabilities.atomic_copy:
            await self._others_run()
        return self._store(target, found.data, found.etag, metadata, kept)

    async def delete(self, key: str, *, etag: str = "") -> None:
        await self._request("delete", key)
        if etag and self.capabilities.conditional_delete:
            self._require(key, Condition(etag=etag))
        self._objects.pop(key, None)

    async def delete_many(
        self, keys: Sequence[str], *, etags: Mapping[str, str] = NO_ETAGS
    ) -> Mapping[str, StoreError]:
        if keys:
            await self._request("delete_many")
        failed: dict[str, StoreError] = {}
        for key in keys if self.capabilities.conditional_delete_many else ():
            found = self._objects.get(key)
            if found is not None and key in etags and found.etag != etags[key]:
                failed[key] = PreconditionFailed(f"{key} is version {found.etag}", key)
        await self._others_run()
        for key in keys:
            if key not in failed:
                self._objects.pop(key, None)
        return failed

    async def multipart_create(self, key: str, *, metadata: Mapping[str, str], headers: Mapping[str, str]) -> str:
        kept = _kept(metadata, headers, key)
        await self._request("multipart_create", key)
        upload_id = f"upload-{next(self._upload_ids)}"
        self._uploads[upload_id] = _Upload(key, self._second_ns(), dict(metadata), kept)
        return upload_id

    async def multipart_put(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        data = await _read(body)
        await self._request("multipart_put", key)
        return self._add_part(key, upload_id, number, data)

    async def multipart_copy(
        self, key: str, upload_id: str, number: int, *, source: str, source_etag: str, start: int, stop: int
    ) -> Part:
        await self._request("multipart_copy", key)
        found = self._version(source, source_etag)
        if not 0 <= start < stop <= len(found.data):
            raise Refused(f"multipart_copy {source}: no bytes {start} to {stop} in {len(found.data)}", source)
        return self._add_part(key, upload_id, number, found.data[start:stop])

    async def multipart_complete(
        self,
        key: str,
        upload_id: str,
        parts: Sequence[Part],
        *,
        condition: Condition = ANY,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        if not self.capabilities.conditional_multipart:
            await self._look(key, condition)
        await self._request("multipart_complete", key)
        upload = self._upload(key, upload_id)
        ordered = sorted(parts, key=lambda part: part.number)
        if not ordered or any(_part_etag(upload.parts.get(part.number)) != part.etag for part in ordered):
            raise Refused(f"multipart_complete {key}: a part is unknown or has another etag", key)
        chunks = [upload.parts[part.number] for part in ordered]
        if any(len(chunk) < MIN_PART_BYTES for chunk in chunks[:-1]):
            raise Refused(f"multipart_complete {key}: a part but the last is under {MIN_PART_BYTES} bytes", key)
        self._require(key, condition)
        if not self.capabilities.atomic_multipart:
            await self._others_run()
        self._uploads.pop(upload_id, None)
        etag = multipart_etag(parts)
        assert etag is not None
        return self._store(key, b"".join(chunks), etag, upload.metadata, dict(upload.headers))

    async def multipart_abort(self, key: str, upload_id: str) -> None:
        await self._request("multipart_abort", key)
        self._uploads.pop(upload_id, None)

    async def list_uploads(self, prefix: str) -> Sequence[Upload]:
        await self._request("list_uploads")
        return [
            Upload(upload.key, upload_id, upload.initiated_ns)
            for upload_id, upload in self._uploads.items()
            if upload.key.startswith(prefix)
        ]

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _request(self, operation: str, key: str = "") -> None:
        """Counts, and lets others run; what follows is atomic as on a server, but for the windows that it has."""
        self.requests[operation] += 1
        await self._others_run()
        if not self.bucket_exists:
            raise NoSuchBucket(f"{operation}: the bucket does not exist", key)
        if len(key.encode(errors="surrogatepass")) > MAX_KEY_BYTES:
            raise Refused(f"{operation} {key[:40]}...: the key is longer than {MAX_KEY_BYTES} bytes", key)
        self.check_key(key)

    async def _others_run(self) -> None:
        """Where requests of others may come in between."""
        await trio.lowlevel.checkpoint()

    async def _look(self, key: str, condition: Condition) -> None:
        if condition != ANY:
            await self._request("head", key)
            self._require(key, condition)

    def _require(self, key: str, condition: Condition) -> None:
        found = self._objects.get(key)
        if (condition.absent and found is not None) or (
            condition.etag is not None and (found is None or found.etag != condition.etag)
        ):
            raise PreconditionFailed(f"{key} is version {found.etag if found else 'none'}", key)

    def _found(self, key: str) -> _Object:
        try:
            return self._objects[key]
        except KeyError:
            raise NotFound(f"no object {key}", key) from None

    def _version(self, key: str, etag: str) -> _Object:
        found = self._found(key)
        if found.etag != etag:
            raise PreconditionFailed(f"{key} is version {found.etag}", key)
        return found

    def _upload(self, key: str, upload_id: str) -> _Upload:
        upload = self._uploads.get(upload_id)
        if upload is None or upload.key != key:
            raise NotFound(f"no upload {upload_id} of {key}", key)
        return upload

    def _add_part(self, key: str, upload_id: str, number: int, data: bytes) -> Part:
        if not 1 <= number <= MAX_PARTS:
            raise Refused(f"part {number} of {key}: parts are numbered from 1 to {MAX_PARTS}", key)
        self._upload(key, upload_id).parts[number] = data
        return Part(number, _part_etag(data))

    def _store(self, key: str, data: bytes, etag: str, metadata: Mapping[str, str], headers: Mapping[str, str]) -> str:
        if not self.capabilities.marker_metadata and sidecar_key(key):
            metadata = {}
        self._objects[key] = _Object(data, etag, self._second_ns(), dict(metadata), headers)
        return etag

    def _second_ns(self) -> int:
        now_ns = self._now_ns()
        return now_ns - now_ns % 1_000_000_000


class _Plain:
    """The operations of `_Bucket` although `MemoryStore` has others of the same names."""

    def __init__(self, bucket: _Bucket) -> None:
        self.head = partial(_Bucket.head, bucket)
        self.put = partial(_Bucket.put, bucket)
        self.copy = partial(_Bucket.copy, bucket)
        self.delete = partial(_Bucket.delete, bucket)
        self.delete_many = partial(_Bucket.delete_many, bucket)


class MemoryStore(Routed, _Bucket):
    """A bucket in memory.

    `capabilities` is what `probe` finds; without conditional writes the condition is looked up by HEAD first, as it
    is on copies unless `conditional_copy`. `odd_keys` takes keys with empty, `.` and `..` segments as AWS
    does. `now_ns` is the clock; times are cut to seconds as HTTP dates are.
    """

    def _for(self, *keys: str) -> Objects:
        plain = _Plain(self)
        apart = not self.capabilities.marker_metadata and any(map(sidecar_key, keys))
        return Markers(plain) if apart else plain


def _part_etag(data: bytes | None) -> str:
    return "" if data is None else hashlib.md5(data, usedforsecurity=False).hexdigest()


def _kept(metadata: Mapping[str, str], headers: Mapping[str, str], key: str) -> dict[str, str]:
    """The headers that the object keeps. Raises Refused as S3Store and the servers do."""
    sent = write_headers(metadata, headers, key)
    if sum(len(name) + len(value) for name, value in sent.items() if name.startswith(_META)) > MAX_METADATA_BYTES:
        raise Refused(f"the metadata of {key} is larger than {MAX_METADATA_BYTES} bytes", key)
    return {name: value for name, value in sent.items() if not name.startswith(_META)}


async def _read(body: Body) -> bytes:
    async with iterating(body) as chunks:
        data = b"".join([bytes(chunk) async for chunk in chunks])
    if len(data) != body.size_bytes:
        raise Refused(f"the content changed while it was sent: {len(data)} bytes instead of {body.size_bytes}")
    return data
