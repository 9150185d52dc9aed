"""The volume plugin on a node, with its socket held by (a stand-in for) systemd as docker/ has it, or on its own."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3fuse.volume.uses import UNSEEN
from tests.docker import unixhttp
from tests.docker.documents import ROOT
from tests.docker.node import LIMIT_S, Node, Process, wait_until

if TYPE_CHECKING:
    from tests.fuse.harness import Bucket
    from tests.servers import Server

_SYSTEMCTL = Path(__file__).with_name("systemctl.py")
CREDENTIALS = "/etc/s3fuse/credentials"
_STALE_S = 6


class Plugin:
    """The driver `s3fuse` of a node. Volumes of one test have the options that `create` gives them."""

    name = "s3fuse"

    def __init__(
        self, node: Node, server: Server, *, held: bool = True, defaults: bool = False, flags: tuple[str, ...] = ()
    ) -> None:
        """Starts it. With `defaults` volumes that name no server and keys have the test's."""
        self.node = node
        self.server = server
        self.held = held
        self.flags = ("--linger=1s", f"--stale={_STALE_S}s", *flags)
        self.keys("test", server.access_key, server.secret_key)
        if defaults:
            self.flags += (f"--endpoint={server.endpoint}", "--credentials=test")
        if held:
            self._install_units()
        self.start()

    # -- life

    @property
    def socket(self) -> Path:
        return self.node.path(f"/run/docker/plugins/{self.name}.sock")

    def keys(self, name: str, access_key: str, secret_key: str) -> None:
        """Puts a named credentials file on the node, as one step."""
        folder = self.node.path(CREDENTIALS)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = folder / f".{name}.part"
        part.write_text(f"{access_key}:{secret_key}\n")
        part.chmod(0o600)
        part.replace(folder / name)

    def _install_units(self) -> None:
        install_systemctl(self.node)
        units = self.node.path("/etc/systemd/system")
        units.mkdir(parents=True, exist_ok=True)
        for name in ("s3fuse-plugin.socket", "s3fuse-plugin.service"):
            shutil.copy(ROOT / "docker" / name, units)
        self.node.path("/etc/s3fuse/plugin.env").write_text(f"FLAGS={' '.join(self.flags)}\n")

    def start(self) -> None:
        """Starts it; returns when it answers."""
        if self.held:
            self.node.run("systemctl", "enable", "--now", "s3fuse-plugin.socket")
        else:
            self.node.spawn("s3fuse", "plugin", *self.flags, log=self.log)
        wait_until(self._answers)

    def _answers(self) -> bool:
        with suppress(OSError):
            return bool(self.call("Plugin.Activate", timeout_s=10).get("Implements"))
        return False

    @property
    def log(self) -> Path:
        if self.held:
            return self.node.path("/run/systemctl/s3fuse-plugin.log")
        return self.node.folder / "plugin.log"

    @property
    def processes(self) -> list[Process]:
        return [process for process in self.node.s3fuse() if "plugin" in process.command]

    def kill(self) -> None:
        """SIGKILL; where the socket is held the next one starts by itself."""
        killed = self.processes
        assert killed, "the plugin does not run"
        self.node.crash(*killed)

    # -- volumes

    def call(self, method: str, body: dict[str, Any] | None = None, *, timeout_s: float = 150) -> dict[str, Any]:
        """Asks the plugin itself, as dockerd does."""
        return unixhttp.call(self.socket, method, body, timeout_s=timeout_s)

    def volume(self, method: str, name: str, **more: Any) -> dict[str, Any]:
        return self.call(f"VolumeDriver.{method}", {"Name": name, **more})

    def options(self, bucket: str, **changes: str) -> dict[str, str]:
        """The options of a volume on this bucket of the test's server."""
        found = {"bucket": bucket, "endpoint": self.server.endpoint, "credentials": "test"}
        return found | {name.replace("_", "-"): value for name, value in changes.items()}

    def create(self, name: str, bucket: str, **changes: str) -> str:
        words = [word for pair in self.options(bucket, **changes).items() for word in ("-o", "=".join(pair))]
        return self.node.docker("volume", "create", "-d", self.name, *words, name)

    def mount_argument(self, name: str, target: str, bucket: str, *more: str, **changes: str) -> str:
        """The value of --mount that makes and uses a volume."""
        words = ["type=volume", f"src={name}", f"dst={target}", f"volume-driver={self.name}", *more]
        words += [f"volume-opt={key}={value}" for key, value in self.options(bucket, **changes).items()]
        return ",".join(words)

    def inspect(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.node.docker("volume", "inspect", name))[0]
        return found

    def status(self, name: str) -> dict[str, Any]:
        """What Get says in Status."""
        found: dict[str, Any] = self.volume("Get", name)["Volume"]["Status"]
        return found

    def volumes(self) -> set[str]:
        """The names of all volumes, by dockerd."""
        return set(self.node.docker("volume", "ls", "-q", "-f", f"driver={self.name}").split())

    def mount_processes(self) -> list[Process]:
        """The processes of all mounts."""
        return [process for process in self.node.s3fuse() if "plugin" not in process.command]

    def idle(self) -> bool:
        """Whether no mount is left: no process of one, no connection that anybody holds."""
        return not self.node.devices() and not self.node.mounts() and not self.mount_processes()

    def wait_until_idle(self) -> None:
        # An Unmount may be lost before any container was seen: that counts longer.
        wait_until(self.idle, timeout_s=LIMIT_S + _STALE_S * UNSEEN)

    def log_tail(self) -> str:
        """The ends of its log and of its mounts' logs."""
        logs = [self.log, *self.node.path("/run/s3fuse").glob("*.log")]
        return "\n".join(f"--- {path}:\n{path.read_text(errors='replace')[-6000:]}" for path in logs if path.exists())

    def check_log(self) -> None:
        """Nothing unexpected may have happened."""
        with suppress(FileNotFoundError):
            text = self.log.read_text(errors="replace")
            assert "Traceback" not in text, text[-4000:]


def files(bucket: Bucket) -> set[str]:
    """The keys of a bucket without those that s3fuse has for itself."""
    return {key for key in bucket.keys() if not key.startswith(".s3fuse")}


def install_systemctl(node: Node) -> None:
    """Puts the stand-in for systemd's command in the node."""
    path = node.path("/usr/local/bin/systemctl")
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{_SYSTEMCTL}" "$@"\n')
    path.chmod(0o755)
