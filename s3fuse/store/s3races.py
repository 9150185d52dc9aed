"""Whether a condition also holds when writes race: of all that are based on one version, one wins, always.

A server may look at the object, and write a moment later whatever has come there by then; asked once it refuses as one
does that is right. Of 300 races each, made to hit that moment (`tests/store/races.py`):

| | conditional PUT | multipart completion | copy over a version | copy of an object to itself |
|---|---|---|---|---|
| MinIO, release of February 2026 | 0 | 0 | undid 87 | undid 141 |
| SeaweedFS 4.48 | 0 | undid 43 of 200 | undid 2 | undid 3 |

MinIO's copy ignores conditions on the target. Deletes in the same races: SeaweedFS 0 of 300, of many at once 1.
"""

from __future__ import annotations

import random
import secrets
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import trio

from s3fuse.errors import PreconditionFailed, Refused, Unsupported
from s3fuse.store.base import Bytes, Condition

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from s3fuse.store.base import Store

    Attempt = Callable[[Condition], Awaitable[str]]

ROUNDS = 8
#: No round begins later than this after the first: a mount waits for them, and a container's start with it.
ROUNDS_S = 0.2
#: Conditional PUTs against which each of the others has to stand. With three SeaweedFS lets some wait for a second.
RIVALS = 2
#: Over how long these are spread: about what a request takes on a near server.
SPREAD_S = 0.004
_BODY_BYTES = 4096
#: What races at mount see too seldom to be relied on alone: measured once, per kind of server.
KNOWN_RACY = {"SeaweedFS": frozenset({"atomic_multipart", "atomic_copy"})}


def known_racy(server: str, what: str) -> bool:
    """Whether a server of this kind was seen to undo a write, however it looked this time."""
    return any(server.startswith(kind) and what in racy for kind, racy in KNOWN_RACY.items())


async def puts_are_exact(store: Store, key: str) -> bool:
    """Races conditional PUTs. Leaves an object at the key, as the others do."""
    return await _exact(store, key, lambda: _rival(store, key))


async def completions_are_exact(store: Store, key: str) -> bool:
    """Races the completion of a multipart upload against conditional PUTs."""

    async def prepare() -> Attempt:
        upload_id = await store.multipart_create(key, metadata={}, headers={})
        part = await store.multipart_put(key, upload_id, 1, _body())

        async def attempt(condition: Condition) -> str:
            try:
                return await store.multipart_complete(key, upload_id, [part], condition=condition)
            except BaseException:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                    await store.multipart_abort(key, upload_id)
                raise

        return attempt

    return await _exact(store, key, prepare)


async def copies_are_exact(store: Store, key: str, copy: Callable[[str, Condition], Awaitable[str]]) -> bool:
    """Races copies, of objects beside the key, against conditional PUTs; `copy` makes one, from the key it is given."""

    async def prepare() -> Attempt:
        source = f"{key}-source"
        await store.put(source, _body(), metadata={}, headers={})
        return partial(copy, source)

    return await _exact(store, key, prepare)


def _body() -> Bytes:
    return Bytes(secrets.token_bytes(_BODY_BYTES))


async def _rival(store: Store, key: str) -> Attempt:
    body = _body()

    async def attempt(condition: Condition) -> str:
        return await store.put(key, body, metadata={}, headers={}, condition=condition)

    return attempt


async def _exact(store: Store, key: str, prepare: Callable[[], Awaitable[Attempt]]) -> bool:
    etag = await store.put(key, _body(), metadata={}, headers={})
    end = trio.current_time() + ROUNDS_S
    for _ in range(ROUNDS):
        if trio.current_time() > end:
            break
        attempts = [await prepare(), *[await _rival(store, key) for _ in range(RIVALS)]]
        winners = await _race(attempts, Condition(etag=etag))
        if len(winners) > 1:
            return False
        etag = winners[0] if winners else (await store.head(key)).etag
    return True


async def _race(attempts: Sequence[Attempt], condition: Condition) -> list[str]:
    """The etags of those that succeeded."""
    winners: list[str] = []

    async def run(attempt: Attempt, delay_s: float) -> None:
        await trio.sleep(delay_s)
        with suppress(PreconditionFailed, Refused, Unsupported):
            winners.append(await attempt(condition))

    async with trio.open_nursery() as nursery:
        for index, attempt in enumerate(attempts):
            nursery.start_soon(run, attempt, random.uniform(0.0, SPREAD_S) if index else 0.0)
    return winners
