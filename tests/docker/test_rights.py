"""What a volume gives nobody in a container: root's rights by set-uid files, devices (T92)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.docker.node import Node
    from tests.docker.plugin import Plugin
    from tests.fuse.harness import Bucket

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, {"rw", "nosuid", "nodev"}),
        ({"read-only": "true"}, {"ro", "nosuid", "nodev"}),
        ({"suid": "true"}, {"rw", "nodev"}),
    ],
)
def test_flags_in_a_container(
    node: Node, plugin: Plugin, bucket: Bucket, options: dict[str, str], flags: set[str]
) -> None:
    plugin.create("vol", bucket.name, **options)
    line = node.docker("run", "--rm", "--network", "none", "-v", "vol:/data", "lab", "grep", " /data ", "/proc/mounts")
    assert set(line.split()[3].split(",")) & {"ro", "rw", "nosuid", "nodev"} == flags
