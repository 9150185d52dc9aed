"""The unix socket of a mount: `status`, `flush` and `umount` talk to its daemon here.

One request a connection, as a line of JSON: {"verb": …, …}. The answer is any number of lines {"progress": {…}},
then one {"result": {…}} or {"error": text, "exit_code": n}. Beside each socket a JSON file says whose it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import trio

from s3fuse.errors import ExitCode, StoreError, UserError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    Progress: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
    Handler: TypeAlias = Callable[[dict[str, Any], Progress], Awaitable[dict[str, Any]]]

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 64 << 10


def runtime_dir() -> Path:
    """Where sockets are: /run/s3fuse for root, below XDG_RUNTIME_DIR else."""
    if os.environ.get("XDG_RUNTIME_DIR") and os.geteuid() != 0:
        return Path(os.environ["XDG_RUNTIME_DIR"]) / "s3fuse"
    return Path("/run/s3fuse") if os.geteuid() == 0 else Path(f"/tmp/s3fuse-{os.geteuid()}")


def socket_path(mountpoint: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.abspath(mountpoint))).hexdigest()[:16]
    return runtime_dir() / f"{name}.sock"


# -- the daemon's side


async def serve(
    mountpoint: Path,
    about: dict[str, Any],
    handlers: Mapping[str, Handler],
    stopping: trio.Event,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers requests until `stopping`, and those that came before it to their end.

    Started (in trio's sense) once the socket takes connections.
    """
    path = socket_path(mountpoint)
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise UserError(f"{folder} must belong to this user with mode 0700; remove it and mount again")
    with suppress(FileNotFoundError):
        path.unlink()
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await listener.bind(str(path))
    listener.listen(16)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(about))
    part.replace(path.with_suffix(".json"))  # whole from the start: `mounts` removes what it cannot read
    task_status.started()
    try:
        async with trio.open_nursery() as answering, trio.open_nursery() as listening:
            listening.start_soon(
                partial(
                    trio.serve_listeners,
                    partial(_answer, handlers=handlers),
                    [trio.SocketListener(listener)],
                    handler_nursery=answering,
                )
            )
            await stopping.wait()
            listening.cancel_scope.cancel()
    finally:
        for left in (path, path.with_suffix(".json")):
            with suppress(FileNotFoundError):
                left.unlink()


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
        error = _first(group)
        code = error.exit_code if isinstance(error, UserError) else ExitCode.FAILED
        answer = {"error": str(error), "exit_code": int(code)}
    except* Exception as group:
        log.exception("%s failed", request["verb"])
        answer = {"error": f"{request['verb']} failed: {_first(group)!r}", "exit_code": int(ExitCode.FAILED)}
    return answer


def _first(group: BaseExceptionGroup[Exception]) -> BaseException:
    """The first exception of a group whose nurseries may be nested."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


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
    """Asks the daemon of a mount and gives its result.

    `timeout_s` bounds the wait for each line. Raises UserError with the daemon's text and exit code, and
    ConnectionError where no daemon listens.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout_s)
        client.connect(str(socket_path(mountpoint)))
        client.sendall(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
        for answer in _lines(client):
            if "progress" in answer:
                on_progress(answer["progress"])
            elif "error" in answer:
                raise UserError(str(answer["error"]), ExitCode(answer["exit_code"]))
            else:
                return dict(answer["result"])
    raise ConnectionError(f"the daemon of {mountpoint} ended before it answered")


def _lines(client: socket.socket) -> Iterator[dict[str, Any]]:
    with client.makefile("rb") as lines:
        for line in lines:
            yield json.loads(line)


def mounts() -> list[dict[str, Any]]:
    """What the JSON files in the runtime directory say of mounts whose daemon is alive; leftovers are removed."""
    found = []
    for path in sorted(runtime_dir().glob("*.json")) if runtime_dir().is_dir() else []:
        try:
            about = json.loads(path.read_text())
            os.kill(int(about["pid"]), 0)
        except (ProcessLookupError, ValueError, KeyError, TypeError, FileNotFoundError):
            for left in (path, path.with_suffix(".sock")):
                with suppress(FileNotFoundError):
                    left.unlink()
        except PermissionError:
            continue
        else:
            found.append(about)
    return found
