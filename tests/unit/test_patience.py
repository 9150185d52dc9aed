"""How long reads wait for a server that sends nothing."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trio.testing
from minio.credentials.providers import StaticProvider

from s3fuse.errors import Unavailable
from s3fuse.store.health import JUST_S
from s3fuse.store.s3client import Call, S3Client

if TYPE_CHECKING:
    from s3fuse.store.transport import Transport

DEADLINE_S = 30.0


async def _silent(*_: Any, stall_s: float, limit_s: float, **__: Any) -> Any:
    await trio.sleep(min(stall_s, limit_s))
    raise Unavailable("nothing came")


@pytest.fixture
def client() -> S3Client:
    transport = SimpleNamespace(scheme="http", host="h", endpoint="http://h", request=_silent)
    keys = StaticProvider("access", "secret")
    return S3Client(cast("Transport", transport), "bucket", "us-east-1", keys, Counter(), DEADLINE_S)


async def _waited_s(client: S3Client) -> float:
    started = trio.current_time()
    with pytest.raises(Unavailable):
        await client.send(Call("get", "GET", "key"))
    return trio.current_time() - started


async def test_a_read_that_follows_a_failure_at_once_does_not_wait_as_long_again(
    client: S3Client, autojump_clock: trio.testing.MockClock
) -> None:
    first_s = await _waited_s(client)
    assert DEADLINE_S <= first_s <= DEADLINE_S + 5
    assert await _waited_s(client) <= 5
    assert await _waited_s(client) <= 5
    await trio.sleep(JUST_S)
    assert await _waited_s(client) >= DEADLINE_S, "a slow server is never waited for again"
