"""Fixtures of the tests on real mounts."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import Bucket, Gate, Mounts, s3_client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.servers import Server

_MARGIN_S = 15.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/fuse" in str(item.path) and not os.path.exists("/dev/fuse"):
            item.add_marker(pytest.mark.skip(reason="no /dev/fuse"))


@pytest.fixture(scope="session", params=["minio", "seaweedfs"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each of the servers in turn."""
    found: Server = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture(scope="session")
def buckets() -> Iterator[Callable[[Server, str | None], Bucket]]:
    """Makes a bucket (or finds the one named) and gives it as the S3 API shows it."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        clients = {}

        def make(server: Server, name: str | None = None) -> Bucket:
            if server.endpoint not in clients:
                clients[server.endpoint] = stack.enter_context(s3_client(server))
            client = clients[server.endpoint]
            if name is None:
                name = f"test-{secrets.token_hex(6)}"
                client.make_bucket(name)
            return Bucket(server, name, client)

        yield make


@pytest.fixture
def mounts(request: pytest.FixtureRequest, tmp_path: Path, buckets: Callable[..., Bucket]) -> Iterator[Mounts]:
    """Mounts that end with the test, each on a bucket of its own."""
    mounts = Mounts(tmp_path, lambda server: buckets(server).name)
    marker = request.node.get_closest_marker("timeout")
    limit_s = float(marker.args[0]) if marker else float(request.config.getini("timeout") or 120)
    with mounts.watch(limit_s - _MARGIN_S):
        try:
            yield mounts
        finally:
            mounts.end()


@pytest.fixture
def gate(server: Server) -> Iterator[Gate]:
    """A way to the server on which changes can be held back."""
    gate = Gate(server)
    yield gate
    gate.close()
