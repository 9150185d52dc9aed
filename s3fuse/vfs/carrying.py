"""What is cached of a file stays good when our own upload makes a new version of it.

The new version is the old one with the bytes of the layer that was uploaded, at the same offsets: so its blocks are
had without a request, and a program that changes a few bytes at a time and syncs them (a log, a database) neither
reads the file again nor has the next upload read it again.

Only a frozen layer has been uploaded. What a program writes while its object is copied (chmod, rename) is in a layer
too, but the copy has none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from s3fuse.reading.records import BLOCK_BYTES
from s3fuse.writing.layers import BASE

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode
    from s3fuse.reading.blocks import BlockCache
    from s3fuse.store.base import ObjectInfo

#: Most blocks of one version that are changed in memory; more of them cost the event loop too long.
PATCHED_BLOCKS = 64
#: So many blocks at the end of an open file are put into the cache by its upload.
NEW_BLOCKS = 8


def carry_over(blocks: BlockCache, inode: Inode, new: ObjectInfo) -> None:
    """Has `blocks` take what it has of `inode.remote` for `new`, which is about to replace it. It may send nothing."""
    data = inode.data if inode.data is not None and inode.data.frozen and inode.data.layers else None
    patched = 0

    def fill(start: int, view: memoryview, known: bool) -> bool:
        """Makes `view` the bytes of the new version from `start`; `known`: it has those of the old one."""
        nonlocal patched
        if data is None:
            return known
        pieces = data.pieces(start, start + len(view), layers=1)
        local = [piece for piece in pieces if piece.is_local]
        patched += bool(local)
        if patched > PATCHED_BLOCKS or any(not p.is_local and (p.source != BASE or not known) for p in pieces):
            return False
        for piece in local:
            view[piece.start - start : piece.stop - start] = data.read_piece(piece)
        return True

    if inode.remote is not None:
        blocks.carry_over(inode.remote, new, fill)
    if inode.opens and data is not None and new.size_bytes:
        last = (new.size_bytes - 1) // BLOCK_BYTES
        for index in range(max(0, last - NEW_BLOCKS + 1), last + 1):
            blocks.admit(new, index, fill)
