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
from s3fuse.store.base import Bytes, Capabilities, Condition
from s3fuse.store.s3client import Call
from s3fuse.store.s3markers import SIDECARS

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

    def capabilities(self, server: str) -> Capabilities:
        return Capabilities(
            server=server,
            list_metadata=bool(self.list_metadata),
            conditional_put=bool(self.conditional_put),
            conditional_multipart=bool(self.conditional_multipart),
            snowball=bool(self.snowball),
            notifications=bool(self.notifications),
            marker_metadata=bool(self.marker_metadata),
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
            nursery.start_soon(run, lambda: _multipart(store, base, findings))
            nursery.start_soon(run, lambda: _copies(client, store, base, findings))
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


async def _multipart(store: Store, base: str, findings: Findings) -> None:
    async def refuses(condition: Condition) -> bool:
        upload_id = await store.multipart_create(base, metadata=_MARK, headers={})
        try:
            part = await store.multipart_put(base, upload_id, 1, Bytes(b"other"))
            return await _refuses(store.multipart_complete(base, upload_id, [part], condition=condition))
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP_S):
                await store.multipart_abort(base, upload_id)

    findings.conditional_multipart = await refuses(_ABSENT) and await refuses(_OTHER)


async def _copies(client: S3Client, store: Store, base: str, findings: Findings) -> None:
    # A target of its own: a server that ignores the condition must not disturb the other experiments.
    target = f"{base}-copy"
    await store.put(target, Bytes(b"target"), metadata=_MARK, headers={})

    async def refuses(header: dict[str, str]) -> bool:
        sent = {"x-amz-copy-source": client.path(base)} | header
        return await _refuses(client.send(Call("copy", "PUT", target, "", sent)))

    findings.conditional_copy = await refuses({"if-none-match": "*"}) and await refuses(
        {"if-match": f'"{_OTHER.etag}"'}
    )


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
