"""Multipart uploads of this mount: each is in the journal before it is begun, and until it is known to be ended.

What a crash or a failed request leaves in the bucket is aborted in the background, for as long as that takes. Where
the id is known that upload is ended. Where the server's answer never came, uploads of the key are listed that began
when ours did; the server may begin it late, after the client has died, so that this goes on for `LOOK_S`. Uploads of
this process are known by their ids and never touched, nor are others that began at another time.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import trio

from s3fuse.errors import StoreError
from s3fuse.store.s3client import acted
from s3fuse.writing.rows import BegunUpload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from s3fuse.store.base import Store, Upload
    from s3fuse.writing.journal import Journal

log = logging.getLogger(__name__)

#: How long after it was asked for an upload may begin: twice what a request may take.
LOOK_S = 60.0
#: How much earlier than asked for it may seem to begin: servers tell whole seconds.
SLACK_S = 2.0
RETRY_S = 2.0
#: A server copies parts as fast as its disks go: more at once take these, and our requests, from reads.
COPIES_AT_ONCE = 8
ABORT_S = 10.0


class Uploads:
    """Begins multipart uploads and ends those that were left. `left` are the rows still to be ended, by their id."""

    def __init__(self, store: Store, journal: Journal) -> None:
        self.store = store
        self.journal = journal
        self.left: dict[int, BegunUpload] = {row.id: row for row in journal.uploads()}
        self.running: dict[int, BegunUpload] = {}
        self.sent_bytes = 0  # of uploads that are under way
        self.copying = trio.CapacityLimiter(COPIES_AT_ONCE)  # parts that the server copies, of all uploads
        self._next = max(self.left, default=0) + 1
        self._ours: set[str] = set()  # ids of uploads that this process has begun
        self._beginning: Counter[str] = Counter()  # keys of uploads whose id has still to come
        self._wake = trio.Event()

    @property
    def known_ids(self) -> int:
        """How many ids of uploads, and keys of those whose id has still to come, are remembered for this process's."""
        return len(self._ours) + len(self._beginning)

    @asynccontextmanager
    async def begin(self, key: str, metadata: Mapping[str, str], headers: Mapping[str, str]) -> AsyncIterator[str]:
        """The id of a new upload, which the block completes. It is aborted where the block fails."""
        row = await self._begin(key, metadata, headers)
        assert row.upload_id is not None
        try:
            yield row.upload_id
        except BaseException:
            with trio.move_on_after(ABORT_S, shield=True):
                try:
                    await self.store.multipart_abort(key, row.upload_id)
                except StoreError as error:
                    log.info("unfinished upload of %s is still in the bucket: %s", key, error)
                else:
                    self._ended(row)
            if row.id in self.running:
                self._leave(row)
            raise
        self._ended(row)

    @contextmanager
    def sending(self) -> Iterator[Callable[[int], None]]:
        """Takes how many staged bytes of an upload have arrived; `sent_bytes` has them until the block ends."""
        total = 0

        def add(count: int) -> None:
            nonlocal total
            total += count
            self.sent_bytes += count

        try:
            yield add
        finally:
            self.sent_bytes -= total

    async def _begin(self, key: str, metadata: Mapping[str, str], headers: Mapping[str, str]) -> BegunUpload:
        row = BegunUpload(self._next, key, None, time.time_ns())
        self._next += 1
        self.running[row.id] = row
        self.journal.put_upload(row)
        self._beginning[key] += 1
        try:
            upload_id = await self.store.multipart_create(key, metadata=metadata, headers=headers)
        except BaseException as error:
            if isinstance(error, StoreError) and not acted(error):
                self._ended(row)
            else:
                self._leave(row)
            raise
        finally:
            self._beginning[key] -= 1
            if not self._beginning[key]:
                del self._beginning[key]
        self._ours.add(upload_id)
        row = self.running[row.id] = row._replace(upload_id=upload_id)
        self.journal.put_upload(row)
        return row

    def _ended(self, row: BegunUpload) -> None:
        self.running.pop(row.id, None)
        self.left.pop(row.id, None)
        if not self.left:  # nobody asks for those that have ended
            self._ours.intersection_update(found.upload_id for found in self.running.values())
        self.journal.drop_upload(row.id)

    def _leave(self, row: BegunUpload) -> None:
        del self.running[row.id]
        self.left[row.id] = row
        self._wake.set()

    async def run(self) -> None:
        """Ends what is left, until cancelled."""
        while True:
            for row in list(self.left.values()):
                try:
                    if await self._end(row):
                        self._ended(row)
                except (StoreError, OSError) as error:
                    log.debug("unfinished upload of %s cannot be ended yet: %s", row.key, error)
            self._wake = trio.Event()
            with trio.move_on_after(RETRY_S if self.left else float("inf")):
                await self._wake.wait()

    async def _end(self, row: BegunUpload) -> bool:
        """Aborts an upload; gives whether it is certain that nothing of it is left, or comes later."""
        if row.upload_id is not None:
            await self.store.multipart_abort(row.key, row.upload_id)
            log.info("aborted an unfinished upload of %s", row.key)
            return True
        is_last_look = time.time_ns() > row.begun_ns + LOOK_S * 1e9
        found = await self.store.list_uploads(row.key)
        if self._beginning[row.key]:  # one of those found may be ours, with an id that we do not know yet
            return False
        for upload in found:
            if self._is_left(upload, row):
                await self.store.multipart_abort(row.key, upload.upload_id)
                log.info("aborted an unfinished upload of %s", row.key)
        return is_last_look

    def _is_left(self, upload: Upload, row: BegunUpload) -> bool:
        after_s = (upload.initiated_ns - row.begun_ns) / 1e9
        return upload.key == row.key and upload.upload_id not in self._ours and -SLACK_S <= after_s <= LOOK_S
