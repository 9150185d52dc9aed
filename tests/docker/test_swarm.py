"""Services of a swarm, on one node and on two: docker.md §8, tests 18 to 21; trial T79."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.docker.images import LISTING, copy_up_tree, listing, parse_listing
from tests.docker.node import DockerError, Node, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.docker.plugin import Plugin
    from tests.fuse.harness import Bucket

pytestmark = pytest.mark.timeout(400)

#: What a task does: says in the volume that it is there, and ends at once when it is told to.
TASK = 'trap "exit 0" TERM; echo "$TASK" >"/data/$TASK"; sleep 1000000 & wait'
IDLE = 'trap "exit 0" TERM; sleep 1000000 & wait'
#: A failed dockerd is noticed after a few missed heartbeats; a node that is slow must not count as failed.
HEARTBEAT = "4s"


class Swarm:
    """A swarm of nodes of one test; the first is the manager."""

    def __init__(self, *nodes: Node, plugins_known: bool = True) -> None:
        """Makes it. dockerd tells the scheduler of plugins that it has spoken to, later ones in up to 20 s."""
        if plugins_known:
            for node in nodes:
                node.docker("volume", "ls")
        self.nodes = nodes
        self.manager, *others = nodes
        address = self.manager.address
        listen = ("--advertise-addr", address, "--listen-addr", f"{address}:2377")
        self.manager.docker("swarm", "init", *listen, "--dispatcher-heartbeat", HEARTBEAT)
        token = self.manager.docker("swarm", "join-token", "-q", "worker")
        for node in others:
            listen = ("--advertise-addr", node.address, "--listen-addr", f"{node.address}:2377")
            node.docker("swarm", "join", "--token", token, *listen, f"{address}:2377")
        self.ids = {node.name: node.docker("info", "-f", "{{.Swarm.NodeID}}") for node in nodes}

    def service(self, name: str, *options: str, image: str = "lab", script: str = TASK) -> None:
        """Makes a service; returns before its tasks run."""
        environment = ("--env", "TASK={{.Service.Name}}.{{.Task.ID}}")
        self.manager.docker(
            *("service", "create", "-d", "--name", name, "--network", "host", "--no-resolve-image"),
            *(*environment, "--restart-delay", "1s", *options, image, "sh", "-c", script),
        )

    def tasks(self, service: str, *filters: str) -> list[dict[str, Any]]:
        """What docker says of the tasks of a service."""
        said = self.manager.docker("service", "ps", "--no-trunc", "--format", "{{json .}}", *filters, service)
        return [json.loads(line) for line in said.splitlines()]

    def running(self, service: str) -> list[dict[str, Any]]:
        wanted = self.tasks(service, "--filter", "desired-state=running")
        return [task for task in wanted if task["CurrentState"].startswith("Running")]

    def wait_for(self, service: str, count: int, *, on: str = "") -> list[dict[str, Any]]:
        """Returns when exactly so many tasks run, on this node if one is named, and no others are to run."""

        def settled() -> bool:
            wanted = self.tasks(service, "--filter", "desired-state=running")
            running = self.running(service)
            return len(wanted) == len(running) == count and all(not on or task["Node"] == on for task in running)

        try:
            wait_until(settled, timeout_s=150, every_s=0.3)
        except AssertionError:
            raise DockerError(f"{service} has not {count} tasks running: {self.tasks(service)}") from None
        return self.running(service)

    def availability(self, node: Node, value: str) -> None:
        self.manager.docker("node", "update", "--availability", value, self.ids[node.name])

    def end_services(self) -> None:
        for service in self.manager.docker("service", "ls", "-q").split():
            self.manager.docker("service", "rm", service)
        for node in self.nodes:
            wait_until(lambda node=node: node.dockerd is None or not node.docker("ps", "-aq"))


def containers(node: Node, service: str) -> list[str]:
    """The ids of a service's running containers on a node."""
    return node.docker("ps", "-q", "--filter", f"label=com.docker.swarm.service.name={service}").split()


def test_18_one_node(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    swarm = Swarm(node)
    mount = plugin.mount_argument("vol", "/data", bucket.name, "volume-nocopy=true")
    swarm.service("s", "--replicas", "3", "--mount", mount)
    tasks = swarm.wait_for("s", 3)
    names = {f"s.{task['ID']}" for task in tasks}
    for container in containers(node, "s"):
        wait_until(lambda container=container: set(node.shell(container, "ls /data").split()) == names)
    assert len(node.devices()) == 1

    swarm.manager.docker("service", "scale", "-d", "s=5")
    swarm.wait_for("s", 5)
    for order in ("stop-first", "start-first"):
        before = {task["ID"] for task in swarm.running("s")}
        node.docker("service", "update", "-d", "--force", "--update-parallelism", "0", "--update-order", order, "s")
        wait_until(lambda before=before: not before & {task["ID"] for task in swarm.running("s")}, timeout_s=150)
        swarm.wait_for("s", 5)
        assert len(node.devices()) == 1
    swarm.availability(node, "drain")
    plugin.wait_until_idle()
    swarm.availability(node, "active")
    last = {f"s.{task['ID']}" for task in swarm.wait_for("s", 5)}
    wait_until(lambda: last <= bucket.keys())
    swarm.end_services()
    plugin.wait_until_idle()
    node.docker("volume", "rm", "vol")


def test_19_replicas_with_copy_up(nodes: Callable[..., Node], plugins: Callable[..., Plugin], bucket: Bucket) -> None:
    node = nodes("seeded")
    plugin = plugins(node, bucket.server)
    swarm = Swarm(node)
    mount = plugin.mount_argument("vol", "/data", bucket.name)
    swarm.service("s", "--replicas", "3", "--mount", mount, image="seeded", script=IDLE)
    swarm.wait_for("s", 3)
    for container in containers(node, "s"):
        found = parse_listing(node.docker("exec", container, "sh", "-ec", LISTING, "sh", "/data"))
        assert found == listing(copy_up_tree(), "data")
    swarm.end_services()
    plugin.wait_until_idle()


def test_20_two_nodes(nodes: Callable[..., Node], plugins: Callable[..., Plugin], bucket: Bucket) -> None:
    one, two = pair = [nodes(), nodes()]
    each = [plugins(node, bucket.server) for node in pair]
    swarm = Swarm(*pair)
    mount = each[0].mount_argument("vol", "/data", bucket.name, "volume-nocopy=true")
    swarm.service("g", "--mode", "global", "--mount", mount)
    swarm.wait_for("g", 2)
    there = {node.name: containers(node, "g")[0] for node in pair}
    one.shell(there["n1"], "echo from one >/data/file; sync /data/file")
    wait_until(lambda: two.try_shell(there["n2"], "cat /data/file") == "from one\n")
    two.shell(there["n2"], "echo from two >>/data/file; sync /data/file")
    wait_until(lambda: one.try_shell(there["n1"], "cat /data/file") == "from one\nfrom two\n")

    swarm.service("r", "--replicas", "1", "--mount", mount)
    swarm.availability(two, "drain")
    swarm.wait_for("r", 1, on="n1")
    each[1].wait_until_idle()
    swarm.availability(two, "active")
    swarm.availability(one, "drain")
    swarm.wait_for("r", 1, on="n2")
    each[0].wait_until_idle()
    swarm.availability(one, "active")
    swarm.wait_for("g", 2)

    # A node that loses its dockerd keeps its containers, and the swarm starts the task elsewhere: two writers.
    left = two.docker("inspect", "-f", "{{.State.Pid}}", containers(two, "r")[0])
    two.stop_dockerd(signal.SIGKILL)
    swarm.wait_for("r", 1, on="n1")
    moved = containers(one, "r")[0]
    one.shell(moved, "echo base >/data/both; sync /data/both")
    enter = ("nsenter", "--target", left, "--mount", "--", "/bin/sh", "-c")
    wait_until(lambda: two.run(*enter, "cat /data/both", check=False).stdout == "base\n")
    holding = "exec 3>>/data/both; echo one >&3; touch /tmp/open; while [ ! -e /tmp/go ]; do sleep 0.1; done"
    one.docker("exec", "-d", moved, "sh", "-c", holding)
    wait_until(lambda: one.try_shell(moved, "ls /tmp/open") == "/tmp/open\n")
    two.run(*enter, "echo two >/data/both; sync /data/both")
    one.shell(moved, "touch /tmp/go")
    wait_until(lambda: {bucket.get(key) for key in bucket.keys("both")} == {b"base\none\n", b"two\n"})
    assert any(key.startswith("both.conflict-n1-") for key in bucket.keys("both"))
    swarm.end_services()
    each[0].wait_until_idle()


def test_21_missing_plugin(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    swarm = Swarm(node, plugins_known=False)
    mount = plugin.mount_argument("vol", "/data", bucket.name, "volume-nocopy=true")
    swarm.service("s", "--replicas", "1", "--mount", mount)
    wait_until(lambda: "missing plugin" in swarm.tasks("s")[0]["Error"])
    assert swarm.tasks("s")[0]["CurrentState"].startswith("Pending")
    node.docker("volume", "ls")
    swarm.wait_for("s", 1)
    swarm.end_services()
    plugin.wait_until_idle()


def test_t79_volumes_by_name_only(nodes: Callable[..., Node], plugins: Callable[..., Plugin], bucket: Bucket) -> None:
    """A node that has only the name of a volume gets the same bucket by rule, or a clear error: never an empty one."""
    one, two = pair = [nodes(), nodes()]
    each = [plugins(node, bucket.server, defaults=True) for node in pair]
    swarm = Swarm(*pair)
    by_name = "type=volume,src={},dst=/data,volume-driver=s3fuse,volume-nocopy=true"
    swarm.service("s", "--mode", "global", "--mount", by_name.format(bucket.name))
    names = {f"s.{task['ID']}" for task in swarm.wait_for("s", 2)}
    for node in pair:
        container = containers(node, "s")[0]
        wait_until(lambda node=node, there=container: set(node.shell(there, "ls /data").split()) == names)

    each[0].create("alias-of-it", bucket.name)
    swarm.service("t", "--mode", "global", "--mount", by_name.format("alias-of-it"))
    wait_until(lambda: containers(one, "t"))
    wait_until(lambda: any("alias-of-it" in task["Error"] for task in swarm.tasks("t") if task["Node"] == "n2"))
    assert not containers(two, "t")
    swarm.end_services()
    for plugin in each:
        plugin.wait_until_idle()
