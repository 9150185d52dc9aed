"""The unix socket of a mount: `status`, `flush` and `umount` talk to its daemon here.

One request a connection, as a line of JSON: {"verb": …, …}. The answer is any number of lines {"progress": {…}},
then one {"result": {…}} or {"error": text, "exit_code": n}. Beside each socket a JSON file says whose it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import select
import socket
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import trio

from s3fuse.errors import ExitCode, StoreError, UserError, described, first
from s3fuse.host.private import NotPrivate, PrivateDirectory, peer_uid, who

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    Progress: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
    Handler: TypeAlias = Callable[[dict[str, Any], Progress], Awaitable[dict[str, Any]]]

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 64 << 10
#: How often a request is sent to a mount whose processes end before they answer.
TRIES = 5


def runtime_dir() -> Path:
    """Where sockets are: /run/s3fuse for root, below XDG_RUNTIME_DIR else. It may not exist, or be somebody else's."""
    if os.geteuid() == 0:
        return Path("/run/s3fuse")
    ours = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(ours, "s3fuse") if ours.startswith("/") else Path(f"/tmp/s3fuse-{os.geteuid()}")


def socket_path(mountpoint: Path) -> Path:
    return runtime_dir() / _name(mountpoint, ".sock")


def _name(mountpoint: Path, end: str) -> str:
    """The name of a mount's file in the runtime directory."""
    return hashlib.sha256(os.fsencode(os.path.abspath(mountpoint))).hexdigest()[:16] + end


def _opened() -> PrivateDirectory:
    """The runtime directory. Raises FileNotFoundError where there is none, UserError where it is not ours alone."""
    try:
        return PrivateDirectory(
            runtime_dir(), "have it removed by its owner or root, or set XDG_RUNTIME_DIR to a directory of yours"
        )
    except NotPrivate as error:
        raise UserError(f"the runtime directory {error}") from None


def _made() -> PrivateDirectory:
    """The runtime directory, made where it is missing. Raises UserError where it is not ours alone."""
    folder = runtime_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _opened()
    except FileExistsError:  # it is no directory, or a link to none
        return _opened()
    except OSError as error:
        raise UserError(f"the runtime directory {folder} cannot be made: {error.strerror}") from None


def make_runtime_dir() -> None:
    """Returns when there is a runtime directory of this user's alone. Raises UserError."""
    with _made():
        pass


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
    with _own(mountpoint, door) as folder:
        if folder is not None:
            folder.remove(_name(mountpoint, ".sock"))
            folder.remove(_name(mountpoint, ".json"))


@contextmanager
def _own(mountpoint: Path, door: Door) -> Iterator[PrivateDirectory | None]:
    """The runtime directory, locked, while the socket in it is this door's.

    None where another mount has taken the mountpoint, as one may that drains; and where there is no such directory any
    more, or one that is not to be trusted: a mount that runs is not ended for that.
    """
    try:
        opened = _opened()
    except FileNotFoundError:
        yield None
        return
    except UserError as error:
        log.error("%s", error)
        yield None
        return
    with opened as folder, folder.locked():
        status = folder.stat(_name(mountpoint, ".sock"))
        yield folder if status is not None and status.st_ino == door.inode else None


def session_path(mountpoint: Path, pid: int) -> Path:
    """Where the session of a new mount is kept, whose process that lives is `pid`; those of dead ones go.

    Raises UserError.
    """
    stem = _name(mountpoint, "")
    with _made() as folder:
        for name in folder.names(""):
            parts = name.split(".")
            if parts[0] != stem or len(parts) < 3 or not parts[2].startswith("session"):
                continue
            if not parts[1].isdigit() or not Path(f"/proc/{parts[1]}").exists():
                folder.remove(name)
        return folder.path / _session(stem, pid)


def _session(stem: str, pid: int) -> str:
    return f"{stem}.{pid}.session"


def open_door(mountpoint: Path, about: dict[str, Any]) -> Door:
    """A new control socket, in the place of a dead daemon's, and a file beside it that says whose it is.

    Raises UserError.
    """
    name = _name(mountpoint, ".sock")
    with _made() as folder, folder.locked():
        folder.remove(name)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(folder.at(name))
        except OSError as error:
            listener.close()
            raise UserError(
                f"the control socket {folder.path / name} cannot be made: {error.strerror}; remove what is there"
            ) from None
        listener.listen(16)
        _say_whose(folder, mountpoint, about)
        made = folder.stat(name)
        assert made is not None, "nobody else has the directory"
        return Door(listener, made.st_ino)


def take_door(mountpoint: Path, about: dict[str, Any], descriptor: int, inode: int) -> Door:
    """The control socket that an earlier process of the mount has opened."""
    door = Door(socket.socket(fileno=descriptor), inode)
    say_anew(mountpoint, about, door)
    return door


def say_anew(mountpoint: Path, about: dict[str, Any], door: Door) -> None:
    """Says anew whose the control socket is, unless another mount has the mountpoint by now."""
    with _own(mountpoint, door) as folder:
        if folder is not None:
            _say_whose(folder, mountpoint, about)


def _say_whose(folder: PrivateDirectory, mountpoint: Path, about: dict[str, Any]) -> None:
    folder.write(_name(mountpoint, ".json"), json.dumps(about).encode())


async def _answer(stream: trio.SocketStream, *, handlers: Mapping[str, Handler]) -> None:
    """One request. A client that goes away ends only its own request."""

    async def send(message: dict[str, Any]) -> None:
        await stream.send_all(json.dumps(message).encode() + b"\n")

    async def progress(message: dict[str, Any]) -> None:
        await send({"progress": message})

    try:
        async with stream:
            uid = peer_uid(stream.socket)
            if uid not in (0, os.geteuid()):
                log.warning("%s asked at the control socket, and got no answer", who(uid))
                return
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
        answer = {"error": f"{request['verb']} failed: {described(first(group))}", "exit_code": int(ExitCode.FAILED)}
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

    `timeout_s` bounds the wait for each line. Raises UserError with the daemon's text and exit code, or where runtime
    directory or socket are somebody else's; FileNotFoundError and ConnectionError where no daemon listens.
    """
    for left in reversed(range(TRIES)):
        with _connected(mountpoint, timeout_s) as client, suppress(ConnectionResetError, BrokenPipeError):
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


def _connected(mountpoint: Path, timeout_s: float | None) -> socket.socket:
    """A connection to a mount's daemon, which is of this user."""
    name = _name(mountpoint, ".sock")
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.settimeout(timeout_s)
        with _opened() as folder:
            client.connect(folder.at(name))
        uid = peer_uid(client)
        if uid != os.geteuid():
            raise UserError(
                f"{runtime_dir() / name} is served by {who(uid)} and not by you, so it was asked nothing; remove it, "
                f"and see s3fuse status for what is mounted on {mountpoint}"
            )
    except BaseException:
        client.close()
        raise
    return client


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
    """What the JSON files in the runtime directory say of mounts whose daemon listens; leftovers are removed.

    Raises UserError where the directory is not this user's alone.
    """
    try:
        opened = _opened()
    except FileNotFoundError:
        return []
    found = []
    with opened as folder:
        if not folder.names(".json"):
            return []
        with folder.locked():
            for name in folder.names(".json"):
                stem = name.removesuffix(".json")
                about = _about(folder, name)
                if about is not None and _listens(folder, f"{stem}.sock"):
                    found.append(about)
                else:
                    folder.remove(name)
                    folder.remove(f"{stem}.sock")
                    if about is not None:  # another mount there may have begun its own
                        folder.remove(_session(stem, about["pid"]))
    return found


def last_said(mountpoint: Path) -> dict[str, Any]:
    """What the JSON file beside a mount's socket says, even where its daemon is dead.

    {} where there is none, or none that is to be believed.
    """
    try:
        with _opened() as folder:
            return _about(folder, _name(mountpoint, ".json")) or {}
    except (FileNotFoundError, UserError):
        return {}


def draining(cache_directory: Path) -> dict[str, Any] | None:
    """The status of the daemon that still uploads what is in a cache directory, although its mount is gone."""
    for about in mounts():
        if about.get("cache_directory") == os.path.abspath(cache_directory):
            with suppress(OSError):
                status = request(Path(about["mountpoint"]), "status")
                return status if status["state"] == "unmounting" else None
    return None


def _about(folder: PrivateDirectory, name: str) -> dict[str, Any] | None:
    try:
        about = json.loads(folder.read(name))
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


def _listens(folder: PrivateDirectory, name: str) -> bool:
    """Whether a daemon has the socket. Its pid says less: a killed one's stays where nobody reaps it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(folder.at(name))
        except BlockingIOError:  # it has no time to answer now
            return True
        except OSError:
            return False
        return True
