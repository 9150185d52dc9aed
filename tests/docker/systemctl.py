"""Stands in for systemd in a node: socket activation of one service, as its unit files say.

`systemctl enable --now NAME.socket` holds the socket and starts NAME.service at the first connection, again at once
when it ends (Restart=always), and after `stop` at the next connection. `stop` and `kill` send the service's main
process a signal and no other, which is what KillMode=process means; other values are refused.
"""

from __future__ import annotations

import configparser
import os
import select
import shlex
import signal
import socket
import sys
import time
from pathlib import Path

UNITS = Path("/etc/systemd/system")
RUNTIME = Path("/run/systemctl")


def unit(name: str) -> configparser.ConfigParser:
    """A unit file. Raises SystemExit where there is none."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    if not parser.read(UNITS / name):
        sys.exit(f"Failed to enable unit: Unit file {name} does not exist.")
    return parser


def listen(name: str) -> socket.socket:
    """The listening socket of NAME.socket."""
    section = unit(f"{name}.socket")["Socket"]
    path = Path(section["ListenStream"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(int(section.get("SocketMode", "0666"), 8))
    listener.listen(128)
    return listener


def environment_lines(name: str) -> list[str]:
    """The lines NAME=VALUE of an EnvironmentFile, which with a dash before it need not exist."""
    path = Path(name.removeprefix("-"))
    if not name or (name.startswith("-") and not path.exists()):
        return []
    return [line for line in path.read_text().splitlines() if "=" in line and not line.startswith("#")]


def start(name: str, listener: socket.socket) -> int:
    """Starts the service with the socket as descriptor 3; gives its pid."""
    section = unit(f"{name}.service")["Service"]
    if section.get("KillMode") != "process":
        sys.exit(f"{name}.service: mounts would end with the plugin: KillMode must be process")
    environment = dict(line.split("=", 1) for line in environment_lines(section.get("EnvironmentFile", "")))
    command: list[str] = []
    for word in shlex.split(section["ExecStart"]):  # $NAME as a word of its own is split into words
        command += environment.get(word[1:], "").split() if word.startswith("$") else [word]
    for folder in section.get("RuntimeDirectory", "").split():
        Path("/run", folder).mkdir(exist_ok=True, mode=int(section["RuntimeDirectoryMode"], 8))
    pid = os.fork()
    if pid == 0:
        os.dup2(listener.fileno(), 3, inheritable=True)
        activation = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
        os.execvpe(command[0], command, {**os.environ, **environment, **activation})
    (RUNTIME / f"{name}.pid").write_text(str(pid))
    return pid


def hold(name: str) -> None:
    """Holds the socket; starts the service at a connection, and again when it ends other than by `stop`."""
    listener = listen(name)
    (RUNTIME / f"{name}.held").touch()
    running, stopped = RUNTIME / f"{name}.pid", RUNTIME / f"{name}.stopped"
    restarts = unit(f"{name}.service")["Service"].get("Restart") == "always"
    while True:
        select.select([listener], [], [])
        while True:
            os.waitpid(start(name, listener), 0)
            running.unlink()
            if stopped.exists() or not restarts:
                break
        stopped.unlink(missing_ok=True)


def detach(name: str) -> None:
    """Leaves the caller's session and terminal."""
    os.setsid()
    log = os.open(RUNTIME / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((null, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, number)


def wait_for(path: Path, *, there: bool) -> None:
    while path.exists() != there:
        time.sleep(0.02)


def main(words: list[str]) -> None:
    RUNTIME.mkdir(exist_ok=True)
    flags = [word for word in words if word.startswith("-")]
    verb, *names = [word for word in words if not word.startswith("-")]
    match verb:
        case "daemon-reload":
            return
        case "enable" if flags == ["--now"] and names[0].endswith(".socket"):
            name = names[0].removesuffix(".socket")
            unit(f"{name}.socket")
            if os.fork() == 0:
                detach(name)
                hold(name)
            wait_for(RUNTIME / f"{name}.held", there=True)
        case "stop" | "kill" if names[0].endswith(".service"):
            name = names[0].removesuffix(".service")
            running = RUNTIME / f"{name}.pid"
            pid = int(running.read_text())
            if verb == "stop":
                (RUNTIME / f"{name}.stopped").touch()
            os.kill(pid, signal.SIGTERM if verb == "stop" else signal.SIGKILL)
            if verb == "stop":
                wait_for(running, there=False)
        case _:
            sys.exit(f"this systemctl does not know: {shlex.join(words)}")


if __name__ == "__main__":
    main(sys.argv[1:])
