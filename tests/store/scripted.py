"""A TCP server that does what a script says, for failures that real servers do not offer."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path


@dataclass(slots=True)
class Peer:
    """The server's end of one connection."""

    stream: trio.abc.Stream
    _data: bytearray = field(default_factory=bytearray)

    async def head(self) -> str:
        """The next request's head, without the blank line; "" if the client closed."""
        while b"\r\n\r\n" not in self._data:
            received = await self.stream.receive_some()
            if not received:
                return ""
            self._data += received
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        return head.decode("latin-1")

    async def body(self, size_bytes: int) -> bytes:
        """That many bytes of the request's body."""
        while len(self._data) < size_bytes:
            received = await self.stream.receive_some()
            if not received:
                break
            self._data += received
        body, self._data = bytes(self._data[:size_bytes]), self._data[size_bytes:]
        return body

    async def request(self) -> tuple[str, bytes]:
        """The next request: its head and its whole body."""
        head = await self.head()
        length = next((line.split(":")[1] for line in head.lower().split("\r\n") if line.startswith("content-le")), "0")
        return head, await self.body(int(length))

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def until_closed(self) -> None:
        """Waits for the client to drop the connection."""
        with suppress(trio.BrokenResourceError):
            while await self.stream.receive_some():
                pass


@dataclass(slots=True)
class Scripted:
    """The address, and how many connections came."""

    endpoint: str
    connections: int = 0


@asynccontextmanager
async def scripted(
    *scripts: Callable[[Peer], Awaitable[None]], certificate: Path | None = None
) -> AsyncIterator[Scripted]:
    """Serves the first connection by the first script and so on; the last serves all that follow.

    A connection is closed when its script returns. `certificate` is a directory with `cert` and `key` for TLS.
    """
    async with trio.open_nursery() as nursery:
        tcp = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        listener: trio.abc.Listener[trio.abc.Stream] = tcp
        scheme = "http"
        if certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate / "cert", certificate / "key")
            listener = trio.SSLListener(tcp, context, https_compatible=True)
            scheme = "https"
        server = Scripted(f"{scheme}://127.0.0.1:{tcp.socket.getsockname()[1]}")

        async def serve(stream: trio.abc.Stream) -> None:
            script = scripts[min(server.connections, len(scripts) - 1)]
            server.connections += 1
            with suppress(trio.BrokenResourceError):
                await script(Peer(stream))

        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield server
        nursery.cancel_scope.cancel()


def answer(status: int = 200, body: bytes = b"", *headers: str) -> bytes:
    """An HTTP answer with a length."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def failure(code: str) -> bytes:
    """S3's error document."""
    return f"<?xml version='1.0'?>\n<Error><Code>{code}</Code><Message>told so</Message></Error>".encode()
