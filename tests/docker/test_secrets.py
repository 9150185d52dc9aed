"""Keys of volumes: where they must not be seen, and how they change. docker.md §8, test 25; trial T83."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from minio.credentials.providers import StaticProvider
from minio.minioadmin import MinioAdmin

from tests.docker.node import wait_until

if TYPE_CHECKING:
    from tests.docker.node import Node
    from tests.docker.plugin import Plugin
    from tests.fuse.harness import Bucket
    from tests.servers import Server

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def admin(server: Server) -> MinioAdmin:
    credentials = StaticProvider(server.access_key, server.secret_key)
    return MinioAdmin(endpoint=server.endpoint.removeprefix("http://"), credentials=credentials, secure=False)


def new_user(admin: MinioAdmin) -> tuple[str, str]:
    """Keys of a new user who may read and write."""
    keys = f"user{secrets.token_hex(6)}", secrets.token_hex(20)
    admin.user_add(*keys)
    admin.attach_policy(["readwrite"], user=keys[0])
    return keys


def places_with(node: Node, secret: str) -> list[str]:
    """Files of the node that hold a text, the credentials directory apart, and processes that show it."""
    folders = ("/var/lib/s3fuse", "/var/cache/s3fuse", "/run", "/etc/systemd", str(node.log))
    said = node.run("grep", "-rlsF", "--devices=skip", "--", secret, *folders, check=False).stdout
    found = said.splitlines()
    for process in node.processes():
        for name in ("cmdline", "environ"):
            if secret.encode() in Path(f"/proc/{process.pid}/{name}").read_bytes():
                found.append(f"{name} of {process.command}")
    return found


def test_25_secrets_are_not_seen(node: Node, plugin: Plugin, bucket: Bucket, admin: MinioAdmin) -> None:
    access_key, secret_key = new_user(admin)
    plugin.keys("mine", access_key, secret_key)
    plugin.create("vol", bucket.name, credentials="mine", log_level="debug")
    node.container("one", "-v", "vol:/data")
    node.shell("one", "echo one >/data/file; sync /data/file")
    assert plugin.inspect("vol")["Options"]["credentials"] == "mine"
    for said in (json.dumps(plugin.inspect("vol")), json.dumps(plugin.call("VolumeDriver.List"))):
        assert secret_key not in said
    assert places_with(node, secret_key) == []
    state = node.path("/var/lib/s3fuse/volumes")
    assert state.stat().st_mode & 0o077 == 0
    assert [path for path in state.iterdir() if path.stat().st_mode & 0o077] == []

    # The keys change, and the old ones end: the next request has the new ones.
    renewed = new_user(admin)
    plugin.keys("mine", *renewed)
    admin.user_remove(access_key)
    node.shell("one", "echo two >>/data/file; sync /data/file")
    assert bucket.get("file") == b"one\ntwo\n"
    assert places_with(node, renewed[1]) == []

    # Keys that are refused keep what was written until right ones are there.
    plugin.keys("mine", renewed[0], "wrong")
    admin.user_remove(renewed[0])
    node.shell("one", "echo three >>/data/file")
    wait_until(lambda: plugin.status("vol")["pending_files"] == 1)
    plugin.keys("mine", *new_user(admin))
    wait_until(lambda: bucket.get("file") == b"one\ntwo\nthree\n")
    node.docker("rm", "-f", "one")
    plugin.wait_until_idle()


def test_nothing_on_disk(node: Node, plugin: Plugin, bucket: Bucket, server: Server) -> None:
    """For secrets: keys from /run/secrets, as a service of the swarm brings them, and staged bytes in memory."""
    node.script("mkdir -p /run/secrets")
    secret = node.path("/run/secrets/brought")
    secret.write_text(f"{server.access_key}:{server.secret_key}")
    secret.chmod(0o444)
    plugin.create("vol", bucket.name, credentials="brought", ephemeral="true")
    node.container("one", "-v", "vol:/data")
    node.shell("one", "echo kept to itself >/data/file")
    assert (
        node.script("grep -rlF 'kept to itself' /var/cache/s3fuse /var/lib/s3fuse --exclude-dir=mounts || true") == ""
    )
    node.docker("rm", "-f", "one")
    plugin.wait_until_idle()
    assert bucket.get("file") == b"kept to itself\n"


def test_25_keys_in_options_are_refused(node: Node, plugin: Plugin, bucket: Bucket, server: Server) -> None:
    for name in ("access-key", "secret-key", "credentials-file"):
        said = node.refused("volume", "create", "-d", "s3fuse", "-o", f"bucket={bucket.name}", "-o", f"{name}=v", "vol")
        assert name in said
    said = node.refused(
        *("volume", "create", "-d", "s3fuse", "-o", f"bucket={bucket.name}"),
        *("-o", f"endpoint=http://{server.access_key}:{server.secret_key}@127.0.0.1", "vol"),
    )
    assert server.secret_key not in said
    assert plugin.volumes() == set()
