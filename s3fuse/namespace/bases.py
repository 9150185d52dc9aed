"""Files that were written in part, whose version in the bucket was replaced by others: what goes below the new bytes.

The bytes of the version that the change is based on, where all that are needed are cached: they are staged, and the
file is whole. Else those of the version that the bucket has now: they are copied, so that they stay whatever others do
next. Either way the file needs nothing any more that others can take away.
"""

from __future__ import annotations

import dataclasses
import secrets
from typing import TYPE_CHECKING

from s3fuse import attrs
from s3fuse.errors import NotFound, PreconditionFailed
from s3fuse.namespace.changes import TOKEN
from s3fuse.namespace.moment import Moment, MovedOn
from s3fuse.store.base import Condition, ObjectInfo
from s3fuse.writing.layers import BASE
from s3fuse.writing.upload import CHUNK_BYTES, Target

if TYPE_CHECKING:
    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.namespace.temporaries import Temporaries
    from s3fuse.reading.blocks import BlockCache
    from s3fuse.writing.copying import Copies
    from s3fuse.writing.dirty import DirtyFile


def base_ranges(data: DirtyFile) -> list[tuple[int, int]]:
    """Which bytes of the base the oldest layer shows, and so its upload needs."""
    pieces = data.pieces(0, data.layers[0].size_bytes, layers=1)
    return [(piece.start, piece.stop) for piece in pieces if piece.source == BASE]


class Bases:
    """Puts something else below what was written. All methods raise StoreError, OSError and MovedOn."""

    def __init__(
        self, inodes: Inodes, changes: Changes, copies: Copies, temporaries: Temporaries, blocks: BlockCache
    ) -> None:
        self.inodes = inodes
        self.changes = changes
        self.copies = copies
        self.temporaries = temporaries
        self.blocks = blocks

    async def keep(self, inode: Inode, base: ObjectInfo) -> bool:
        """Stages what the oldest layer needs of its base, which is gone. False where that is not all cached."""
        data, moment = inode.data, Moment(self.inodes, inode)
        assert data is not None
        data.freeze()  # what is written meanwhile goes into a layer of its own
        ranges = base_ranges(data)
        if not all(self.blocks.has(base, start, stop) for start, stop in ranges):
            return False
        for first, last in ranges:
            for start in range(first, last, CHUNK_BYTES):
                try:
                    found = await self.blocks.copy(base, start, min(last, start + CHUNK_BYTES))
                except (NotFound, PreconditionFailed):
                    return False  # a block was given up meanwhile
                moment.check()
                data.fill_base(start, found)
        return True

    async def copied(self, inode: Inode, theirs: ObjectInfo) -> ObjectInfo:
        """A copy of `theirs` for `put_below`, which must come before the next await."""
        before, moment = inode.remote, Moment(self.inodes, inode)
        assert before is not None
        source = dataclasses.replace(
            theirs,
            metadata=before.metadata if before.metadata is not None else theirs.metadata,
            headers=before.headers if before.headers is not None else theirs.headers,
        )
        # A token of its own: it is not what the next upload of the inode writes.
        copy = await self.temporaries.copy(source, secrets.token_hex(12))
        try:
            moment.check()
        except MovedOn:
            self.temporaries.abandon(copy.key)
            raise
        return copy

    async def pass_on(self, inode: Inode, theirs: ObjectInfo) -> None:
        """Gives the object of others the attributes that were changed here; the inode keeps its version."""
        moment = Moment(self.inodes, inode)
        metadata = attrs.encode(inode.attributes(), theirs.metadata or {}) | {TOKEN: secrets.token_hex(12)}
        target = Target(theirs.key, metadata, theirs.headers or {}, Condition(etag=theirs.etag))
        await self.copies.copy(theirs, target)
        moment.check()

    def put_below(self, inode: Inode, base: ObjectInfo | None) -> None:
        """Makes this what is below what was written (None: zeros), which nobody reads through handles open now.

        Call it inside a journal transaction that records the inode, too.
        """
        data, before = inode.data, inode.remote
        assert data is not None
        self.inodes.keep(inode)
        if before is not None:
            self.inodes.displaced.settle(before.key, inode)
        if base is not None:
            self.temporaries.named(base.key)
        inode.remote, inode.doubtful = base, False
        self.inodes.displaced.add(inode)
        data.set_base(base.size_bytes if base is not None else 0)
        inode.era += 1
