"""A machine for one dockerd, made of namespaces: its own mounts, processes, /run, /etc and /var/lib.

Nothing in it can outlive it: the kernel ends every process when the first one ends, and unmounts what they mounted.
The first one ends with the thread that made the node. Network and cgroups are the machine's own, so a node has a
loopback address and a cgroup of its own, and takes what is left of them away at its end.

Mounts propagate inside a node as they do under systemd (`/` is shared), and never out of it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3fuse import kernel
from s3fuse.server import die_with_parent
from tests.docker import unixhttp
from tests.fuse.harness import S3FUSE, free_environment, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_S = 60.0
#: What the names of this session's cgroups begin with.
CGROUPS = f"s3fuse-test-{os.getpid()}"
_GRACE_S = 5.0
_FLAGS = (
    "--storage-driver=overlay2",
    "--iptables=false",
    "--ip6tables=false",
    "--ip-forward=false",
    "--ip-masq=false",
    "--bridge=none",
)
#: What may be written in a node without a trace on the machine.
_OVERLAID = ("/etc", "/var/lib", "/var/cache", "/usr/local/bin")
_SETUP = """
set -eu
hostname "$NAME"
# A mount of somebody else must be able to end while this node lives.
awk '$3 ~ /^fuse/ { print $2 }' /proc/self/mounts | while read -r place; do umount -l "$(printf %b "$place")"; done
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/docker/plugins /run/lock
for place in $PLACES; do
    upper=$FOLDER/overlay$place
    mkdir -p "$upper/upper" "$upper/work"
    chmod --reference="$place" "$upper/upper"
    mount -t overlay overlay -o "lowerdir=$place,upperdir=$upper/upper,workdir=$upper/work" "$place"
done
for place in /mnt /var/lib/docker /var/lib/s3fuse /var/cache/s3fuse; do
    mkdir -p "$FOLDER$place" "$place"
    mount --bind "$FOLDER$place" "$place"
done
# Nobody asks for an image elsewhere.
rm -f /etc/resolv.conf
echo nameserver 127.0.0.1 >/etc/resolv.conf
ln -sf "$S3FUSE" "$DOCKER" /usr/local/bin/
mount --make-rshared /
: >"$FOLDER/ready"
exec tini -- sleep infinity
"""


class DockerError(AssertionError):
    """A command that failed, with all it said."""


@dataclass(frozen=True)
class Process:
    """A process in a node, by its pid on the machine."""

    pid: int
    command: tuple[str, ...]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def runs(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False


def dockerd_binary() -> Path | None:
    """Where dockerd is."""
    found = shutil.which("dockerd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin")
    return Path(found) if found else None


def _client(dockerd: Path) -> Path:
    """The client of the same installation: another one may come first in PATH."""
    return next(path for folder in (".", "../bin") if (path := (dockerd.parent / folder / "docker").resolve()).exists())


class Node:
    """See the module. `start` and `start_dockerd` make it; `end` leaves nothing."""

    def __init__(self, name: str, folder: Path, address: str = "127.0.0.1") -> None:
        self.name = name
        self.folder = folder
        self.address = address
        self.cgroup = f"{CGROUPS}-{name}"
        self.log = folder / "dockerd.log"
        self.dockerd: Process | None = None
        self._unshare: subprocess.Popen[bytes] | None = None
        self._init = 0
        dockerd = dockerd_binary()
        assert dockerd is not None
        self._dockerd = dockerd
        self._docker = _client(dockerd)

    # -- the machine

    def start(self) -> Node:
        """Makes the namespaces."""
        self.folder.mkdir(parents=True)
        command = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        command += ["--propagation", "private", "sh", "-c", _SETUP]
        settings = {"NAME": self.name, "FOLDER": str(self.folder), "PLACES": " ".join(_OVERLAID)}
        settings |= {"S3FUSE": S3FUSE, "DOCKER": str(self._docker)}
        errors = self.folder / "setup.log"
        with errors.open("wb") as output:
            self._unshare = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | settings,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        ready = self.folder / "ready"
        wait_for(lambda: ready.exists() or self._unshare_ended(), timeout_s=LIMIT_S)
        if not ready.exists():
            raise DockerError(f"no namespaces for a node: {errors.read_text()}")
        pid = self._unshare.pid
        self._init = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        return self

    def _unshare_ended(self) -> bool:
        assert self._unshare is not None
        return self._unshare.poll() is not None

    def end(self) -> None:
        """Ends every process in it and removes what it had on the machine."""
        if self._unshare is not None:
            if self._init:
                with suppress(ProcessLookupError):
                    os.kill(self._init, signal.SIGKILL)
            else:
                self._unshare.kill()
            self._unshare.wait(LIMIT_S)
            self._unshare = None
        self._init = 0
        self._remove_cgroups()
        # A bare mountpoint refuses changes, its removal among them.
        subprocess.run(["chattr", "-R", "-f", "-i", self.folder], check=False, timeout=LIMIT_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_cgroups(self) -> None:
        for top in self.cgroups():
            for folder, _, _ in os.walk(top, topdown=False):
                # Its tasks have ended, which the kernel may take a moment to see.
                wait_for(lambda folder=folder: _rmdir(folder), timeout_s=LIMIT_S)

    def cgroups(self) -> list[Path]:
        """The node's cgroups, one a hierarchy."""
        roots = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")]
        return [path for root in roots if (path := root / self.cgroup).is_dir()]

    def path(self, path: str | Path) -> Path:
        """A path of the node as the machine reaches it."""
        return Path(f"/proc/{self._init}/root{path}")

    @property
    def environment(self) -> dict[str, str]:
        places = [
            "/usr/local/bin",
            str(Path(S3FUSE).parent),
            str(self._dockerd.parent),
            "/usr/sbin:/usr/bin:/sbin:/bin",
        ]
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return free_environment(PATH=":".join(places), HOME=str(home))

    def inside(self, *command: str | Path) -> list[str]:
        """The arguments that run a command in the node."""
        return ["nsenter", f"--target={self._init}", "--mount", "--pid", "--uts", "--", *map(str, command)]

    def run(
        self, *command: str | Path, timeout_s: float = LIMIT_S, check: bool = True, **changes: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the node to its end; it is killed there after `timeout_s`. Raises DockerError."""
        environment = self.environment | changes.pop("env", {})
        done = subprocess.run(
            self.inside("timeout", "-s", "KILL", f"{timeout_s}", *command),
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout_s + _GRACE_S,
            env=environment,
            **({"stdin": subprocess.DEVNULL} if "input" not in changes else {}),
            **changes,
        )
        if check and done.returncode:
            raise DockerError(
                f"{self.name}: {command} ended with {done.returncode}\n{done.stdout}{done.stderr}{self.log_tail()}"
            )
        return done

    def script(self, text: str, *arguments: str, **options: Any) -> str:
        """What a shell script says in the node."""
        return self.run("bash", "-euo", "pipefail", "-c", text, "bash", *arguments, **options).stdout

    def spawn(self, *command: str | Path, log: Path, env: dict[str, str] | None = None, **options: Any) -> None:
        """Starts a command in the node that goes on in the background, in a session of its own."""
        with log.open("ab") as output:
            subprocess.Popen(
                self.inside("setsid", "-f", *command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment | (env or {}),
                **options,
            ).wait(LIMIT_S)

    def processes(self, *words: str) -> list[Process]:
        """The living processes in the node whose command line has all these words, by their start."""
        found = []
        for pid in sorted(_descendants(self._init)):
            with suppress(OSError):
                command = tuple(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1])
                process = Process(pid, command)
                if all(any(word in part for part in command) for word in words) and process.runs:
                    found.append(process)
        return found

    def s3fuse(self) -> list[Process]:
        """The processes that run s3fuse, whatever they do: `s3fuse VERB`, `python -m s3fuse VERB`, its modules."""
        every = self.processes()
        return [one for one in every if any(Path(word).name.split(".")[0] == "s3fuse" for word in one.command[:5])]

    def crash(self, *processes: Process) -> None:
        """Kills processes as one, so that none of them sees another's end."""
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in processes:
                process.kill(number)
        wait_for(lambda: not any(process.runs for process in processes), timeout_s=LIMIT_S)

    def mounts(self) -> list[kernel.MountEntry]:
        """The s3fuse mounts that the node sees, those that only containers have not among them."""
        return _fuse_mounts(self._init)

    def devices(self) -> set[str]:
        """The s3fuse connections that somebody in the node has mounted, container or not."""
        found = set()
        for pid in [self._init, *_descendants(self._init)]:
            with suppress(OSError):
                found |= {entry.device for entry in _fuse_mounts(pid)}
        return found

    # -- dockerd

    def start_dockerd(self, *flags: str, timeout_s: float = LIMIT_S) -> Node:
        """Starts dockerd; returns when it answers."""
        self.path("/run/docker.pid").unlink(missing_ok=True)
        self.path("/run/docker/containerd/containerd.pid").unlink(missing_ok=True)
        self.spawn(self._dockerd, *_FLAGS, f"--cgroup-parent=/{self.cgroup}", *flags, log=self.log)
        try:
            wait_for(self._docker_answers, timeout_s=timeout_s)
        except AssertionError:
            raise DockerError(f"dockerd does not answer after {timeout_s} s:{self.log_tail()}") from None
        self.dockerd = next(process for process in self.processes("dockerd") if "dockerd" in process.command[0])
        return self

    def _docker_answers(self) -> bool:
        with suppress(OSError):
            return unixhttp.request(self.path("/run/docker.sock"), "GET", "/_ping", timeout_s=5)[0] == 200
        return False

    def stop_dockerd(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends dockerd; its containerd ends with it."""
        assert self.dockerd is not None
        self.dockerd.kill(number)
        wait_for(lambda: not self.dockerd.runs and not self.processes("containerd", "--config"), timeout_s=LIMIT_S)
        self.dockerd = None

    def docker(self, *words: str | Path, timeout_s: float = LIMIT_S, **options: Any) -> str:
        """What docker says, without the newline at its end. Raises DockerError."""
        return self.run(self._docker, *words, timeout_s=timeout_s, **options).stdout.strip()

    def container(self, name: str, *options: str, image: str = "lab", timeout_s: float = LIMIT_S) -> str:
        """Starts a container that does nothing until it is stopped, which it is at once; gives its name."""
        idle = "trap 'exit 0' TERM; sleep 1000000 & wait"
        run = ("run", "-d", "--name", name, "--network", "none")
        self.docker(*run, *options, image, "sh", "-c", idle, timeout_s=timeout_s)
        return name

    def shell(self, container: str, script: str, *arguments: str, **options: Any) -> str:
        """What a shell script says in a container. Raises DockerError where it fails."""
        return self.docker("exec", container, "sh", "-ec", script, "sh", *arguments, **options)

    def try_shell(self, container: str, script: str) -> str:
        """What a shell script says in a container, both outputs; "" where it succeeds in silence."""
        done = self.run(self._docker, "exec", container, "sh", "-c", f"{{ {script}\n}} 2>&1", check=False)
        return done.stdout + done.stderr

    def refused(self, *words: str | Path, timeout_s: float = LIMIT_S) -> str:
        """What docker says of a command that has to fail."""
        done = self.run(self._docker, *words, timeout_s=timeout_s, check=False)
        if not done.returncode:
            raise DockerError(f"docker {words} succeeded:\n{done.stdout}{done.stderr}")
        assert done.returncode != 128 + signal.SIGKILL, f"docker {words} was killed after {timeout_s} s"
        return done.stderr

    def log_tail(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = [line for line in text.splitlines() if "level=info" not in line]
        return "\n".join(["", "--- end of dockerd's log:", *lines[-30:]])


def _rmdir(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _fuse_mounts(pid: int) -> list[kernel.MountEntry]:
    text = Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    return [entry for entry in kernel.parse_mountinfo(text) if entry.fstype == kernel.FSTYPE]


def _descendants(pid: int) -> Iterator[int]:
    """All processes below this one, parents first."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    left = [pid]
    while left:
        for child in children.get(left.pop(), ()):
            yield child
            left.append(child)


def wait_until(look: Any, *, timeout_s: float = LIMIT_S, every_s: float = 0.1) -> Any:
    """`wait_for` with the patience that a loaded machine needs; a look at docker is dearer than one at a file."""
    return wait_for(look, timeout_s=timeout_s, every_s=every_s)
