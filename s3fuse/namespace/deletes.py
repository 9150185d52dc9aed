"""Deletes what was removed here from the bucket, and nothing else.

What somebody else has put under the name since then must stay. So an object is looked at just before it is deleted,
and the server is told which version may go. SeaweedFS looks at that while it holds the object (of many objects in one
request: just before each); MinIO does not look, and deletes what comes between our look and the delete. Where the
bucket keeps versions the log says which one was deleted, so that it can be had back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from s3fuse.errors import PreconditionFailed, StoreError
from s3fuse.namespace.changes import tokens
from s3fuse.namespace.displaced import ancestors
from s3fuse.namespace.doubts import carries, expected, look
from s3fuse.writing.upload import first_failure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.store.base import ObjectInfo, Store

log = logging.getLogger(__name__)

#: How long a directory waits for what is in it.
BEHIND_S = 0.02
#: The same while some of that may have to wait for seconds.
LATE_BEHIND_S = 0.25
#: From how many keys on a page of a listing is cheaper than a HEAD for each.
LISTED_KEYS = 10


class Behind(Exception):
    """Another inode has to be brought to the bucket first."""

    def __init__(self, other: Inode) -> None:
        super().__init__(f"waits for {other.name or other.number}" + (f": {other.error}" if other.error else ""))
        self.other = other


@dataclass
class DeleteCounts:
    """Objects of files that were deleted since the mount began, by how sure it is that they were ours."""

    conditional: int = 0  # the server looked at the version
    looked_before: int = 0  # only we did, just before
    left: int = 0  # not deleted: somebody else had changed them


class Deletes:
    """Deletes objects of unlinked inodes, many in one request."""

    def __init__(self, store: Store, inodes: Inodes, changes: Changes) -> None:
        self.store = store
        self.counts = DeleteCounts()
        self.inodes = inodes
        self.changes = changes

    async def run(self, batch: list[Inode]) -> list[tuple[Inode, Exception]]:
        """Deletes the objects of unlinked inodes; gives why some could not be. One that is open waits for its close."""
        with self.changes.journal.transaction():
            for inode in batch:
                self.changes.doubt(inode)
                if not inode.opens and inode.remote is None:
                    self.forget(inode)
        ready = {inode.remote.key: inode for inode in batch if inode.remote is not None and self.may_go(inode)}
        self._leave_what_may_come(ready)
        # What is in a directory goes before it: some servers keep a directory that was not empty when it was deleted.
        early = self.inodes.displaced.with_more_below(ready) | self._written_below(ready)
        behind: list[tuple[Inode, Exception]] = []
        for key in early:
            directory = ready.pop(key)
            blocker = self._failing_below(key)
            if blocker is None:
                self.changes.queue(directory, BEHIND_S if self.changes.late.is_over else LATE_BEHIND_S)
            else:
                behind.append((directory, Behind(blocker)))
        ours = await self._still_ours(ready)
        failed = await self._delete(ours)
        for key in [key for key, why in failed.items() if isinstance(why, PreconditionFailed)]:
            del failed[key], ours[key]
            self.changes.queue(ready.pop(key))  # somebody was faster: it is looked at again
        with self.changes.journal.transaction():
            for key, inode in ready.items():
                if key in failed:
                    continue
                if key in ours:
                    self.inodes.note_deleted(key)
                self.forget(inode)
        return behind + [(ready[key], OSError(5, str(why), key)) for key, why in failed.items() if key in ready]

    async def _delete(self, ours: Mapping[str, ObjectInfo | None]) -> dict[str, StoreError]:
        """Deletes what was seen at these keys, of markers whatever is there; gives what was not deleted, and why."""
        etags = {key: info.etag for key, info in ours.items() if info is not None}
        able, failed = self.store.capabilities, dict[str, StoreError]()
        if len(ours) == 1:
            (key,) = ours
            try:
                await self.store.delete(key, etag=etags.get(key, ""))
            except PreconditionFailed as error:
                failed[key] = error
        elif ours:
            failed.update(await self.store.delete_many(list(ours), etags=etags))
        checked = able.conditional_delete if len(ours) == 1 else able.conditional_delete_many
        for key, info in ours.items():
            if info is not None and key not in failed:
                self._count(key, info, checked=checked)
        return failed

    def _count(self, key: str, info: ObjectInfo, *, checked: bool) -> None:
        self.counts.conditional += checked
        self.counts.looked_before += not checked
        if info.version_id:
            log.info("deleted %s: version %s with etag %s, which the bucket keeps", key, info.version_id, info.etag)

    def _leave_what_may_come(self, ready: dict[str, Inode]) -> None:
        """Puts off deletes where what an earlier process wrote may still come: it would stay."""
        for key in () if self.changes.late.is_over else list(ready):
            late_s = self.changes.late.before_delete_s(key)
            if late_s:
                self.changes.queue(ready.pop(key), late_s)

    def _written_below(self, ready: Mapping[str, Inode]) -> set[str]:
        """Directories below which something is under way: nobody knows yet what that leaves there."""
        above = {at for key in self.inodes.claimed if key not in ready for at in ancestors(key)}
        return above.intersection(ready)

    def _failing_below(self, key: str) -> Inode | None:
        """What keeps a directory's key from being deleted for longer, if anything does."""
        if not self.changes.retries.any_failing():
            return None
        for below, inode in self.inodes.displaced.items():
            if below != key and below.startswith(key) and self.changes.retries.is_failing(inode.number):
                return inode
        return None

    def may_go(self, inode: Inode) -> bool:
        """Not while somebody reads it, nor while the next object under its name is on its way: that one replaces it."""
        heir = self.inodes.at(inode.remote.key) if inode.remote is not None else None
        return not inode.opens and (heir is None or heir.is_directory or not heir.dirty)

    async def _still_ours(self, ready: Mapping[str, Inode]) -> dict[str, ObjectInfo | None]:
        """What may go, children first: keys with the version that was removed here, and markers (None).

        What others put there stays.
        """
        files = {key: inode.remote for key, inode in ready.items() if inode.remote is not None and key[-1:] != "/"}
        by_folder: dict[str, list[str]] = {}
        for key in sorted(files):
            by_folder.setdefault(key[: key.rfind("/") + 1], []).append(key)
        there: dict[str, ObjectInfo] = {}
        try:
            async with trio.open_nursery() as nursery:
                for folder, keys in by_folder.items():
                    nursery.start_soon(self._look, folder, keys, files, there)
        except BaseExceptionGroup as group:
            raise first_failure(group) from None
        ours: dict[str, ObjectInfo | None] = {}
        for key, inode in ready.items():
            if key.endswith("/") and await self._is_marker(key, inode):
                ours[key] = None
        for key, info in there.items():
            remote = files[key]
            written = tokens(ready[key]) if remote.etag else expected(remote)
            if info.version == remote.version or carries(info, written):
                ours[key] = info
            elif self._is_of_another(ready[key], info):
                pass  # what was in doubt has not come there
            else:
                self.counts.left += 1
                log.warning("%s was changed by somebody else before it could be deleted; it stays", key)
        return dict(sorted(ours.items(), reverse=True))

    async def _is_marker(self, key: str, directory: Inode) -> bool:
        """Whether deleting the directory's marker takes nothing else: SeaweedFS deletes an empty file of its name."""
        may_be_gone = self.changes.retries.is_failing(directory.number) or not self.changes.late.is_over
        if not may_be_gone and self.inodes.at(key[:-1]) is None and key[:-1] not in self.inodes.displaced:
            return True
        return await look(self.store, key[:-1]) is None or await look(self.store, key) is not None

    def _is_of_another(self, inode: Inode, info: ObjectInfo) -> bool:
        """Whether the object is one that another inode of ours has in the bucket, there or on its way from there."""
        named = self.inodes.at(info.key)
        for other in (*self.inodes.displaced.all_at(info.key), *((named,) if named is not None else ())):
            if other is inode or other.remote is None:
                continue
            if other.remote.version == info.version or (
                not other.remote.etag and carries(info, expected(other.remote))
            ):
                return True
        return False

    async def _look(
        self, folder: str, keys: list[str], files: Mapping[str, ObjectInfo], there: dict[str, ObjectInfo]
    ) -> None:
        """Notes what is at the keys (sorted, of one folder): by listing while that tells of enough keys a page."""
        left = list(keys)
        while len(left) >= LISTED_KEYS:
            page = await self.store.list_page(folder, start_after=left[0][:-1])
            # Another etag may be of an operation of ours, which only the object's metadata tells.
            known = (info for info in page.objects if info.key in files)
            there.update((info.key, info) for info in known if info.version == files[info.key].version)
            # Each round decides some, whatever the page shows: keys far apart in a large folder are asked for singly.
            await self._look_singly(left[:LISTED_KEYS], there)
            left = [key for key in left[LISTED_KEYS:] if key not in there]
        await self._look_singly(left, there)

    async def _look_singly(self, keys: list[str], there: dict[str, ObjectInfo]) -> None:
        """All at once: the first one looked at waits for the last one, and others may write meanwhile."""

        async def note(key: str) -> None:
            info = await look(self.store, key)
            if info is not None:
                there[key] = info

        async with trio.open_nursery() as nursery:
            for key in keys:
                if key not in there:
                    nursery.start_soon(note, key)

    def forget(self, inode: Inode) -> None:
        """The unlinked inode's object is gone; call it inside a journal transaction."""
        self.inodes.keep(inode)
        if inode.remote is not None:
            self.inodes.displaced.settle(inode.remote.key, inode)
            inode.remote = None
        self.changes.synced(inode, inode.version)
        if inode.data is not None and not inode.opens:
            inode.data.discard()
        self.inodes.drop_if_unused(inode)
