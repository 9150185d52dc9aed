"""compose.yml and stack.yml of docker/, as they are, and the systemd units beside them."""

from __future__ import annotations

import configparser
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.docker.documents import ROOT, commands
from tests.docker.images import program, tar
from tests.docker.node import wait_until
from tests.docker.test_swarm import Swarm, containers
from tests.servers import minio_binary

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.docker.node import Node
    from tests.docker.plugin import Plugin
    from tests.fuse.harness import Bucket

pytestmark = pytest.mark.timeout(300)


def test_compose(node: Node, plugin: Plugin, docker_folder: Path) -> None:
    """MinIO in a container, and two services on a bucket of it."""
    compose = shutil.which("docker-compose")
    if compose is None:
        pytest.skip("no docker-compose")
    image = docker_folder / "minio.tar"
    image.write_bytes(tar(program("bin/minio", minio_binary())))
    node.docker("import", "-c", 'ENTRYPOINT ["/bin/minio"]', image, "minio", timeout_s=120)
    address = f"{node.address}:9000"
    environment = {"MINIO_IMAGE": "minio", "IMAGE": "lab", "MINIO_ADDRESS": address}
    environment |= {"MINIO_ROOT_USER": "composed", "MINIO_ROOT_PASSWORD": "quite a secret"}
    plugin.keys("compose", environment["MINIO_ROOT_USER"], environment["MINIO_ROOT_PASSWORD"])

    def run(*words: str) -> str:
        file = str(ROOT / "docker/compose.yml")
        return node.run(compose, "-p", "demo", "-f", file, *words, timeout_s=150, env=environment).stdout

    run("up", "-d")
    reader = run("ps", "-q", "reader").strip()
    wait_until(lambda: len(node.docker("logs", reader).splitlines()) > 2)
    assert len(node.devices()) == 1
    run("down", "--timeout", "30", "--volumes")
    plugin.wait_until_idle()


def test_stack(nodes: Callable[..., Node], plugins: Callable[..., Plugin], bucket: Bucket) -> None:
    """Two nodes; the plugin has its keys from a secret of the swarm."""
    pair = [nodes(), nodes()]
    each = [plugins(node, bucket.server) for node in pair]
    swarm = Swarm(*pair)
    for node in pair:
        node.script(commands("docker/README.md", "follow"), env=bucket.server.environment | {"BUCKET": bucket.name})
    manager = swarm.manager
    keys = f"{bucket.server.access_key}:{bucket.server.secret_key}\n"
    manager.docker("secret", "create", "s3fuse-keys", "-", input=keys)
    environment = {"IMAGE": "lab", "ENDPOINT": bucket.server.endpoint, "BUCKET": bucket.name}
    manager.docker(
        "stack", "deploy", "-c", str(ROOT / "docker/stack.yml"), "--resolve-image", "never", "shop", env=environment
    )
    swarm.wait_for("shop_keys", 2)
    swarm.wait_for("shop_app", 2)
    swarm.wait_for("shop_by-bind", 2)
    wait_until(lambda: {"shop_app.1", "shop_app.2"} <= bucket.keys())
    for node in pair:
        container = containers(node, "shop_by-bind")[0]
        wait_until(
            lambda node=node, container=container: "shop_app.1" in node.try_shell(container, "ls /mnt/s3/photos")
        )
    said = manager.docker("volume", "inspect", "shop_shared") + manager.docker("service", "inspect", "shop_app")
    assert bucket.server.secret_key not in said
    manager.docker("stack", "rm", "shop")
    wait_until(lambda: not any(node.docker("ps", "-q") for node in pair))
    for node, plugin in zip(pair, each, strict=True):
        node.run("s3fuse", "umount", "/mnt/s3/photos")
        plugin.wait_until_idle()


def test_units() -> None:
    """What the mounts' life depends on is in the unit files."""

    def unit(name: str) -> configparser.ConfigParser:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read(ROOT / "docker" / name)
        return parser

    service, held = unit("s3fuse-plugin.service"), unit("s3fuse-plugin.socket")
    assert service["Service"]["KillMode"] == "process"
    assert service["Service"]["Restart"] == "always"
    assert held["Socket"]["ListenStream"].startswith("/run/docker/plugins/")
    assert "docker.service" in held["Unit"]["Before"]
    assert "docker.service" in service["Unit"]["Before"]
    assert service["Unit"]["Requires"] == "s3fuse-plugin.socket"
