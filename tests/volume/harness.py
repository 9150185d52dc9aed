"""A real `s3fuse plugin` on its socket, with what must hold at its end.

Docker is played by `Plugin.call`, a container by `Container`: a process in a mount namespace of its own in which the
volume is bound to another path, as runc does it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3fuse import control, kernel
from s3fuse.mountpoint import refuse_writes
from tests.fuse.harness import S3FUSE, free_environment, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.servers import Server

#: Longest wait for something that comes in well under a second.
WAIT_S = 60.0
_WARNING = re.compile(r" (WARNING|ERROR|CRITICAL) ")


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("plugin", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Refused(AssertionError):
    """What the plugin answered as "Err"."""


def _session(pid: int) -> list[int]:
    """The processes of a mount, its session's leader first: what starts others anew ends before them."""
    try:
        leader = os.getsid(pid)
    except ProcessLookupError:
        return []
    found = []
    for process in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(ProcessLookupError):
            if os.getsid(process) == leader:
                found.append(process)
    return sorted(found, key=lambda process: process != leader)


@dataclass
class Plugin:
    """A plugin with directories of its own; started and ended any number of times."""

    folder: Path
    server: Server
    options: tuple[str, ...] = ()
    #: Regular expressions of warnings that this test expects, of the plugin and of its mounts.
    allowed: list[str] = field(default_factory=list)
    keys: bool = True
    process: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.folder / "s3fuse.sock"

    @property
    def log(self) -> Path:
        return self.folder / "plugin.log"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def command(self) -> list[str]:
        places = {
            "--socket": self.socket,
            "--base-dir": self.folder / "mounts",
            "--state-dir": self.state,
            "--cache-root": self.folder / "cache",
            "--credentials-dir": self.folder / "keys",
            "--linger": "500ms",
            # A test that uses the mount's own path holds nothing, however long it takes.
            "--stale": "1h",
        }
        return [S3FUSE, "plugin", *(f"{name}={value}" for name, value in places.items()), *self.options]

    def start(self) -> Plugin:
        keys = self.server.environment if self.keys else {}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=free_environment(**keys, **self.environment),
                start_new_session=True,
            )
        wait_for(self._answers, timeout_s=WAIT_S)
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log_text()
        with suppress(OSError):
            self.call("Plugin.Activate")
            return True
        return False

    def stop(self, sig: int = signal.SIGTERM) -> None:
        """Ends the plugin; its mounts stay."""
        assert self.process is not None
        self.process.send_signal(sig)
        code = self.process.wait(WAIT_S)
        assert code == (0 if sig == signal.SIGTERM else -sig), self.log_text()
        self.process = None

    # -- the protocol

    def raw(self, path: str, body: bytes = b"", timeout_s: float = 120.0) -> tuple[int, dict[str, Any]]:
        connection = _Connection(self.socket, timeout_s)
        try:
            connection.request("POST", path, body, {"Accept": "application/vnd.docker.plugins.v1.2+json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """What the plugin answers; raises Refused with the text of an error."""
        path = method if method.startswith("Plugin.") else f"VolumeDriver.{method}"
        status, answer = self.raw(f"/{path}", json.dumps(arguments).encode() if arguments else b"")
        assert status == 200, answer
        if answer["Err"]:
            raise Refused(answer["Err"])
        return answer

    def create(self, name: str, **options: str) -> None:
        self.call("Create", Name=name, Opts={key.replace("_", "-"): value for key, value in options.items()})

    def mount(self, name: str, identity: str = "id") -> Path:
        return Path(self.call("Mount", Name=name, ID=identity)["Mountpoint"])

    def unmount(self, name: str, identity: str = "id") -> None:
        self.call("Unmount", Name=name, ID=identity)

    def get(self, name: str) -> dict[str, Any]:
        return dict(self.call("Get", Name=name)["Volume"])

    def status(self, name: str) -> dict[str, Any]:
        return dict(self.get(name)["Status"])

    def names(self) -> set[str]:
        return {volume["Name"] for volume in self.call("List")["Volumes"]}

    # -- the world

    def mountpoint(self, name: str) -> Path:
        return self.folder / "mounts" / name

    def daemon(self, name: str) -> int:
        """The process that the mount's control socket belongs to."""
        return int(control.request(self.mountpoint(name), "status")["pid"])

    def serving(self, name: str) -> int:
        """The process that answers requests: another one than `daemon` where that only keeps the mount."""
        said = control.request(self.mountpoint(name), "status")
        return int(said.get("worker_pid") or said["pid"])

    def kill_daemon(self, name: str) -> None:
        """Kills the mount's keeper and the process that it keeps."""
        session = _session(self.daemon(name))
        kill_all(session)
        for process in session:
            assert control.wait_for_end(process, WAIT_S)

    def mounted(self, name: str) -> bool:
        return kernel.mount_entry(self.mountpoint(name)) is not None

    def gone(self, name: str) -> bool:
        """Whether neither mount nor daemon is left."""
        return not self.mounted(name) and not control.socket_path(self.mountpoint(name)).exists()

    def until_gone(self, name: str) -> None:
        """Returns when nothing is left of a mount, and the plugin knows it."""
        wait_for(lambda: self.gone(name) and self.status(name)["state"] == "unmounted", timeout_s=WAIT_S)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def check_log(self) -> None:
        bad = [
            line
            for line in self.log_text().splitlines()
            if (_WARNING.search(line) or "Traceback" in line)
            and not any(re.search(pattern, line) for pattern in self.allowed)
        ]
        assert not bad, "unexpected in the plugin's log:\n" + "\n".join(bad) + "\n--- log:\n" + self.log_text()[-6000:]

    def end(self) -> None:
        """Ends the plugin, and checks what it and its mounts had to say."""
        if self.process is not None:
            self.stop()
        self.check_log()

    def kill(self) -> None:
        """Ends the plugin and whatever it mounted, at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self.abort()

    def crash_mounts(self) -> None:
        """What a reboot does to mounts: they and their processes are gone at once."""
        for mountpoint in (self.folder / "mounts").glob("*"):
            pid = control.last_said(mountpoint).get("pid")
            session = [] if pid is None else _session(pid)
            kill_all(session)  # before they see that the mount is gone
            while (entry := kernel.mount_entry(mountpoint)) is not None:
                with suppress(OSError):
                    Path(f"/sys/fs/fuse/connections/{entry.device.partition(':')[2]}/abort").write_text("1")
                kernel.unmount(mountpoint, lazy=True)
            for process in session:
                control.wait_for_end(process, 10)

    def abort(self) -> None:
        """Nothing stays mounted, running, or immutable."""
        self.crash_mounts()
        for mountpoint in (self.folder / "mounts").glob("*"):
            refuse_writes(mountpoint, on=False)
        shutil.rmtree(self.folder / "cache", ignore_errors=True)


def kill_all(processes: Iterable[int]) -> None:
    """Kills processes so that none of them sees another one die."""
    for sig in (signal.SIGSTOP, signal.SIGKILL):
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, sig)


@dataclass
class Container:
    """What a container is to a volume: a mount namespace that has it at /data, and a process in that."""

    process: subprocess.Popen[str]
    data: Path

    def run(self, script: str) -> str:
        """Runs a shell script in it and gives its output; raises CalledProcessError."""
        command = ["nsenter", "-m", "-t", str(self.process.pid), "sh", "-ec", f"cd {self.data}; {script}"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


_CONTAINER = """
mount -t tmpfs container "$2"
mkdir "$2/data"
mount --bind "$1" "$2/data"
while read -r _ at type _; do [ "$type" != fuse.s3fuse ] || [ "$at" = "$2/data" ] || umount -l "$at"; done </proc/mounts
echo ready
exec sleep 1000
"""


@contextmanager
def container(mountpoint: Path, folder: Path) -> Iterator[Container]:
    """A container that has the volume mounted: its namespace is a slave of ours, its root a mount of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        ["unshare", "-m", "--propagation", "slave", "sh", "-ec", _CONTAINER, "sh", str(mountpoint), str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    made = Container(process, folder / "data")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield made
    finally:
        made.end()
