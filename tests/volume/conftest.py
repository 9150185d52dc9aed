"""Fixtures of the tests of the volume plugin: real plugins, real mounts, containers played by mount namespaces."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from s3fuse import kernel
from tests.fuse.conftest import buckets, server
from tests.fuse.harness import Gate
from tests.proxy import Proxy, proxied
from tests.volume.harness import Plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fuse.harness import Bucket
    from tests.servers import Server

__all__ = ["bucket", "buckets", "gate_to", "plugins", "proxy", "server"]

_MARGIN_S = 15.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    able = os.path.exists("/dev/fuse") and os.geteuid() == 0
    for item in items:
        if "tests/volume" in str(item.path) and not able:
            item.add_marker(pytest.mark.skip(reason="the plugin wants root and /dev/fuse"))


@pytest.fixture
def plugins(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Plugin]]:
    """Starts plugins, each a node of its own; all end with the test, and nothing of them stays.

    Their directories are on shared mounts, as everything is where systemd runs.
    """
    made: list[Plugin] = []

    def start(server: Server, *options: str, start: bool = True) -> Plugin:
        folder = tmp_path / f"node{len(made)}"
        folder.mkdir()
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "--make-shared", folder], check=True)
        plugin = Plugin(folder, server, options)
        made.append(plugin)
        return plugin.start() if start else plugin

    marker = request.node.get_closest_marker("timeout")
    limit_s = float(marker.args[0]) if marker else float(request.config.getini("timeout") or 120)
    timer = threading.Timer(limit_s - _MARGIN_S, lambda: [plugin.abort() for plugin in made])
    timer.daemon = True
    timer.start()
    try:
        yield start
        for plugin in made:
            plugin.end()
    finally:
        timer.cancel()
        for plugin in made:
            plugin.kill()
            kernel.unmount(plugin.folder, lazy=True)


@pytest.fixture
def gate_to() -> Iterator[Callable[[Server], Gate]]:
    """Makes ways to servers on which changes can be held back."""
    with ExitStack() as stack:

        def make(server: Server) -> Gate:
            gate = Gate(server)
            stack.callback(gate.close)
            return gate

        yield make


@pytest.fixture
def proxy(minio_server: Server) -> Iterator[Proxy]:
    """A way to MinIO that can be down."""
    with proxied(minio_server) as proxy:
        yield proxy


@pytest.fixture
def bucket(minio_server: Server, buckets: Callable[..., Bucket]) -> Bucket:
    """A new bucket on MinIO."""
    return buckets(minio_server)
