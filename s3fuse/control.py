"""The unix socket of a mount: `status`, `flush` and `umount` talk to its daemon here.

One request a connection, as a line of JSON: {"verb": …, …}. The answer is any number of lines {"progress": {…}},
then one {"result": {…}} or {"error": text, "exit_code": n}. Beside each socket a JSON file says whose it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import select
import socket
import stat
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import trio

from s3fuse.errors import ExitCode, StoreError, UserError, first

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    Progress: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
    Handler: TypeAlias = Callable[[dict[str, Any], Progress], Awaitable[dict[str, Any]]]

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 64 << 10
#: How often a request is sent to a mount whose processes end before they answer.
TRIES = 5


def runtime_dir() -> Path:
    """Where sockets are: /run/s3fuse for root, below XDG_RUNTIME_DIR else."""
    if os.environ.get("XDG_RUNTIME_DIR") and os.geteuid() != 0:
        return Path(os.environ["XDG_RUNTIME_DIR"]) / "s3fuse"
    return Path("/run/s3fuse") if os.geteuid() == 0 else Path(f"/tmp/s3fuse-{os.geteuid()}")


def socket_path(mountpoint: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.abspath(mountpoint))).hexdigest()[:16]
    return runtime_dir() / f"{name}.sock"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else puts a mount into the runtime directory, or clears what a dead one left, meanwhile."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


# -- the daemon's side


class Door(NamedTuple):
    """The listening socket of a mount, and the inode of its name in the runtime directory."""

    listener: socket.socket
    inode: int


async def serve(
    door: Door,
    mountpoint: Path,
    handlers: Mapping[str, Handler],
    stopping: trio.Event,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers requests until `stopping`, and those that came before it to their end; then the socket goes.

    Started (in trio's sense) once it answers. Cancelled, it leaves the socket to another process.
    """
    path = socket_path(mountpoint)
    task_status.started()
    async with trio.open_nursery() as answering, trio.open_nursery() as listening:
        listening.start_soon(
            partial(
                trio.serve_listeners,
                partial(_answer, handlers=handlers),
                [trio.SocketListener(trio.socket.from_stdlib_socket(door.listener))],
                handler_nursery=answering,
            )
        )
        await stopping.wait()
        listening.cancel_scope.cancel()
    with suppress(FileNotFoundError), _locked(path.parent):
        if path.stat().st_ino == door.inode:  # else another mount has taken the mountpoint while we drained
            path.unlink()
            path.with_suffix(".json").unlink()


def make_runtime_dir() -> None:
    """Raises UserError where the runtime directory is not ours alone."""
    folder = runtime_dir()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise UserError(f"{folder} must belong to this user with mode 0700; remove it and mount again")


def session_path(mountpoint: Path, pid: int) -> Path:
    """Where the session of a new mount is kept, whose process that lives is `pid`; those of dead ones go."""
    make_runtime_dir()
    path = socket_path(mountpoint)
    for left in path.parent.glob(f"{path.stem}.*.session*"):
        owner = left.name.split(".")[1]
        if not owner.isdigit() or not Path(f"/proc/{owner}").exists():
            left.unlink(missing_ok=True)
    return _session(path, pid)


def _session(path: Path, pid: int) -> Path:
    return path.with_name(f"{path.stem}.{pid}.session")


def open_door(mountpoint: Path, about: dict[str, Any]) -> Door:
    """A new control socket, in the place of a dead daemon's, and a file beside it that says whose it is.

    Raises UserError.
    """
    path = socket_path(mountpoint)
    make_runtime_dir()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _locked(path.parent):
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(16)
        _say_whose(path, about)
        return Door(listener, path.stat().st_ino)


def take_door(mountpoint: Path, about: dict[str, Any], descriptor: int, inode: int) -> Door:
    """The control socket that an earlier process of the mount has opened."""
    door = Door(socket.socket(fileno=descriptor), inode)
    say_anew(mountpoint, about, door)
    return door


def say_anew(mountpoint: Path, about: dict[str, Any], door: Door) -> None:
    """Says anew whose the control socket is, unless another mount has the mountpoint by now."""
    path = socket_path(mountpoint)
    with suppress(FileNotFoundError), _locked(path.parent):
        if path.stat().st_ino == door.inode:
            _say_whose(path, about)


def _say_whose(path: Path, about: dict[str, Any]) -> None:
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(about))
    part.replace(path.with_suffix(".json"))


async def _answer(stream: trio.SocketStream, *, handlers: Mapping[str, Handler]) -> None:
    """One request. A client that goes away ends only its own request."""

    async def send(message: dict[str, Any]) -> None:
        await stream.send_all(json.dumps(message).encode() + b"\n")

    async def progress(message: dict[str, Any]) -> None:
        await send({"progress": message})

    try:
        async with stream:
            request = await _receive(stream)
            handler = handlers.get(str(request.get("verb")))
            if handler is None:
                await send({"error": f"unknown verb {request.get('verb')!r}", "exit_code": int(ExitCode.USAGE)})
                return
            await send(await _handled(handler, request, progress))
    except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, ValueError):
        log.debug("a control client went away or sent no request")
    except* Exception:
        log.exception("a control request failed")


async def _handled(handler: Handler, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The answer to send. A client that waits gets one whatever happened; one that went away raises."""
    answer: dict[str, Any] = {}
    try:
        answer = {"result": await handler(request, progress)}
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        raise
    except* (UserError, StoreError) as group:
        error = first(group)
        code = error.exit_code if isinstance(error, UserError) else ExitCode.FAILED
        answer = {"error": str(error), "exit_code": int(code)}
    except* Exception as group:
        log.exception("%s failed", request["verb"])
        answer = {"error": f"{request['verb']} failed: {first(group)!r}", "exit_code": int(ExitCode.FAILED)}
    return answer


async def _receive(stream: trio.SocketStream) -> dict[str, Any]:
    line = bytearray()
    with trio.fail_after(10):
        while not line.endswith(b"\n"):
            chunk = await stream.receive_some(4096)
            if not chunk or len(line) > MAX_REQUEST_BYTES:
                raise ValueError("no request")
            line += chunk
    request = json.loads(line)
    if not isinstance(request, dict):
        raise ValueError("no request")
    return request


# -- the command line's side


def request(
    mountpoint: Path,
    verb: str,
    *,
    on_progress: Callable[[dict[str, Any]], None] = lambda message: None,
    timeout_s: float | None = 10.0,
    **arguments: Any,
) -> dict[str, Any]:
    """Asks the daemon of a mount and gives its result; where another process goes on meanwhile, asks that one.

    `timeout_s` bounds the wait for each line. Raises UserError with the daemon's text and exit code, and
    ConnectionError where no daemon listens.
    """
    for left in reversed(range(TRIES)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(timeout_s)
            client.connect(str(socket_path(mountpoint)))
            with suppress(ConnectionResetError, BrokenPipeError):
                client.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
                for answer in _lines(client):
                    if "progress" in answer:
                        on_progress(answer["progress"])
                    elif "error" in answer:
                        raise UserError(str(answer["error"]), ExitCode(answer["exit_code"]))
                    else:
                        return dict(answer["result"])
        if not left or not _is_kept(mountpoint):
            break
    raise ConnectionError(f"the daemon of {mountpoint} ended before it answered")


def _is_kept(mountpoint: Path) -> bool:
    """Whether the mount's process was not its keeper, which lives."""
    about = last_said(mountpoint)
    try:
        command = Path(f"/proc/{about['pid']}/cmdline").read_bytes()
    except (KeyError, OSError):
        return False
    return b"s3fuse.keeper" in command


def _lines(client: socket.socket) -> Iterator[dict[str, Any]]:
    with client.makefile("rb") as lines:
        for line in lines:
            yield json.loads(line)


def mounts() -> list[dict[str, Any]]:
    """What the JSON files in the runtime directory say of mounts whose daemon listens; leftovers are removed."""
    folder = runtime_dir()
    if not any(folder.glob("*.json")):
        return []
    found = []
    with _locked(folder):
        for path in sorted(folder.glob("*.json")):
            about = _about(path)
            if about is not None and _listens(path.with_suffix(".sock")):
                found.append(about)
            else:
                path.unlink(missing_ok=True)
                path.with_suffix(".sock").unlink(missing_ok=True)
                if about is not None:  # another mount there may have begun its own
                    _session(path, about["pid"]).unlink(missing_ok=True)
    return found


def last_said(mountpoint: Path) -> dict[str, Any]:
    """What the JSON file beside a mount's socket says, even where its daemon is dead; {} where there is none."""
    return _about(socket_path(mountpoint).with_suffix(".json")) or {}


def draining(cache_directory: Path) -> dict[str, Any] | None:
    """The status of the daemon that still uploads what is in a cache directory, although its mount is gone."""
    for about in mounts():
        if about.get("cache_directory") == os.path.abspath(cache_directory):
            with suppress(OSError):
                status = request(Path(about["mountpoint"]), "status")
                return status if status["state"] == "unmounting" else None
    return None


def _about(path: Path) -> dict[str, Any] | None:
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) and {"mountpoint", "pid"} <= about.keys() else None


def wait_for_end(pid: int, timeout_s: float) -> bool:
    """Waits for the end of a daemon. False where it still runs after that time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)


def _listens(path: Path) -> bool:
    """Whether a daemon has the socket. Its pid says less: a killed one's stays where nobody reaps it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(str(path))
        except BlockingIOError:  # it has no time to answer now
            return True
        except OSError:
            return False
        return True
