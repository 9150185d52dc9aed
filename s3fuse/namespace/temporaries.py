"""Copies under temporary keys: each key is in the journal before the copy is asked for, until an inode's row names it.

So a crash leaves none that nobody knows of: the next process has them deleted (`Parking.restore`), also where the
server carries out the request of the one that died only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from s3fuse import keys
from s3fuse.namespace.changes import TOKEN
from s3fuse.store.base import ANY, ObjectInfo
from s3fuse.writing.rows import OF_NO_FILE
from s3fuse.writing.upload import Target

if TYPE_CHECKING:
    from s3fuse.namespace.changes import Changes
    from s3fuse.writing.copying import Copies


class Temporaries:
    """Makes such copies. They carry `token`, by which what may be at a key is told from what is not ours."""

    def __init__(self, changes: Changes, copies: Copies) -> None:
        self.changes = changes
        self._copies = copies

    async def copy(self, source: ObjectInfo, token: str) -> ObjectInfo:
        """A copy of that version, with the metadata and headers of `source`.

        The caller follows with `named` or `abandon` before the next await. Raises StoreError: then nothing is left.
        """
        key = keys.temporary_key(self.changes.inodes.prefix)
        target = Target(key, {**(source.metadata or {}), TOKEN: token}, source.headers or {}, ANY)
        # What ends the process, or this task, leaves the row to the next one.
        self.changes.temporaries[key] = token
        self.changes.journal.put_temporary(OF_NO_FILE, key, token)
        try:
            etag = await self._copies.copy(source, target)
        except Exception:
            self.abandon(key)
            raise
        return ObjectInfo(key, source.size_bytes, etag, 0, source.metadata, source.headers)

    def named(self, key: str) -> None:
        """An inode's row names the object from now on: call it inside the transaction that records that."""
        self.changes.journal.drop_temporary(key)
        del self.changes.temporaries[key]

    def abandon(self, key: str) -> None:
        """Has what may be at the key deleted."""
        token = self.changes.temporaries[key]
        with self.changes.journal.transaction():
            self.changes.orphan(ObjectInfo(key, 0, "", 0, {TOKEN: token}, {}))
            self.named(key)
