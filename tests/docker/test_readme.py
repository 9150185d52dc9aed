"""The README's page "Swarm in five minutes" is run as it stands, on two nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.docker.documents import ROOT, blocks
from tests.docker.node import wait_until
from tests.docker.plugin import files, install_systemctl

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.docker.node import Node
    from tests.fuse.harness import Bucket

pytestmark = pytest.mark.timeout(400)


def test_swarm_in_five_minutes(nodes: Callable[..., Node], bucket: Bucket) -> None:
    one, two = pair = [nodes(), nodes()]
    server = bucket.server
    environment = {
        "MINIO_ENDPOINT": server.endpoint,
        "MINIO_ACCESS_KEY": server.access_key,
        "MINIO_SECRET_KEY": server.secret_key,
        "BUCKET": bucket.name,
        "IMAGE": "lab",
        "MANAGER": one.address,
    }

    def run(node: Node, script: str, **more: str) -> str:
        settings = environment | {"ADDRESS": node.address} | more
        return node.script(f"cd {ROOT}\n{script}", env=settings, timeout_s=150)

    everywhere, manager, worker, service, look, end = blocks("README.md", "swarm")
    for node in pair:
        install_systemctl(node)
        run(node, everywhere)
    run(one, manager)
    run(two, worker, TOKEN=one.docker("swarm", "join-token", "-q", "worker"))
    run(one, service)
    wait_until(lambda: len(one.docker("service", "ps", "web", "-q", "-f", "desired-state=running").split()) == 4)
    for node in pair:
        wait_until(lambda node=node: len(run(node, look).splitlines()) >= 4)
    assert len(files(bucket)) >= 4
    run(one, end)
    for node in pair:
        wait_until(lambda node=node: not node.devices() and not node.docker("ps", "-q"))
