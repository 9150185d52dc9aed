"""Leases: how other nodes learn that a place of the bucket is in use.

A mount of BUCKET/PREFIX has an object below PREFIX/.s3fuse/, which names host and mountpoint and is written anew every
`RENEW_S`. Whoever wants to delete what is there looks for such objects first: at the place, above it and below it.
Nobody has to end a lease: `EXPIRE_S` after the last renewal it counts no more.

A purge has such an object, too, for as long as it deletes. Each side writes its own before it looks for the other's,
so one of the two sees the other, whichever came first.

Ages are differences of the server's Last-Modified: no clock of a node matters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from s3fuse.errors import AccessDenied, NotFound
from s3fuse.keys import RESERVED, temporary_key
from s3fuse.store.base import Bytes
from s3fuse.store.walk import Walk, check_readable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Sequence

    from s3fuse.store.base import ObjectInfo, Store

#: How often a mount renews its lease: six requests an hour.
RENEW_S: Final = 600.0
#: When a lease that nobody renews counts no more: an outage of the server or six lost renewals do not end a use.
EXPIRE_S: Final = 3600.0
#: A purge renews its own before each request that deletes, so one that was not renewed for this long has died.
PURGE_EXPIRE_S: Final = 120.0

_LEASE: Final = f"{RESERVED}/lease-"
_PURGE: Final = f"{RESERVED}/purge-"
#: The name of the metadata that says who holds a lease.
_HOLDER: Final = "s3fuse-holder"
_MOST_TEXT: Final = 200
_NS: Final = 1_000_000_000
_CLEAN_UP_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Lease:
    """A use that was told. `renewed_ns` is a time of the server; the texts are foreign: see `printable`."""

    key: str
    host: str
    mountpoint: str
    renewed_ns: int

    @property
    def prefix(self) -> str:
        """What is used: a prefix that is empty or ends with "/"."""
        return self.key.rpartition(f"{RESERVED}/")[0]

    def age_s(self, now_ns: int) -> float:
        """How long ago it was renewed, at least 0."""
        return max(0, now_ns - self.renewed_ns) / _NS


def lease_key(prefix: str, identity: str) -> str:
    """The key of the lease of a mount of `prefix` ("" or ending in "/")."""
    return f"{prefix}{_LEASE}{identity}"


def purge_key(prefix: str, identity: str) -> str:
    """The key of what a purge of `prefix` tells with that it is under way."""
    return f"{prefix}{_PURGE}{identity}"


def is_lease(key: str) -> bool:
    """Whether a key is that of a lease, at whatever depth."""
    return _is(key, _LEASE)


def is_purge(key: str) -> bool:
    """Whether a key is that of a purge under way, at whatever depth."""
    return _is(key, _PURGE)


def _is(key: str, kind: str) -> bool:
    folder, _, name = key.rpartition("/")
    return f"{folder.rpartition('/')[2]}/{name}".startswith(kind)


async def write(store: Store, key: str, host: str, mountpoint: str) -> int:
    """Writes or renews a lease or a purge's object; gives the server's time of that (ns). Raises StoreError."""
    # ASCII, as it becomes a header; cut, as user metadata is at most 2 KB.
    holder = json.dumps({"host": host[:_MOST_TEXT], "mountpoint": mountpoint[:_MOST_TEXT]})
    await store.put(key, Bytes(b""), metadata={_HOLDER: holder}, headers={})
    return (await store.head(key)).modified_ns


async def server_ns(store: Store, prefix: str) -> int:
    """What time it is by the server's clock, to the second (ns). Raises StoreError."""
    key = temporary_key(prefix)
    await store.put(key, Bytes(b""), metadata={}, headers={})
    try:
        return (await store.head(key)).modified_ns
    finally:
        with trio.move_on_after(_CLEAN_UP_S, shield=True):
            await remove(store, [key])


def above(prefix: str) -> list[str]:
    """The places that have `prefix` in them, the prefix itself first and the whole bucket ("") last."""
    parts = prefix.split("/")[:-1]
    return ["".join(f"{part}/" for part in parts[:count]) for count in range(len(parts), -1, -1)]


async def living_above(store: Store, prefix: str, now_ns: int, own: Iterable[str] = ()) -> list[Lease]:
    """The leases on `prefix` and on what is above it that count at `now_ns`, without those whose keys are `own`.

    Where the keys may not list what is above, nobody is known there. Raises StoreError.
    """
    return await living(store, await _above(store, prefix, _LEASE), now_ns, own)


async def purges_above(store: Store, prefix: str, now_ns: int) -> list[Lease]:
    """The purges of `prefix`, and of what is above it, that are under way at `now_ns`; as `living_above`."""
    return await _read(store, await _above(store, prefix, _PURGE), now_ns, PURGE_EXPIRE_S, frozenset())


async def living(store: Store, infos: Iterable[ObjectInfo], now_ns: int, own: Iterable[str] = ()) -> list[Lease]:
    """Those of these lease objects that count at `now_ns`, save `own` ones. Raises StoreError."""
    return await _read(store, infos, now_ns, EXPIRE_S, frozenset(own))


async def remove(store: Store, keys: Sequence[str]) -> None:
    """Removes leases or purges' objects of one place, at most 1000. Raises StoreError."""
    for reason in (await store.delete_many(keys)).values():
        raise reason
    # SeaweedFS keeps the folder that an object was in; one that has something in it stays.
    await store.delete(keys[0].rpartition("/")[0] + "/")


async def forget_expired(store: Store, prefix: str, now_ns: int) -> None:
    """Removes what mounts that died long ago left of leases on `prefix`. Raises StoreError."""
    infos = [info async for info in listed(store, f"{prefix}{_LEASE}")]
    old = [info.key for info in infos if now_ns - info.modified_ns > 2 * EXPIRE_S * _NS]
    if old:
        await remove(store, old[:1000])


async def _above(store: Store, prefix: str, kind: str) -> list[ObjectInfo]:
    found: list[ObjectInfo] = []
    for place in above(prefix):
        try:
            found += [info async for info in listed(store, f"{place}{kind}")]
        except AccessDenied:
            if place == prefix:
                raise
    return found


async def _read(
    store: Store, infos: Iterable[ObjectInfo], now_ns: int, expire_s: float, own: frozenset[str]
) -> list[Lease]:
    found = []
    for info in infos:
        if info.key in own or now_ns - info.modified_ns > expire_s * _NS:
            continue
        try:
            metadata = info.metadata if info.metadata is not None else (await store.head(info.key)).metadata
        except NotFound:
            continue  # it ended just now
        found.append(_lease(info, (metadata or {}).get(_HOLDER, "")))
    return found


def _lease(info: ObjectInfo, holder: str) -> Lease:
    try:
        named = json.loads(holder)
        host, mountpoint = str(named["host"]), str(named["mountpoint"])
    except (ValueError, KeyError, TypeError):  # it counts all the same
        host = mountpoint = "unknown"
    return Lease(info.key, host, mountpoint, info.modified_ns)


async def listed(store: Store, prefix: str) -> AsyncGenerator[ObjectInfo, None]:
    """Every object whose key begins with `prefix`, however deep. Raises StoreError, also where one cannot be read."""
    token: str | None = None
    walk = Walk()
    while True:
        page = await store.list_page(prefix, delimiter="", token=token)
        check_readable(page, prefix)
        for info in page.objects:
            yield info
        token = walk.follow(page)
        if token is None:
            return
