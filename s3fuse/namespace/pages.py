"""Listings of directories, page by page, and what they make of the tree.

A listing that took longer than the TTL cannot be as fresh as the TTL asks for; it is good for a few times as long as it
took, else walking a large directory would be listing it for ever.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from s3fuse import waits
from s3fuse.errors import StoreError
from s3fuse.namespace.merge import Listed
from s3fuse.store.walk import Walk

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.namespace.merge import Merge
    from s3fuse.store.base import Store

log = logging.getLogger(__name__)

#: A listing that took longer than this and the TTL is good for so many times as long as it took.
SLOW_S = 1.0
WORTH = 5


class _Loading:
    """A listing under way. `error` is set before `done` where it failed; cut short it is `done` and not `complete`."""

    __slots__ = ("complete", "done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.complete = False
        self.error: StoreError | None = None


class Pages:
    """Lists directories. All methods raise StoreError where the store cannot be asked."""

    def __init__(self, inodes: Inodes, store: Store, merge: Merge) -> None:
        self.inodes = inodes
        self.store = store
        self._merge = merge
        self.hidden: dict[int, int] = {}  # number of a directory -> names that cannot be shown
        self.unreadable: dict[int, int] = {}  # number of a directory -> entries that the server lists with errors
        self._loaded: dict[int, _Loading] = {}

    async def tree(self, directory: Inode) -> int:
        """Makes every object below a directory known; gives how many keys there cannot be shown."""
        prefix = self.inodes.key(directory)
        token: str | None = None
        hidden = 0
        started = time.monotonic()
        walk = Walk()
        while True:
            with waits.interruptible():
                page = await self.store.list_page(prefix, delimiter="", token=token)
            for info in page.objects:
                hidden += not self._merge.below(directory, info.key[len(prefix) :], info, started)
            hidden += len(page.unreadable)
            token = walk.follow(page)
            if token is None:
                return hidden

    async def is_ghost(self, directory: Inode, key: str) -> bool:
        """Whether a prefix is none: MinIO shows an object that is being written or deleted as one for a moment.

        Only where a file is known, or was until lately, is there reason to ask.
        """
        child = directory.children.get(key[len(self.inodes.key(directory)) : -1])
        if (child is None or child.is_directory) and not self.inodes.was_file(key[:-1]):
            return False
        below = await self.store.list_page(key, limit=1)
        return below.is_empty

    async def list(self, directory: Inode, pages: int | None) -> bool:
        """Lists up to `pages` pages (None: all) into `children`; a second caller waits for the first one's listing.

        False where the listing was somebody else's.
        """
        while (other := self._loaded.get(directory.number)) is not None:
            await other.done.wait()
            if other.error is not None:
                raise other.error
            if other.complete:
                return False
        mine = self._loaded[directory.number] = _Loading()
        listing = directory.folder()
        listing.listed_by += 1
        try:
            await self._list_pages(directory, pages)
            mine.complete = True
        except StoreError as error:
            mine.error = error
            raise
        finally:
            listing.listed_by -= 1
            del self._loaded[directory.number]
            mine.done.set()
        return True

    async def _list_pages(self, directory: Inode, pages: int | None) -> None:
        listing = directory.folder()
        prefix = self.inodes.key(directory)
        started = time.monotonic()
        listed = Listed(started, started)
        seen: set[str] = set()
        bad: set[str] = set()  # what is known of them stays
        token: str | None = None
        hidden = count = unreadable = 0
        walk = Walk()
        while True:
            listed.asked = time.monotonic()
            page = await self.store.list_page(prefix, token=token)
            count += 1
            ghosts = [key for key in page.prefixes if await self.is_ghost(directory, key)]
            if ghosts:  # what is known of these names stays as it is
                page = replace(page, prefixes=tuple(key for key in page.prefixes if key not in ghosts))
                seen.update(key[len(prefix) : -1] for key in ghosts)
            shown = self._merge.page(directory, page, listed)
            seen.update(shown.files, shown.directories)
            bad.update(key[len(prefix) :] if key != prefix else "." for key in page.unreadable)
            hidden += shown.hidden
            unreadable += len(page.unreadable)
            token = walk.follow(page)
            if token is None or count == pages:
                break
        listing.probes = 0
        listing.unreadable = bad | (listing.unreadable - seen if token is not None else set())
        seen |= bad
        if token is not None:
            listing.pages = max(listing.pages, count) * 4
            return
        now = time.monotonic()
        ttl_s = self._merge.ttl_s
        slow = now - started > max(ttl_s, SLOW_S)
        valid_until = now + (WORTH * (now - started) if slow else ttl_s)
        for name, child in list(directory.children.items()):
            if name not in seen and self._merge.believable(child, started):
                self._merge.vanish(child, started)
            elif slow and name in seen and not child.dirty:
                child.valid_until = max(child.valid_until, valid_until)
        listing.pages = count
        listing.complete = True
        listing.asked_at = started
        listing.valid_until = valid_until
        listing.absent = {name: asked for name, asked in listing.absent.items() if asked > started}
        text = "%d keys below %r cannot be shown as files (see README, odd keys)"
        self._note(self.hidden, directory, hidden, text)
        text = "%d entries below %r are left out: the server lists them with errors"
        self._note(self.unreadable, directory, unreadable, text)

    def _note(self, counts: dict[int, int], directory: Inode, count: int, text: str) -> None:
        before = counts.pop(directory.number, 0)
        if count:
            counts[directory.number] = count
            if count != before:
                log.warning(text, count, self.inodes.key(directory))

    def forget_gone(self) -> None:
        """Forgets what was counted in directories that are gone; call it every second."""
        for counts in (self.hidden, self.unreadable):
            for number in [number for number in counts if number not in self.inodes.table]:
                del counts[number]
