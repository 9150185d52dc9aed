"""The S3 store: every operation of `base.Store` as signed requests of the lean transport."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode
from xml.sax.saxutils import escape

from s3fuse.errors import BadResponse, NotFound, PreconditionFailed, Refused, StoreError
from s3fuse.store import s3listing, s3xml
from s3fuse.store.base import ANY, MAX_KEY_BYTES, Bytes, Part
from s3fuse.store.s3checks import check_stored, crc32_header, multipart_etag
from s3fuse.store.s3client import Call, S3Client
from s3fuse.store.s3headers import check_range, condition_headers, write_headers
from s3fuse.store.s3listing import Asked
from s3fuse.store.s3markers import Markers, Routed, sidecar_key, without_marker_metadata
from s3fuse.store.s3objects import S3Objects, deleted
from s3fuse.store.s3parsing import parsed
from s3fuse.store.s3probe import Findings, probe
from s3fuse.store.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from s3fuse.credentials import Provider
    from s3fuse.store.base import Body, Capabilities, Condition, Page, Upload
    from s3fuse.store.framing import Answer
    from s3fuse.store.s3markers import Objects

#: The longest answer to a listing: what an entry with a key of 1 KiB and 2 KiB of metadata may take, escaped as XML.
_ANSWER_BYTES = 1 << 20
_ENTRY_BYTES = 16 << 10


class S3Store(Routed):
    """A bucket of an S3 server. `endpoint` is `http[s]://HOST[:PORT]`; times are seconds.

    `deadline_s` bounds each operation, grown by its size; waiting for one of the `max_requests` slots comes on top.
    Raises ValueError for an endpoint that is no such URL.
    """

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        credentials: Provider,
        *,
        region: str = "us-east-1",
        max_requests: int = 32,
        ca_file: str | None = None,
        deadline_s: float = 30.0,
    ) -> None:
        self.requests: Counter[str] = Counter()
        self._transport = Transport(
            endpoint, max_requests=max_requests, ca_file=ca_file, stall_timeout_s=min(15.0, deadline_s)
        )
        self._client = S3Client(self._transport, bucket, region, credentials, self.requests, deadline_s)
        self.health = self._client.health
        self._bucket = bucket
        self._region = region
        self._objects = S3Objects(self._client)
        self._markers = Markers(self._objects)

    def check_key(self, key: str) -> None:
        self._client.check_key(key)
        sidecar = sidecar_key(key) if self._objects.findings.marker_metadata is False else None
        if sidecar is not None and len(sidecar.encode()) > MAX_KEY_BYTES:
            raise Refused(f"the metadata of {key} has no place on this server: the key is too long", key)

    async def check(self) -> None:
        # A listing and not HEAD: its refusals have a body that says why.
        query = _query({"list-type": "2", "max-keys": "1"})
        await self._client.ask(Call("list", "GET", query=query), self._first_page)

    async def ping(self) -> None:
        """Asks the server once whether it answers, whatever waits; `health` learns of it. Raises StoreError."""
        call = Call("list", "GET", query=_query({"list-type": "2", "max-keys": "1"}), ping=True)
        await self._client.ask(call, self._first_page)

    async def _first_page(self, answer: Answer) -> Page:
        return s3listing.parse_page(answer.body, Asked(self._bucket), metadata_known=False)

    async def probe(self) -> Capabilities:
        self._objects.findings = findings = await probe(self._client, self)
        return findings.capabilities(self._client.server)

    def findings(self) -> dict[str, Any]:
        """What `probe` has found out, for `adopt`."""
        return {"server": self._client.server, **asdict(self._objects.findings)}

    def adopt(self, findings: dict[str, Any]) -> None:
        """Takes what an earlier process has found out instead of probing."""
        self._client.server = findings["server"]
        self._objects.findings = Findings(**{field.name: findings.get(field.name) for field in fields(Findings)})

    @property
    def capabilities(self) -> Capabilities:
        """What `probe` has found out."""
        return self._objects.findings.capabilities(self._client.server)

    async def create_bucket(self) -> None:
        # us-east-1 is what servers take a bucket without a place for, and AWS refuses it as a name there.
        place = f"<LocationConstraint>{escape(self._region)}</LocationConstraint>"
        document = f"<CreateBucketConfiguration>{place}</CreateBucketConfiguration>"
        body = b"" if self._region == "us-east-1" else document.encode()
        try:
            await self._client.send(Call("create_bucket", "PUT", body=Bytes(body)))
        except Refused as refused:
            try:
                await self.check()
            except StoreError:
                raise refused from None

    async def list_page(
        self, prefix: str, *, delimiter: str = "/", token: str | None = None, start_after: str = "", limit: int = 1000
    ) -> Page:
        fields = {"list-type": "2", "encoding-type": "url", "max-keys": str(limit), "prefix": prefix}
        fields |= {"delimiter": delimiter} if delimiter else {}
        fields |= {"start-after": start_after} if start_after else {}
        fields |= {"continuation-token": token} if token is not None else {}
        asked = Asked(self._bucket, prefix, delimiter, token)
        answer_bytes = _ANSWER_BYTES + limit * _ENTRY_BYTES
        known = self._objects.findings.list_metadata

        async def read(answer: Answer) -> Page:
            return await parsed(answer.body, partial(s3listing.parse_page, asked=asked, metadata_known=False))

        async def read_metadata(answer: Answer) -> Page | None:
            """None where it cannot be read: MinIO makes XML names of metadata names, and somebody's may not be any."""
            parse = partial(s3listing.parse_page, asked=asked, metadata_known=bool(known))
            try:
                return await parsed(answer.body, parse)
            except BadResponse:
                return None

        if known is not False:
            query = _query({**fields, "metadata": "true"})
            page = await self._client.ask(Call("list", "GET", query=query, answer_bytes=answer_bytes), read_metadata)
            if page is not None:
                return self._page(page)
        call = Call("list", "GET", query=_query(fields), answer_bytes=answer_bytes)
        return self._page(await self._client.ask(call, read))

    def _page(self, page: Page) -> Page:
        return without_marker_metadata(page) if self._objects.findings.marker_metadata is False else page

    def _for(self, *keys: str) -> Objects:
        apart = self._objects.findings.marker_metadata is False and any(map(sidecar_key, keys))
        return self._markers if apart else self._objects

    async def get_into(
        self, key: str, offset: int, buffers: Sequence[memoryview], *, etag: str, size_bytes: int | None = None
    ) -> None:
        wanted = sum(map(len, buffers))
        if not wanted:
            return
        headers = {"range": f"bytes={offset}-{offset + wanted - 1}", "if-match": f'"{etag}"'}

        def check(answer: Answer) -> None:
            check_range(answer, offset, wanted, etag, size_bytes)

        # MinIO looks at the range before it looks at If-Match: a version that has these bytes is another one.
        inside = size_bytes is not None and offset + wanted <= size_bytes
        call = Call(
            "get",
            "GET",
            key,
            "",
            headers,
            buffers=buffers,
            check=check,
            size_bytes=wanted,
            out_of_range=PreconditionFailed if inside else BadResponse,
        )
        await self._client.send(call)

    async def multipart_create(self, key: str, *, metadata: Mapping[str, str], headers: Mapping[str, str]) -> str:
        sent = write_headers(metadata, headers, key)
        call = Call("multipart_create", "POST", key, "uploads=", sent)
        return await self._client.ask_result(call, "InitiateMultipartUploadResult", "UploadId")

    async def multipart_put(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        checksum = await crc32_header(body)
        query = _query({"partNumber": str(number), "uploadId": upload_id})
        sent = {"x-amz-checksum-crc32": checksum}
        call = Call("multipart_put", "PUT", key, query, sent, body, size_bytes=body.size_bytes)

        async def read(answer: Answer) -> str:
            return await check_stored(answer.headers, checksum, body, key)

        return Part(number, await self._client.ask(call, read))

    async def multipart_copy(
        self, key: str, upload_id: str, number: int, *, source: str, source_etag: str, start: int, stop: int
    ) -> Part:
        sent = self._objects.copy_source(source, source_etag) | {"x-amz-copy-source-range": f"bytes={start}-{stop - 1}"}
        query = _query({"partNumber": str(number), "uploadId": upload_id})
        call = Call("multipart_copy", "PUT", key, query, sent, size_bytes=stop - start, copied_bytes=stop - start)
        return Part(number, await self._client.ask_result(call, "CopyPartResult", "ETag"))

    async def multipart_complete(
        self,
        key: str,
        upload_id: str,
        parts: Sequence[Part],
        *,
        condition: Condition = ANY,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        body = Bytes(s3xml.complete_body(parts))
        sent = {"content-type": "application/xml"} | condition_headers(condition)
        query = _query({"uploadId": upload_id})
        # Joining 10,000 parts takes servers seconds; only the stall timeout bounds a single try.
        call = Call("multipart_complete", "POST", key, query, sent, body, conditional=True)

        async def write() -> str:
            if condition != ANY and self._objects.findings.conditional_multipart is False:
                await self._objects.look(key, condition)
            return await self._client.ask_result(call, "CompleteMultipartUploadResult", "ETag")

        async def ours() -> str | None:
            found = await self.head(key)
            same = found.etag == multipart_etag(parts) and metadata in (None, found.metadata)
            return found.etag if same else None

        return await self._objects.resolved(write, ours, (PreconditionFailed, NotFound))

    async def multipart_abort(self, key: str, upload_id: str) -> None:
        try:
            query = _query({"uploadId": upload_id})
            await self._client.ask(Call("multipart_abort", "DELETE", key, query), deleted)
        except NotFound:
            return

    async def list_uploads(self, prefix: str) -> Sequence[Upload]:
        # MinIO finds uploads of one exact key only, but gives all of them when asked without a prefix.
        asked = "" if self._client.server == "MinIO" else prefix
        # SeaweedFS says that it encodes the keys, and does not.
        encoding = {} if self._client.server.startswith("SeaweedFS") else {"encoding-type": "url"}
        fields = {"uploads": "", "prefix": asked} | encoding
        uploads: list[Upload] = []
        seen: set[tuple[str, str]] = set()

        async def read(answer: Answer) -> tuple[list[Upload], tuple[str, str] | None]:
            return await parsed(answer.body, partial(s3listing.parse_uploads, bucket=self._bucket))

        while True:
            call = Call("list_uploads", "GET", query=_query(fields), answer_bytes=_ANSWER_BYTES + 1000 * _ENTRY_BYTES)
            page, markers = await self._client.ask(call, read)
            uploads += [upload for upload in page if upload.key.startswith(prefix)]
            if markers is None:
                return uploads
            if markers in seen:
                raise BadResponse(f"the listing of uploads in {self._bucket} has no end: its markers repeat themselves")
            seen.add(markers)
            fields |= {"key-marker": markers[0], "upload-id-marker": markers[1]}

    async def aclose(self) -> None:
        await self._transport.aclose()


def _query(fields: Mapping[str, str]) -> str:
    # Blanks as %20: the signature is made of the query as it is sent.
    return urlencode(sorted(fields.items())).replace("+", "%20")
