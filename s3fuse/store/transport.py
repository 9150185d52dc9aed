"""A lean HTTP/1.1 client for trio: a bounded pool of connections, and bodies received into the caller's memory.

llhttp (httptools) frames the answers. A body with a Content-Length goes from the socket straight into the buffers
of the caller; llhttp sees only the head, and whatever part of the body came in the same read.

A connection returns to the pool only after a complete answer to a completely sent request; a failed or cancelled
request closes it. Errors are `StoreError`s: `NotSent` if the server cannot have seen the request, `Lost` if it may
have acted on it, `BadResponse` for an answer that is not HTTP or not what was asked for.
"""

from __future__ import annotations

import math
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import trio

from s3fuse.errors import BadResponse, Refused, Unavailable
from s3fuse.store.base import Bytes
from s3fuse.store.body import iterating
from s3fuse.store.framing import Framing, Sink
from s3fuse.store.wire import Broken, connect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from s3fuse.store.base import Body, Buffer
    from s3fuse.store.framing import Answer
    from s3fuse.store.wire import Wire

#: One read takes a head and a small body; larger bodies bypass this buffer.
_HEAD_BYTES = 16 << 10
#: A head larger than this is not S3.
_MAX_HEAD_BYTES = 256 << 10
#: What is read of the answer that says why a request failed: S3's own documents have less than 1 KiB.
_REASON_BYTES = 64 << 10
#: A body up to this size is sent in one call with the head, without watching for an early answer.
_SMALL_BODY_BYTES = 64 << 10
_BODYLESS = frozenset({204, 304})
_WITH_DATA = frozenset({200, 206})


class NotSent(Unavailable):
    """No connection: the server cannot have acted on the request."""


class Lost(Unavailable):
    """The answer did not come (whole): the server may have acted on the request or not."""


class _Clock:
    """The deadline of one attempt: `stall_s` without progress, `limit_s` over all."""

    def __init__(self, stall_s: float, limit_s: float) -> None:
        now = trio.current_time()
        self._stall_s = stall_s
        self._end = now + limit_s
        self._last = now
        self.scope = trio.CancelScope(deadline=min(self._end, now + stall_s))

    def progress(self) -> None:
        now = trio.current_time()
        # Moving a deadline costs a heap operation: an eighth of the stall time is precise enough.
        if now - self._last > self._stall_s / 8:
            self._last = now
            self.scope.deadline = min(self._end, now + self._stall_s)


class _Connection:
    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.scratch = memoryview(bytearray(_HEAD_BYTES))
        self.idle_since = 0.0
        #: Whether a byte of the current answer came: from then on the connection was not stale.
        self.answering = False


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    head: bytes = field(repr=False)
    body: Body | None
    buffers: Sequence[memoryview]
    check: Callable[[Answer], None] | None
    text_bytes: int
    head_only: bool
    stall_s: float
    silent_s: float


class Transport:
    """HTTP to one endpoint with at most `max_requests` requests at a time; those beyond wait in order.

    `endpoint` is `http[s]://host[:port]`; times are seconds.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        max_requests: int = 32,
        ca_file: str | None = None,
        connect_timeout_s: float = 5.0,
        stall_timeout_s: float = 15.0,
        idle_timeout_s: float = 25.0,
    ) -> None:
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname or url.path not in ("", "/"):
            raise ValueError(f"endpoint {endpoint!r} is not http[s]://HOST[:PORT]")
        self.endpoint = f"{url.scheme}://{url.netloc}"
        self.scheme = url.scheme
        #: The Host header, without a default port as every client sends it.
        self.host = url.netloc.rpartition("@")[2]
        self._name = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context(cafile=ca_file) if url.scheme == "https" else None
        self._slots = trio.Semaphore(max_requests, max_value=max_requests)
        # A body may be made of what other requests fetch: some slots are never taken by such bodies.
        most = max(1, max_requests - max(1, max_requests // 4))
        self._sending = trio.Semaphore(most, max_value=most)
        self._idle: list[_Connection] = []
        self._connect_timeout_s = connect_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._idle_timeout_s = idle_timeout_s

    async def request(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str] | Callable[[], Awaitable[Mapping[str, str]]],
        *,
        limit_s: float,
        stall_s: float = math.inf,
        silent_s: float = 0.0,
        wait_s: float = math.inf,
        body: Body | None = None,
        buffers: Sequence[memoryview] = (),
        check: Callable[[Answer], None] | None = None,
        text_bytes: int = 1 << 20,
        repeatable: bool = True,
        head_only: bool = False,
    ) -> Answer:
        """The answer to one request, within `limit_s` of getting a slot, for which it waits `wait_s` at most.

        `headers` may be what makes them: that is called when the request is about to be sent, not before the wait.
        `stall_s` shortens how long the request may go on without progress, `silent_s` is added to that: for work
        during which the server sends nothing. `wait_s` 0 needs no slot.

        With `buffers`, a 200 or 206 body is received into them and must fill them exactly; `check` sees the head
        first and raises to refuse it. Any other body is in the answer, and raises BadResponse beyond `text_bytes`; of
        one that comes with a failure the beginning is enough. `head_only` ends at the head (a stream).
        A pooled connection that turns out to be closed is replaced without an error if the request is `repeatable`.
        """
        slots = self._slots_for(body) if wait_s else ()
        await self._acquire(slots, wait_s)
        try:
            sent = await headers() if callable(headers) else headers
            head = _head(method, target, sent, body)
            request = _Request(method, head, body, buffers, check, text_bytes, head_only, stall_s, silent_s)
            return await self._request(request, limit_s, repeatable)
        finally:
            for slot in slots:
                slot.release()

    def _slots_for(self, body: Body | None) -> tuple[trio.Semaphore, ...]:
        return (self._slots,) if body is None or isinstance(body, Bytes) else (self._sending, self._slots)

    async def _acquire(self, slots: Sequence[trio.Semaphore], wait_s: float) -> None:
        """Takes all of them, or none. Raises NotSent after `wait_s`."""
        taken: list[trio.Semaphore] = []
        try:
            with trio.move_on_after(wait_s):
                for slot in slots:
                    try:
                        slot.acquire_nowait()
                    except trio.WouldBlock:
                        await slot.acquire()
                    taken.append(slot)
            if len(taken) < len(slots):
                raise NotSent(f"all requests to {self.endpoint} that may run at once wait for their answers")
        except BaseException:
            for slot in taken:
                slot.release()
            raise

    async def aclose(self) -> None:
        """Closes the idle connections; those in use close when their requests end."""
        self._idle_timeout_s = 0
        while self._idle:
            self._idle.pop().wire.close()
        await trio.lowlevel.checkpoint()

    async def _request(self, request: _Request, limit_s: float, repeatable: bool) -> Answer:
        connection = self._pooled()
        if connection is not None:
            try:
                return await self._attempt(connection, request, limit_s)
            except Lost as exc:
                if not (repeatable and isinstance(exc.__cause__, Broken) and not connection.answering):
                    raise
        return await self._attempt(await self._connect(), request, limit_s)

    def _pooled(self) -> _Connection | None:
        oldest = trio.current_time() - self._idle_timeout_s
        while self._idle:
            connection = self._idle.pop()
            if connection.idle_since > oldest and not connection.wire.stale():
                connection.answering = False
                return connection
            connection.wire.close()
        return None

    async def _connect(self) -> _Connection:
        try:
            with trio.fail_after(self._connect_timeout_s):
                return _Connection(await connect(self._name, self._port, self._tls))
        except trio.TooSlowError as exc:
            raise NotSent(f"no connection to {self.endpoint} within {self._connect_timeout_s:g} s") from exc
        except ssl.SSLCertVerificationError as exc:
            raise Refused(f"the certificate of {self.endpoint} is not trusted: {exc.verify_message}") from exc
        except OSError as exc:
            raise NotSent(f"no connection to {self.endpoint}: {exc.strerror or exc}") from exc

    async def _attempt(self, connection: _Connection, request: _Request, limit_s: float) -> Answer:
        clock = _Clock(min(self._stall_timeout_s, request.stall_s) + request.silent_s, limit_s)
        reusable = False
        try:
            with clock.scope:
                sent = await _send(connection.wire, request, clock)
                answer, reusable = await _receive(connection, request, clock)
                if not sent:
                    reusable = False
                    if answer.status < 300:
                        raise BadResponse(f"{self.endpoint} answered {answer.status} before the body was sent")
                return answer
        except Broken as exc:
            raise Lost(f"the connection to {self.endpoint} broke: {exc}") from exc
        finally:
            # Synchronous, so that a cancelled request cannot leave its connection behind.
            if reusable and self._idle_timeout_s:
                connection.idle_since = trio.current_time()
                self._idle.append(connection)
            else:
                connection.wire.close()
        raise Lost(f"{self.endpoint} did not answer in time")


async def _send(wire: Wire, request: _Request, clock: _Clock) -> bool:
    """Sends the request; False if an answer, or the end, came before all of it was sent."""
    body = request.body
    if body is not None and body.size_bytes > _SMALL_BODY_BYTES:
        return await _send_watched(wire, request.head, body, clock)
    data: Buffer = request.head
    if body is not None and body.size_bytes:
        async with iterating(body) as chunks:
            parts: list[Buffer] = [chunk async for chunk in chunks]
        _require_size(body, sum(map(len, parts)))
        data = b"".join((request.head, *parts))
    try:
        await wire.send_all(data)
    except Broken:
        # The answer that says why may be waiting; if there is none, receiving raises the same error.
        return False
    return True


async def _send_watched(wire: Wire, head: bytes, body: Body, clock: _Clock) -> bool:
    """Like `_send`, with one task that waits for an early answer while another sends."""
    sent_bytes = 0
    finished = False
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_on_input, wire, nursery.cancel_scope)
        try:
            await wire.send_all(head)
            async with iterating(body) as chunks:
                async for chunk in chunks:
                    await wire.send_all(chunk)
                    sent_bytes += len(chunk)
                    clock.progress()
            finished = True
        except Broken:
            pass
        except Exception as exc:
            # Raised again outside, where the nursery cannot wrap it in a group.
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if finished:
        _require_size(body, sent_bytes)
    return finished


async def _cancel_on_input(wire: Wire, scope: trio.CancelScope) -> None:
    try:
        await wire.readable()
    except Broken:
        return
    scope.cancel()


def _require_size(body: Body, sent_bytes: int) -> None:
    if sent_bytes != body.size_bytes:
        raise Refused(f"the content changed while it was sent: {sent_bytes} bytes instead of {body.size_bytes}")


async def _receive(connection: _Connection, request: _Request, clock: _Clock) -> tuple[Answer, bool]:
    """The answer, and whether the connection can serve another request."""
    framing = Framing()
    head_bytes = 0
    while framing.answer is None:
        head_bytes += await _feed(connection, framing, clock)
        if framing.answer is None and head_bytes > _MAX_HEAD_BYTES:
            raise BadResponse("the head of the answer has no end")
    answer = framing.answer
    if request.head_only:
        return answer, False
    if request.buffers and answer.status < 300 and answer.status not in _WITH_DATA:
        raise BadResponse(f"status {answer.status} came where bytes were due")
    if request.method == "HEAD" or answer.status in _BODYLESS:
        return answer, framing.keep_alive and not framing.data
    if request.buffers and answer.status in _WITH_DATA:
        if request.check is not None:
            request.check(answer)
        whole = await _fill(connection, framing, request.buffers, clock)
        return answer, framing.keep_alive and whole
    answer.body = await _text(connection, framing, clock, request.text_bytes)
    return answer, framing.keep_alive and framing.complete


async def _feed(connection: _Connection, framing: Framing, clock: _Clock) -> int:
    received = await connection.wire.recv_into(connection.scratch)
    if not received:
        raise Broken("closed before the answer was whole")
    connection.answering = True
    clock.progress()
    framing.feed(connection.scratch[:received])
    return received


async def _text(connection: _Connection, framing: Framing, clock: _Clock, most_bytes: int) -> bytes:
    assert framing.answer is not None
    failed = framing.answer.status >= 300
    if failed:
        most_bytes = _REASON_BYTES
    until_close = not {"content-length", "transfer-encoding"} & framing.answer.headers.keys()
    # Chunks have heads and trailers, which are bounded as well.
    received_bytes = len(framing.data)
    while not framing.complete and received_bytes <= 2 * most_bytes and len(framing.data) <= most_bytes:
        try:
            received_bytes += await _feed(connection, framing, clock)
        except Broken:
            if until_close:
                break
            raise
    if not failed and (len(framing.data) > most_bytes or received_bytes > 2 * most_bytes):
        raise BadResponse(f"the answer is longer than {most_bytes} bytes")
    del framing.data[most_bytes:]
    return bytes(framing.data)


async def _fill(connection: _Connection, framing: Framing, buffers: Sequence[memoryview], clock: _Clock) -> bool:
    """Fills the buffers with the body; raises BadResponse if it is shorter or longer than they are."""
    assert framing.answer is not None
    wanted = sum(map(len, buffers))
    length = framing.answer.headers.get("content-length")
    if length is not None and length != str(wanted):
        raise BadResponse(f"the answer has {length} bytes where {wanted} were due")
    sink = Sink(buffers)
    sink.write(framing.data)
    while length is not None and sink.room:
        received = await connection.wire.recv_into(sink.room)
        if not received:
            raise Broken("closed in the middle of the body")
        clock.progress()
        sink.advance(received)
    while not framing.complete and length is None:
        framing.data.clear()
        await _feed(connection, framing, clock)
        sink.write(framing.data)
    if sink.room:
        raise BadResponse(f"the answer ended before the {wanted} bytes that were due")
    return True


def _head(method: str, target: str, headers: Mapping[str, str], body: Body | None) -> bytes:
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body is not None or method in ("PUT", "POST"):
        lines.append(f"Content-Length: {body.size_bytes if body is not None else 0}")
    if not _fits_a_head("".join(lines)):
        # The line itself is not shown: it may be the one with the keys.
        bad = next(line for line in lines if not _fits_a_head(line))
        name = "its first line" if bad is lines[0] else f"the header {bad.partition(':')[0]}"
        raise Refused(f"the request cannot be sent: {name} has a character that no head can carry")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def _fits_a_head(text: str) -> bool:
    """Whether it is printable ASCII: a line end in it would begin another header, or another request."""
    return text.isascii() and text.isprintable()
