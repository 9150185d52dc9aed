"""Connections for the transport: plain TCP and TLS behind one small interface, driven by trio.

Plain sockets are used through the stdlib with `trio.lowlevel` waits only where the kernel would block: trio's own
socket methods reschedule on every call, which costs more than the system call itself on small requests.
"""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    from s3fuse.store.base import Buffer

#: Other tasks get a turn after this many bytes that came without waiting.
_FAIR_BYTES = 2 << 20
#: TLS records hold 16 KiB; asking trio for more than this only makes it allocate more.
_TLS_RECV_BYTES = 256 << 10


class Broken(Exception):
    """The connection failed or ended; a type of its own so that it is never taken for a failure to read a body."""


class Wire(Protocol):
    """A connected byte stream whose methods raise only `Broken`; closing is immediate and needs no await."""

    async def send_all(self, data: Buffer) -> None:
        """Sends every byte."""

    async def recv_into(self, view: memoryview) -> int:
        """Waits for bytes and gives how many were written to `view`; 0 at the end of the stream."""

    async def readable(self) -> None:
        """Returns when `recv_into` would return at once."""

    def stale(self) -> bool:
        """Whether the peer closed, or sent something nobody asked for, while the connection was idle."""

    def close(self) -> None:
        """Drops the connection; whoever waits on it gets an error."""


class PlainWire:
    """TCP without TLS."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._unfair_bytes = 0

    async def send_all(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            try:
                sent = self._sock.send(view)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)
            except OSError as exc:
                raise Broken(exc.strerror) from exc
            else:
                view = view[sent:]

    async def recv_into(self, view: memoryview) -> int:
        while True:
            try:
                received = self._sock.recv_into(view)
            except BlockingIOError:
                self._unfair_bytes = 0
                await trio.lowlevel.wait_readable(self._sock)
            except OSError as exc:
                raise Broken(exc.strerror) from exc
            else:
                break
        self._unfair_bytes += received
        if self._unfair_bytes > _FAIR_BYTES:
            self._unfair_bytes = 0
            await trio.lowlevel.checkpoint()
        return received

    async def readable(self) -> None:
        await trio.lowlevel.wait_readable(self._sock)

    def stale(self) -> bool:
        return _has_input(self._sock)

    def close(self) -> None:
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()


class TlsWire:
    """TCP with TLS, through trio's `SSLStream`."""

    def __init__(self, sock: socket.socket, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self._sock = sock
        self._stream = stream
        self._early = b""

    async def send_all(self, data: Buffer) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise Broken(str(exc.__cause__ or exc)) from exc

    async def recv_into(self, view: memoryview) -> int:
        data = self._early or await self._receive(min(len(view), _TLS_RECV_BYTES))
        taken = min(len(data), len(view))
        self._early = data[taken:] if taken < len(data) else b""
        view[:taken] = data[:taken]
        return taken

    async def readable(self) -> None:
        self._early = await self._receive(_TLS_RECV_BYTES)

    async def _receive(self, max_bytes: int) -> bytes:
        try:
            return bytes(await self._stream.receive_some(max_bytes))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise Broken(str(exc.__cause__ or exc)) from exc

    def stale(self) -> bool:
        return _has_input(self._sock)

    def close(self) -> None:
        self._stream.transport_stream.socket.close()


def _has_input(sock: socket.socket) -> bool:
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


async def connect(host: str, port: int, tls: ssl.SSLContext | None) -> Wire:
    """A connection to the first address of `host` that accepts one; the caller bounds the time.

    Raises OSError of the last address tried, `ssl.SSLError` among them.
    """
    addresses = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, proto, _name, address in addresses:
        sock = socket.socket(family, kind, proto)
        try:
            return await _connect_one(sock, address, host, tls)
        except OSError as exc:
            sock.close()
            failure = exc
        except BaseException:
            sock.close()
            raise
    raise failure


async def _connect_one(
    sock: socket.socket, address: tuple[object, ...], host: str, tls: ssl.SSLContext | None
) -> PlainWire | TlsWire:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    trio_socket = trio.socket.from_stdlib_socket(sock)
    await trio_socket.connect(address)
    if tls is None:
        return PlainWire(sock)
    stream = trio.SSLStream(trio.SocketStream(trio_socket), tls, server_hostname=host, https_compatible=True)
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as exc:
        if isinstance(exc.__cause__, ssl.SSLError):
            raise exc.__cause__ from None
        raise ConnectionResetError("the connection broke during the TLS handshake") from exc
    return TlsWire(sock, stream)
