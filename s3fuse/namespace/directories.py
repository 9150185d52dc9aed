"""What the bucket says about names: lookups, listings and their freshness, merged with what is not there yet.

An answer of the store is good for `ttl_s` from when it was asked for. Until then nothing is asked again; after it,
a name is asked for alone or with its whole directory, whichever has cost less so far: single names are asked until
they have cost as many requests as a listing would, then the directory is listed, first one page, then four times as
many each time it turns out to be larger.

Merging is atomic (no awaits) and keeps three rules. What is dirty here wins over what the bucket says. An answer
asked for before a change of ours arrived there is not believed about that name. A remotely changed object is a new
inode, because the kernel does not take a new size for one it knows and an open handle must keep its version.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from typing import TYPE_CHECKING

import trio

from s3fuse import attrs, keys
from s3fuse.errors import NotFound

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.store.base import ObjectInfo, Page, Store

log = logging.getLogger(__name__)

#: A directory of up to this many pages is listed again as a whole when its listing is no longer fresh.
SMALL_PAGES = 2


class Directories:
    """Finds and refreshes inodes. All methods raise StoreError where the store cannot be asked."""

    def __init__(self, inodes: Inodes, store: Store, defaults: attrs.Defaults, ttl_s: float) -> None:
        self.inodes = inodes
        self.store = store
        self.defaults = defaults
        self.ttl_s = ttl_s
        self.hidden: Counter[str] = Counter()  # directory key -> names that cannot be shown
        self._loaded: dict[int, trio.Event] = {}

    # -- what callers ask

    async def lookup(self, directory: Inode, name: str) -> Inode | None:
        """The child with this name as the bucket or the journal has it now, attributes known; None if there is none."""
        child = self._fresh(directory, name)
        if child is None:
            listing = directory.folder()
            now = time.monotonic()
            known_absent = listing.complete and now < listing.valid_until and name not in directory.children
            if known_absent or listing.absent.get(name, 0.0) > now:
                return None
            await self._find(directory, name)
            child = directory.children.get(name)
        if child is not None and not child.attributes_known:
            await self.learn(child)
            child = directory.children.get(name)
        return child

    def absent_for_s(self, directory: Inode, name: bytes) -> float:
        """How long the kernel may believe that there is no such name, after `lookup` said so."""
        listing = directory.folder()
        try:
            until = listing.absent.get(name.decode(), 0.0)
        except UnicodeDecodeError:
            return self.ttl_s
        if listing.complete:
            until = max(until, listing.valid_until)
        return max(0.0, min(self.ttl_s, until - time.monotonic()))

    async def refresh(self, inode: Inode) -> None:
        """Returns when the inode's attributes are fresh; a version that is gone leaves `inode.linked` False."""
        if inode.dirty or not inode.linked or (inode.attributes_known and time.monotonic() < inode.valid_until):
            return
        if inode.parent is None:
            await self.learn(inode)
        else:
            await self.lookup(inode.parent, inode.name)

    async def load(self, directory: Inode) -> None:
        """Returns when `children` holds every name, as fresh as the TTL demands."""
        listing = directory.folder()
        if listing.complete and time.monotonic() < listing.valid_until:
            return
        mine = await self._list(directory, pages=None)
        if not mine and not listing.complete:  # somebody else's listing was of a few pages only
            await self._list(directory, pages=None)

    async def learn_all(self, children: list[Inode]) -> None:
        """Fetches the attributes that a listing did not give, in parallel (the store limits how many at once)."""
        unknown = [child for child in children if not child.attributes_known]
        if len(unknown) == 1:
            await self.learn(unknown[0])
        elif unknown:
            async with trio.open_nursery() as nursery:
                for child in unknown:
                    nursery.start_soon(self.learn, child)

    async def learn(self, inode: Inode) -> None:
        """Fetches metadata by HEAD. A directory without a marker gets the defaults; a file that is gone is detached."""
        started = time.monotonic()
        key = self.inodes.object_key(inode)
        try:
            info = await self.store.head(key)
        except NotFound:
            if inode.is_directory:
                inode.attributes_known, inode.valid_until = True, started + self.ttl_s
            elif self._believable(inode, started):
                self._vanish(inode)
            return
        if inode.is_directory:
            self._merge_marker(inode, info, started)
        elif inode.parent is not None and inode.linked:
            self._merge_object(inode.parent, inode.name, info, started)

    async def tree(self, directory: Inode) -> int:
        """Makes every object below a directory known; gives how many keys there cannot be shown."""
        prefix = self.inodes.key(directory)
        token: str | None = None
        hidden = 0
        while True:
            started = time.monotonic()
            page = await self.store.list_page(prefix, delimiter="", token=token)
            for info in page.objects:
                hidden += not self._merge_below(directory, info.key[len(prefix) :], info, started)
            token = page.next_token
            if token is None:
                return hidden

    # -- asking the store

    def _fresh(self, directory: Inode, name: str) -> Inode | None:
        child = directory.children.get(name)
        if child is not None and (child.dirty or time.monotonic() < child.valid_until):
            return child
        return None

    async def _find(self, directory: Inode, name: str) -> None:
        listing = directory.folder()
        known = directory.children.get(name)
        if listing.complete and listing.pages <= SMALL_PAGES:
            await self._list(directory, pages=None)
        elif listing.probes >= listing.pages:
            await self._list(directory, pages=listing.pages)
            if not listing.complete and name not in listing.absent and self._fresh(directory, name) is None:
                await self._probe(directory, name)
        elif known is not None and not known.is_directory:
            listing.probes += 1
            known.attributes_known = False
        else:
            await self._probe(directory, name)

    async def _probe(self, directory: Inode, name: str) -> None:
        """Asks for one name: one listing of what begins with it, a second only where that does not tell."""
        directory.folder().probes += 1
        started = time.monotonic()
        key = keys.join(self.inodes.key(directory), name)
        page = await self.store.list_page(key, limit=8)
        is_prefix = key + "/" in page.prefixes
        if not is_prefix and page.next_token is not None and self._last(page) < key + "/":
            below = await self.store.list_page(key + "/", limit=1)
            is_prefix = bool(below.objects or below.prefixes)
        info = next((info for info in page.objects if info.key == key), None)
        if is_prefix:
            self._merge_prefix(directory, name, started)
        elif info is not None:
            self._merge_object(directory, name, info, started)
        else:
            self._merge_absent(directory, name, started)

    @staticmethod
    def _last(page: Page) -> str:
        return max([info.key for info in page.objects[-1:]] + list(page.prefixes[-1:]), default="")

    async def _list(self, directory: Inode, pages: int | None) -> bool:
        """Lists up to `pages` pages (None: all) into `children`; a second caller waits for the first one's listing.

        False where the listing was somebody else's.
        """
        loading = self._loaded.get(directory.number)
        if loading is not None:
            await loading.wait()
            return False
        done = self._loaded[directory.number] = trio.Event()
        try:
            await self._list_pages(directory, pages)
        finally:
            del self._loaded[directory.number]
            done.set()
        return True

    async def _list_pages(self, directory: Inode, pages: int | None) -> None:
        listing = directory.folder()
        prefix = self.inodes.key(directory)
        started = time.monotonic()
        seen: set[str] = set()
        token: str | None = None
        hidden = count = 0
        while True:
            asked = time.monotonic()
            page = await self.store.list_page(prefix, token=token)
            count += 1
            hidden += self._merge_page(directory, prefix, page, asked, seen)
            token = page.next_token
            if token is None or count == pages:
                break
        listing.probes = 0
        if token is not None:
            listing.pages = max(listing.pages, count) * 4
            return
        for name, child in list(directory.children.items()):
            if name not in seen and self._believable(child, started):
                self._vanish(child)
        listing.pages = count
        listing.complete = True
        listing.valid_until = time.monotonic() + self.ttl_s
        listing.absent.clear()
        self._note_hidden(prefix, hidden)

    def _note_hidden(self, prefix: str, hidden: int) -> None:
        if hidden and hidden != self.hidden[prefix]:
            log.warning("%d keys below %r cannot be shown as files (see README, odd keys)", hidden, prefix)
        self.hidden[prefix] = hidden

    # -- merging answers; atomic

    def _merge_page(self, directory: Inode, prefix: str, page: Page, started: float, seen: set[str]) -> int:
        shown = keys.shown(page, prefix)
        if shown.marker is not None:
            self._merge_marker(directory, shown.marker, started)
        reserved = keys.RESERVED if directory.parent is None else None
        for name, info in shown.files.items():
            if name != reserved:
                seen.add(name)
                self._merge_object(directory, name, info, started)
        for name in shown.directories:
            if name != reserved:
                seen.add(name)
                self._merge_prefix(directory, name, started)
        return shown.hidden

    def _believable(self, inode: Inode, started: float) -> bool:
        """Whether an answer asked for at `started` can be newer than what we did to this inode."""
        return not inode.dirty and inode.synced_at <= started

    def _hidden_by_us(self, key: str, started: float) -> bool:
        """Whether the object at `key` is one that we have moved away or deleted, or are about to."""
        return key in self.inodes.displaced or self.inodes.deleted_at.get(key, -1.0) >= started

    def _merge_object(self, directory: Inode, name: str, info: ObjectInfo, started: float) -> None:
        child = directory.children.get(name)
        if child is not None and not self._believable(child, started):
            return
        if child is None and self._hidden_by_us(info.key, started):
            return
        if child is not None:
            remote = child.remote
            if not child.is_directory and remote is not None and (remote.etag == info.etag or child.writers):
                self._update(child, info, started)
                return
            self._vanish(child)
        attributes = attrs.decode(
            info.metadata, is_directory=False, modified_ns=info.modified_ns, defaults=self.defaults
        )
        inode = self.inodes.add(directory, name, attributes)
        inode.attributes_known = info.metadata is not None
        inode.remote, inode.size = info, self._size(inode, info)
        inode.valid_until = started + self.ttl_s

    def _update(self, child: Inode, info: ObjectInfo, started: float) -> None:
        """The same version, perhaps with other metadata: attributes change in place."""
        remote = child.remote
        assert remote is not None
        child.valid_until = started + self.ttl_s
        if remote.etag != info.etag:  # open for writing here: its upload will meet the other version
            return
        same = remote.modified_ns in (0, info.modified_ns)
        if info.metadata is None and same and child.attributes_known:
            child.remote = dataclasses.replace(remote, modified_ns=info.modified_ns)
            return
        child.attributes_known = info.metadata is not None
        if info.metadata is not None:
            child.set_attributes(
                attrs.decode(info.metadata, is_directory=False, modified_ns=info.modified_ns, defaults=self.defaults)
            )
        child.remote = info
        child.size = self._size(child, info)

    @staticmethod
    def _size(inode: Inode, info: ObjectInfo) -> int:
        if inode.is_regular:
            return info.size_bytes
        return len(inode.target) if inode.target is not None else info.size_bytes

    def _merge_prefix(self, directory: Inode, name: str, started: float) -> None:
        child = directory.children.get(name)
        if child is None:
            key = keys.join(self.inodes.key(directory), name) + "/"
            if self.inodes.is_leaving(key, started):
                return
        elif child.is_directory:
            if self._believable(child, started) and time.monotonic() >= child.valid_until:
                child.attributes_known = False  # its marker is asked for when somebody wants the attributes
                child.valid_until = started + self.ttl_s
            return
        elif not self._believable(child, started):
            return
        else:
            self._vanish(child)  # a directory shadows a file of the same name
        self._add_directory(directory, name, started)

    def _add_directory(self, directory: Inode, name: str, started: float) -> Inode:
        attributes = attrs.decode(None, is_directory=True, modified_ns=time.time_ns(), defaults=self.defaults)
        inode = self.inodes.add(directory, name, attributes)
        inode.attributes_known = False
        inode.valid_until = started + self.ttl_s
        return inode

    def _merge_marker(self, inode: Inode, info: ObjectInfo, started: float) -> None:
        if not self._believable(inode, started):
            return
        inode.remote = info
        inode.valid_until = started + self.ttl_s
        inode.attributes_known = info.metadata is not None
        if info.metadata is not None:
            inode.set_attributes(
                attrs.decode(info.metadata, is_directory=True, modified_ns=info.modified_ns, defaults=self.defaults)
            )
            inode.mtime_ns = max(inode.mtime_ns, inode.entries_changed_ns)
            inode.ctime_ns = max(inode.ctime_ns, inode.entries_changed_ns)

    def _merge_absent(self, directory: Inode, name: str, started: float) -> None:
        child = directory.children.get(name)
        if child is not None and self._believable(child, started):
            self._vanish(child)
        absent = directory.folder().absent
        if len(absent) > 10_000:
            absent.clear()
        absent[name] = started + self.ttl_s

    def _vanish(self, inode: Inode) -> None:
        """The bucket no longer has this version under this name. What is dirty below a directory keeps it alive."""
        for child in list(inode.children.values()):
            if not child.dirty:
                self._vanish(child)
        if inode.children or inode.writers:
            inode.valid_until = time.monotonic() + self.ttl_s
            return
        self.inodes.detach(inode)

    def _merge_below(self, directory: Inode, path: str, info: ObjectInfo, started: float) -> bool:
        """One key of a recursive listing; False where no path can be made of it."""
        if not path:
            return True
        *folders, name = path.split("/")
        try:
            for step in [*folders, name] if name else folders:
                keys.check_name(step.encode())
        except OSError:
            return False
        for folder in folders:
            child = directory.children.get(folder)
            if child is None:
                child = self._add_directory(directory, folder, started)
            elif not child.is_directory:
                return False
            directory = child
        if name:
            self._merge_object(directory, name, info, started)
        else:
            self._merge_marker(directory, info, started)
        return True
