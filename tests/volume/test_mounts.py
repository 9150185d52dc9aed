"""The life of a volume's mount: begun once, joined, adopted, brought back, and ended when nobody needs it."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from s3fuse import control, kernel
from s3fuse.mountpoint import refuse_writes
from tests.fuse.harness import wait_for
from tests.proxy import Fault
from tests.volume.harness import WAIT_S, Plugin, Refused, container

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuse.harness import Bucket, Gate
    from tests.proxy import Proxy
    from tests.servers import Server

    Plugins = Callable[..., Plugin]

#: For tests in which an Unmount never comes: an ID counts 0.3 s after its container is gone, 3 s if none was seen.
STALE = "--stale=300ms"


def test_a_container_starts_and_stops(plugins: Plugins, server: Server, buckets: Callable[..., Bucket]) -> None:
    """As `docker run` does it: mounted for copy-up, unmounted, mounted again for the container."""
    bucket = buckets(server)
    plugin = plugins(server)
    plugin.create("vol", bucket=bucket.name)
    plugin.mount("vol", "copy-up")
    pid = plugin.daemon("vol")
    assert os.getsid(pid) != os.getsid(plugin.process.pid if plugin.process else 0)
    plugin.unmount("vol", "copy-up")
    path = plugin.mount("vol", "run")
    assert plugin.daemon("vol") == pid, "the next mount joins"
    with container(path, plugin.folder / "data") as box:
        box.run("echo hello >file; mkdir dir; echo deep >dir/file")
        assert box.run("cat file dir/file") == "hello\ndeep\n"
    plugin.unmount("vol", "run")
    assert bucket.keys() >= {"file", "dir/", "dir/file"}, "an Unmount returns when all is in the bucket"
    plugin.until_gone("vol")
    assert plugin.status("vol")["state"] == "unmounted"
    plugin.call("Remove", Name="vol")
    assert bucket.get("file") == b"hello\n", "the data stays"
    wait_for(lambda: list((plugin.folder / "cache").iterdir()) == [], timeout_s=WAIT_S)
    wait_for(lambda: not plugin.mountpoint("vol").exists(), timeout_s=WAIT_S)


def test_mount_ids_are_a_hint(plugins: Plugins, bucket: Bucket) -> None:
    plugin = plugins(bucket.server, STALE)
    plugin.create("vol", bucket=bucket.name)
    path = plugin.mount("vol", "one")
    pid = plugin.daemon("vol")
    with container(path, plugin.folder / "data") as box:
        plugin.mount("vol", "one")  # `docker cp` comes with the ID of the container
        plugin.unmount("vol", "one")
        plugin.unmount("vol", "never heard of")
        wait_for(lambda: plugin.status("vol")["mount_ids"] == 0, timeout_s=WAIT_S)
        with pytest.raises(Refused, match="volume vol is in use by a container"):
            plugin.call("Remove", Name="vol")
        # Longer than it would linger: each look at it ends with the same finding.
        for _ in range(3):
            before = control.request(path, "status")["requests"]
            plugin.unmount("vol", "never heard of")
            assert control.request(path, "status")["requests"] == before
        box.run("echo still here >file")
        assert plugin.daemon("vol") == pid
    plugin.until_gone("vol")
    assert bucket.get("file") == b"still here\n"


def test_an_unmount_that_never_comes(plugins: Plugins, bucket: Bucket) -> None:
    plugin = plugins(bucket.server, STALE)
    plugin.create("vol", bucket=bucket.name)
    for identity in ("crashed", "also crashed"):
        with container(plugin.mount("vol", identity), plugin.folder / identity.replace(" ", "-")) as box:
            box.run("echo x >file")
            wait_for(lambda: plugin.status("vol")["mount_ids"], timeout_s=WAIT_S)
    plugin.until_gone("vol")
    assert plugin.status("vol")["mount_ids"] == 0
    assert bucket.get("file") == b"x\n"
    plugin.call("Remove", Name="vol")


def test_a_plugin_that_is_killed_leaves_its_mounts_and_finds_them_again(plugins: Plugins, bucket: Bucket) -> None:
    plugin = plugins(bucket.server, STALE)
    plugin.create("vol", bucket=bucket.name)
    path = plugin.mount("vol", "run")
    pid = plugin.daemon("vol")
    with container(path, plugin.folder / "data") as box:
        box.run("echo one >>log")
        plugin.stop(signal.SIGKILL)
        box.run("echo two >>log")
        plugin.start()
        wait_for(lambda: plugin.status("vol")["pid"] == pid, timeout_s=WAIT_S)
        plugin.stop()
        box.run("echo three >>log")
        plugin.start()
        assert plugin.mount("vol", "another") == path
        assert plugin.daemon("vol") == pid
        plugin.unmount("vol", "another")
        box.run("echo four >>log")
        assert plugin.daemon("vol") == pid
    plugin.unmount("vol", "run")
    plugin.until_gone("vol")
    assert bucket.get("log") == b"one\ntwo\nthree\nfour\n"


def test_a_container_that_ends_while_the_plugin_is_away(plugins: Plugins, bucket: Bucket) -> None:
    plugin = plugins(bucket.server, STALE)
    plugin.create("vol", bucket=bucket.name)
    with container(plugin.mount("vol", "run"), plugin.folder / "data") as box:
        plugin.stop(signal.SIGKILL)
        box.run("echo x >file")
    plugin.start()
    plugin.until_gone("vol")
    assert bucket.get("file") == b"x\n"
    plugin.call("Remove", Name="vol")


@pytest.mark.parametrize("who", ["its keeper", "the plugin", "the next Mount"])
def test_a_daemon_that_is_killed_comes_back_with_what_it_had(
    plugins: Plugins, bucket: Bucket, who: str, gate_to: Callable[[Server], Gate]
) -> None:
    """Whoever brings it back."""
    gate = gate_to(bucket.server)
    plugin = plugins(gate.server)
    plugin.allowed.append("volume vol: its daemon is dead")
    plugin.create("vol", bucket=bucket.name)
    path = plugin.mount("vol", "run")
    gate.hold()
    (path / "file").write_text("not uploaded yet")
    before = plugin.serving("vol")
    if who == "its keeper":
        os.kill(before, signal.SIGKILL)
    else:
        if who == "the next Mount":
            plugin.stop(signal.SIGKILL)
        plugin.kill_daemon("vol")
    gate.open()
    if who == "the next Mount":
        plugin.start()
        plugin.mount("vol", "again")

    def back() -> bool:
        try:
            return plugin.serving("vol") != before and (path / "file").read_text() == "not uploaded yet"
        except OSError:
            return False

    wait_for(back, timeout_s=WAIT_S)
    plugin.unmount("vol", "run")
    plugin.unmount("vol", "again")
    wait_for(lambda: "file" in bucket.keys(), timeout_s=WAIT_S)  # noqa: SIM118 - it is no mapping
    assert bucket.get("file") == b"not uploaded yet"


def test_what_waited_when_the_host_went_down_is_uploaded(
    plugins: Plugins, bucket: Bucket, gate_to: Callable[[Server], Gate]
) -> None:
    gate = gate_to(bucket.server)
    plugin = plugins(gate.server, STALE)
    plugin.create("vol", bucket=bucket.name)
    path = plugin.mount("vol", "run")
    gate.hold()
    (path / "file").write_text("in the journal")
    wait_for(lambda: control.request(path, "status")["pending"]["files"], timeout_s=WAIT_S)
    pid = plugin.daemon("vol")
    plugin.stop(signal.SIGKILL)
    plugin.crash_mounts()
    assert not plugin.mounted("vol")
    assert control.wait_for_end(pid, WAIT_S)
    gate.open()
    plugin.start()
    wait_for(lambda: "file" in bucket.keys(), timeout_s=WAIT_S)  # noqa: SIM118 - it is no mapping
    plugin.until_gone("vol")
    assert bucket.get("file") == b"in the journal"
    assert plugin.status("vol")["pending_files"] == 0


def test_slow_uploads(plugins: Plugins, bucket: Bucket, gate_to: Callable[[Server], Gate]) -> None:
    """Unmount does not wait for ever, the daemon goes on, the next Mount joins it, and nothing is removed meanwhile."""
    gate = gate_to(bucket.server)
    plugin = plugins(gate.server, "--unmount-timeout=500ms")
    plugin.allowed.append("changes are still to be uploaded; that goes on")
    plugin.create("vol", bucket=bucket.name)
    path = plugin.mount("vol", "run")
    pid = plugin.daemon("vol")
    gate.hold()
    with container(path, plugin.folder / "data") as box:
        box.run("for n in 1 2 3; do echo $n >file$n; done")
    plugin.unmount("vol", "run")
    wait_for(lambda: plugin.status("vol")["pending_files"] == 3, timeout_s=WAIT_S)
    with pytest.raises(Refused, match="volume vol is not removed: 3 changes in it wait for upload"):
        plugin.call("Remove", Name="vol")
    plugin.mount("vol", "again")
    assert plugin.daemon("vol") == pid
    plugin.unmount("vol", "again")
    assert plugin.mounted("vol")
    gate.open()
    plugin.until_gone("vol")
    assert bucket.keys() == {"file1", "file2", "file3"}
    plugin.call("Remove", Name="vol")


def test_a_server_that_is_away_and_comes_back(plugins: Plugins, bucket: Bucket, proxy: Proxy) -> None:
    plugin = plugins(proxy.server)
    plugin.allowed.append("volume vol cannot be mounted")
    plugin.create("vol", bucket="no-such-bucket-anywhere")
    with pytest.raises(Refused, match="volume vol: bucket 'no-such-bucket-anywhere' does not exist"):
        plugin.mount("vol")
    plugin.call("Remove", Name="vol")
    plugin.create("vol", bucket=bucket.name)
    proxy.down()
    with pytest.raises(Refused, match=f"volume vol: {proxy.server.endpoint} cannot be reached"):
        plugin.mount("vol")
    assert plugin.gone("vol")
    proxy.up()
    plugin.mount("vol")
    plugin.unmount("vol")
    plugin.until_gone("vol")


def test_what_docker_copied_and_could_not_be_uploaded_is_told(plugins: Plugins, bucket: Bucket, proxy: Proxy) -> None:
    """Docker does not look at what an Unmount says, so the Mount for the container tells it, once."""
    plugin = plugins(proxy.server, "--unmount-timeout=5s")
    plugin.allowed.append("volume vol: 1 files are not in the bucket, and are tried again; the first is file")
    plugin.allowed.append("changes are still to be uploaded; that goes on")
    plugin.create("vol", bucket=bucket.name)
    path = plugin.mount("vol", "copy-up")
    proxy.fail(Fault.DENIED, "put")
    (path / "file").write_text("copied")
    wait_for(lambda: plugin.status("vol")["last_error"], timeout_s=WAIT_S)
    plugin.unmount("vol", "copy-up")
    with pytest.raises(Refused, match=r"volume vol: 1 files are not in the bucket.*the first is file"):
        plugin.mount("vol", "run")
    assert plugin.status("vol")["pending_files"] == 1
    plugin.mount("vol", "run")
    proxy.heal()
    plugin.unmount("vol", "run")
    plugin.until_gone("vol")
    assert bucket.get("file") == b"copied"


def test_somebody_else_unmounts(plugins: Plugins, bucket: Bucket) -> None:
    plugin = plugins(bucket.server)
    plugin.allowed.append("volume vol: somebody unmounted it")
    plugin.create("vol", bucket=bucket.name)
    path = plugin.mount("vol", "run")
    (path / "file").write_text("x")
    pid = plugin.daemon("vol")
    kernel.unmount(path)
    assert plugin.mount("vol", "again") == path
    assert plugin.mounted("vol"), "never the bare directory"
    assert plugin.daemon("vol") != pid
    assert (path / "file").read_text() == "x"
    plugin.unmount("vol", "run")
    plugin.unmount("vol", "again")
    plugin.until_gone("vol")


def test_somebody_else_unmounts_under_a_container(plugins: Plugins, bucket: Bucket) -> None:
    """The container goes on, and there is no second daemon beside the one that it has."""
    plugin = plugins(bucket.server)
    plugin.allowed += ["volume vol: somebody unmounted it", "volume vol cannot be mounted: somebody unmounted"]
    plugin.create("vol", bucket=bucket.name)
    path = plugin.mount("vol", "run")
    with container(path, plugin.folder / "data") as box:
        kernel.unmount(path)
        with pytest.raises(Refused, match=r"somebody unmounted .* while containers use it; they go on"):
            plugin.mount("vol", "again")
        box.run("echo still here >file")
    plugin.unmount("vol", "run")
    assert (plugin.mount("vol", "again") / "file").read_text() == "still here\n"
    plugin.unmount("vol", "again")
    plugin.until_gone("vol")


def test_the_bare_directory_takes_no_data(plugins: Plugins, bucket: Bucket) -> None:
    plugin = plugins(bucket.server)
    plugin.create("vol", bucket=bucket.name)
    path = plugin.mount("vol")
    plugin.unmount("vol")
    plugin.until_gone("vol")
    if not refuse_writes(path):
        pytest.skip("this filesystem has no immutable flag")
    with pytest.raises(PermissionError):
        (path / "file").write_text("on the host's disk")
    plugin.mount("vol")
    plugin.unmount("vol")


def test_files_open_on_the_host_keep_the_mount(plugins: Plugins, bucket: Bucket) -> None:
    plugin = plugins(bucket.server)
    plugin.create("vol", bucket=bucket.name)
    path = plugin.mount("vol")
    with (path / "file").open("w") as file:
        plugin.unmount("vol")
        wait_for(lambda: "stays mounted" in plugin.log_text(), timeout_s=WAIT_S)
        file.write("late")
    plugin.until_gone("vol")
    assert bucket.get("file") == b"late"


def test_a_removed_volume_comes_back_under_its_name(plugins: Plugins, bucket: Bucket) -> None:
    plugin = plugins(bucket.server, "--linger=1h")
    plugin.create("vol", bucket=bucket.name)
    for round_ in range(3):
        path = plugin.mount("vol")
        (path / f"file{round_}").write_text("x")
        plugin.unmount("vol")
        plugin.call("Remove", Name="vol")
        plugin.create("vol", bucket=bucket.name, attr_ttl=f"{round_ + 1}s")
    assert bucket.keys() == {"file0", "file1", "file2"}
    plugin.until_gone("vol")


@pytest.mark.timeout(180)
def test_many_volumes(plugins: Plugins, bucket: Bucket) -> None:
    """As many as `docker stack` may ask for at once, all of one bucket."""
    plugin = plugins(bucket.server)
    names = [f"vol{number}" for number in range(8)]
    for name in names:
        plugin.create(name, bucket=bucket.name, prefix=name)

    def use(name: str) -> None:
        path: Path = plugin.mount(name)
        (path / "file").write_text(name)
        plugin.unmount(name)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(use, names))
    assert bucket.keys() == {f"{name}/file" for name in names}
    for name in names:
        plugin.until_gone(name)
