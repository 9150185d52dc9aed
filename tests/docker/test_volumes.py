"""Volumes as docker's user sees them: docker.md §8, tests 1, 2, 5, 16, 17; trials T73, T80, T83, T84."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.docker.node import Node
    from tests.docker.plugin import Plugin
    from tests.fuse.harness import Bucket
    from tests.servers import Server

pytestmark = pytest.mark.timeout(240)

#: What a call that answers from memory may take (docker.md §8, 16).
PROMPT_S = 0.1


def test_01_create_inspect_list_remove(node: Node, plugin: Plugin, bucket: Bucket, server: Server) -> None:
    plugin.create("vol", bucket.name)
    about = plugin.inspect("vol")
    assert about["Driver"] == "s3fuse"
    assert about["Scope"] == "global"
    assert about["Status"]["bucket"] == bucket.name
    assert about["Status"]["state"]
    assert server.secret_key not in json.dumps(about)
    assert plugin.volumes() == {"vol"}
    node.docker("volume", "rm", "vol")
    assert plugin.volumes() == set()


def test_01_wrong_options_make_no_volume(node: Node, plugin: Plugin, bucket: Bucket, server: Server) -> None:
    def refusal(**options: str) -> str:
        return node.refused("volume", "create", "-d", "s3fuse", *_words(plugin.options(bucket.name) | options), "vol")

    said = refusal(colour="blue")
    assert "colour" in said
    assert "endpoint" in said  # the known ones are named
    assert "Not A Bucket" in refusal(bucket="Not A Bucket")
    assert "attr-ttl" in refusal(**{"attr-ttl": "soon"})
    assert "nobody" in refusal(credentials="nobody")
    assert plugin.volumes() == set()


def test_01_wrong_key_and_missing_bucket_fail_the_run(
    node: Node, plugin: Plugin, bucket: Bucket, server: Server
) -> None:
    plugin.keys("wrong", server.access_key, "not the secret")
    plugin.create("locked", bucket.name, credentials="wrong")
    said = node.refused("run", "--rm", "--network", "none", "-v", "locked:/data", "lab", "true")
    assert "refuse" in said
    assert "not the secret" not in said
    plugin.create("nowhere", f"{bucket.name}-missing")
    assert f"{bucket.name}-missing" in node.refused(
        "run", "--rm", "--network", "none", "-v", "nowhere:/data", "lab", "true"
    )
    assert plugin.idle()
    node.docker("volume", "rm", "locked", "nowhere")


def test_02_one_definition(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    plugin.create("vol", bucket.name)
    plugin.create("vol", bucket.name)
    assert plugin.volumes() == {"vol"}
    plugin.create("vol", "other")  # dockerd does not pass it on
    assert plugin.inspect("vol")["Status"]["bucket"] == bucket.name
    assert not plugin.volume("Create", "vol", Opts=plugin.options(bucket.name))["Err"]
    error = plugin.volume("Create", "vol", Opts=plugin.options("other"))["Err"]
    assert "vol" in error
    assert "other" in error
    assert plugin.status("vol")["bucket"] == bucket.name


def test_05_volume_by_mount_option(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    argument = plugin.mount_argument("vol", "/data", bucket.name, "volume-label=team=blue")
    node.docker("run", "--rm", "--network", "none", "--mount", argument, "lab", "sh", "-c", "echo kept >/data/file")
    assert plugin.inspect("vol")["Labels"] == {"team": "blue"}
    plugin.wait_until_idle()
    assert bucket.get("file") == b"kept\n"
    node.docker("volume", "rm", "vol")
    assert bucket.get("file") == b"kept\n"


def test_16_parallel_runs(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    for number in range(5):
        plugin.create(f"vol{number}", bucket.name, prefix=f"p{number}")
    took_s: list[float] = []

    def run(number: int) -> None:
        script = f"echo {number} >/data/f{number}"
        volume = f"vol{number % 5}:/data"
        node.docker("run", "--rm", "--network", "none", "-v", volume, "lab", "sh", "-c", script, timeout_s=180)

    def look(until: Callable[[], bool]) -> None:
        while not until():
            start = time.monotonic()
            assert len(plugin.call("VolumeDriver.List")["Volumes"]) == 5
            took_s.append(time.monotonic() - start)

    with ThreadPoolExecutor(21) as pool:
        runs = [pool.submit(run, number) for number in range(20)]
        looking = pool.submit(look, lambda: all(one.done() for one in runs))
        for one in runs:
            one.result()
        looking.result()
    assert min(took_s) < PROMPT_S  # the machine is loaded, and who looks waits for it too
    plugin.wait_until_idle()
    assert bucket.keys() >= {f"p{number % 5}/f{number}" for number in range(20)}
    node.docker("volume", "rm", *(f"vol{number}" for number in range(5)))
    assert plugin.call("VolumeDriver.List")["Volumes"] == []


def test_17_odd_names(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    for name in ("../evil", "a/../../evil", "..", ".", "", "evil\0", "a/b", "-evil\n"):
        answer = plugin.volume("Create", name, Opts=plugin.options(bucket.name))
        if not answer["Err"]:
            assert not plugin.volume("Remove", name)["Err"]
    assert node.script("find /var/lib /var/cache /etc /run /mnt -name '*evil*'") == ""
    for name in ("f" * 64, "with.dots.and-dashes_1", "n" * 255):
        node.docker("volume", "create", "-d", "s3fuse", *_words(plugin.options(bucket.name, prefix=name[:9])), name)
        node.docker("run", "--rm", "--network", "none", "-v", f"{name}:/data", "lab", "sh", "-c", "echo x >/data/x")
        plugin.wait_until_idle()
        assert bucket.get(f"{name[:9]}/x") == b"x\n"
        node.docker("volume", "rm", name)
    assert plugin.volumes() == set()


def test_t84_many_volumes(node: Node, plugin: Plugin, bucket: Bucket) -> None:
    """One container with three volumes, then twenty on a node; what each takes."""
    names = [f"vol{number}" for number in range(20)]
    for name in names:
        plugin.create(name, bucket.name, prefix=name)

    def use(count: int) -> tuple[str, ...]:
        return tuple(word for name in names[:count] for word in ("-v", f"{name}:/{name}:nocopy"))

    write = 'for folder in /vol*; do echo x >"$folder/x"; done'
    node.docker("run", "--rm", "--network", "none", *use(3), "lab", "sh", "-ec", write)
    node.container("one", *use(20), timeout_s=150)
    node.shell("one", write)
    assert len(node.devices()) == 20
    total = sum(_private_bytes(process.pid) for process in plugin.mount_processes())
    print(f"memory of 20 volumes: {total / 1e6:.0f} MB, {total / 20e6:.1f} MB each")
    assert total < 1.5e9  # of a node of 2 GiB
    node.docker("rm", "-f", "one")
    plugin.wait_until_idle()
    assert bucket.keys() >= {f"{name}/x" for name in names}


def _private_bytes(pid: int) -> int:
    """The memory that a process has for itself alone, and its share of the rest."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))


def _words(options: dict[str, str]) -> list[str]:
    return [word for pair in options.items() for word in ("-o", "=".join(pair))]
