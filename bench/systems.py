"""The filesystems of `systems.toml`, and one of them mounted: mount, unmount, cold again, ended whatever happens."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bench import processes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MOUNT_S = 30.0
_END_S = 60.0
#: Where this interpreter's scripts are: s3fuse and the peers that come as wheels.
_PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


class Broken(Exception):
    """A filesystem did not do what a workload asked of it."""


@dataclass(frozen=True)
class System:
    """One entry of systems.toml."""

    name: str
    title: str
    binary: str
    version: Sequence[str]
    mount: Sequence[str]
    umount: Sequence[str]
    fstype: str
    durable: Literal["listed", "closed"]
    plain: bool
    environment: Mapping[str, str] = field(default_factory=dict)
    prepare: Sequence[Sequence[str]] = ()
    foreground: bool = False
    limit: bool = False

    @property
    def present(self) -> bool:
        return shutil.which(self.binary, path=_PATH) is not None

    def version_text(self) -> str:
        """The first line of what it says of its version."""
        done = subprocess.run(
            self.version, capture_output=True, text=True, env={**os.environ, "PATH": _PATH}, timeout=30, check=False
        )
        return (done.stdout or done.stderr).strip().partition("\n")[0]


def systems() -> dict[str, System]:
    """All entries by name, s3fuse first. Raises TypeError for an entry with a wrong field."""
    found = tomllib.loads(Path(__file__).with_name("systems.toml").read_text())
    return {name: System(name=name, **entry) for name, entry in found.items()}


class Place:
    """A bucket and the mountpoint, cache and state of one system for it."""

    def __init__(self, system: System, folder: Path, bucket: str, access: Mapping[str, str]) -> None:
        """`access` has endpoint, access_key and secret_key."""
        self.system = system
        self.folder = folder
        self.bucket = bucket
        self.mark = secrets.token_hex(8)
        self.path, self._cache, state = (folder / part for part in ("mnt", "cache", "state"))
        for made in (self.path, self._cache, state):
            made.mkdir(parents=True)
        self._log = folder / "mount.log"
        self._daemon: subprocess.Popen[bytes] | None = None
        self._fields = dict(access) | {
            "bucket": bucket,
            "mountpoint": str(self.path),
            "cache": str(self._cache),
            "state": str(state),
            "root": str(Path(__file__).parents[1]),
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MINIO_", "RCLONE_", "MC_"))}
        given = {k: v.format_map(self._fields) for k, v in system.environment.items()}
        self._environment = kept | given | {"PATH": _PATH, "HOME": str(folder), processes.MARK: self.mark}
        for command in system.prepare:
            self._run(command, "prepare")

    def mount(self) -> None:
        """Returns when it is mounted. Raises Broken if it is not within 30 s."""
        if self.system.foreground:
            with self._log.open("ab") as log:
                self._daemon = subprocess.Popen(
                    self._filled(self.system.mount), env=self._environment, stdout=log, stderr=log, cwd="/"
                )
        else:
            self._run(self.system.mount, "mount")
        end = time.monotonic() + _MOUNT_S
        while not self._mounted():
            if time.monotonic() > end:
                raise Broken(f"{self.system.title} did not mount: {self._log_tail()}")
            time.sleep(0.01)

    def unmount(self) -> None:
        """Unmounts and waits until the filesystem's processes have ended. Raises Broken."""
        self._run(self.system.umount, "umount")
        if not processes.wait_for_end(self.mark, _END_S):
            raise Broken(f"{self.system.title} runs on {_END_S:.0f} s after it was unmounted")
        self._reap()

    def clear(self) -> None:
        """Forgets what it cached; nothing may be mounted."""
        shutil.rmtree(self._cache)
        self._cache.mkdir()

    def kill(self) -> None:
        """Ends whatever is left of it."""
        if self._mounted():
            subprocess.run(["umount", "-l", str(self.path)], check=False, capture_output=True, timeout=30)
        marked = processes.marked(self.mark)
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: one that keeps another would start it again
            for pid in marked:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        processes.wait_for_end(self.mark, 10)
        self._reap()

    def _reap(self) -> None:
        if self._daemon is not None:
            self._daemon.wait(10)
            self._daemon = None

    def _mounted(self) -> bool:
        wanted = f" {self.path} {self.system.fstype} "
        return wanted in Path("/proc/self/mounts").read_text()

    def _filled(self, command: Sequence[str]) -> list[str]:
        return [word.format_map(self._fields) for word in command]

    def _run(self, command: Sequence[str], what: str) -> None:
        with self._log.open("ab") as log:
            done = subprocess.run(
                self._filled(command),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                timeout=_END_S,
                check=False,
            )
        if done.returncode:
            raise Broken(f"{self.system.title}: {what} ended with {done.returncode}: {self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
        return lines[-1][:200] if lines else "no word in its log"


class LocalPlace:
    """A directory on the local disk, as a limit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = secrets.token_hex(8)
        self.path = folder / "local"
        self.path.mkdir(parents=True)

    def mount(self) -> None: ...

    def unmount(self) -> None: ...

    def clear(self) -> None: ...

    def kill(self) -> None: ...
