"""What a server really does: small experiments under `.s3fuse/probe-<random>/`, which are always cleaned up."""

from __future__ import annotations

import io
import secrets
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlencode

import trio

from s3fuse.errors import AccessDenied, BadResponse, NotFound, PreconditionFailed, Refused, StoreError, Unsupported
from s3fuse.store import s3xml
from s3fuse.store.base import Bytes, Capabilities, Condition
from s3fuse.store.s3checks import md5_header
from s3fuse.store.s3client import Call
from s3fuse.store.s3headers import condition_headers
from s3fuse.store.s3markers import SIDECARS
from s3fuse.store.s3races import completions_are_exact, copies_are_exact, known_racy, puts_are_exact

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from s3fuse.store.base import Store
    from s3fuse.store.s3client import S3Client

_NAMESPACE = ".s3fuse"
_MARK = {"probe": "1"}
_OTHER = Condition(etag="0" * 32)
_ABSENT = Condition(absent=True)
_CLEANUP_S = 15.0
#: A push that comes later than this after the change is of no use: 20 ms were seen where it works. Each mount waits for
#: both of these times, and a container's start with it.
_EVENT_S = 0.15
_SUBSCRIBE_S = 0.05


@dataclass(slots=True)
class Findings:
    """What the experiments showed; None is not tried yet."""

    list_metadata: bool | None = None
    conditional_put: bool | None = None
    conditional_multipart: bool | None = None
    conditional_copy: bool | None = None
    snowball: bool | None = None
    notifications: bool | None = None
    marker_metadata: bool | None = None
    atomic_put: bool | None = None
    atomic_multipart: bool | None = None
    atomic_copy: bool | None = None
    conditional_delete: bool | None = None
    conditional_delete_many: bool | None = None

    def capabilities(self, server: str) -> Capabilities:
        """Where nothing was raced (the findings of an earlier version) a refusal is believed, but not of copies."""

        def atomic(what: str, honoured: bool | None, raced: bool | None) -> bool:
            return bool(honoured) and raced is not False and not known_racy(server, what)

        return Capabilities(
            server=server,
            list_metadata=bool(self.list_metadata),
            conditional_put=bool(self.conditional_put),
            conditional_multipart=bool(self.conditional_multipart),
            snowball=bool(self.snowball),
            notifications=bool(self.notifications),
            marker_metadata=bool(self.marker_metadata),
            atomic_put=atomic("atomic_put", self.conditional_put, self.atomic_put),
            atomic_multipart=atomic("atomic_multipart", self.conditional_multipart, self.atomic_multipart),
            atomic_copy=atomic("atomic_copy", self.conditional_copy, bool(self.atomic_copy)),
            conditional_delete=bool(self.conditional_delete),
            conditional_delete_many=bool(self.conditional_delete_many),
        )


async def probe(client: S3Client, store: Store) -> Findings:
    """The findings about a bucket; `store` must not have any yet. With read-only credentials most are False."""
    prefix = f"{_NAMESPACE}/probe-{secrets.token_hex(8)}/"
    findings = Findings()
    base = f"{prefix}object"
    try:
        await store.put(base, Bytes(b"probe"), metadata=_MARK, headers={})
        failures: list[StoreError] = []

        async def run(experiment: Callable[[], Awaitable[None]]) -> None:
            try:
                await experiment()
            except StoreError as exc:
                failures.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, lambda: _listing(store, base, findings))
            nursery.start_soon(run, lambda: _puts(store, base, findings))
            nursery.start_soon(run, lambda: _multipart(client.server, store, base, findings))
            nursery.start_soon(run, lambda: _copies(client, store, base, findings))
            nursery.start_soon(run, lambda: _deletes(client, store, base, findings))
            nursery.start_soon(run, lambda: _snowball(client, store, prefix, findings))
            nursery.start_soon(run, lambda: _markers(store, prefix, findings))
            nursery.start_soon(run, lambda: _events(client, store, prefix, findings))
        if failures:
            raise failures[0]
    except AccessDenied:
        # Read-only credentials: only what reading shows.
        await _any_listing(store, findings)
        await _sidecars(store, findings)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP_S):
            await _clean_up(store, prefix)
    return findings


async def _listing(store: Store, base: str, findings: Findings) -> None:
    page = await store.list_page(base)
    findings.list_metadata = any(entry.metadata == _MARK for entry in page.objects)


async def _any_listing(store: Store, findings: Findings) -> None:
    page = await store.list_page("", delimiter="", limit=10)
    findings.list_metadata = any(entry.metadata is not None for entry in page.objects)


async def _refuses(attempt: Awaitable[object]) -> bool:
    """Whether a write whose condition does not hold is refused for that reason."""
    try:
        await attempt
    except PreconditionFailed:
        return True
    except (Unsupported, Refused):
        return False
    return False


async def _puts(store: Store, base: str, findings: Findings) -> None:
    async def refuses(condition: Condition) -> bool:
        return await _refuses(store.put(base, Bytes(b"other"), metadata=_MARK, headers={}, condition=condition))

    findings.conditional_put = await refuses(_ABSENT) and await refuses(_OTHER)
    findings.atomic_put = findings.conditional_put and await puts_are_exact(store, f"{base}-puts")


async def _multipart(server: str, store: Store, base: str, findings: Findings) -> None:
    async def refuses(condition: Condition) -> bool:
        upload_id = await store.multipart_create(base, metadata=_MARK, headers={})
        try:
            part = await store.multipart_put(base, upload_id, 1, Bytes(b"other"))
            return await _refuses(store.multipart_complete(base, upload_id, [part], condition=condition))
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP_S):
                await store.multipart_abort(base, upload_id)

    findings.conditional_multipart = await refuses(_ABSENT) and await refuses(_OTHER)
    racing = findings.conditional_multipart and not known_racy(server, "atomic_multipart")
    findings.atomic_multipart = racing and await completions_are_exact(store, f"{base}-parts")


async def _copies(client: S3Client, store: Store, base: str, findings: Findings) -> None:
    # A target of its own: a server that ignores the condition must not disturb the other experiments.
    target = f"{base}-copy"
    await store.put(target, Bytes(b"target"), metadata=_MARK, headers={})

    async def copy(source: str, condition: Condition) -> str:
        sent = {"x-amz-copy-source": client.path(source)} | condition_headers(condition)
        call = Call("copy", "PUT", target, "", sent, conditional=True)
        return await client.ask_result(call, "CopyObjectResult", "ETag")

    findings.conditional_copy = await _refuses(copy(base, _ABSENT)) and await _refuses(copy(base, _OTHER))
    racing = findings.conditional_copy and not known_racy(client.server, "atomic_copy")
    findings.atomic_copy = racing and await copies_are_exact(store, target, copy)


async def _deletes(client: S3Client, store: Store, base: str, findings: Findings) -> None:
    """Whether a delete looks at the version: MinIO deletes whatever is there."""
    one, other = f"{base}-delete", f"{base}-delete-many"
    for key in (one, other):
        await store.put(key, Bytes(b"target"), metadata=_MARK, headers={})
    call = Call("delete", "DELETE", one, "", condition_headers(_OTHER), conditional=True)
    findings.conditional_delete = await _refuses(client.send(call))
    body = s3xml.delete_body([other], {other: _OTHER.etag or ""})
    call = Call("delete_many", "POST", "", "delete=", {"content-md5": md5_header(body)}, Bytes(body))
    try:
        failed = s3xml.parse_deleted((await client.send(call)).body, [other])
    except (Refused, Unsupported):
        failed = {}
    findings.conditional_delete_many = bool(failed) and findings.conditional_delete


async def _snowball(client: S3Client, store: Store, prefix: str, findings: Findings) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo(f"{prefix}entry")
        entry.pax_headers = {f"minio.metadata.x-amz-meta-{name}": value for name, value in _MARK.items()}
        tar.addfile(entry)
    body = Bytes(target.getvalue())
    headers = {"x-amz-meta-snowball-auto-extract": "true"}
    try:
        await client.send(Call("put", "PUT", f"{prefix}snowball.tar", "", headers, body))
        findings.snowball = (await store.head(f"{prefix}entry")).metadata == _MARK
    except (NotFound, Refused, Unsupported, BadResponse):
        findings.snowball = False


async def _markers(store: Store, prefix: str, findings: Findings) -> None:
    key = f"{prefix}marker/"
    try:
        await store.put(key, Bytes(b""), metadata=_MARK, headers={})
        findings.marker_metadata = (await store.head(key)).metadata == _MARK
    except (NotFound, Refused, Unsupported, BadResponse):
        findings.marker_metadata = False
    if findings.marker_metadata:
        await _sidecars(store, findings)


async def _sidecars(store: Store, findings: Findings) -> None:
    """A bucket with sidecars keeps them on a server that needs none (a later release, or a copy of the bucket)."""
    if (await store.list_page(SIDECARS, delimiter="", limit=1)).objects:
        findings.marker_metadata = False


async def _events(client: S3Client, store: Store, prefix: str, findings: Findings) -> None:
    """Whether an event arrives soon after one change.

    The head of MinIO's stream comes with the first event. Releases of 2025-26 lose the flush (their response writer
    has none), so that events wait until 4 KiB of them have gathered: to rely on those would serve stale data.
    """
    key = f"{prefix}event"
    query = urlencode({"events": "s3:ObjectCreated:*", "prefix": key})
    findings.notifications = False

    async def listen(scope: trio.CancelScope) -> None:
        try:
            answer = await client.send(Call("listen", "GET", query=query, head_only=True))
            # Other servers might take this for a listing.
            findings.notifications = answer.headers.get("content-type") == "text/event-stream"
        except StoreError:
            pass
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen, nursery.cancel_scope)
        await trio.sleep(_SUBSCRIBE_S)  # nothing tells when the subscription has begun
        await store.put(key, Bytes(b""), metadata={}, headers={})
        await trio.sleep(_EVENT_S)
        nursery.cancel_scope.cancel()


async def _clean_up(store: Store, prefix: str) -> None:
    try:
        page = await store.list_page(prefix, delimiter="")
        keys = [entry.key for entry in page.objects]
        if keys:
            await store.delete_many(keys)
        # SeaweedFS keeps the directories that a deleted object was in.
        await store.delete(prefix)
        await store.delete(f"{_NAMESPACE}/")
    except StoreError:
        return
