"""What the bucket says about names: lookups, listings and their freshness, merged with what is not there yet.

An answer of the store is good for `ttl_s` from when it was asked for. Until then nothing is asked again; after it,
a name is asked for alone or with its whole directory, whichever has cost less so far: single names are asked until
they have cost as many requests as a listing would, then the directory is listed, first one page, then four times as
many each time it turns out to be larger (`pages`). `merge` turns the answers into inodes.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

import trio

from s3fuse import keys, waits
from s3fuse.errors import BadResponse, NeedsCredentials, NotFound, StoreError, Unavailable
from s3fuse.namespace.inodes import Inode, Listing
from s3fuse.namespace.merge import Merge
from s3fuse.namespace.pages import Pages
from s3fuse.writing.upload import first_failure

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from s3fuse import attrs
    from s3fuse.namespace.inodes import Inodes
    from s3fuse.store.base import Store

log = logging.getLogger(__name__)

#: A directory of up to this many pages is listed again as a whole when its listing is no longer fresh.
SMALL_PAGES = 2
#: How long a question about an inode that is known may take, and how long what was known is good without an answer.
PATIENCE_S = 5.0
#: The root is always there, and df looks at it before it asks for free space.
ROOT_PATIENCE_S = 0.5
GRACE_S = 5.0
SWEEP_S = 1.0


class Directories:
    """Finds and refreshes inodes. All methods raise StoreError where the store cannot be asked."""

    def __init__(
        self, inodes: Inodes, store: Store, defaults: attrs.Defaults, ttl_s: float, *, lists_metadata: bool
    ) -> None:
        self.inodes = inodes
        self.store = store
        self.lists_metadata = lists_metadata
        self._merge = Merge(inodes, defaults, ttl_s)
        self._pages = Pages(inodes, store, self._merge)
        self.defaults = defaults
        self.ttl_s = ttl_s
        self.hidden, self.unreadable = self._pages.hidden, self._pages.unreadable
        self._away_until = 0.0  # the server did not answer: until then it is not asked about what is known
        self._believed: dict[Inode | Listing, bool] = {}  # what is used without an answer, and whether it was outdated
        store.health.on_recovery(self._ask_again)

    # -- what callers ask

    async def lookup(self, directory: Inode, name: str) -> Inode | None:
        """The child with this name as the bucket or the journal has it now, attributes known; None if there is none."""
        child = self._fresh(directory, name)
        if child is None:
            listing = directory.folder()
            now = time.monotonic()
            known_absent = listing.names_all and now < listing.valid_until and name not in directory.children
            if not known_absent and listing.absent.get(name, float("-inf")) + self.ttl_s <= now:
                await self._ask(directory.children.get(name) or listing, partial(self._find, directory, name))
            child = directory.children.get(name)
            if child is None and name in listing.unreadable:  # not absent: nothing may be made in its place
                key = self.inodes.key(directory) + name
                raise BadResponse(f"what the server lists of {key} cannot be read", key)
        if child is not None and (child.outdated or not child.attributes_known):
            with self.inodes.unused.hold(child):
                await self._ask(child, partial(self.learn, child))
            child = directory.children.get(name)
        return child

    async def _ask(
        self, known: Inode | Listing | None, question: Callable[[], Awaitable[None]], patience_s: float = PATIENCE_S
    ) -> None:
        """Asks the bucket about an inode, or about a name that the last listing of its directory did not have.

        While the server is away, or takes our keys no longer, what was known stays good, so that cached data is served
        and files are made. Where it answers others, an inode that is known stays so, but that a name is not there is no
        longer said: somebody may have made it since.
        """
        if known is None or not (known.complete if isinstance(known, Listing) else known.attributes_known):
            with waits.interruptible():
                await question()
            return
        if time.monotonic() >= self._away_until and await self._is_answered(known, question, patience_s):
            return
        self._believe(known)

    async def _is_answered(
        self, known: Inode | Listing, question: Callable[[], Awaitable[None]], patience_s: float
    ) -> bool:
        """Whether the question was answered; False where what is known has to do."""
        health = self.store.health
        began = trio.current_time()
        try:
            with waits.interruptible(), trio.fail_after(patience_s):
                await question()
            return True
        except trio.TooSlowError:
            failure: StoreError = Unavailable("the server does not answer")
            if health.answered_at > began and isinstance(known, Listing):
                with waits.interruptible():
                    await question()  # only this request is stuck
                return True
            if patience_s >= PATIENCE_S:
                health.failed("list", failure, began)
        except StoreError as error:
            failure = error
        others_answered = health.answered_at > began
        away = failure.transient or isinstance(failure, NeedsCredentials)
        if not away or (others_answered and isinstance(known, Listing)):
            raise failure
        log.info("what is known may be out of date: %s", failure)
        if not others_answered:
            self._away_until = time.monotonic() + GRACE_S
        return False

    def _believe(self, known: Inode | Listing) -> None:
        known.valid_until = time.monotonic() + GRACE_S
        if len(self._believed) > 10_000:
            self._believed.clear()  # their time of grace ends by itself
        if isinstance(known, Listing):
            self._believed[known] = False
        else:
            self._believed[known] = known.outdated or self._believed.get(known, False)
            known.outdated = False

    def _ask_again(self) -> None:
        """The server is back: nothing is believed any longer without asking."""
        self._away_until = 0.0
        for known, outdated in self._believed.items():
            known.valid_until = 0.0
            if isinstance(known, Inode):
                known.outdated = known.outdated or outdated
        self._believed.clear()

    def absent_for_s(self, directory: Inode, name: bytes) -> float:
        """How long the kernel may believe that there is no such name, after `lookup` said so."""
        listing = directory.folder()
        try:
            until = listing.absent.get(name.decode(), float("-inf")) + self.ttl_s
        except UnicodeDecodeError:
            return self.ttl_s
        if listing.complete:
            until = max(until, listing.valid_until)
        return max(0.0, min(self.ttl_s, until - time.monotonic()))

    async def refresh(self, inode: Inode) -> None:
        """Returns when the inode's attributes are fresh; a version that is gone leaves `inode.linked` False."""
        known = inode.attributes_known and not inode.outdated
        if inode.dirty or not inode.linked or (known and time.monotonic() < inode.valid_until):
            return
        if inode.parent is None:
            await self._ask(inode, partial(self.learn, inode), ROOT_PATIENCE_S)
        else:
            await self.lookup(inode.parent, inode.name)

    async def load(self, directory: Inode) -> None:
        """Returns when `children` holds every name, as fresh as the TTL demands."""
        listing = directory.folder()
        if not (listing.complete and time.monotonic() < listing.valid_until):
            await self._ask(listing, partial(self._load, directory))

    async def _load(self, directory: Inode) -> None:
        while not await self._pages.list(directory, pages=None) and not directory.folder().complete:
            pass  # somebody else's listing was of a few pages only

    def unseen(self, directory: Inode) -> int:
        """How many keys the last listing of a directory had that `children` does not show."""
        return self.hidden.get(directory.number, 0) + self.unreadable.get(directory.number, 0)

    async def learn_all(self, children: list[Inode], *, leave_bad: bool = False) -> None:
        """Fetches the attributes that a listing did not give, in parallel (the store limits how many at once).

        With `leave_bad` those stay unknown of which the answer cannot be read.
        """

        async def learn(child: Inode) -> None:
            try:
                await self.learn(child)
            except BadResponse as error:
                if not leave_bad:
                    raise
                log.info("attributes are unknown: %s", error)

        unknown = [child for child in children if child.outdated or not child.attributes_known]
        if len(unknown) == 1:
            with waits.interruptible():
                await learn(unknown[0])
        elif unknown:
            try:
                with waits.interruptible():
                    async with trio.open_nursery() as nursery:
                        for child in unknown:
                            nursery.start_soon(learn, child)
            except BaseExceptionGroup as group:
                raise first_failure(group) from None

    async def learn(self, inode: Inode) -> None:
        """Fetches metadata. A directory without a marker gets the defaults; what is gone is detached."""
        if self.lists_metadata and inode.is_directory and inode.parent is not None:
            await self._learn_directory(inode)
        else:
            await self._learn_by_head(inode)

    async def _learn_directory(self, inode: Inode) -> None:
        """By a listing, which tells a directory without a marker from nothing at all.

        MinIO may show a deleted object as a prefix for ever, where a race or a crash left its folder on the disk.
        """
        started = time.monotonic()
        key = self.inodes.object_key(inode)
        page = await self.store.list_page(key, limit=1)
        marker = next((info for info in page.objects if info.key == key), None)
        if marker is not None:
            self._merge.marker(inode, marker, started)
            return
        is_there = not page.is_empty or bool(inode.children) or not self._merge.believable(inode, started)
        if is_there or not self._merge.vanish(inode, started):
            self._merge.has_no_marker(inode, started)

    async def _learn_by_head(self, inode: Inode) -> None:
        started = time.monotonic()
        key = self.inodes.object_key(inode)
        try:
            info = await self.store.head(key)
        except NotFound:
            if inode.is_directory:
                self._merge.has_no_marker(inode, started)
            elif inode.parent is not None and inode.linked:
                self._merge.absent(inode.parent, inode.name, started)
            return
        if inode.is_directory:
            self._merge.marker(inode, info, started)
        elif inode.parent is not None and inode.linked:
            self._merge.object(inode.parent, inode.name, info, started)

    async def tree(self, directory: Inode) -> int:
        """Makes every object below a directory known; gives how many keys there cannot be shown."""
        return await self._pages.tree(directory)

    async def sweep(self) -> None:
        """Frees inodes that nothing refers to, until cancelled; while the server is away all that is known is kept."""
        while True:
            await trio.sleep(SWEEP_S)
            if self.store.health.up:
                self.free_unused()

    def free_unused(self) -> None:
        """One step of `sweep`."""
        self.inodes.sweep()
        self._pages.forget_gone()

    # -- asking the store

    def _fresh(self, directory: Inode, name: str) -> Inode | None:
        child = directory.children.get(name)
        if child is not None and (child.dirty or time.monotonic() < child.valid_until):
            return child
        return None

    async def _find(self, directory: Inode, name: str) -> None:
        listing = directory.folder()
        known = directory.children.get(name)
        whole = listing.complete and listing.pages <= SMALL_PAGES
        if whole or listing.probes >= listing.pages:
            began = time.monotonic()
            await self._pages.list(directory, pages=None if whole else listing.pages)
            # It may have been of other pages, or what it showed was freed before this task ran again.
            is_told = listing.names_all or listing.absent.get(name, float("-inf")) >= began
            if not is_told and self._fresh(directory, name) is None:
                await self._probe(directory, name)
        elif known is not None and not known.is_directory:
            listing.probes += 1
            known.outdated = True
        else:
            await self._probe(directory, name)

    async def _probe(self, directory: Inode, name: str) -> None:
        """Asks for one name: one listing of what begins with it, a second only where that does not tell."""
        directory.folder().probes += 1
        started = time.monotonic()
        key = keys.join(self.inodes.key(directory), name)
        page = await self.store.list_page(key, limit=8)
        is_prefix = key + "/" in page.prefixes
        if not is_prefix and page.may_go_on_before(key + "/"):
            below = await self.store.list_page(key + "/", limit=1)
            is_prefix = not below.is_empty
        if is_prefix and await self._pages.is_ghost(directory, key + "/"):
            if name in directory.children:
                return
            is_prefix = False
        info = next((info for info in page.objects if info.key == key), None)
        if is_prefix and not self._merge.is_leaving(key + "/", started):
            self._merge.prefix(directory, name, started)
        elif info is not None:
            self._merge.object(directory, name, info, started)
        elif not {key, ""}.isdisjoint(page.unreadable):
            directory.folder().unreadable.add(name)
            return
        else:
            self._merge.absent(directory, name, started)
        directory.folder().unreadable.discard(name)
