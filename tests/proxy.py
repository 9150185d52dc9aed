"""A faulty way to a real S3 server: one TCP proxy on loopback that harms chosen requests or answers.

What goes wrong is chosen by rule (`fail`) or by a seeded fraction of the requests (`rate`); `counts` tells what was
done to which operation. It runs in a thread of its own, so that synchronous tests and those under trio can use it. It
knows just enough HTTP/1.1: requests with a Content-Length, answers with a length, in chunks, or until the end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import formatdate
from enum import Enum, auto
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.servers import Server

_CHUNK_BYTES = 64 << 10


class Fault(Enum):
    """What goes wrong with one request."""

    #: The connection is reset before anything is done.
    RESET = auto()
    #: Nothing comes for `stall_s`, then the connection is closed; the server never sees the request.
    STALLED = auto()
    #: The answer comes piece by piece over `slow_s`.
    SLOW = auto()
    #: The answer comes `late_s` later.
    LATE = auto()
    #: The connection is reset in the middle of the answer's body (its head, where it has none).
    CUT = auto()
    #: The server does the work, the answer is lost.
    LOST = auto()
    ERROR_500 = auto()
    ERROR_503 = auto()
    DENIED = auto()
    NO_BUCKET = auto()
    #: 200 with a document that is not what was asked for; the server never sees the request.
    XML = auto()
    HTML = auto()
    #: The Content-Length is larger than the body, after which the connection is closed.
    LONG_LENGTH = auto()
    #: The body, and the Content-Length with it, are too short.
    SHORT_BODY = auto()
    #: The Date header is off by hours.
    WRONG_DATE = auto()
    #: The keys have expired.
    EXPIRED = auto()


#: What a fraction of requests meets: keys that expire stay so, which is no matter of a fraction.
RANDOM = tuple(fault for fault in Fault if fault is not Fault.EXPIRED)
_CANNED = {
    Fault.ERROR_500: (500, "InternalError", "We encountered an internal error, please try again."),
    Fault.ERROR_503: (503, "SlowDown", "Please reduce your request rate."),
    Fault.DENIED: (403, "AccessDenied", "Access Denied."),
    Fault.NO_BUCKET: (404, "NoSuchBucket", "The specified bucket does not exist"),
    Fault.EXPIRED: (403, "ExpiredToken", "The provided token has expired."),
}
#: Whose answers have no body that could be cut short: there these faults are something else.
_WITHOUT_BODY = {Fault.LONG_LENGTH: Fault.CUT, Fault.SHORT_BODY: Fault.CUT, Fault.SLOW: Fault.LATE}


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the rules see it; `operation` is named as in `Store.requests`."""

    method: str
    key: str
    operation: str
    head: str


@dataclass
class _Rule:
    fault: Fault
    applies: Callable[[Request], bool]
    times: float


@dataclass
class _Answer:
    status: int
    lines: list[bytes]
    body: bytes
    has_body: bool

    def encode(self, *, length: int | None = None) -> bytes:
        kept = [line for line in self.lines if not line.lower().startswith((b"content-length:", b"transfer-encoding:"))]
        if self.has_body:
            kept.append(b"Content-Length: %d" % (len(self.body) if length is None else length))
        else:
            kept += [line for line in self.lines if line.lower().startswith(b"content-length:")]
        return b"\r\n".join(kept) + b"\r\n\r\n" + self.body


class Proxy:
    """The proxy in front of `server`. Times are seconds; what is public may be changed while it runs."""

    def __init__(self, server: Server, *, seed: int = 0, rate: float = 0.0, faults: Sequence[Fault] = RANDOM) -> None:
        self.rate = rate
        self.faults = faults
        self.stall_s = 3600.0
        self.slow_s = 0.3
        self.late_s = 0.2
        #: The proxy's clock against this host's; a request whose date is off by more than `skew_limit_s` is refused.
        self.clock_offset_s = 0.0
        self.skew_limit_s: float | None = None
        #: A fifth of the writes come to the server up to this much later, also where their sender has died since.
        self.lag_s = 0.0
        #: How fast request bodies are taken.
        self.upload_bytes_per_s: float | None = None
        self.counts: Counter[tuple[str, str]] = Counter()
        self.requests: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._rules: list[_Rule] = []
        self._to = ("127.0.0.1", int(server.endpoint.rpartition(":")[2]))
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._released = asyncio.Event()
        self._listener: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._port = 0
        self.up()
        self.server: Server = dataclasses.replace(server, endpoint=f"http://127.0.0.1:{self._port}")

    # -- what tests say

    def fail(
        self,
        fault: Fault,
        *operations: str,
        times: float = float("inf"),
        key: str = "",
        when: Callable[[Request], bool] = lambda _: True,
    ) -> None:
        """From now on the next `times` requests of these operations (none: all), on keys that match `key`, fail."""
        pattern = re.compile(key)

        def applies(request: Request) -> bool:
            named = not operations or request.operation in operations
            return named and pattern.search(request.key) is not None and when(request)

        self._rules.append(_Rule(fault, applies, times))

    def heal(self) -> None:
        """No faults any more; what is stalled is closed."""
        self.rate = 0.0
        self._rules.clear()

        def release() -> None:
            self._released.set()
            self._released = asyncio.Event()

        self._loop.call_soon_threadsafe(release)

    def up(self) -> None:
        """Listens (again), on the same port."""

        async def listen() -> None:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", self._port))
            self._port = sock.getsockname()[1]
            self._listener = await asyncio.start_server(self._connection, sock=sock, limit=1 << 20)

        self._call(listen())

    def down(self) -> None:
        """Refuses connections, and drops those that there are."""

        async def stop() -> None:
            if self._listener is not None:
                self._listener.close()
                self._listener = None
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(stop())

    def close(self) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def faults_done(self) -> Counter[str]:
        """How often each kind of fault was done."""
        done: Counter[str] = Counter()
        for (kind, _), count in self.counts.items():
            done[kind] += count
        return done

    def _call(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)  # type: ignore[arg-type]

    # -- one connection

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        upstream = _Upstream(self._to)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                while await self._exchange(reader, writer, upstream):
                    pass
        except asyncio.CancelledError:
            _reset(writer)
        finally:
            self._tasks.discard(task)
            upstream.close()
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: _Upstream) -> bool:
        """One request; whether the connection can have another."""
        head = await reader.readuntil(b"\r\n\r\n")
        request = _request(head)
        self.requests[request.operation] += 1
        if self._is_skewed(head):
            await self._take(reader, head)
            body = _document(
                "RequestTimeTooSkewed", "The difference between the request time and the server's is too large."
            )
            self.counts["SKEWED", request.operation] += 1
            writer.write(self._canned(request, 403, body))
            return True
        fault = self._choose(request)
        if fault is not None:
            self.counts[fault.name, request.operation] += 1
        if fault is Fault.RESET:
            _reset(writer)
            return False
        if fault is Fault.STALLED:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._released.wait(), self.stall_s)
            return False
        if fault in _CANNED or fault in (Fault.XML, Fault.HTML):
            await self._take(reader, head)
            assert fault is not None
            writer.write(self._canned(request, *_canned_body(fault)))
            await writer.drain()
            return True
        if self.lag_s and request.method not in ("GET", "HEAD") and self._random.random() < 0.2:
            reader = await _whole(reader, head)
            await asyncio.sleep(self._random.uniform(0.0, self.lag_s))
        await upstream.send(head, reader, self.upload_bytes_per_s)
        if fault is None and not self.clock_offset_s:
            return await upstream.relay(request.method, writer)
        answer = await upstream.answer(request.method)
        return await self._spoil(request, fault, answer, writer)

    async def _spoil(
        self, request: Request, fault: Fault | None, answer: _Answer, writer: asyncio.StreamWriter
    ) -> bool:
        if not answer.body and fault in _WITHOUT_BODY:
            fault = _WITHOUT_BODY[fault]
        data = self._dated(answer, 6 * 3600 if fault is Fault.WRONG_DATE else 0).encode()
        match fault:
            case Fault.LOST:
                _reset(writer)
                return False
            case Fault.CUT:
                writer.write(data[: len(data) - max(1, len(answer.body) // 2)])
                await writer.drain()
                _reset(writer)
                return False
            case Fault.LONG_LENGTH:
                writer.write(answer.encode(length=len(answer.body) + 7))
                await writer.drain()
                return False
            case Fault.SHORT_BODY:
                answer.body = answer.body[: len(answer.body) * 2 // 3]
                data = answer.encode()
            case Fault.LATE:
                await asyncio.sleep(self.late_s)
            case Fault.SLOW:
                step = len(data) // 10 + 1
                for start in range(0, len(data), step):
                    writer.write(data[start : start + step])
                    await writer.drain()
                    await asyncio.sleep(self.slow_s / 10)
                return True
        writer.write(data)
        await writer.drain()
        return True

    def _choose(self, request: Request) -> Fault | None:
        for rule in self._rules:
            if rule.times > 0 and rule.applies(request):
                rule.times -= 1
                return rule.fault
        return self._random.choice(self.faults) if self._random.random() < self.rate else None

    def _is_skewed(self, head: bytes) -> bool:
        found = re.search(rb"(?i)\r\nx-amz-date: *(\d{8}T\d{6}Z)", head)
        if self.skew_limit_s is None or found is None:
            return False
        signed = datetime.strptime(found[1].decode(), "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
        return abs(signed - self._now()) > self.skew_limit_s

    def _now(self) -> float:
        return time.time() + self.clock_offset_s

    def _dated(self, answer: _Answer, off_s: float = 0.0) -> _Answer:
        if off_s or self.clock_offset_s:
            answer.lines = [line for line in answer.lines if not line.lower().startswith(b"date:")]
            answer.lines.append(b"Date: " + formatdate(self._now() + off_s, usegmt=True).encode())
        return answer

    def _canned(self, request: Request, status: int, body: bytes) -> bytes:
        kind = "text/html" if b"<html>" in body else "application/xml"
        date = formatdate(self._now(), usegmt=True)
        head = f"HTTP/1.1 {status} X\r\nServer: proxy\r\nDate: {date}\r\nContent-Type: {kind}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + (b"" if request.method == "HEAD" else body)

    async def _take(self, reader: asyncio.StreamReader, head: bytes) -> None:
        left = _length(head)
        while left and (data := await reader.read(min(left, _CHUNK_BYTES))):
            left -= len(data)


@dataclass
class _Upstream:
    """The connection to the real server that belongs to one of a client."""

    to: tuple[str, int]
    _streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    _sent: bool = field(default=False)

    async def send(self, head: bytes, body: asyncio.StreamReader, bytes_per_s: float | None) -> None:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self.to, limit=1 << 20)
        _, writer = self._streams
        writer.write(head)
        left = _length(head)
        while left:
            data = await body.read(min(left, _CHUNK_BYTES))
            if not data:
                raise ConnectionResetError
            left -= len(data)
            writer.write(data)
            await writer.drain()
            if bytes_per_s:
                await asyncio.sleep(len(data) / bytes_per_s)
        await writer.drain()

    async def _head(self) -> bytes:
        assert self._streams is not None
        while True:
            head = await self._streams[0].readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 1"):
                return head

    async def relay(self, method: str, writer: asyncio.StreamWriter) -> bool:
        """Passes the answer on as it comes."""
        assert self._streams is not None
        head = await self._head()
        writer.write(head)
        if _bodyless(method, head):
            await writer.drain()
            return True
        if b"transfer-encoding" not in head.lower() and b"content-length" in head.lower():
            left = _length(head)
            while left and (data := await self._streams[0].read(min(left, _CHUNK_BYTES))):
                left -= len(data)
                writer.write(data)
                await writer.drain()
            return not left
        if b"transfer-encoding" not in head.lower():
            while data := await self._streams[0].read(_CHUNK_BYTES):
                writer.write(data)
                await writer.drain()
            return False
        while True:
            line = await self._streams[0].readuntil(b"\r\n")
            data = line + await self._streams[0].readexactly(int(line, 16) + 2)
            writer.write(data)
            await writer.drain()
            if not int(line, 16):
                return True

    async def answer(self, method: str) -> _Answer:
        """The whole answer."""
        assert self._streams is not None
        head = await self._head()
        lines = head[:-4].split(b"\r\n")
        status = int(lines[0].split()[1])
        if _bodyless(method, head):
            return _Answer(status, lines, b"", False)
        reader = self._streams[0]
        if b"transfer-encoding" not in head.lower():
            return _Answer(status, lines, await reader.readexactly(_length(head)), True)
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
        return _Answer(status, lines, body, True)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def _whole(reader: asyncio.StreamReader, head: bytes) -> asyncio.StreamReader:
    """A reader that has the whole body of a request already."""
    body = asyncio.StreamReader()
    body.feed_data(await reader.readexactly(_length(head)))
    body.feed_eof()
    return body


def _length(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(found[1]) if found else 0


def _bodyless(method: str, head: bytes) -> bool:
    return method == "HEAD" or head.split()[1] in (b"204", b"304")


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _document(code: str, message: str) -> bytes:
    text = f"<Error><Code>{code}</Code><Message>{message}</Message><RequestId>1</RequestId></Error>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()


def _canned_body(fault: Fault) -> tuple[int, bytes]:
    if fault is Fault.HTML:
        return 200, b"<html><body><h1>It works!</h1><p>Sign in to the network to go on.</p></body></html>"
    if fault is Fault.XML:
        return 200, _document("InternalError", "We encountered an internal error, please try again.")
    status, code, message = _CANNED[fault]
    return status, _document(code, message)


def _request(head: bytes) -> Request:
    text = head.decode("latin-1")
    method, target, _ = text.split(" ", 2)
    path, _, query = target.partition("?")
    fields = parse_qs(query, keep_blank_values=True)
    key = path.lstrip("/").partition("/")[2]
    return Request(method, key, _operation(method, key, fields, "\r\nx-amz-copy-source:" in text.lower()), text)


def _operation(method: str, key: str, fields: dict[str, list[str]], copies: bool) -> str:
    match method:
        case "PUT" if "uploadId" in fields:
            return "multipart_copy" if copies else "multipart_put"
        case "PUT":
            return "copy" if copies else "put"
        case "POST" if "uploads" in fields:
            return "multipart_create"
        case "POST" if "uploadId" in fields:
            return "multipart_complete"
        case "POST":
            return "delete_many"
        case "DELETE":
            return "multipart_abort" if "uploadId" in fields else "delete"
        case "GET" if not key:
            return "list_uploads" if "uploads" in fields else "list"
    return method.lower()


@contextmanager
def proxied(server: Server, *, seed: int = 0, rate: float = 0.0) -> Iterator[Proxy]:
    """A proxy that ends with the context."""
    proxy = Proxy(server, seed=seed, rate=rate)
    try:
        yield proxy
    finally:
        proxy.close()
