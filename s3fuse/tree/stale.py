"""Names that the kernel may believe to lead to another inode than they do: it is told to look them up anew.

Without that a program that opens such a name within the attribute TTL gets the other file, and writes into it: after a
conflict that is the file which was kept aside. Telling the kernel may wait for a directory that a request is about, so
it is done in threads, which nobody waits for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

#: So many names may wait for their turn; the belief in more of them ends with the TTL.
MOST_WAITING: Final = 10_000
#: So many are told at once: one may wait for a request that takes long.
THREADS: Final = 8


class StaleNames:
    """Names, by the inode number of their directory, that the kernel is still to be told of."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, bytes], None] = {}
        self._some = trio.Event()

    def add(self, directory: int, name: str) -> None:
        """The name leads to another inode from now on, or to none."""
        if len(self._waiting) < MOST_WAITING:
            self._waiting[directory, name.encode()] = None
            self._some.set()

    async def run(self, telling: Callable[[int, bytes], Callable[[], None]]) -> None:
        """Calls what `telling` gives for each, in threads, until cancelled. That must not raise."""
        limit = trio.CapacityLimiter(THREADS)
        async with trio.open_nursery() as nursery:
            while True:
                await self._some.wait()
                self._some = trio.Event()
                while self._waiting:
                    entry = next(iter(self._waiting))
                    await limit.acquire_on_behalf_of(entry)
                    del self._waiting[entry]
                    nursery.start_soon(self._tell, telling, entry, limit)

    @staticmethod
    async def _tell(
        telling: Callable[[int, bytes], Callable[[], None]], entry: tuple[int, bytes], limit: trio.CapacityLimiter
    ) -> None:
        try:
            await trio.lowlevel.checkpoint_if_cancelled()  # nothing is begun for a connection that has ended
            # A limiter that nobody waits for: what was begun is always called.
            await trio.to_thread.run_sync(telling(*entry), abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        finally:
            limit.release_on_behalf_of(entry)
