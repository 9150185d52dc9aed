"""Single objects of S3: put, head, copy and delete as the server does them, conditions and lost answers settled.

What a PUT stores is checked by the server against an x-amz-checksum-crc32 header (7 GB/s here, MD5 0.9, SHA-256 2.1):
MinIO and SeaweedFS refuse a mismatch and echo the checksum. Where it is not echoed, MD5 is compared with the etag.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from s3fuse.errors import BadResponse, NotFound, PreconditionFailed, StoreError
from s3fuse.store import s3xml
from s3fuse.store.base import ANY, NO_ETAGS, Bytes, Condition
from s3fuse.store.s3checks import check_stored, crc32_header, md5_header, md5_of
from s3fuse.store.s3client import Call, S3Client, acted, error_kind
from s3fuse.store.s3headers import condition_headers, object_info, write_headers
from s3fuse.store.s3parsing import parsed
from s3fuse.store.s3probe import Findings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from s3fuse.store.base import Body, ObjectInfo
    from s3fuse.store.framing import Answer

#: A thousand keys of 1 KiB and as many reasons why they are still there.
_DELETED_BYTES = 8 << 20
#: How often a conditional write is tried when its answers get lost.
_CONDITIONAL_ATTEMPTS = 5


async def deleted(answer: Answer) -> None:
    """Reads the answer to a DELETE, which is 204: a page with 200 comes from something that is no S3 server."""
    if answer.body:
        raise BadResponse(f"{answer.status} with a body came where a deletion was to be confirmed")


def _delete_failures(answer: bytes, keys: Sequence[str]) -> dict[str, StoreError]:
    # The status of the answer is that of the whole request: 500 stands for "may be tried again".
    return {
        key: error_kind(500, failure.code)(f"{failure.code}: {failure.message}", key)
        for key, failure in s3xml.parse_deleted(answer, keys).items()
    }


class S3Objects:
    """The methods of `base.Store` for whole objects."""

    def __init__(self, client: S3Client) -> None:
        self._client = client
        #: What the probe found.
        self.findings = Findings()

    async def head(self, key: str) -> ObjectInfo:
        async def read(answer: Answer) -> ObjectInfo:
            return object_info(key, answer)

        return await self._client.ask(Call("head", "HEAD", key), read)

    async def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str],
        headers: Mapping[str, str],
        condition: Condition = ANY,
    ) -> str:
        sent = write_headers(metadata, headers, key) | condition_headers(condition)
        sent["x-amz-checksum-crc32"] = await crc32_header(body)
        call = Call("put", "PUT", key, "", sent, body, size_bytes=body.size_bytes, conditional=condition != ANY)

        async def read(answer: Answer) -> str:
            return await check_stored(answer.headers, sent["x-amz-checksum-crc32"], body, key)

        async def write() -> str:
            if condition != ANY and self.findings.conditional_put is False:
                await self.look(key, condition)
            return await self._client.ask(call, read)

        if condition == ANY:
            return await write()

        async def ours() -> str | None:
            found = await self.head(key)
            same = found.size_bytes == body.size_bytes and found.metadata == metadata
            return found.etag if same and found.etag == await md5_of(body) else None

        return await self.resolved(write, ours, PreconditionFailed)

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
        sent = self.copy_source(source, source_etag) | condition_headers(condition)
        if metadata is not None:
            sent |= write_headers(metadata, headers or {}, target) | {"x-amz-metadata-directive": "REPLACE"}
        # The condition on the source is the condition on the target of a metadata-only change.
        settled = source == target and condition.etag == source_etag
        conditional = condition != ANY and not settled
        call = Call("copy", "PUT", target, "", sent, conditional=conditional)

        async def write() -> str:
            if conditional and not self.findings.conditional_copy:
                await self.look(target, condition)
            return await self._client.ask_result(call, "CopyObjectResult", "ETag")

        if not conditional:
            return await write()

        async def ours() -> str | None:
            found = await self.head(target)
            return found.etag if found.etag == source_etag and metadata in (None, found.metadata) else None

        return await self.resolved(write, ours, PreconditionFailed)

    def copy_source(self, source: str, source_etag: str) -> dict[str, str]:
        return {
            "x-amz-copy-source": self._client.path(source),
            "x-amz-copy-source-if-match": f'"{source_etag}"',
        }

    async def look(self, key: str, condition: Condition) -> None:
        """Checks by HEAD a condition that the server does not check itself."""
        try:
            found: str | None = (await self.head(key)).etag
        except NotFound:
            found = None
        if found != condition.etag:
            raise PreconditionFailed(f"{self._client.name(key)} is version {found or 'none'}", key)

    async def resolved(
        self,
        write: Callable[[], Awaitable[str]],
        ours: Callable[[], Awaitable[str | None]],
        puzzling: type[StoreError] | tuple[type[StoreError], ...],
    ) -> str:
        """Does a write that cannot blindly be repeated; `ours` looks whether it happened and gives the etag.

        After a lost answer, what happened is looked up before the next try, and again where that try fails as one
        fails whose predecessor succeeded (`puzzling`).
        """
        in_doubt = False
        attempt = 0
        started = trio.current_time()
        while True:
            attempt += 1
            try:
                return await write()
            except StoreError as exc:
                in_doubt = in_doubt or acted(exc)
                if not (in_doubt and (exc.transient or isinstance(exc, puzzling))):
                    raise
                try:
                    etag = await ours()
                except NotFound:
                    etag = None
                if etag is not None:
                    return etag
                late = trio.current_time() - started >= self._client.deadline_s
                if not exc.transient or attempt >= _CONDITIONAL_ATTEMPTS or late:
                    raise
            await trio.sleep(self._client.backoff_s(attempt))

    async def delete(self, key: str, *, etag: str = "") -> None:
        sent = condition_headers(Condition(etag=etag)) if etag and self.findings.conditional_delete else {}
        try:
            await self._client.ask(Call("delete", "DELETE", key, "", sent), deleted)
        except NotFound:
            return

    async def delete_many(
        self, keys: Sequence[str], *, etags: Mapping[str, str] = NO_ETAGS
    ) -> Mapping[str, StoreError]:
        named = [key for key in keys if s3xml.fits_xml(key)]
        failed: dict[str, StoreError] = {}
        if named:
            body = s3xml.delete_body(named, etags if self.findings.conditional_delete_many else {})
            sent = {"content-md5": md5_header(body)}
            call = Call("delete_many", "POST", "", "delete=", sent, Bytes(body), answer_bytes=_DELETED_BYTES)

            async def read(answer: Answer) -> dict[str, StoreError]:
                refused = await parsed(answer.body, partial(_delete_failures, keys=named))
                if refused and self._client.shows_keys(answer.body):
                    hidden = "refused; the reason shows keys and is left out"
                    return {key: type(why)(hidden, key) for key, why in refused.items()}
                return refused

            failed |= await self._client.ask(call, read)
        for key in set(keys).difference(named):
            try:
                await self.delete(key, etag=etags.get(key, ""))
            except StoreError as exc:
                failed[key] = exc
        return failed
