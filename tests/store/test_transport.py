"""The HTTP client against servers that misbehave in every way that was thought of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import trio
import trio.testing

from s3fuse.errors import BadResponse, Refused, Unavailable
from s3fuse.store.base import Bytes
from s3fuse.store.transport import Lost, NotSent, Transport
from tests.store.scripted import Peer, answer, scripted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from s3fuse.store.base import Body, Buffer
    from s3fuse.store.framing import Answer

LIMIT_S = 10.0
BIG = b"x" * (8 << 20)
Connect: TypeAlias = "Callable[..., Transport]"


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Makes transports, which are closed at the end of the test."""
    made: list[Transport] = []

    def make(endpoint: str, **options: Any) -> Transport:
        made.append(Transport(endpoint, **options))
        return made[-1]

    yield make
    for transport in made:
        await transport.aclose()


def script(*answers: bytes) -> Callable[[Peer], Awaitable[None]]:
    """Answers one request after the other, then closes."""

    async def serve(peer: Peer) -> None:
        for data in answers:
            await peer.request()
            await peer.send(data)

    return serve


async def get(transport: Transport, size_bytes: int = 0, *, pieces: int = 1) -> tuple[Answer, bytes]:
    memory = bytearray(size_bytes)
    view, step = memoryview(memory), max(1, size_bytes // pieces)
    buffers = [view[start : start + step] for start in range(0, size_bytes, step)]
    return await transport.request("GET", "/b/k", {}, limit_s=LIMIT_S, buffers=buffers), bytes(memory)


async def put(transport: Transport, body: Body, *, repeatable: bool = True) -> Answer:
    return await transport.request("PUT", "/b/k", {}, limit_s=LIMIT_S, body=body, repeatable=repeatable)


async def test_keep_alive_uses_one_connection(connect: Connect) -> None:
    body = bytes(range(256)) * 1000
    async with scripted(script(answer(200, body), answer(404, b"gone"), answer(204), answer(200, body))) as server:
        transport = connect(server.endpoint)
        found, data = await get(transport, len(body), pieces=7)
        assert (found.status, data) == (200, body)
        assert (await get(transport))[0].body == b"gone"
        assert (await get(transport))[0].status == 204
        assert (await get(transport, len(body)))[1] == body
        assert server.connections == 1
        await transport.aclose()


async def test_head_has_no_body_whatever_its_length(connect: Connect) -> None:
    head = b'HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nETag: "1"\r\n\r\n'
    async with scripted(script(head, answer(200, b"hello"))) as server:
        transport = connect(server.endpoint)
        found = await transport.request("HEAD", "/b/k", {}, limit_s=LIMIT_S)
        assert found.headers == {"content-length": "1000000", "etag": '"1"'}
        assert (await get(transport, 5))[1] == b"hello"
        assert server.connections == 1


@pytest.mark.parametrize("split", [1, 3, 1000])
async def test_chunked_body(connect: Connect, split: int) -> None:
    body = bytes(range(256)) * 20
    chunks = [body[start : start + 700] for start in range(0, len(body), 700)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed

    async def serve(peer: Peer) -> None:
        for _ in range(2):
            await peer.request()
            for start in range(0, len(whole), max(split, len(whole) // 500)):
                await peer.send(whole[start : start + max(split, len(whole) // 500)])

    async with scripted(serve) as server:
        transport = connect(server.endpoint)
        assert (await get(transport, len(body)))[1] == body
        assert (await get(transport))[0].body == body
        assert server.connections == 1


async def test_interim_answers_are_skipped(connect: Connect) -> None:
    async with scripted(script(b"HTTP/1.1 100 Continue\r\n\r\n" + answer(200, b"hello", "X-A: 1", "x-a: 2"))) as server:
        found, data = await get(connect(server.endpoint), 5)
        assert (data, found.headers["x-a"]) == (b"hello", "1, 2")


async def test_body_until_close(connect: Connect) -> None:
    async with scripted(script(b"HTTP/1.0 200 OK\r\n\r\n<xml/>")) as server:
        assert (await get(connect(server.endpoint)))[0].body == b"<xml/>"


@pytest.mark.parametrize(
    "data",
    [
        answer(200, b"hell"),
        answer(200, b"hello!"),
        answer(206, b"<Error><Code>SlowDown</Code></Error>"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhell\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nhello!\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n",
        b"\x16\x03\x01\x00\x05hello",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 60_000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1_001 + b"Content-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 24 + b"\r\n\r\nhello",
    ],
    ids=[
        *("short", "long", "xml", "short-chunks", "long-chunks", "bad-chunks", "ssh", "tls", "endless-head"),
        *("many-headers", "upgrade", "negative", "huge"),
    ],
)
async def test_wrong_answers(connect: Connect, data: bytes) -> None:
    async with scripted(script(data)) as server:
        with pytest.raises(BadResponse):
            await get(connect(server.endpoint), 5)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        answer(200, b"x" * ((1 << 20) + 1)),
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (2 << 20),
        CHUNKED + b"100000\r\n%s\r\n" % (b"x" * (1 << 20)) + b"1\r\nx\r\n" * 2,
        CHUNKED + b"1\r\nx\r\n" * 500_000,
        CHUNKED + b"0\r\n" + b"trailer: y\r\n" * 300_000,
    ],
    ids=["length", "until-close", "chunks", "small-chunks", "trailers"],
)
async def test_a_text_without_end_is_refused(connect: Connect, data: bytes) -> None:
    async with scripted(script(data)) as server:
        with pytest.raises(BadResponse, match="longer than"):
            await get(connect(server.endpoint))


async def test_trailers_are_no_headers(connect: Connect) -> None:
    async with scripted(script(CHUNKED + b"2\r\nok\r\n0\r\nETag: x\r\n\r\n")) as server:
        found = (await get(connect(server.endpoint)))[0]
        assert (found.body, found.headers.get("etag")) == (b"ok", None)


async def test_of_a_long_reason_the_beginning_is_enough(connect: Connect) -> None:
    long = answer(403, b"<Error>" + b"no" * 500_000)
    async with scripted(script(long), script(answer(204))) as server:
        transport = connect(server.endpoint)
        found = (await get(transport))[0]
        assert (found.status, len(found.body)) == (403, 64 << 10)
        assert (await get(transport))[0].status == 204
        assert server.connections == 2


async def test_an_error_where_bytes_were_due_is_no_data(connect: Connect) -> None:
    async with scripted(script(answer(503, b"<Err/>"))) as server:
        found, data = await get(connect(server.endpoint), 6)
        assert (found.status, found.body, data) == (503, b"<Err/>", bytes(6))


async def test_check_sees_the_head_before_any_byte_is_stored(connect: Connect) -> None:
    def refuse(answer: Answer) -> None:
        raise BadResponse(f"etag {answer.headers['etag']}")

    async with scripted(script(answer(200, b"hello", "etag: 1"))) as server:
        memory = bytearray(5)
        with pytest.raises(BadResponse, match="etag 1"):
            await connect(server.endpoint).request(
                "GET", "/", {}, limit_s=LIMIT_S, buffers=[memoryview(memory)], check=refuse
            )
        assert memory == bytes(5)


@pytest.mark.parametrize("cut", [0, 10, 41, 45])
async def test_connection_cut(connect: Connect, cut: int) -> None:
    data = answer(200, b"hello world")
    async with scripted(script(data[:cut])) as server:
        with pytest.raises(Lost):
            await get(connect(server.endpoint), 11)
        assert server.connections == 1


@pytest.mark.parametrize("cut", [0, 10, 45])
async def test_stall(connect: Connect, cut: int, short_s: float) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer(200, b"hello world")[:cut])
        await peer.until_closed()

    async with scripted(serve) as server:
        started = trio.current_time()
        with pytest.raises(Unavailable, match="in time"):
            await get(connect(server.endpoint, stall_timeout_s=short_s), 11)
        assert trio.current_time() - started < 20 * short_s


async def test_slow_progress_is_no_stall_but_has_a_limit(connect: Connect, short_s: float) -> None:
    async def serve(peer: Peer) -> None:
        await peer.request()
        for byte in answer(200, b"x" * 10_000):
            await peer.send(bytes([byte]))
            await trio.sleep(short_s / 10)

    async with scripted(serve) as server:
        transport = connect(server.endpoint, stall_timeout_s=short_s)
        started = trio.current_time()
        with pytest.raises(Lost):
            await transport.request("GET", "/", {}, limit_s=4 * short_s)
        assert trio.current_time() - started >= 3.9 * short_s


@pytest.fixture
def short_s() -> float:
    """Real sockets need the real clock, so a timeout that is tested has to be short."""
    return 0.05


async def test_no_server(connect: Connect) -> None:
    async with scripted(script(b"")) as server:
        endpoint = server.endpoint
    with pytest.raises(NotSent):
        await get(connect(endpoint))


async def test_idle_connection_that_the_server_closed(connect: Connect) -> None:
    async with scripted(script(answer(200, b"1")), script(answer(200, b"2"))) as server:
        transport = connect(server.endpoint)
        await get(transport, 1)
        with trio.fail_after(5):
            while not transport._idle[0].wire.stale():
                await trio.lowlevel.checkpoint()
        assert (await get(transport, 1))[1] == b"2"
        assert server.connections == 2


async def close_after_request(peer: Peer) -> None:
    """Answers once; what comes next on the connection finds it closing: the race that no check before can see."""
    await peer.request()
    await peer.send(answer(200, b"1"))
    await peer.head()


async def test_connection_that_closes_under_a_request_is_replaced(connect: Connect) -> None:
    async with scripted(close_after_request, script(answer(200, b"2"))) as server:
        transport = connect(server.endpoint)
        await get(transport, 1)
        assert (await get(transport, 1))[1] == b"2"


async def test_request_that_must_not_be_repeated_is_lost_instead(connect: Connect) -> None:
    async with scripted(close_after_request, script(answer(200))) as server:
        transport = connect(server.endpoint)
        await get(transport, 1)
        with pytest.raises(Lost):
            await put(transport, Bytes(b"1"), repeatable=False)
        assert server.connections == 1


@pytest.mark.parametrize("size_bytes", [0, 1, 65_536, 65_537, len(BIG)])
async def test_bodies_arrive_whole(connect: Connect, size_bytes: int) -> None:
    seen: list[tuple[str, bytes]] = []

    async def serve(peer: Peer) -> None:
        for _ in range(2):
            seen.append(await peer.request())
            await peer.send(answer(200))

    async with scripted(serve) as server:
        transport = connect(server.endpoint)
        for _ in range(2):
            assert (await put(transport, Bytes(BIG[:size_bytes]))).status == 200
        assert server.connections == 1
    assert [body for _, body in seen] == [BIG[:size_bytes]] * 2
    assert f"content-length: {size_bytes}" in seen[0][0].lower()


@pytest.mark.parametrize("close", [True, False])
async def test_early_refusal_of_an_upload_is_reported(connect: Connect, close: bool) -> None:
    async def serve(peer: Peer) -> None:
        await peer.head()
        await peer.send(answer(403, b"<Error/>"))
        if not close:
            await trio.sleep_forever()

    async with scripted(serve) as server:
        transport = connect(server.endpoint)
        refusal = await put(transport, Bytes(BIG * 4))
        assert (refusal.status, refusal.body) == (403, b"<Error/>")
        assert not transport._idle


async def test_success_before_the_body_was_sent_is_no_success(connect: Connect) -> None:
    async def serve(peer: Peer) -> None:
        await peer.head()
        await peer.send(answer(200))
        await trio.sleep_forever()

    async with scripted(serve) as server:
        with pytest.raises(BadResponse):
            await put(connect(server.endpoint), Bytes(BIG * 4))


class Lying:
    """A body with another size than it says, or one that cannot be read."""

    def __init__(self, size_bytes: int, *chunks: bytes, error: Exception | None = None) -> None:
        self.size_bytes = size_bytes
        self._chunks = chunks
        self._error = error

    async def chunks(self) -> AsyncIterator[Buffer]:
        for chunk in self._chunks:
            yield chunk
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize(("size_bytes", "chunk"), [(10, b"x" * 9), (10, b"x" * 11), (100_000, b"x" * 99_999)])
async def test_body_that_changed_is_refused(connect: Connect, size_bytes: int, chunk: bytes) -> None:
    async with scripted(script(answer(200))) as server:
        transport = connect(server.endpoint, stall_timeout_s=0.2)
        with pytest.raises(Refused):
            await put(transport, Lying(size_bytes, chunk))
        assert not transport._idle


@pytest.mark.parametrize("size_bytes", [10, 100_000])
async def test_failure_to_read_a_body_is_the_caller_s(connect: Connect, size_bytes: int) -> None:
    async with scripted(script(answer(200))) as server:
        transport = connect(server.endpoint)
        with pytest.raises(OSError, match="disk"):
            await put(transport, Lying(size_bytes, b"x", error=OSError("disk")))
        assert not transport._idle


async def test_cancelled_requests_leave_no_connection_and_no_slot(connect: Connect) -> None:
    arrived = trio.Event()

    async def hang(peer: Peer) -> None:
        await peer.request()
        arrived.set()
        await peer.until_closed()

    async with scripted(hang, script(answer(200, b"1"))) as server, trio.open_nursery() as nursery:
        transport = connect(server.endpoint, max_requests=1)
        nursery.start_soon(get, transport, 1)
        await arrived.wait()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            assert not transport._idle
            assert (await get(transport, 1))[1] == b"1"


async def test_limit_of_requests_is_hard_and_fair(connect: Connect) -> None:
    running = most = 0
    order: list[str] = []

    async def serve(peer: Peer) -> None:
        nonlocal running, most
        while head := await peer.head():
            running += 1
            most = max(most, running)
            order.append(head.split(" ")[1])
            await trio.lowlevel.checkpoint()
            running -= 1
            await peer.send(answer(200))

    async with scripted(serve) as server:
        transport = connect(server.endpoint, max_requests=2)

        async def ask(path: str) -> None:
            await transport.request("GET", path, {}, limit_s=LIMIT_S)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(ask, f"/{number}")
                await trio.lowlevel.checkpoint()
        assert most <= 2
        assert server.connections == 2
        numbers = [int(path[1:]) for path in order]
        assert all(abs(number - place) <= 2 for place, number in enumerate(numbers))
        await transport.aclose()
        assert not transport._idle


async def test_bytes_after_an_answer_end_the_connection(connect: Connect) -> None:
    async with scripted(script(answer(200, b"1") + b"HTTP/1.1 200 OK\r\n\r\n"), script(answer(200, b"2"))) as server:
        transport = connect(server.endpoint)
        assert (await get(transport, 1))[1] == b"1"
        assert (await get(transport, 1))[1] == b"2"
        assert server.connections == 2


async def test_connection_close_is_honoured(connect: Connect) -> None:
    async with scripted(script(answer(200, b"1", "Connection: close"), answer(200, b"no"))) as server:
        transport = connect(server.endpoint)
        await get(transport, 1)
        assert not transport._idle


async def test_idle_timeout(connect: Connect) -> None:
    async with scripted(script(answer(200, b"1"))) as server:
        transport = connect(server.endpoint, idle_timeout_s=1e-9)
        await get(transport, 1)
        await get(transport, 1)
        assert server.connections == 2


@pytest.mark.parametrize("endpoint", ["localhost:9000", "ftp://x", "http://", "http://x/path", "http://x:port"])
def test_bad_endpoints(endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"endpoint|[Pp]ort"):
        Transport(endpoint)


class Fetched:
    """A body that another request fetches while it is sent."""

    size_bytes = 5

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def chunks(self) -> AsyncIterator[Buffer]:
        await trio.testing.wait_all_tasks_blocked()  # all bodies that can begin have begun
        yield (await get(self._transport, 5))[1]


@pytest.mark.parametrize("max_requests", [2, 3, 8])
async def test_bodies_that_are_fetched_leave_room_for_what_fetches_them(connect: Connect, max_requests: int) -> None:
    async def serve(peer: Peer) -> None:
        while True:
            head, _ = await peer.request()
            await peer.send(answer(200, b"hello" if head.startswith("GET") else b""))

    async with scripted(serve) as server:
        transport = connect(server.endpoint, max_requests=max_requests)
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                for _ in range(max_requests):
                    nursery.start_soon(put, transport, Fetched(transport))
