"""Fixtures of the tests with a real dockerd; where none can run they are skipped, with the reason."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.docker.images import busybox, copy_up_tree, many_files, tar
from tests.docker.node import CGROUPS, DockerError, Node, dockerd_binary
from tests.docker.plugin import Plugin
from tests.fuse.conftest import buckets, gate
from tests.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fuse.harness import Bucket
    from tests.servers import Server

__all__ = ["buckets", "gate"]

_BRIDGE = Path("/sys/class/net/docker_gwbridge")
TREES = {"lab": list, "seeded": copy_up_tree, "many": lambda: many_files(3000)}


def _missing() -> str:
    """What a dockerd lacks on this machine; "" where nothing is known."""
    if os.geteuid() != 0:
        return "dockerd needs root"
    if not os.path.exists("/dev/fuse"):
        return "no /dev/fuse"
    if dockerd_binary() is None or busybox() is None:
        return "dockerd or a static busybox is not installed: make setup"
    for name in ("unshare", "nsenter", "tini", "containerd", "runc"):
        if shutil.which(name) is None:
            return f"{name} is not installed"
    return ""


@pytest.fixture(scope="session")
def docker_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where nodes live. At its end nothing of them may be left on the machine."""
    if reason := _missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("docker")
    bridged = _BRIDGE.exists()
    trial = Node("trial", folder / "trial")
    try:
        trial.start().start_dockerd()
    except DockerError as error:
        pytest.skip(f"no dockerd can run here: {error}")
    finally:
        trial.end()
    yield folder
    if _BRIDGE.exists() and not bridged:
        subprocess.run(["ip", "link", "del", _BRIDGE.name], check=True, timeout=60)
    assert not _left(folder), f"left on the machine: {_left(folder)}"
    shutil.rmtree(folder)


def _left(folder: Path) -> list[str]:
    """Processes, mounts and cgroups of nodes that are gone."""
    found = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    found += [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{CGROUPS}-*")]
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = Path(entry.path, "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if str(folder) in command:
                found.append(command.replace("\0", " "))
    return found


@pytest.fixture(scope="session")
def images(docker_folder: Path) -> Callable[[str], Path]:
    """The tar file of an image by its name in `TREES`, made once."""

    def find(name: str) -> Path:
        path = docker_folder / f"{name}.tar"
        if not path.exists():
            path.write_bytes(tar(TREES[name]()))
        return path

    return find


@pytest.fixture
def nodes(
    docker_folder: Path, images: Callable[[str], Path], request: pytest.FixtureRequest
) -> Iterator[Callable[..., Node]]:
    """Makes machines with a dockerd each, which end with the test; images by name, `lab` is always there."""
    made: list[Node] = []

    def make(*names: str, dockerd: bool = True, flags: tuple[str, ...] = ()) -> Node:
        number = len(made) + 1
        node = Node(f"n{number}", docker_folder / f"n{number}", f"127.0.{os.getpid() % 250 + 1}.{number}")
        made.append(node)
        node.start()
        if dockerd:
            node.start_dockerd(*flags)
            for name in ("lab", *names):
                node.docker("import", "-c", 'CMD ["/bin/sh"]', images(name), name)
        return node

    try:
        yield make
    finally:
        for node in made:
            node.end()


@pytest.fixture
def node(nodes: Callable[..., Node]) -> Node:
    """One machine with a dockerd and the image `lab`."""
    return nodes()


@pytest.fixture
def server(minio_server: Server) -> Server:
    """The store behind the volumes."""
    return minio_server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A way to the store that can fail."""
    proxy = Proxy(server)
    yield proxy
    proxy.close()


@pytest.fixture
def bucket(server: Server, buckets: Callable[..., Bucket]) -> Bucket:
    """An empty bucket in the store."""
    return buckets(server)


@pytest.fixture
def plugin(node: Node, server: Server, plugins: Callable[..., Plugin]) -> Plugin:
    """The volume plugin on `node`, its socket held as docker/ has it."""
    return plugins(node, server)


@pytest.fixture
def plugins() -> Iterator[Callable[..., Plugin]]:
    """Makes volume plugins on nodes."""
    made: list[Plugin] = []

    def make(node: Node, server: Server, **options: object) -> Plugin:
        plugin = Plugin(node, server, **options)
        made.append(plugin)
        return plugin

    yield make
    for plugin in made:
        print(plugin.log_tail())  # which pytest shows of a test that failed
        plugin.check_log()
