"""What is known of a server, from what became of requests to it."""

from __future__ import annotations

import trio
import trio.testing

from s3fuse.errors import AccessDenied
from s3fuse.store.health import FORGOTTEN_S, Health


async def test_a_refusal_that_nobody_has_met_again_is_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    """Keys were wrong for a moment, and no second request of that kind was made: status would say so for good."""
    health = Health()
    for _ in range(2):
        health.failed("list", AccessDenied("denied"), trio.current_time())
        health.answered("put")
        await trio.sleep(FORGOTTEN_S - 1)
        assert health.needs == "permission"
    await trio.sleep(2)
    assert health.needs == ""
