"""Parks staged bytes of files that are still open for writing, so that one may be larger than the dirty budget.

The oldest layer is frozen and sent to temporary objects under the reserved name; then its local bytes go, and reads and
the file's next upload find them there (`writing.overlay`). Nothing is visible under the file's own key before the file
is whole. Each byte is sent once, and copied once by the server when the file is put together. An upload of the file
waits for a parking that was begun: else half of what was written would become visible.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from s3fuse import keys
from s3fuse.namespace.changes import TOKEN
from s3fuse.namespace.lateness import OF_NOBODY
from s3fuse.store.base import ObjectInfo
from s3fuse.writing.layers import Piece
from s3fuse.writing.parking import Pack, Temporary
from s3fuse.writing.upload import CHUNK_BYTES, PARTS_AT_ONCE, first_failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.inodes import Inode
    from s3fuse.store.base import Buffer, Store
    from s3fuse.writing.dirty import DirtyFile
    from s3fuse.writing.plan import Limits
    from s3fuse.writing.staging import Staging

#: So many packs make the largest file that needs no longer ones; far fewer than parts are allowed.
PACKS = 2000


@dataclass(frozen=True)
class _PackBody:
    """The bytes of a pack, from the oldest layer of a file."""

    data: DirtyFile
    pack: Pack

    @property
    def size_bytes(self) -> int:
        return self.pack.size_bytes

    async def chunks(self) -> AsyncIterator[Buffer]:
        for start, stop in self.pack.ranges:
            for at in range(start, stop, CHUNK_BYTES):
                if self.pack not in self.data.parked.packs:
                    raise OSError(125, "the file is gone")
                yield self.data.read_piece(Piece(0, at, min(stop, at + CHUNK_BYTES)))


class Parking:
    """Parks what `wanted` names, when the syncer comes to it."""

    def __init__(self, store: Store, changes: Changes, limits: Limits) -> None:
        self.store = store
        self.changes = changes
        self.limits = limits
        self.wanted: set[int] = set()
        self.parked_bytes = 0

    def can(self, inode: Inode) -> bool:
        """Whether parking would free bytes. Not of a layer whose upload was begun: that one may have arrived.

        Of an unlinked file nothing is uploaded any more.
        """
        data = inode.data
        if data is None or not data.layers or not self._is_held(inode) or data.layers[0].extents.total_bytes == 0:
            return False
        if data.layers[0].poisoned:  # bytes between those that would be sent are lost
            return False
        return not data.frozen or bool(data.parked.packs) or not inode.linked

    @staticmethod
    def _is_held(inode: Inode) -> bool:
        """Whether only a close brings its bytes to the bucket, or has them dropped: then they are parked meanwhile."""
        return inode.writers > 0 or (inode.opens > 0 and not inode.linked)

    def want(self, inode: Inode) -> None:
        if inode.number not in self.wanted:
            self.wanted.add(inode.number)
            self.changes.queue(inode)

    async def park_if_wanted(self, inode: Inode) -> bool:
        """Whether the inode came up only in order to be parked. Raises as `park` does, and it then is wanted still."""
        if inode.number not in self.wanted:
            return False
        uploading = inode.linked and inode.data is not None and inode.data.frozen and not inode.data.parked.packs
        if uploading or not self._is_held(inode):
            self.wanted.discard(inode.number)
            return False
        if self.can(inode):
            await self.park(inode)
        self.wanted.discard(inode.number)
        self.changes.looked_at(inode)
        return True

    async def park(self, inode: Inode) -> None:
        """Sends the oldest layer away. Raises StoreError; what has arrived is then not sent again."""
        data = inode.data
        assert data is not None
        parked = data.parked
        if data.frozen and not parked.packs and inode.dirty:
            # It may have arrived before its name went: by its token it is known for ours, and deleted.
            inode.token = ",".join(filter(None, (inode.token, data.tokens[0])))
            self.changes.record(inode)
        packs = data.park(max(self.limits.part_bytes, data.size // PACKS), self._new)
        parked.sending = True
        try:
            limit = trio.CapacityLimiter(PARTS_AT_ONCE)
            async with trio.open_nursery() as nursery:
                for pack in [pack for pack in packs if not pack.into.etag]:
                    await limit.acquire_on_behalf_of(pack)
                    nursery.start_soon(self._send, data, pack, limit)
        except BaseExceptionGroup as group:
            if parked.packs is packs:
                raise first_failure(group) from None
        finally:
            parked.sent()
        if parked.packs is packs and packs:
            with self.changes.journal.transaction():
                data.parked_oldest()
            self.parked_bytes += sum(pack.size_bytes for pack in packs)

    async def _send(self, data: DirtyFile, pack: Pack, limit: trio.CapacityLimiter) -> None:
        into = pack.into
        try:
            with data.staging.ledger.sending(pack.size_bytes, data.arrived):
                etag = await self.store.put(into.key, _PackBody(data, pack), metadata={TOKEN: into.token}, headers={})
            into.etag, into.size_bytes = etag, pack.size_bytes
        finally:
            limit.release_on_behalf_of(pack)

    def _new(self) -> Temporary:
        return Temporary(keys.temporary_key(self.changes.inodes.prefix), secrets.token_hex(12))

    def abandon(self, temporary: Temporary) -> None:
        """Has an object deleted that no file needs any more, or that may be there."""
        metadata = {TOKEN: temporary.token}
        self.changes.orphan(ObjectInfo(temporary.key, temporary.size_bytes, temporary.etag, 0, metadata, {}))

    def restore(self, staging: Staging) -> None:
        """Gives recovered files what they have parked. What an earlier process was parking is parked anew."""
        journal, table = self.changes.journal, self.changes.inodes.table
        staging.abandon = self.abandon
        overlays, known = journal.overlays(), set()
        for number, overlay in overlays.items():
            data = table[number].data
            assert data is not None
            data.parked.restore(overlay)
            known |= overlay.objects()
        for key, number, token in journal.temporaries():
            if key in known:
                continue
            # In this order: whatever comes between, one of the two knows the object.
            self.abandon(Temporary(key, token))
            self.changes.late.expect([(key, OF_NOBODY)])  # what the earlier process asked for may be done only now
            journal.drop_temporary(key)
            inode = table.get(number)
            layers = inode.data.layers if inode is not None and inode.data is not None else ()
            if inode is not None and inode.data is not None and len(layers) > 1 and not layers[0].poisoned:
                inode.data.park(max(self.limits.part_bytes, inode.size // PACKS), self._new)
