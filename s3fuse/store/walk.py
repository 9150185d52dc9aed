"""Listings of more than one page, of which a server could make one that never ends; pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s3fuse.errors import BadResponse

if TYPE_CHECKING:
    from s3fuse.store.base import Page


class Walk:
    """The pages of one listing, one after the other: each must bring something that those before it did not."""

    #: So many pages may have no key: servers skip what is deleted.
    MAX_EMPTY = 1000

    def __init__(self) -> None:
        self._tokens: set[str] = set()
        self._ends: set[tuple[str, str]] = set()
        self._empty = 0

    def follow(self, page: Page) -> str | None:
        """The token of the page after this one; None after the last. Raises BadResponse where there is no progress."""
        token = page.next_token
        if token is None:
            return None
        keys = [entry.key for entry in page.objects[:1] + page.objects[-1:]] + [*page.prefixes[:1], *page.prefixes[-1:]]
        ends = (min(keys, default=""), max(keys, default=""))
        self._empty = 0 if keys else self._empty + 1
        if token in self._tokens or (keys and ends in self._ends) or self._empty > self.MAX_EMPTY:
            raise BadResponse("the listing has no end: its pages repeat themselves")
        self._tokens.add(token)
        self._ends.add(ends)
        return token


def check_readable(page: Page, prefix: str) -> None:
    """For whoever must know every object: raises BadResponse where the server says impossible things of one."""
    if page.unreadable:
        raise BadResponse(f"what the server lists of {page.unreadable[0] or 'a key'} below {prefix} cannot be read")
