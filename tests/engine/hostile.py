"""An S3 server in memory that lies: `MemoryStore` behind HTTP, whose answers a test damages. No socket is used.

`Hostile.handle` does what is asked, then renders the answer; `damage` may replace it. So what the client is told is
wrong while the bucket is right, as behind a broken proxy; where `damage` says so the request is not done at all.
"""

from __future__ import annotations

import base64
import re
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import trio

from s3fuse.credentials import StaticProvider
from s3fuse.errors import NoSuchBucket, NotFound, PreconditionFailed, Refused, StoreError
from s3fuse.store import transport
from s3fuse.store.base import Bytes, Condition
from s3fuse.store.s3 import S3Store
from s3fuse.store.wire import Broken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import pytest

    from s3fuse.store.base import Buffer, ObjectInfo, Page
    from s3fuse.store.memory import MemoryStore

BUCKET = "bucket"
FILES = {"d/a": b"aaa", "d/b": b"bb", "d/c": b"", "d/e/f": b"deep", "g": b"top"}
_META = "x-amz-meta-"
_ERRORS: Mapping[type[StoreError], tuple[int, str]] = {
    NotFound: (404, "NoSuchKey"),
    NoSuchBucket: (404, "NoSuchBucket"),
    PreconditionFailed: (412, "PreconditionFailed"),
}


@dataclass
class Reply:
    """An answer before it is bytes. With `raw` those are sent instead; b"" closes the connection."""

    status: int = 200
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    raw: bytes | None = None
    has_body: bool = True

    def data(self) -> bytes:
        if self.raw is not None:
            return self.raw
        named = {name.lower() for name, _ in self.headers}
        length = [] if "content-length" in named else [("Content-Length", str(len(self.body)))]
        lines = [f"{name}: {value}" for name, value in [*self.headers, *length]]
        head = f"HTTP/1.1 {self.status} X\r\n" + "".join(f"{line}\r\n" for line in lines) + "\r\n"
        return head.encode("utf-8", "surrogatepass") + (self.body if self.has_body else b"")


@dataclass
class Request:
    """What the client asks. `operation` is named as in `Store.requests`."""

    method: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def operation(self) -> str:
        if self.method == "GET" and not self.key:
            return "list_uploads" if "uploads" in self.query else "list"
        if self.method == "POST" and "delete" in self.query:
            return "delete_many"
        if self.method == "PUT" and "x-amz-copy-source" in self.headers:
            return "copy"
        return {"GET": "get", "HEAD": "head", "PUT": "put", "DELETE": "delete"}.get(self.method, "other")


class Hostile:
    """The server. `damage` sees every request and its true answer; None leaves that as it is."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.damage: Callable[[Request, Reply], Reply | None] = lambda request, reply: None
        #: Operations that are not done, though an answer comes as if they were.
        self.undone: frozenset[str] = frozenset()

    async def handle(self, request: Request) -> Reply:
        if request.operation in self.undone:
            reply = Reply(503, [], _error("SlowDown", "later"))
        else:
            try:
                reply = await self._done(request)
            except StoreError as error:
                status, code = _ERRORS.get(type(error), (400, "InvalidRequest"))
                reply = Reply(status, [], _error(code, str(error)))
        reply.has_body = request.method != "HEAD"
        reply.headers.append(("Server", "Hostile"))
        if request.method == "HEAD" and reply.status >= 400:
            reply.headers.append(("x-minio-error-code", _ERRORS[NotFound][1]))
            reply.body = b""
        damaged = self.damage(request, reply)
        return reply if damaged is None else damaged

    async def _done(self, request: Request) -> Reply:
        store, key, headers = self.store, request.key, request.headers
        match request.operation:
            case "list":
                return Reply(200, [], await self._list(request.query))
            case "list_uploads":
                return Reply(
                    200,
                    [],
                    b"<ListMultipartUploadsResult><Bucket>bucket</Bucket><IsTruncated>false"
                    b"</IsTruncated></ListMultipartUploadsResult>",
                )
            case "head":
                return Reply(200, _described(await store.head(key)))
            case "get":
                return await self._get(key, headers)
            case "put":
                etag = await store.put(
                    key,
                    Bytes(request.body),
                    metadata=_metadata(headers),
                    headers={"content-type": headers.get("content-type", "")},
                    condition=_condition(headers),
                )
                crc32 = base64.b64encode(zlib.crc32(request.body).to_bytes(4, "big")).decode()
                return Reply(200, [("ETag", f'"{etag}"'), ("x-amz-checksum-crc32", crc32)])
            case "copy":
                return await self._copy(key, headers)
            case "delete":
                await store.delete(key)
                return Reply(204)
            case "delete_many":
                root = ET.fromstring(request.body)
                await store.delete_many([item.findtext("Key") or "" for item in root.iter("Object")])
                return Reply(200, [], b"<DeleteResult></DeleteResult>")
        raise Refused(f"{request.method} is not known")

    async def _list(self, query: Mapping[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        limit = int(query.get("max-keys", "1000"))
        page = await self.store.list_page(
            prefix,
            delimiter=delimiter,
            token=query.get("continuation-token"),
            start_after=query.get("start-after", ""),
            limit=limit,
        )
        return listing(page, prefix, metadata=query.get("metadata") == "true")

    async def _get(self, key: str, headers: Mapping[str, str]) -> Reply:
        found = await self.store.head(key)
        if headers.get("if-match", f'"{found.etag}"') != f'"{found.etag}"':
            raise PreconditionFailed("another version", key)
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", headers["range"])
        assert match is not None
        start, stop = int(match[1]), min(int(match[2]) + 1, found.size_bytes)
        data = self.store._objects[key].data[start:stop]
        described = [pair for pair in _described(found) if pair[0] != "Content-Length"]
        return Reply(206, [*described, ("Content-Range", f"bytes {start}-{stop - 1}/{found.size_bytes}")], data)

    async def _copy(self, key: str, headers: Mapping[str, str]) -> Reply:
        source = unquote(headers["x-amz-copy-source"]).partition("/")[2].partition("/")[2]
        replaces = headers.get("x-amz-metadata-directive") == "REPLACE"
        etag = await self.store.copy(
            source,
            key,
            source_etag=headers["x-amz-copy-source-if-match"].strip('"'),
            metadata=_metadata(headers) if replaces else None,
            headers={"content-type": headers.get("content-type", "")} if replaces else None,
            condition=_condition(headers),
        )
        body = f"<CopyObjectResult><ETag>&quot;{etag}&quot;</ETag></CopyObjectResult>"
        return Reply(200, [], body.encode())


def listing(page: Page, prefix: str, *, metadata: bool = True, bucket: str = BUCKET) -> bytes:
    """The page as MinIO writes it."""
    entries = []
    for info in page.objects:
        meta = "".join(
            f"<X-Amz-Meta-{name.title()}>{escape(value)}</X-Amz-Meta-{name.title()}>"
            for name, value in (info.metadata or {}).items()
        )
        entries.append(
            f"<Contents><Key>{quote(info.key)}</Key><LastModified>{_iso(info.modified_ns)}</LastModified>"
            f"<ETag>&quot;{info.etag}&quot;</ETag><Size>{info.size_bytes}</Size><StorageClass>STANDARD</StorageClass>"
            + (f"<UserMetadata>{meta}</UserMetadata>" if metadata and meta else "")
            + "</Contents>"
        )
    entries += [f"<CommonPrefixes><Prefix>{quote(key)}</Prefix></CommonPrefixes>" for key in page.prefixes]
    more = f"<NextContinuationToken>{escape(page.next_token)}</NextContinuationToken>" if page.next_token else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket}</Name><Prefix>{quote(prefix)}</Prefix><KeyCount>{len(entries)}</KeyCount>"
        f"<IsTruncated>{'true' if page.next_token else 'false'}</IsTruncated>{more}{''.join(entries)}"
        "<EncodingType>url</EncodingType></ListBucketResult>"
    ).encode()


def _iso(ns: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(ns // 10**9))


def _described(found: ObjectInfo) -> list[tuple[str, str]]:
    return [
        ("Content-Length", str(found.size_bytes)),
        ("ETag", f'"{found.etag}"'),
        ("Last-Modified", formatdate(found.modified_ns // 10**9, usegmt=True)),
        *((name, value) for name, value in (found.headers or {}).items()),
        *((f"{_META}{name}", value) for name, value in (found.metadata or {}).items()),
    ]


def _metadata(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(_META): value for name, value in headers.items() if name.startswith(_META)}


def _condition(headers: Mapping[str, str]) -> Condition:
    etag = headers.get("if-match")
    return Condition(etag=etag.strip('"') if etag else None, absent="if-none-match" in headers)


def _error(code: str, message: str) -> bytes:
    return f"<Error><Code>{escape(code)}</Code><Message>{escape(message)}</Message></Error>".encode()


class _Wire:
    """The client's end of a connection to a `Hostile`."""

    def __init__(self, server: Hostile) -> None:
        self._server = server
        self._sent = bytearray()
        self._answer = memoryview(b"")
        self._closed = False

    async def send_all(self, data: Buffer) -> None:
        self._sent += data
        head, found, body = bytes(self._sent).partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode("ascii").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
        if len(body) < int(headers.get("content-length", "0")):
            return
        self._sent.clear()
        method, target, _ = lines[0].split(" ")
        path, _, query = target.partition("?")
        key = unquote(path.removeprefix(f"/{BUCKET}").removeprefix("/"))
        fields = {name: values[0] for name, values in parse_qs(query, keep_blank_values=True).items()}
        reply = await self._server.handle(Request(method, key, fields, headers, body))
        data = reply.data()
        self._closed = not data or reply.raw is not None
        self._answer = memoryview(data)

    async def recv_into(self, view: memoryview) -> int:
        await trio.lowlevel.checkpoint()
        count = min(len(view), len(self._answer))
        if not count and not self._closed:
            raise Broken("the test's server has no more to say")
        view[:count] = self._answer[:count]
        self._answer = self._answer[count:]
        return count

    async def readable(self) -> None:
        await trio.sleep_forever()

    def stale(self) -> bool:
        return self._closed or bool(self._answer)

    def close(self) -> None:
        self._closed = True


@contextmanager
def connected(server: Hostile, monkeypatch: pytest.MonkeyPatch, *, lists_metadata: bool = True) -> Iterator[S3Store]:
    """A store whose connections all lead to the server; nothing waits before it tries again.

    Where listings have no metadata, the engine asks by HEAD.
    """

    async def connect(host: str, port: int, tls: object) -> _Wire:
        await trio.lowlevel.checkpoint()
        return _Wire(server)

    with monkeypatch.context() as patched:
        patched.setattr(transport, "connect", connect)
        store = S3Store("http://hostile", BUCKET, StaticProvider("access", "secret"))
        store._client.backoff_s = lambda attempt: 0.0  # type: ignore[method-assign]
        store._objects.findings.list_metadata = lists_metadata
        store._objects.findings.conditional_put = True
        store._objects.findings.marker_metadata = True
        yield store


async def fill(store: MemoryStore) -> None:
    """Puts `FILES` there, and a directory marker with metadata."""
    for key, data in FILES.items():
        await store.put(key, Bytes(data), metadata={"mode": "33188"}, headers={})
    await store.put("d/", Bytes(b""), metadata={"mode": "16877"}, headers={})
