"""How stores read a `Body`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from s3fuse.store.base import Body, Buffer


@asynccontextmanager
async def iterating(body: Body) -> AsyncIterator[AsyncIterator[Buffer]]:
    """The chunks of a body; a generator that is left early is closed here, not by the garbage collector."""
    chunks = body.chunks()
    try:
        yield chunks
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
