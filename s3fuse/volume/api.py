"""Docker's plugin protocol: POST requests with JSON on a unix socket, each answered with JSON and status 200.

A failure is an answer too, {"Err": text}; Docker shows the text to the user as it is. h11 reads and writes HTTP (it is
the parser of httpx and uvicorn, and needs nothing else); trio serves the connections. A request whose client went away
is brought to its end all the same: Docker gives up after a while, but never takes back what it asked for.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import h11
import trio

from s3fuse.errors import UserError
from s3fuse.printable import MOST_CHARS, printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from pathlib import Path

    Call = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]

log = logging.getLogger(__name__)

_CONTENT_TYPE = b"application/vnd.docker.plugins.v1.2+json"
_MOST_BODY_BYTES = 1 << 20
_FIRST_PASSED_FD = 3
#: How long requests under way may take once the plugin is told to end.
GRACE_S = 5.0


@contextmanager
def listener(path: Path) -> Iterator[trio.SocketListener]:
    """The socket to serve: the one that systemd holds for us (LISTEN_FDS), else a new one at `path` (mode 0600).

    Raises UserError where that cannot be, as another plugin listens there.
    """
    passed = _passed()
    if passed is not None:
        with passed:
            yield trio.SocketListener(trio.socket.from_stdlib_socket(passed))
        return
    bound = _bind(path)
    ours = path.stat().st_ino
    try:
        with bound:
            yield trio.SocketListener(trio.socket.from_stdlib_socket(bound))
    finally:
        with suppress(FileNotFoundError):
            if path.stat().st_ino == ours:
                path.unlink()


def _passed() -> socket.socket | None:
    """The socket that was passed on start (protocol: sd_listen_fds(3))."""
    process, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not count or process not in ("", str(os.getpid())):
        return None
    if count != "1":
        raise UserError(f"LISTEN_FDS is {count}; the plugin serves one socket")
    os.set_inheritable(_FIRST_PASSED_FD, False)
    return socket.socket(fileno=_FIRST_PASSED_FD)


def _bind(path: Path) -> socket.socket:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise UserError(f"--socket {path} exists and is no socket")
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                with suppress(ConnectionRefusedError):  # nobody listens: what a killed plugin left
                    probe.connect(str(path))
                    raise UserError(f"another plugin listens on {path}; end it first")
            path.unlink()
        bound = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            bound.bind(str(path))
        finally:
            os.umask(mask)
        bound.listen(128)
    except OSError as error:
        raise UserError(f"--socket {path} cannot be used: {error.strerror or error}") from None
    return bound


class Server:
    """Answers requests on one socket. `calls` are by path, and raise UserError for what the user is to see."""

    def __init__(self, calls: Mapping[str, Call]) -> None:
        self._calls = calls
        self._busy = 0
        self._idle = trio.Event()

    async def serve(self, where: trio.SocketListener, stopping: trio.Event) -> None:
        """Returns some time after `stopping`: what is being answered then has `GRACE_S`."""
        async with trio.open_nursery() as answering:
            async with trio.open_nursery() as listening:
                listening.start_soon(
                    partial(trio.serve_listeners, self._connection, [where], handler_nursery=answering)
                )
                await stopping.wait()
                listening.cancel_scope.cancel()
            with trio.move_on_after(GRACE_S):
                while self._busy:
                    self._idle = trio.Event()
                    await self._idle.wait()
            answering.cancel_scope.cancel()

    async def _connection(self, stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER)
        try:
            async with stream:
                while await self._exchange(http, stream):
                    http.start_next_cycle()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("a client went away")
        except h11.RemoteProtocolError as error:
            log.warning("a client of the socket does not speak HTTP: %s", error)

    async def _exchange(self, http: h11.Connection, stream: trio.SocketStream) -> bool:
        """Receives and answers one request; False where no other can follow."""
        request, body = await _receive(http, stream)
        if request is None:
            return False
        self._busy += 1
        try:
            await _send(http, stream, *await _answer(request, body, self._calls))
        finally:
            self._busy -= 1
            self._idle.set()
        return http.our_state is h11.DONE and http.their_state is h11.DONE


async def _receive(http: h11.Connection, stream: trio.SocketStream) -> tuple[h11.Request | None, bytes]:
    """The next request and its body; None at the end of the connection."""
    request = None
    body = bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            if http.they_are_waiting_for_100_continue:
                await stream.send_all(http.send(h11.InformationalResponse(status_code=100, headers=[])))
            http.receive_data(await stream.receive_some(1 << 16))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _MOST_BODY_BYTES:
                raise h11.RemoteProtocolError("the body is too long")
        elif isinstance(event, h11.EndOfMessage):
            return request, bytes(body)
        else:
            return None, b""


async def _answer(request: h11.Request, body: bytes, calls: Mapping[str, Call]) -> tuple[int, dict[str, Any]]:
    """Status and content. Whatever happens, the client learns of it."""
    path = request.target.decode("ascii", "replace")
    call = calls.get(path)
    if call is None:
        return 404, {"Err": f"s3fuse has no {printable(path)}"}
    try:
        arguments = json.loads(body) if body.strip() else {}
        if not isinstance(arguments, dict):
            raise ValueError("no object")
    except ValueError as error:
        return 400, {"Err": f"the body of {path} is not JSON as expected: {printable(str(error))}"}
    try:
        return 200, {"Err": "", **await call(arguments)}
    except UserError as error:
        log.info("%s %s: %s", path, arguments.get("Name", ""), error)
        return 200, {"Err": _told(error)}
    except Exception as error:
        log.exception("%s failed", path)
        return 200, {"Err": f"{path} failed: {printable(repr(error))}; see the log of s3fuse plugin"}


def _told(error: UserError) -> str:
    """What Docker shows on a terminal as it is."""
    return printable(str(error), 4 * MOST_CHARS, lines=True)


async def _send(http: h11.Connection, stream: trio.SocketStream, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"Content-Type", _CONTENT_TYPE), (b"Content-Length", str(len(body)).encode())]
    data = http.send(h11.Response(status_code=status, headers=headers)) or b""
    data += http.send(h11.Data(data=body)) or b""
    data += http.send(h11.EndOfMessage()) or b""
    await stream.send_all(data)
