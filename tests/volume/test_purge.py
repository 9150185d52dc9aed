"""What `purge` deletes with a volume, and what it must never: each plugin is a node of its own."""

from __future__ import annotations

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import S3FUSE, free_environment, run, wait_for
from tests.proxy import Fault
from tests.volume.harness import WAIT_S, Plugin, Refused, container

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuse.harness import Bucket
    from tests.proxy import Proxy
    from tests.servers import Server

    Plugins = Callable[..., Plugin]

pytestmark = pytest.mark.timeout(180)


def data(bucket: Bucket) -> set[str]:
    """All keys but s3fuse's own."""
    return {key for key in bucket.every_key() if ".s3fuse" not in key}


def fill(plugin: Plugin, volume: str, *names: str) -> None:
    """Writes files as a container does, and returns when nothing of the mount is left."""
    path = plugin.mount(volume, "fill")
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(name)
    plugin.unmount(volume, "fill")
    plugin.until_gone(volume)


def purged(plugin: Plugin) -> None:
    """Returns when no purge waits any more, and the plugin has said so of each volume that was removed."""

    def done() -> bool:
        text = plugin.log_text()
        removed = len(re.findall(r"driver: volume \S+ is removed\n", text))
        said = len(re.findall(r"INFO s3fuse.volume.purges: the data of the removed volume", text))
        return said >= removed and not list(plugin.state.glob("*.purge"))

    wait_for(done, timeout_s=WAIT_S)


def test_purge(plugins: Plugins, server: Server, buckets: Callable[..., Bucket]) -> None:
    """Data goes with its volume where that was asked for, and nothing beside it."""
    bucket = buckets(server)
    bucket.put("gone-but-not-mine", b"x")
    plugin = plugins(server)
    for name, purge in (("gone", "true"), ("kept", "false")):
        plugin.create(name, bucket=bucket.name, prefix=name, purge=purge)
        path = plugin.mount(name)
        (path / "dir").mkdir()
        (path / "dir" / "file").write_text("x")
        plugin.unmount(name)
        plugin.call("Remove", Name=name)
    wait_for(lambda: not list(plugin.state.iterdir()), timeout_s=WAIT_S)
    wait_for(lambda: plugin.gone("kept"), timeout_s=WAIT_S)
    assert bucket.keys() == {"gone-but-not-mine", "kept/dir/", "kept/dir/file"}
    assert not bucket.leases()


def test_what_was_there_before_stays_unless_all_is_said(
    plugins: Plugins, server: Server, buckets: Callable[..., Bucket]
) -> None:
    bucket = buckets(server)
    bucket.put("old/file", b"old")
    bucket.put("old/changed", b"old")
    plugin = plugins(server)
    plugin.create("vol", bucket=bucket.name, purge="true")
    assert plugin.mount("vol").joinpath("old", "changed").write_text("new")
    plugin.unmount("vol")
    fill(plugin, "vol", "mine", "old/mine", "dir/mine")
    plugin.call("Remove", Name="vol")
    purged(plugin)
    assert "is purged; 2 objects stay" in plugin.log_text()
    assert bucket.keys() == {"old/file", "old/changed"}
    plugin.create("vol", bucket=bucket.name, purge="all")
    fill(plugin, "vol", "mine")
    plugin.call("Remove", Name="vol")
    purged(plugin)
    assert bucket.keys() == set()


def test_what_another_node_uses_is_not_purged(plugins: Plugins, server: Server, buckets: Callable[..., Bucket]) -> None:
    """The issue's case: a node that never mounted the volume removes it under a container of another."""
    bucket = buckets(server)
    first, second = plugins(server), plugins(server)
    for plugin in (first, second):
        plugin.create("vol", bucket=bucket.name, prefix="p", purge="true")
    path = second.mount("vol")
    with container(path, second.folder / "data") as box:
        box.run("echo precious >file; sync file")
        with pytest.raises(Refused, match=rf"volume vol is not removed.*node \S+ has /p/ mounted on {path}"):
            first.call("Remove", Name="vol")
        assert first.names() == {"vol"}
        assert box.run("cat file") == "precious\n"
        assert data(bucket) >= {"p/file"}
    second.unmount("vol")
    second.until_gone("vol")
    first.call("Remove", Name="vol")
    purged(first)
    assert not [key for key in bucket.every_key() if not key.startswith(".s3fuse/directories")]
    # The other node's volume goes on, with nothing in it.
    fill(second, "vol", "again")
    assert data(bucket) - {"p/"} == {"p/again"}
    second.call("Remove", Name="vol")
    purged(second)
    assert data(bucket) == set()


@pytest.mark.parametrize("place", ["", "/p", "/p/q/r"])
def test_a_mount_without_the_plugin_counts_too(plugins: Plugins, bucket: Bucket, tmp_path: Path, place: str) -> None:
    plugin = plugins(bucket.server)
    plugin.create("vol", bucket=bucket.name, prefix="p/q" if place.endswith("r") else "p", purge="all")
    fill(plugin, "vol", "r/file")
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    environment = free_environment(**bucket.server.environment)
    run(S3FUSE, "mount", f"--cache-dir={tmp_path / 'cache'}", bucket.name + place, mountpoint, env=environment)
    try:
        with pytest.raises(Refused, match=f"mounted on {mountpoint}"):
            plugin.call("Remove", Name="vol")
    finally:
        run(S3FUSE, "umount", mountpoint)
    assert [key for key in data(bucket) if key.endswith("r/file")]
    plugin.call("Remove", Name="vol")
    purged(plugin)
    assert data(bucket) == set()


@pytest.mark.parametrize("purge", ["true", "false"])
def test_what_a_dead_mount_of_the_volume_left_is_no_use(plugins: Plugins, bucket: Bucket, purge: str) -> None:
    plugin = plugins(bucket.server)
    plugin.allowed.append("volume vol: its daemon is dead")
    plugin.create("vol", bucket=bucket.name, purge=purge)
    fill(plugin, "vol", "file")
    plugin.mount("vol")
    plugin.unmount("vol")
    plugin.stop()
    plugin.crash_mounts()
    assert len(bucket.leases()) == 1
    plugin.start()
    plugin.call("Remove", Name="vol")
    left = set() if purge == "true" else {"file"}
    wait_for(lambda: bucket.every_key() == left, timeout_s=WAIT_S)


def test_a_purge_never_takes_what_is_another_volumes(plugins: Plugins, bucket: Bucket) -> None:
    for key in ("a/b/x", "a/bb/x", "x"):
        bucket.put(key, b"x")
    plugin = plugins(bucket.server)
    plugin.allowed += [
        "of the removed volume part is not purged: volume whole has",
        "volume twin is not purged: volume w",
    ]
    plugin.create("whole", bucket=bucket.name, purge="all")
    plugin.create("twin", bucket=bucket.name, purge="all")
    plugin.create("part", bucket=bucket.name, prefix="a/b", purge="true")
    plugin.call("Remove", Name="part")
    plugin.call("Remove", Name="twin")
    plugin.create("beside", bucket=bucket.name, prefix="c", purge="true")
    plugin.call("Remove", Name="beside")
    plugin.allowed.append("of the removed volume beside is not purged: volume whole has")
    purged(plugin)
    plugin.create("twin", bucket=bucket.name)
    plugin.call("Remove", Name="twin")
    assert bucket.every_key() == {"a/b/x", "a/bb/x", "x"}
    plugin.call("Remove", Name="whole")
    wait_for(lambda: not bucket.every_key(), timeout_s=WAIT_S)


def test_a_volume_whose_definition_cannot_be_read_counts(plugins: Plugins, bucket: Bucket) -> None:
    plugin = plugins(bucket.server)
    plugin.allowed.append("volume other: its definition")
    for name in ("vol", "other"):
        plugin.create(name, bucket=bucket.name, purge="true" if name == "vol" else "false")
    fill(plugin, "vol", "file")
    plugin.stop()
    definition = plugin.state / "other.json"
    text = definition.read_text()
    definition.write_text(text[:20])
    plugin.start()
    with pytest.raises(Refused, match=rf"volume vol is not removed.*volume other.*{definition}"):
        plugin.call("Remove", Name="vol")
    assert plugin.names() == {"vol"}
    assert data(bucket) == {"file"}
    definition.unlink()
    plugin.call("Remove", Name="vol")
    purged(plugin)
    assert bucket.every_key() == set()


def test_a_purge_that_cannot_be_done_now_is_done_later(plugins: Plugins, bucket: Bucket) -> None:
    plugin = plugins(bucket.server)
    (plugin.folder / "keys").mkdir()
    keys = plugin.folder / "keys" / "prod"
    content = f"{bucket.server.access_key}:{bucket.server.secret_key}\n"
    keys.write_text(content)
    keys.chmod(0o600)
    plugin.create("vol", bucket=bucket.name, purge="true", credentials="prod")
    fill(plugin, "vol", "file")
    keys.write_text("")
    plugin.allowed.append("the data of the removed volume vol is not purged yet: credentials file")
    plugin.call("Remove", Name="vol")
    wait_for(lambda: "is not purged yet" in plugin.log_text(), timeout_s=WAIT_S)
    with pytest.raises(Refused, match="its data is still being purged"):
        plugin.create("vol", bucket=bucket.name)
    assert plugin.names() == set()
    assert data(bucket) == {"file"}
    plugin.stop()
    keys.write_text(content)
    plugin.start()
    wait_for(lambda: not bucket.every_key(), timeout_s=WAIT_S)


def away(plugin: Plugin, proxy: Proxy, volume: str) -> None:
    """Removes a volume while the server is away."""
    plugin.allowed.append(f"the data of the removed volume {volume} is not purged yet")
    proxy.down()
    plugin.call("Remove", Name=volume)
    wait_for(lambda: f"volume {volume} is not purged yet" in plugin.log_text(), timeout_s=WAIT_S)


def test_a_purge_that_waits_leaves_a_new_volume_alone(plugins: Plugins, bucket: Bucket, proxy: Proxy) -> None:
    """The issue's case: the server is away at `volume rm`, and a new volume is made at the same place."""
    plugin = plugins(proxy.server)
    plugin.create("old", bucket=bucket.name, prefix="p", purge="true")
    fill(plugin, "old", "old")
    away(plugin, proxy, "old")
    plugin.create("new", bucket=bucket.name, prefix="p")
    proxy.up()
    plugin.allowed.append("of the removed volume old is not purged: volume new has")
    fill(plugin, "new", "new")
    purged(plugin)
    assert data(bucket) == {"p/old", "p/new"}
    assert not [key for key in bucket.every_key() if "owner-" in key]


def test_a_purge_that_waits_leaves_what_was_written_after_the_removal(
    plugins: Plugins, bucket: Bucket, proxy: Proxy
) -> None:
    """By another node, which has ended its use when the purge comes; and by whoever has no mount."""
    first, second = plugins(proxy.server), plugins(bucket.server)
    first.create("vol", bucket=bucket.name, purge="true")
    fill(first, "vol", "old", "changed")
    away(first, proxy, "vol")
    second.create("vol", bucket=bucket.name, purge="true")
    fill(second, "vol", "new", "changed")
    bucket.put("other", b"x")
    proxy.up()
    purged(first)
    assert data(bucket) == {"new", "changed", "other"}


def test_a_purge_that_waits_ends_where_another_node_uses_the_data(
    plugins: Plugins, bucket: Bucket, proxy: Proxy
) -> None:
    first, second = plugins(proxy.server), plugins(bucket.server)
    first.create("vol", bucket=bucket.name, purge="true")
    fill(first, "vol", "old")
    away(first, proxy, "vol")
    second.create("vol", bucket=bucket.name)
    path = second.mount("vol")
    first.allowed.append(rf"vol is not purged, as it is in use: node \S+ has / mounted on {path}.*It stays for good")
    proxy.up()
    purged(first)
    assert (path / "old").read_text() == "old"
    second.unmount("vol")
    second.until_gone("vol")
    assert bucket.every_key() == {"old"}
    first.create("vol", bucket=bucket.name, purge="true")  # whose it is not
    fill(first, "vol", "new")
    first.call("Remove", Name="vol")
    purged(first)
    assert bucket.every_key() == {"old"}


def test_a_volume_that_is_made_while_the_server_is_away_owns_what_it_makes(
    plugins: Plugins, bucket: Bucket, proxy: Proxy
) -> None:
    plugin = plugins(proxy.server)
    bucket.put("old", b"x")
    proxy.down()
    plugin.create("vol", bucket=bucket.name, purge="true")
    proxy.up()
    fill(plugin, "vol", "file")
    plugin.call("Remove", Name="vol")
    purged(plugin)
    assert bucket.every_key() == {"old"}


def test_an_earlier_versions_removal_deletes_nothing_without_proof(plugins: Plugins, bucket: Bucket) -> None:
    """It recorded no time, and put no mark."""
    bucket.put("file", b"x")
    plugin = plugins(bucket.server, start=False)
    plugin.state.mkdir(parents=True)
    definition = {"version": 1, "name": "vol", "created_at": "", "bucket": bucket.name, "prefix": ""}
    (plugin.state / "vol.purge").write_text(json.dumps(definition | {"options": {"purge": "true"}}))
    plugin.allowed.append("nothing in .* shows that the volume made it; purge=all")
    plugin.start()
    purged(plugin)
    assert bucket.every_key() == {"file"}


def test_an_empty_volume_looks_empty(plugins: Plugins, server: Server, buckets: Callable[..., Bucket]) -> None:
    """Docker copies what an image has only into a volume with nothing in it."""
    bucket = buckets(server)
    plugin = plugins(server)
    for prefix in ("", "p"):
        name = f"vol{prefix}"
        plugin.create(name, bucket=bucket.name, prefix=prefix, purge="true")
        path = plugin.mount(name)
        assert list(path.iterdir()) == []
        assert subprocess.run(["find", path], capture_output=True, text=True, check=True).stdout == f"{path}\n"
        plugin.unmount(name)
        plugin.until_gone(name)
        plugin.call("Remove", Name=name)
        purged(plugin)
        assert not [key for key in bucket.every_key() if not key.startswith(".s3fuse/directories")]


def test_a_creation_that_waits_for_the_server_keeps_nobody_waiting(
    plugins: Plugins, bucket: Bucket, proxy: Proxy
) -> None:
    plugin = plugins(proxy.server)
    proxy.fail(Fault.STALLED)
    with ThreadPoolExecutor(1) as pool:
        before = proxy.requests.total()
        slow = pool.submit(plugin.create, "slow", bucket=bucket.name, prefix="a", purge="true")
        wait_for(lambda: proxy.requests.total() > before, timeout_s=WAIT_S)
        plugin.create("fast", bucket=bucket.name, prefix="b")
        plugin.call("Remove", Name="fast")
        assert not slow.done()
        proxy.heal()
        slow.result()
    assert plugin.names() == {"slow"}
