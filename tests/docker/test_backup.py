"""A volume's bucket is copied as docker/README.md says, and a volume on the copy has the same tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.docker.documents import ROOT, commands
from tests.docker.test_copyup import RUN, check_tree, seen

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.docker.node import Node
    from tests.docker.plugin import Plugin
    from tests.fuse.harness import Bucket

pytestmark = pytest.mark.timeout(240)


def test_rsync_mc_and_rclone(
    nodes: Callable[..., Node], plugins: Callable[..., Plugin], bucket: Bucket, buckets: Callable[..., Bucket]
) -> None:
    node = nodes("seeded")
    plugin = plugins(node, bucket.server)
    plugin.create("vol", bucket.name)
    node.docker(*RUN, "-v", "vol:/data", "seeded", "true")
    original = seen(node, "vol")

    # There by rsync, and back from there.
    where = bucket.server.environment
    there, back = f"{bucket.name}-there", f"{bucket.name}-back"
    node.script("mkdir /mnt/from /mnt/to")
    for source, copy in ((bucket.name, there), (there, back)):
        node.script(commands("docker/README.md", "rsync"), env=where | {"BUCKET": source, "BACKUP": copy})
    plugin.create("back", back)
    check_tree(node, "back")

    mirror, again = f"{bucket.name}-mirror", f"{bucket.name}-again"
    store = {
        "MINIO_ENDPOINT": bucket.server.endpoint,
        "MINIO_ACCESS_KEY": bucket.server.access_key,
        "MINIO_SECRET_KEY": bucket.server.secret_key,
        "MC_CONFIG_DIR": "/mnt/mc",  # else it makes the one that the tests say is not there, on the machine itself
        "PATH": f"{ROOT}/.tools/bin:{node.environment['PATH']}",
    }
    for source, copy in ((bucket.name, mirror), (mirror, again)):
        node.script(commands("docker/README.md", "mc"), env=store | {"BUCKET": source, "BACKUP": copy})
    plugin.create("again", again)
    check_tree(node, "again")

    copied_to = buckets(bucket.server)
    settings = {"BUCKET": bucket.name, "BACKUP": copied_to.name}
    for name in ("FROM", "TO"):
        settings[f"RCLONE_CONFIG_{name}_TYPE"] = "s3"
        settings[f"RCLONE_CONFIG_{name}_PROVIDER"] = "Minio"
        settings[f"RCLONE_CONFIG_{name}_ENDPOINT"] = bucket.server.endpoint
        settings[f"RCLONE_CONFIG_{name}_ACCESS_KEY_ID"] = bucket.server.access_key
        settings[f"RCLONE_CONFIG_{name}_SECRET_ACCESS_KEY"] = bucket.server.secret_key
    node.script(commands("docker/README.md", "rclone"), env=settings)
    plugin.create("copy", copied_to.name)
    copied = seen(node, "copy")
    assert copied.keys() == original.keys()
    folders = {path for path, about in original.items() if about.startswith("4")}
    assert {path for path in original if copied[path] != original[path]} <= folders
    plugin.wait_until_idle()
