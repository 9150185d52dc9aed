"""A mount of the machine in containers, by bind mount: docker.md §8, 22 and 23; trial T81."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.docker.documents import commands
from tests.fuse.harness import S3FUSE

if TYPE_CHECKING:
    from tests.docker.node import Node
    from tests.fuse.harness import Bucket

pytestmark = pytest.mark.timeout(240)

DEAD = ("not connected", "Transport endpoint")


def mount(node: Node, bucket: Bucket, *, check: bool = True) -> str:
    """Mounts the bucket without preparations; gives what was said on stderr."""
    where = bucket.server.environment
    return node.run(S3FUSE, "mount", bucket.name, "/mnt/s3/photos", env=where, check=check).stderr


def mount_shared(node: Node, bucket: Bucket) -> None:
    """Mounts it as docker/README.md says."""
    node.script(commands("docker/README.md", "follow"), env=bucket.server.environment | {"BUCKET": bucket.name})


def kill(node: Node) -> None:
    """The mount dies: whatever processes hold it."""
    processes = node.s3fuse()
    assert processes
    node.crash(*processes)


def is_dead(node: Node, container: str) -> bool:
    said = node.try_shell(container, "cat /m/photos/first || cat /m/first")
    return any(word in said for word in DEAD)


def test_22_slave_follows(node: Node, bucket: Bucket) -> None:
    node.script("mount --make-rprivate /mnt")  # as on a machine without systemd
    mount_shared(node, bucket)
    node.container("one", "--mount", "type=bind,src=/mnt/s3,dst=/m,bind-propagation=rslave")
    node.shell("one", "echo first >/m/photos/first; sync /m/photos/first")
    assert bucket.get("first") == b"first\n"

    kill(node)
    assert is_dead(node, "one")
    node.run("umount", "-l", "/mnt/s3/photos")
    assert "not permitted" in node.try_shell("one", "echo lost >/m/photos/lost")
    assert node.script("ls -A /mnt/s3/photos") == ""

    mount_shared(node, bucket)
    assert node.shell("one", "cat /m/photos/first") == "first"
    node.shell("one", "echo second >/m/photos/second; sync /m/photos/second")
    assert bucket.get("second") == b"second\n"
    node.docker("rm", "-f", "one")
    node.run(S3FUSE, "umount", "/mnt/s3/photos")


def test_23_default_needs_a_restart(node: Node, bucket: Bucket) -> None:
    node.script("mkdir -p /mnt/s3/photos")
    mount(node, bucket)
    node.container("one", "-v", "/mnt/s3/photos:/m")
    node.shell("one", "echo first >/m/first; sync /m/first")
    refused = mount(node, bucket, check=False)
    assert "/mnt/s3/photos is busy" in refused

    kill(node)
    assert is_dead(node, "one")
    mount(node, bucket)  # a dead mount is detached and replaced
    assert len(node.mounts()) == 1
    assert is_dead(node, "one")
    node.docker("restart", "one")
    assert node.shell("one", "cat /m/first") == "first"
    node.docker("rm", "-f", "one")
    node.run(S3FUSE, "umount", "/mnt/s3/photos")
