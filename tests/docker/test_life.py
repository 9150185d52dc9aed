"""How long a volume's mount lives, whatever is ended or fails around it: docker.md §8, tests 6 to 15."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.docker.node import Node, wait_until
from tests.docker.plugin import files

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.docker.plugin import Plugin
    from tests.fuse.harness import Bucket, Gate
    from tests.proxy import Proxy
    from tests.servers import Server

pytestmark = pytest.mark.timeout(300)

RUN = ("run", "--rm", "--network", "none")
#: dockerd gives up an Unmount after this time, and a Mount after the next (docker.md §2).
UNMOUNT_LIMIT_S, MOUNT_LIMIT_S = 60, 120
#: Writes numbers until it is told to stop; an error ends it.
COUNTING = "n=0; while [ ! -e /tmp/enough ]; do n=$((n + 1)); echo $n >>/data/log || exit 7; done; echo done >/tmp/done"


def one_mount(node: Node) -> bool:
    return len(node.devices()) == 1


def counting(node: Node, name: str, volume: str) -> None:
    """Starts a container that writes without a pause."""
    node.container(name, "-v", f"{volume}:/data")
    node.docker("exec", "-d", name, "sh", "-c", COUNTING)
    wait_until(lambda: written(node, name) > 20)


def written(node: Node, name: str) -> int:
    """How many lines it has written."""
    return int(node.shell(name, "wc -l </data/log 2>/dev/null || echo 0"))


def check_counting(node: Node, name: str) -> int:
    """It still writes and has lost nothing; ends it and gives how many lines it wrote."""
    before = written(node, name)
    wait_until(lambda: written(node, name) > before + 20)
    node.shell(name, "touch /tmp/enough")
    wait_until(lambda: node.try_shell(name, "[ -e /tmp/done ] || echo not yet") == "")
    lines = node.shell(name, "cat /data/log").split()
    assert lines == [str(number + 1) for number in range(len(lines))]
    return len(lines)


def test_06_shared_by_containers(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    plugin.create("vol", bucket.name)
    node.container("one", "-v", "vol:/data")
    node.container("two", "-v", "vol:/one", "-v", "vol:/two")
    node.shell("one", "echo from a >/data/a")
    node.shell("two", "echo from b >/one/b")
    assert node.shell("two", "cat /one/a /two/a /two/b").splitlines() == ["from a", "from a", "from b"]
    assert node.shell("one", "cat /data/b") == "from b"
    assert one_mount(node)
    node.docker("stop", "one")
    node.shell("two", "echo more >>/two/a; cat /one/a")
    assert one_mount(node)
    node.docker("stop", "two")
    plugin.wait_until_idle()
    assert bucket.get("a") == b"from a\nmore\n"
    node.docker("rm", "one", "two")
    node.docker("volume", "rm", "vol")


def test_07_docker_cp(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    plugin.create("vol", bucket.name)
    counting(node, "one", "vol")
    node.script("echo copied in >/mnt/in")
    for state in ("running", "stopped"):
        node.docker("cp", "/mnt/in", f"one:/data/{state}")
        node.docker("cp", f"one:/data/{state}", "/mnt/out")
        assert node.script("cat /mnt/out") == "copied in\n"
        if state == "running":
            assert one_mount(node)
            check_counting(node, "one")
            assert node.shell("one", "cat /data/running") == "copied in"
            node.docker("stop", "one")
            plugin.wait_until_idle()
    plugin.wait_until_idle()
    assert bucket.get("stopped") == b"copied in\n"
    node.docker("start", "one")
    assert node.shell("one", "cat /data/stopped") == "copied in"
    node.docker("rm", "-f", "one")
    plugin.wait_until_idle()


@pytest.fixture
def hasty(node: Node, server: Server, plugins: Callable[..., Plugin]) -> Plugin:
    """A plugin whose Unmount waits for uploads only briefly."""
    return plugins(node, server, flags=("--unmount-timeout=3s",))


def test_08_unmount_with_slow_uploads(node: Node, hasty: Plugin, bucket: Bucket, gate: Gate) -> None:
    plugin = hasty
    plugin.create("vol", bucket.name, endpoint=gate.server.endpoint)
    node.container("one", "-v", "vol:/data")
    gate.hold()
    node.shell("one", "for n in 1 2 3 4 5; do echo $n >/data/f$n; done")
    device = node.devices()
    start = time.monotonic()
    node.docker("stop", "one", timeout_s=100)
    assert time.monotonic() - start < UNMOUNT_LIMIT_S
    # The reply came, and the upload goes on: nothing was dropped, and the volume says what waits.
    assert plugin.status("vol")["pending_files"] >= 5
    node.docker("start", "one")
    assert node.shell("one", "cat /data/f5") == "5"
    assert node.devices() == device
    gate.open()
    wait_until(lambda: plugin.status("vol")["pending_files"] == 0)
    node.docker("rm", "-f", "one")
    plugin.wait_until_idle()
    assert files(bucket) == {f"f{n}" for n in range(1, 6)}
    node.docker("volume", "rm", "vol")


def test_09_mount_without_server(node: Node, plugin: Plugin, bucket: Bucket, proxy: Proxy) -> None:
    bucket.put("file", b"there")
    plugin.create("vol", bucket.name, endpoint=proxy.server.endpoint)
    node.docker("create", "--name", "one", "--network", "none", "-v", "vol:/data", "lab", "cat", "/data/file")
    proxy.down()
    start = time.monotonic()
    said = node.refused("start", "one", timeout_s=150)
    assert time.monotonic() - start < MOUNT_LIMIT_S
    assert proxy.server.endpoint.removeprefix("http://") in said
    plugin.wait_until_idle()
    proxy.up()
    assert node.docker("start", "-a", "one") == "there"
    plugin.wait_until_idle()


def test_10_plugin_killed_while_a_container_writes(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    """Also T82: an upgrade of the plugin is its end and a start."""
    plugin.create("vol", bucket.name)
    counting(node, "one", "vol")
    device = node.devices()
    plugin.kill()
    wait_until(lambda: plugin.processes)
    lines = check_counting(node, "one")
    assert node.devices() == device
    plugin.kill()
    node.docker("stop", "one")  # dockerd's call waits in the held socket
    plugin.wait_until_idle()
    assert len(bucket.get("log").split()) == lines
    node.docker("rm", "one")
    node.docker("volume", "rm", "vol")


def test_11_unmount_lost(node: Node, server: Server, plugins: Callable[..., Plugin], bucket: Bucket) -> None:
    plugin = plugins(node, server, held=False)
    plugin.create("vol", bucket.name)
    node.container("one", "-v", "vol:/data")
    node.shell("one", "echo kept >/data/file")
    plugin.kill()
    node.docker("stop", "one", timeout_s=120)  # dockerd asks for 15 s, then never again
    plugin.start()
    plugin.wait_until_idle()
    assert bucket.get("file") == b"kept\n"
    for _ in range(2):
        node.docker("start", "one")
        assert node.shell("one", "cat /data/file") == "kept"
        node.docker("stop", "one")
        plugin.wait_until_idle()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_12_dockerd_ends(node: Node, plugin: Plugin, bucket: Bucket, number: str) -> None:
    """Also T72: after dockerd's restart the container that is to run always sees its data."""
    plugin.create("vol", bucket.name)
    plugin.create("once", bucket.name, prefix="once")
    node.container("always", "--restart", "always", "-v", "vol:/data")
    node.container("once", "-v", "once:/data")
    node.shell("always", "echo kept >/data/file")
    node.shell("once", "echo kept >/data/file")
    node.stop_dockerd(signal.Signals[number])
    node.start_dockerd()
    wait_until(lambda: node.try_shell("always", "cat /data/file") == "kept\n")
    assert node.docker("inspect", "-f", "{{.State.Running}}", "once") == "false"
    wait_until(lambda: bucket.get("once/file") == b"kept\n")
    node.docker("rm", "-f", "always", "once")
    plugin.wait_until_idle()
    node.docker("volume", "rm", "vol", "once")


def test_12_live_restore(nodes: Callable[..., Node], plugins: Callable[..., Plugin], bucket: Bucket) -> None:
    node = nodes(flags=("--live-restore",))
    plugin = plugins(node, bucket.server)
    plugin.create("vol", bucket.name)
    counting(node, "one", "vol")
    device = node.devices()
    node.stop_dockerd(signal.SIGTERM)
    node.start_dockerd("--live-restore")
    node.script("echo copied >/mnt/in")
    node.docker("cp", "/mnt/in", "one:/data/in")
    check_counting(node, "one")
    assert node.devices() == device
    node.docker("stop", "one")  # dockerd sends no Unmount for it
    plugin.wait_until_idle()
    assert bucket.get("in") == b"copied\n"
    node.docker("rm", "one")
    node.docker("volume", "rm", "vol")


def test_13_dockerd_starts_with_many_volumes(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    for number in range(10):
        plugin.create(f"vol{number}", bucket.name, prefix=f"p{number}")
    node.container("always", "--restart", "always", "-v", "vol3:/data")
    node.stop_dockerd(signal.SIGTERM)
    plugin.wait_until_idle()
    plugin.kill()
    start = time.monotonic()
    node.start_dockerd()
    took_s = time.monotonic() - start
    assert took_s < 60, "without an answer it is 15 s for each volume"
    assert len(plugin.volumes()) == 10
    wait_until(lambda: node.try_shell("always", "echo up >/data/file") == "")
    node.docker("rm", "-f", "always")
    plugin.wait_until_idle()


def test_14_mount_killed(node: Node, plugin: Plugin, bucket: Bucket, gate: Gate) -> None:
    """What serves the mount is killed: the container goes on by itself, or is unhealthy until it is started again."""
    plugin.create("vol", bucket.name, endpoint=gate.server.endpoint)
    health = ("--health-cmd", "cat /data/file", "--health-interval", "1s", "--health-retries", "1")
    node.container("one", *health, "-v", "vol:/data")
    gate.hold()
    node.shell("one", "echo journaled >/data/file")
    worker = plugin.status("vol")["pid"]
    node.run("kill", "-KILL", str(worker))
    assert "file" not in bucket.keys()
    gate.open()  # a mount asks the server what it can do, by writing

    def state() -> str:
        return node.docker("inspect", "-f", "{{.State.Health.Status}}", "one")

    def comes_back() -> bool:
        return plugin.status("vol")["state"] == "mounted" and plugin.status("vol")["pid"] != worker

    wait_until(comes_back)
    if node.try_shell("one", "cat /data/file") != "journaled\n":
        wait_until(lambda: state() == "unhealthy")
        node.docker("restart", "one")
    wait_until(lambda: state() == "healthy")
    assert node.shell("one", "cat /data/file") == "journaled"
    wait_until(lambda: "file" in bucket.keys())
    assert bucket.get("file") == b"journaled\n"
    node.docker("rm", "-f", "one")
    plugin.wait_until_idle()


def test_15_remove_while_uploads_wait(node: Node, hasty: Plugin, bucket: Bucket, gate: Gate) -> None:
    plugin = hasty
    plugin.create("vol", bucket.name, endpoint=gate.server.endpoint)
    node.container("one", "-v", "vol:/data")
    gate.hold()
    node.shell("one", "echo kept >/data/file")
    node.docker("rm", "-f", "one", timeout_s=100)
    assert "upload" in node.refused("volume", "rm", "vol")
    assert plugin.volumes() == {"vol"}
    gate.open()
    plugin.wait_until_idle()
    node.docker("volume", "rm", "vol")
    assert bucket.get("file") == b"kept\n"


def test_15_remove_with_stale_ids(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    plugin.create("vol", bucket.name)
    answer = plugin.volume("Mount", "vol", ID="of a container that never was")
    assert not answer["Err"]
    assert answer["Mountpoint"]
    plugin.volume("Unmount", "vol", ID="another one")
    node.docker("volume", "rm", "vol")
    plugin.wait_until_idle()
    assert plugin.volumes() == set()


def test_t75_containers_that_fail(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    plugin.create("vol", bucket.name)
    node.refused(*RUN, "-v", "vol:/data", "lab", "sh", "-c", "echo x >/data/file; exit 1")
    node.container("one", "-v", "vol:/data")
    node.container("two", "-v", "vol:/data")
    node.docker("exec", "-d", "one", "tail", "-f", "/data/file")
    node.docker("kill", "one")
    assert node.shell("two", "cat /data/file") == "x"
    node.docker("rm", "-f", "one", "two")
    plugin.wait_until_idle()
    node.docker("volume", "rm", "vol")
    assert bucket.get("file") == b"x\n"
