"""Where answers are parsed: small ones at once, large ones in a thread, so that others are served meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")

#: A thread costs 0.1 ms, and others get the interpreter within its switch interval of 5 ms: what is parsed in less
#: (350 entries, 200 with metadata) is better parsed at once. A page of 1,000 with metadata takes 21 ms.
_INLINE_BYTES = 128 << 10
#: Threads share one interpreter, and each holds a document in memory.
_THREADS = trio.CapacityLimiter(2)


async def parsed(body: bytes, parse: Callable[[bytes], Result]) -> Result:
    """What `parse` makes of a body; it must be pure."""
    if len(body) <= _INLINE_BYTES:
        return parse(body)
    return await trio.to_thread.run_sync(parse, body, abandon_on_cancel=True, limiter=_THREADS)
