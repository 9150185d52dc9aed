"""The store protocol: all that the rest of s3fuse knows of S3 (or of a later store such as IPFS).

Keys are str, sizes and offsets bytes, times ns since the epoch, etags the server's text without quotes. User
metadata has lower-case names without `x-amz-meta-`. Every method raises only `errors.StoreError`s, answers or
raises within the store's deadline, and may be cancelled at any await. An object version is (key, etag, size):
a conditional form sees exactly that version or raises `PreconditionFailed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import AsyncIterator, Mapping, Sequence

    from s3fuse.errors import StoreError
    from s3fuse.store.health import Health

Buffer: TypeAlias = bytes | bytearray | memoryview

#: S3's limits. Sizes in bytes.
MAX_PUT_BYTES = 5 << 30
MAX_COPY_BYTES = 5 << 30
MIN_PART_BYTES = 5 << 20
MAX_PART_BYTES = 5 << 30
MAX_PARTS = 10_000
MAX_OBJECT_BYTES = 5 << 40
MAX_KEY_BYTES = 1024
MAX_METADATA_BYTES = 2048

#: The etag of a directory that the server shows though it has no marker (SeaweedFS: objects are below it, or were).
UNMADE_ETAG = "d41d8cd98f00b204e9800998ecf8427e-0"
#: Headers that belong to an object and must survive when it is rewritten (lower case).
KEPT_HEADERS = frozenset(
    {
        "content-type",
        "cache-control",
        "content-disposition",
        "content-encoding",
        "content-language",
        "expires",
    }
)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One version of one object. `metadata` and `headers` are None when the answer did not carry them.

    `modified_ns` is a whole second, as HTTP has no more. Listings never carry `headers`: MinIO's leave out Expires,
    so that whoever rewrites an object would lose it.
    """

    key: str
    size_bytes: int
    etag: str
    modified_ns: int
    metadata: Mapping[str, str] | None = None
    headers: Mapping[str, str] | None = None
    #: Under which the bucket keeps it, where it keeps versions and the answer said so: that to HEAD does.
    version_id: str = ""

    @property
    def version(self) -> tuple[str, str, int]:
        """What tells this version from every other one: key, etag and size.

        An etag alone does not: MinIO's copy of an object to itself, racing with a PUT, was seen to lay the etag of one
        version over the bytes of the other.
        """
        return self.key, self.etag, self.size_bytes


@dataclass(frozen=True, slots=True)
class Page:
    """Up to 1000 entries of a listing in key order; `next_token` is None on the last page.

    `unreadable` are the keys of further entries, of which the server says something impossible; "" where it is the key.
    """

    objects: tuple[ObjectInfo, ...]
    prefixes: tuple[str, ...]
    next_token: str | None
    unreadable: tuple[str, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether the server knows of no key here."""
        return not (self.objects or self.prefixes or self.unreadable)

    def may_go_on_before(self, key: str) -> bool:
        """Whether a later page may have this key or one that comes before it."""
        last = max([info.key for info in self.objects[-1:]] + list(self.prefixes[-1:]), default="")
        return self.next_token is not None and last < key


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the probe saw the server do (not what it claims).

    `notifications` is True only where an event arrives at once after a change: MinIO releases of 2025-26 hold events
    back until 4 KiB of them have gathered. Without `marker_metadata` (SeaweedFS) the server loses the metadata of keys
    that end in "/": the store keeps it elsewhere in the bucket, which costs requests, and listings never show it.

    A conditional request that the server refuses when asked once may still undo a write that comes between its look
    and its own write. `atomic_...` is True only where racing writes never did so (`s3probe`).
    """

    server: str
    list_metadata: bool
    conditional_put: bool
    conditional_multipart: bool
    snowball: bool
    notifications: bool
    marker_metadata: bool = True
    atomic_put: bool = True
    atomic_multipart: bool = True
    atomic_copy: bool = False
    #: DELETE honours If-Match, of one object, and of each of many (there the server's look and delete are two steps).
    conditional_delete: bool = False
    conditional_delete_many: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """One finished part of a multipart upload."""

    number: int
    etag: str


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload that was begun and neither completed nor aborted."""

    key: str
    upload_id: str
    initiated_ns: int


class Body(Protocol):
    """Content to send. `chunks` may be called again: each retry sends from the start.

    An exception that reading raises reaches the caller of the store as it is; content of another size than
    `size_bytes` raises Refused.
    """

    @property
    def size_bytes(self) -> int: ...

    def chunks(self) -> AsyncIterator[Buffer]: ...


@dataclass(frozen=True, slots=True)
class Bytes:
    """A body that is in memory."""

    data: Buffer

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    async def chunks(self) -> AsyncIterator[Buffer]:
        if len(self.data):
            yield self.data


@dataclass(frozen=True, slots=True)
class Condition:
    """What must be true of the key for a write to happen.

    `Condition()` writes whatever is there; `etag` demands that version; `absent` demands that there is none.
    """

    etag: str | None = None
    absent: bool = False


ANY = Condition()
NO_ETAGS: Mapping[str, str] = {}


class Store(Protocol):
    """An object store. One instance serves one bucket and is used from one trio thread."""

    #: Requests sent so far by operation: list, head, get, put, copy, delete, delete_many, multipart_create,
    #: multipart_put, multipart_copy, multipart_complete, multipart_abort, list_uploads, create_bucket. Retries count
    #: again.
    requests: Counter[str]
    #: Whether the server answers, as the outcome of every operation shows it.
    health: Health

    @property
    def capabilities(self) -> Capabilities:
        """What `probe` has found out."""

    def check_key(self, key: str) -> None:
        """Raises Refused where this server is known to take the key for another one, so that it cannot be used."""

    async def check(self) -> None:
        """Returns when the bucket answers with these credentials. Raises NoSuchBucket, AccessDenied, Unavailable."""

    async def probe(self) -> Capabilities:
        """What this server can do; leaves nothing behind in the bucket."""

    async def create_bucket(self) -> None:
        """Makes the bucket; a bucket that is there already and is ours is no error."""

    async def list_page(
        self, prefix: str, *, delimiter: str = "/", token: str | None = None, start_after: str = "", limit: int = 1000
    ) -> Page:
        """One page of keys that begin with `prefix`, with user metadata where the server gives it."""

    async def head(self, key: str) -> ObjectInfo:
        """The current version, with metadata and headers. Raises NotFound."""

    async def get_into(
        self, key: str, offset: int, buffers: Sequence[memoryview], *, etag: str, size_bytes: int | None = None
    ) -> None:
        """Fills the buffers, one after the other, with bytes of version `etag` from `offset` on (one ranged GET).

        `size_bytes` is how many that version has, where it is known: another one of the same etag is not taken for it.
        Raises NotFound or PreconditionFailed where that version is gone, BadResponse where not every byte came.
        """

    async def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str],
        headers: Mapping[str, str],
        condition: Condition = ANY,
    ) -> str:
        """Makes the object in one request and gives its etag; what the server stored is checked against what was sent.

        A lost answer to a conditional put is resolved by looking: our own bytes there count as success.
        """

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
        """Server-side copy of version `source_etag` of up to MAX_COPY_BYTES; gives the new etag.

        `metadata` None copies metadata and headers too; else both are replaced (source == target is then a
        metadata-only change). `condition` is about the target; where the server ignores it on copies it is checked
        by HEAD just before. Unless `atomic_copy`, a write to the target in between is undone: `writing.copying`.
        """

    async def delete(self, key: str, *, etag: str = "") -> None:
        """Deletes the object; one that is not there is no error.

        With `etag` only that version. Raises PreconditionFailed for another one, and for none, where
        `conditional_delete`; elsewhere the server does not look.
        """

    async def delete_many(
        self, keys: Sequence[str], *, etags: Mapping[str, str] = NO_ETAGS
    ) -> Mapping[str, StoreError]:
        """Deletes up to 1000 objects in one request; gives the keys that failed with the reason.

        A key in `etags` only goes as that version, where `conditional_delete_many`: else it fails.
        """

    async def multipart_create(self, key: str, *, metadata: Mapping[str, str], headers: Mapping[str, str]) -> str:
        """Begins a multipart upload and gives its id."""

    async def multipart_put(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        """Sends part `number` (1 to MAX_PARTS)."""

    async def multipart_copy(
        self, key: str, upload_id: str, number: int, *, source: str, source_etag: str, start: int, stop: int
    ) -> Part:
        """Makes part `number` from bytes [start, stop) of version `source_etag` of `source`, on the server."""

    async def multipart_complete(
        self,
        key: str,
        upload_id: str,
        parts: Sequence[Part],
        *,
        condition: Condition = ANY,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        """Makes the object from its parts and gives its etag. An error hidden in a 200 answer raises.

        After a lost answer the object counts as made where it has the etag of the parts and, if given, the `metadata`
        with which the upload was begun: a change of metadata alone can leave the etag as it was.

        Raises NotFound for an unknown upload, Refused for an unknown part or one but the last under MIN_PART_BYTES.
        """

    async def multipart_abort(self, key: str, upload_id: str) -> None:
        """Drops an upload and its parts; one that is gone is no error."""

    async def list_uploads(self, prefix: str) -> Sequence[Upload]:
        """The unfinished multipart uploads of keys that begin with `prefix`."""

    async def aclose(self) -> None:
        """Closes every connection."""
