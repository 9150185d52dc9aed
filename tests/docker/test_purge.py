"""`docker volume rm` of volumes with `purge`, on two nodes that share the store."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.docker.node import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.docker.node import Node
    from tests.docker.plugin import Plugin
    from tests.fuse.harness import Bucket
    from tests.servers import Server

pytestmark = pytest.mark.timeout(300)


def purged(plugin: Plugin) -> None:
    """Returns when no removed volume of the node has data any more that is to go."""
    folder = plugin.node.path("/var/lib/s3fuse/volumes")
    wait_until(lambda: not list(folder.glob("*.purge")))


@pytest.fixture
def pair(nodes: Callable[..., Node], plugins: Callable[..., Plugin], server: Server) -> tuple[Plugin, Plugin]:
    """The plugins of two nodes."""
    return plugins(nodes(), server), plugins(nodes(), server)


def test_a_container_of_another_node_keeps_its_data(pair: tuple[Plugin, Plugin], bucket: Bucket) -> None:
    first, second = pair
    for plugin in pair:
        plugin.create("vol", bucket.name, prefix="p", purge="true")
    second.node.container("one", "-v", "vol:/data")
    second.node.shell("one", "echo precious >/data/file; sync /data/file")
    refusal = re.compile(
        r"volume vol is not removed, as its data would be deleted with it and is in use: node n2 has /p/ mounted on "
        r"/var/lib/s3fuse/mounts/vol, heard of 0 min ago"
    )
    assert refusal.search(first.node.refused("volume", "rm", "vol"))
    second.kill()  # its mounts go on, and so do their leases
    for process in second.mount_processes():
        if "s3fuse.worker" in process.command:
            second.node.crash(process)
    wait_until(lambda: second.node.shell("one", "cat /data/file") == "precious")
    assert refusal.search(first.node.refused("volume", "rm", "vol"))
    assert first.volumes() == {"vol"}
    assert second.node.shell("one", "cat /data/file") == "precious"
    assert bucket.get("p/file") == b"precious\n"
    second.node.docker("rm", "-f", "one")
    second.wait_until_idle()
    first.node.docker("volume", "rm", "vol")
    purged(first)
    assert bucket.every_key() == set()
    # What is made on the other node from now on is that volume's again.
    second.node.docker("run", "--rm", "--network", "none", "-v", "vol:/data", "lab", "sh", "-c", "echo x >/data/new")
    second.wait_until_idle()
    assert bucket.keys() >= {"p/new"}
    second.node.docker("volume", "rm", "vol")
    purged(second)
    assert bucket.every_key() == set()


def test_a_node_that_died_counts_until_its_lease_is_removed(pair: tuple[Plugin, Plugin], bucket: Bucket) -> None:
    first, second = pair
    for plugin in pair:
        plugin.create("vol", bucket.name, purge="true")
    second.node.container("one", "-v", "vol:/data")
    second.node.shell("one", "echo precious >/data/file; sync /data/file")
    second.node.crash(*second.mount_processes())  # before the end of the container lets the mount end
    second.node.stop_dockerd()
    said = first.node.refused("volume", "rm", "vol")
    found = re.search(r"counts for (\d+) min more, or until its object (\S+) is removed", said)
    assert found
    assert 50 <= int(found[1]) <= 60
    assert bucket.get("file") == b"precious\n"
    bucket.delete(found[2])
    first.node.docker("volume", "rm", "vol")
    purged(first)
    assert bucket.every_key() == set()


def test_copy_up_goes_into_a_volume_with_purge(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    """What s3fuse itself keeps at the place does not make the volume look full; what was there before stays."""
    bucket.put("other", b"x")
    plugin.create("vol", bucket.name, prefix="p", purge="true")
    node.docker("run", "--rm", "--network", "none", "-v", "vol:/bin", "lab", "true")
    plugin.wait_until_idle()
    assert "p/sh" in bucket.keys()
    plugin.create("all", bucket.name, purge="true")
    node.docker(
        "run", "--rm", "--network", "none", "-v", "all:/data", "lab", "sh", "-c", "ls -A /data; echo x >/data/n"
    )
    plugin.wait_until_idle()
    node.docker("volume", "rm", "all")
    purged(plugin)
    assert bucket.keys() >= {"other", "p/sh", "n"}, "another volume of the node has some of it"
    node.docker("volume", "rm", "vol")
    purged(plugin)
    assert bucket.every_key() == {"other", "n"}
