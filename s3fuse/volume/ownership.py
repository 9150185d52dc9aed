"""The owner's mark: the proof that a volume made what is at its place, without which nothing of it is ever purged.

The creation of a volume with `purge=true` puts it below the place, before anything else is written there: an object
whose Last-Modified is the beginning, and whose content is the keys that were there already. Each volume's name has a
mark of its own, which all nodes with this volume share.
"""

from __future__ import annotations

import json
import zlib
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from s3fuse.coherence import leases
from s3fuse.errors import NotFound, PreconditionFailed, UserError
from s3fuse.keys import RESERVED
from s3fuse.store.base import Bytes, Condition
from s3fuse.volume.naming import file_name

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from s3fuse.store.base import ObjectInfo, Store

#: The most objects that may be at a place before a volume with `purge=true`: they are all remembered.
MOST_BEFORE: Final = 100_000
_MARK: Final = f"{RESERVED}/owner-"
_PROBE: Final = f"{RESERVED}/probe-"
_MOST_BYTES: Final = (MOST_BEFORE + 1) * 2 * 1024


@dataclass(frozen=True)
class Mark:
    """What a volume found when it was made: the server's time (ns), and the keys after the prefix."""

    made_ns: int
    before: AbstractSet[str]

    def covers(self, info: ObjectInfo, prefix: str) -> bool:
        """Whether the object came after the volume."""
        return info.modified_ns >= self.made_ns and info.key[len(prefix) :] not in self.before


def mark_key(prefix: str, volume: str) -> str:
    """The key of the mark of a volume at `prefix` ("" or ending in "/")."""
    return f"{prefix}{_MARK}{file_name(volume)}"


def is_mark(key: str, prefix: str) -> bool:
    """Whether a key is that of a mark at exactly `prefix`."""
    return key.startswith(f"{prefix}{_MARK}")


async def own(store: Store, prefix: str, volume: str) -> None:
    """Puts the mark where there is none yet. Raises UserError where too much is there already, and StoreError."""
    key = mark_key(prefix, volume)
    try:
        await store.head(key)
        return
    except NotFound:
        pass
    before = await _there(store, prefix)
    if len(before) > MOST_BEFORE:
        raise UserError(
            f"more than {MOST_BEFORE} objects are there already, which purge=true would have to remember, as it never "
            "deletes what was there before the volume; choose a prefix of its own, leave purge out, or say purge=all "
            "to delete them, too"
        )
    body = zlib.compress(json.dumps({"version": 1, "before": before}).encode(), 1)
    try:
        await store.put(key, Bytes(body), metadata={}, headers={}, condition=Condition(absent=True))
    except PreconditionFailed:
        return  # another node makes the same volume


async def _there(store: Store, prefix: str) -> list[str]:
    """The keys of the place after its prefix, at most one more than `MOST_BEFORE`, without what only passes."""
    found: list[str] = []
    async with aclosing(leases.listed(store, prefix)) as infos:
        async for info in infos:
            passing = leases.is_lease(info.key) or leases.is_purge(info.key) or is_mark(info.key, prefix)
            if not passing and not info.key.startswith(_PROBE):
                found.append(info.key[len(prefix) :])
            if len(found) > MOST_BEFORE:
                break
    return found


async def read(store: Store, prefix: str, volume: str) -> Mark | None:
    """The mark of a volume; None where there is none, or none that can be read. Raises StoreError."""
    key = mark_key(prefix, volume)
    try:
        info = await store.head(key)
        body = bytearray(min(info.size_bytes, _MOST_BYTES))
        await store.get_into(key, 0, [memoryview(body)], etag=info.etag)
        unpacking = zlib.decompressobj()
        content = json.loads(unpacking.decompress(body, _MOST_BYTES))
        if content["version"] != 1 or unpacking.unconsumed_tail:
            return None
        return Mark(info.modified_ns, frozenset(map(str, content["before"])))
    except (NotFound, PreconditionFailed, zlib.error, ValueError, KeyError, TypeError):
        return None
