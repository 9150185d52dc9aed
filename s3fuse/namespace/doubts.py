"""Writes whose outcome is unknown: how their results are recognised, and what becomes of them.

Each operation on an inode writes a token into the object's metadata (`changes.TOKEN`). A write over the object that
the inode has in the bucket may have happened although it failed here (`Inode.doubtful`). While only that write is
repeated, its condition fails and the token tells why. Before the inode is moved or its object replaced, the doubt is
settled: else our own version would be taken for somebody else's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from s3fuse.errors import NotFound
from s3fuse.namespace.changes import TOKEN, tokens

if TYPE_CHECKING:
    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.inodes import Inode
    from s3fuse.store.base import ObjectInfo, Store


def expected(remote: ObjectInfo) -> list[str]:
    """The tokens that may be on an object whose etag is not known."""
    return (remote.metadata or {}).get(TOKEN, "").split(",")


def carries(info: ObjectInfo, wanted: list[str]) -> bool:
    """Whether the object was written by an operation with one of these tokens."""
    return (info.metadata or {}).get(TOKEN) in wanted


async def look(store: Store, key: str) -> ObjectInfo | None:
    """What is at the key now, None for nothing."""
    try:
        return await store.head(key)
    except NotFound:
        return None


async def settle(store: Store, changes: Changes, inode: Inode) -> None:
    """Finds out what a write in doubt has made of the inode's object; what it wrote is in the bucket from then on.

    The caller holds the object's key, so that no other operation changes it meanwhile. Raises StoreError.
    """
    before = inode.remote
    if before is None or not inode.doubtful:
        return
    info = await look(store, before.key)
    if inode.remote is not before:
        return
    inode.doubtful = False
    if info is not None and carries(info, tokens(inode)):
        with changes.journal.transaction():
            adopt(changes, inode, info)


def adopt(changes: Changes, inode: Inode, info: ObjectInfo) -> None:
    """The object is what an operation of ours on the inode has written: further changes are based on it.

    Call it inside a journal transaction.
    """
    changes.inodes.keep(inode)
    data = inode.data
    if data is not None and data.frozen and data.layers and carries(info, data.tokens[:1]):
        data.commit(info.size_bytes)
    inode.remote = info
    changes.record(inode)
