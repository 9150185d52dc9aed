"""The managed plugin, built offline by docker/managed/build.py: docker.md §8, test 24."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.docker.documents import ROOT
from tests.docker.node import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.docker.node import Node
    from tests.fuse.harness import Bucket, Gate

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def built(docker_folder: Path) -> Path:
    """What `docker plugin create` takes."""
    folder = docker_folder / "managed"
    command = [sys.executable, ROOT / "docker/managed/build.py", folder]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    return folder


def test_24_managed_plugin(nodes: Callable[..., Node], built: Path, bucket: Bucket, gate: Gate) -> None:
    node = nodes()
    server = gate.server
    node.script(
        "install -d -m 700 /etc/s3fuse/credentials /var/lib/s3fuse/managed; umask 077; echo $1 >$2",
        f"{server.access_key}:{server.secret_key}",
        "/etc/s3fuse/credentials/test",
    )
    node.docker("plugin", "create", "s3fuse", str(built), timeout_s=120)
    node.docker("plugin", "set", "s3fuse", f"MINIO_ENDPOINT={server.endpoint}", "args=--linger=1s --stale=6s")
    node.docker("plugin", "enable", "s3fuse")
    assert server.secret_key not in node.docker("plugin", "inspect", "s3fuse")
    node.docker("volume", "create", "-d", "s3fuse", "-o", f"bucket={bucket.name}", "-o", "credentials=test", "vol")
    node.container("one", "-v", "vol:/data")
    node.shell("one", "echo first >/data/first; sync /data/first")
    assert bucket.get("first") == b"first\n"
    assert "in use" in node.refused("plugin", "disable", "s3fuse")

    gate.hold()
    node.shell("one", "echo waits >/data/waits")
    # Its mounts end with it: the container has lost its volume, what it wrote is in the journal.
    node.docker("plugin", "disable", "-f", "s3fuse")
    assert node.try_shell("one", "cat /data/waits") != "waits\n"
    assert "waits" not in bucket.keys()
    gate.open()
    node.docker("plugin", "enable", "s3fuse")
    wait_until(lambda: "waits" in bucket.keys())
    assert bucket.get("waits") == b"waits\n"
    node.docker("restart", "one")
    assert node.shell("one", "cat /data/first /data/waits").split() == ["first", "waits"]

    node.docker("stop", "one")
    node.stop_dockerd(signal.SIGTERM)
    node.start_dockerd()
    assert node.docker("volume", "ls", "-q").split() == ["vol"]
    assert json.loads(node.docker("volume", "inspect", "vol"))[0]["Status"]["bucket"] == bucket.name
    node.docker("start", "one")
    assert node.shell("one", "cat /data/first") == "first"
    node.docker("rm", "-f", "one")
    node.docker("volume", "rm", "vol")
    wait_until(lambda: not node.devices())
    node.docker("plugin", "disable", "s3fuse")
    node.docker("plugin", "rm", "s3fuse")
