"""`S3Store` where a real server cannot be made to misbehave: lost answers, refusals, clocks, keys that rotate."""

from __future__ import annotations

import base64
import hashlib
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import trio

from s3fuse.credentials import Credentials, StaticProvider
from s3fuse.errors import (
    AccessDenied,
    BadResponse,
    ClockSkew,
    NeedsCredentials,
    NoSuchBucket,
    NotFound,
    PreconditionFailed,
    Refused,
    StoreError,
    Unavailable,
    Unsupported,
)
from s3fuse.store.base import Bytes, Condition, Part
from s3fuse.store.s3 import S3Store
from s3fuse.store.s3client import S3Client
from tests.store.scripted import Peer, answer, failure, scripted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from s3fuse.credentials import Provider

SECRET = "very-secret-key"
ETAG = hashlib.md5(b"hello").hexdigest()
MODIFIED = "Last-Modified: Wed, 25 Nov 2026 08:46:25 GMT"
CRC = base64.b64encode(zlib.crc32(b"hello").to_bytes(4, "big")).decode()
STORED = answer(200, b"", f'ETag: "{ETAG}"', f"x-amz-checksum-crc32: {CRC}")
DESCRIBED = f'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "{ETAG}"\r\n{MODIFIED}\r\nX-Amz-Meta-A: 1\r\n\r\n'.encode()
ABSENT = Condition(absent=True)
LOST = b""
#: What MinIO answers to HEAD.
NO_KEY = answer(404, b"", "x-minio-error-code: NoSuchKey")

Open: TypeAlias = "Callable[..., S3Store]"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S3Client, "backoff_s", lambda _self, _attempt: 0.0)


@pytest.fixture
async def open_store() -> AsyncIterator[Open]:
    made: list[S3Store] = []

    def make(endpoint: str, credentials: Provider | None = None, **options: Any) -> S3Store:
        made.append(S3Store(endpoint, "bucket", credentials or StaticProvider("access", SECRET), **options))
        return made[-1]

    yield make
    for store in made:
        await store.aclose()


def play(*answers: bytes, heads: list[str] | None = None) -> Callable[[Peer], Awaitable[None]]:
    """Answers the requests of all connections in this order; LOST closes the connection instead."""
    rest = iter(answers)

    async def serve(peer: Peer) -> None:
        while True:
            head, _ = await peer.request()
            if not head:
                return
            if heads is not None:
                heads.append(head)
            data = next(rest)
            if data == LOST:
                return
            await peer.send(data)

    return serve


async def put(store: S3Store, condition: Condition = ABSENT) -> str:
    return await store.put("k", Bytes(b"hello"), metadata={"a": "1"}, headers={}, condition=condition)


async def get(store: S3Store) -> bytes:
    buffer = bytearray(5)
    await store.get_into("k", 0, [memoryview(buffer)], etag=ETAG)
    return bytes(buffer)


async def test_lost_answer_of_a_conditional_put_that_happened(open_store: Open) -> None:
    async with scripted(play(LOST, DESCRIBED)) as server:
        store = open_store(server.endpoint)
        assert await put(store) == ETAG
        assert store.requests == {"put": 1, "head": 1}


async def test_lost_answer_of_a_conditional_put_that_did_not_happen(open_store: Open) -> None:
    async with scripted(play(LOST, NO_KEY, STORED)) as server:
        store = open_store(server.endpoint)
        assert await put(store) == ETAG
        assert store.requests == {"put": 2, "head": 1}


async def test_lost_answer_of_a_conditional_put_that_happens_late(open_store: Open) -> None:
    late = (LOST, NO_KEY, answer(412, failure("PreconditionFailed")), DESCRIBED)
    async with scripted(play(*late)) as server:
        store = open_store(server.endpoint)
        assert await put(store) == ETAG
        assert store.requests == {"put": 2, "head": 2}


@pytest.mark.parametrize("other", [b'ETag: "1"', b"X-Amz-Meta-A: 2", b"Content-Length: 6"])
async def test_somebody_else_s_object_is_not_taken_for_ours(open_store: Open, other: bytes) -> None:
    name = other.partition(b":")[0]
    theirs = b"\r\n".join(other if line.startswith(name) else line for line in DESCRIBED.split(b"\r\n"))
    async with scripted(play(LOST, theirs, answer(412, failure("PreconditionFailed")), theirs)) as server:
        store = open_store(server.endpoint)
        with pytest.raises(PreconditionFailed):
            await put(store)


async def test_refused_condition_is_believed_at_once(open_store: Open) -> None:
    async with scripted(play(answer(412, failure("PreconditionFailed")))) as server:
        store = open_store(server.endpoint)
        with pytest.raises(PreconditionFailed):
            await put(store)
        assert store.requests == {"put": 1}


async def test_lost_answer_of_a_completion(open_store: Open) -> None:
    parts = [Part(1, ETAG)]
    etag = hashlib.md5(bytes.fromhex(ETAG)).hexdigest() + "-1"
    done = DESCRIBED.replace(ETAG.encode(), etag.encode())
    async with scripted(play(LOST, NO_KEY, answer(404, failure("NoSuchUpload")), done)) as server:
        store = open_store(server.endpoint)
        assert await store.multipart_complete("k", "id", parts) == etag
        assert store.requests == {"multipart_complete": 2, "head": 2}


async def test_a_completion_that_leaves_the_etag_is_known_by_its_metadata(open_store: Open) -> None:
    """The one before has the same bytes in the same parts: it does not show that the answer to this one was lost."""
    parts = [Part(1, ETAG)]
    etag = hashlib.md5(bytes.fromhex(ETAG)).hexdigest() + "-1"
    before = DESCRIBED.replace(ETAG.encode(), etag.encode())
    result = f"<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
    async with scripted(play(LOST, before, answer(200, result.encode()))) as server:
        store = open_store(server.endpoint)
        condition = Condition(etag=etag)
        assert await store.multipart_complete("k", "id", parts, condition=condition, metadata={"mode": "7"}) == etag
        assert store.requests == {"multipart_complete": 2, "head": 1}


async def test_completion_of_an_unknown_upload(open_store: Open) -> None:
    async with scripted(play(answer(404, failure("NoSuchUpload")))) as server:
        with pytest.raises(NotFound):
            await open_store(server.endpoint).multipart_complete("k", "id", [Part(1, ETAG)])


@pytest.mark.parametrize(("code", "kind"), [("InternalError", Unavailable), ("InvalidPart", Refused)])
async def test_error_hidden_in_a_success(open_store: Open, code: str, kind: type[StoreError]) -> None:
    async def serve(peer: Peer) -> None:
        while head := (await peer.request())[0]:
            await peer.send(NO_KEY if head.startswith("HEAD") else answer(200, b"  \n" + failure(code)))

    async with scripted(serve) as server:
        store = open_store(server.endpoint)
        with pytest.raises(kind, match=code):
            await store.multipart_complete("k", "id", [Part(1, ETAG)])
        with pytest.raises(kind, match=code):
            await store.copy("a", "b", source_etag=ETAG)


@pytest.mark.parametrize("first", [LOST, answer(500), answer(503, failure("SlowDown")), answer(429)])
async def test_reads_and_plain_writes_are_repeated(open_store: Open, first: bytes) -> None:
    data = answer(206, b"hello", f'ETag: "{ETAG}"', "Content-Range: bytes 0-4/9")
    async with scripted(play(first, data, first, STORED, first, answer(204))) as server:
        store = open_store(server.endpoint)
        assert await get(store) == b"hello"
        assert await put(store, Condition()) == ETAG
        await store.delete("k")
        # What a closed pooled connection never carried is sent again without counting.
        counts = {"get": 2, "put": 1, "delete": 1} if first == LOST else {"get": 2, "put": 2, "delete": 2}
        assert store.requests == counts


async def test_a_conflict_of_conditions_is_tried_again(open_store: Open) -> None:
    async with scripted(play(answer(409, failure("ConditionalRequestConflict")), STORED)) as server:
        assert await put(open_store(server.endpoint)) == ETAG


async def test_retries_end(open_store: Open) -> None:
    async with scripted(play(*[answer(503)] * 99)) as server:
        store = open_store(server.endpoint)
        with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:[0-9]+/bucket/k: 503"):
            await store.head("k")
        assert store.requests == {"head": 7}


async def test_deadline_ends_retries_of_a_silent_server(open_store: Open) -> None:
    async def silent(peer: Peer) -> None:
        await peer.until_closed()

    async with scripted(silent) as server:
        started = trio.current_time()
        with pytest.raises(Unavailable):
            await open_store(server.endpoint, deadline_s=0.05).head("k")
        assert trio.current_time() - started < 2


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchBucket", NoSuchBucket),
        (404, "NoSuchKey", NotFound),
        (403, "AccessDenied", AccessDenied),
        (400, "ExpiredToken", NeedsCredentials),
        (401, "", NeedsCredentials),
        (403, "SignatureDoesNotMatch", NeedsCredentials),
        (403, "RequestTimeTooSkewed", ClockSkew),
        (404, "", BadResponse),
        (501, "NotImplemented", Unsupported),
        (400, "EntityTooLarge", Refused),
        (405, "MethodNotAllowed", Refused),
        (301, "PermanentRedirect", BadResponse),
    ],
)
async def test_classes_of_errors(open_store: Open, status: int, code: str, kind: type[StoreError]) -> None:
    async with scripted(play(*[answer(status, failure(code) if code else b"")] * 9)) as server:
        with pytest.raises(kind) as caught:
            await open_store(server.endpoint).list_page("p")
        assert type(caught.value) is kind
        assert SECRET not in f"{caught.value} {caught.value.__cause__!r}"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (answer(200, b"<a/>!", "Content-Type: application/xml"), BadResponse),
        (answer(206, b"hello", 'ETag: "1"', "Content-Range: bytes 0-4/9"), PreconditionFailed),
        (answer(206, b"hello", f'ETag: "{ETAG}"', "Content-Range: bytes 1-5/9"), BadResponse),
        (answer(206, b"hello", f'ETag: "{ETAG}"'), BadResponse),
        (answer(200, b"hello, whole", f'ETag: "{ETAG}"'), BadResponse),
        (answer(204, b""), BadResponse),
    ],
)
async def test_a_get_believes_nothing_else(open_store: Open, data: bytes, kind: type[StoreError]) -> None:
    async with scripted(play(*[data] * 3)) as server:
        with pytest.raises(kind):
            await get(open_store(server.endpoint))


async def test_a_body_cut_in_the_middle_is_fetched_again(open_store: Open) -> None:
    data = answer(206, b"hello", f'ETag: "{ETAG}"', "Content-Range: bytes 0-4/9")

    async def cut(peer: Peer) -> None:
        await peer.request()
        await peer.send(data[:-2])

    async with scripted(cut, play(data)) as server:
        assert await get(open_store(server.endpoint)) == b"hello"


@pytest.mark.parametrize(
    ("headers", "good"),
    [
        ([f'ETag: "{ETAG}"', "x-amz-checksum-crc32: AAAAAA=="], False),
        ([f'ETag: "{ETAG}"'], True),
        (['ETag: "00000000000000000000000000000000"'], False),
        (['ETag: "00000000000000000000000000000000"', "x-amz-server-side-encryption: aws:kms"], True),
        (['ETag: "not-md5"'], True),
        ([], False),
    ],
)
async def test_what_was_stored_is_compared(open_store: Open, headers: list[str], good: bool) -> None:
    async with scripted(play(*[answer(200, b"", *headers)] * 3)) as server:
        store = open_store(server.endpoint)
        if good:
            await put(store, Condition())
        else:
            with pytest.raises(BadResponse):
                await put(store, Condition())


def now_header(offset: timedelta) -> str:
    return f"Date: {format_datetime(datetime.now(UTC) + offset, usegmt=True)}"


async def test_clock_is_learnt_from_the_server(open_store: Open) -> None:
    heads: list[str] = []
    ahead = timedelta(minutes=-20)
    refused = answer(403, failure("RequestTimeTooSkewed"), now_header(ahead))
    async with scripted(play(refused, STORED, answer(403, b"", now_header(timedelta())), heads=heads)) as server:
        store = open_store(server.endpoint)
        await put(store)
        dates = [line.split(": ")[1] for head in heads for line in head.split("\r\n") if line.startswith("x-amz-date")]
        signed = [datetime.strptime(date, "%Y%m%dT%H%M%SZ") for date in dates]
        assert abs(signed[1] - signed[0] - ahead) < timedelta(seconds=5)
        assert store.requests == {"put": 2}


@pytest.mark.parametrize(("code", "times"), [("AccessDenied", 2), ("SignatureDoesNotMatch", 1)])
async def test_a_refusal_with_the_right_time_is_final(open_store: Open, code: str, times: int) -> None:
    async with scripted(play(*[answer(403, failure(code), now_header(timedelta()))] * times)) as server:
        store = open_store(server.endpoint)
        with pytest.raises(AccessDenied):
            await put(store)
        assert store.requests == {"put": times}


class Rotating:
    """Gives other keys whenever it is asked again."""

    def __init__(self) -> None:
        self.asked = 0

    def retrieve(self) -> Credentials:
        self.asked += 1
        return Credentials(f"access-{self.asked}", SECRET, session_token=f"token-{self.asked}")


async def test_rotated_credentials_are_fetched_when_the_old_ones_are_refused(open_store: Open) -> None:
    heads: list[str] = []
    provider = Rotating()
    refused = answer(403, failure("InvalidAccessKeyId"))
    async with scripted(play(STORED, STORED, refused, STORED, heads=heads)) as server:
        store = open_store(server.endpoint, provider)
        for _ in range(3):
            await put(store)
    assert [next(n for n in "12" if f"access-{n}/" in head and f"token-{n}" in head) for head in heads] == list("1112")
    assert provider.asked == 2


class Missing:
    def retrieve(self) -> Credentials:
        raise ValueError(f"cannot read {SECRET}")


async def test_no_credentials(open_store: Open) -> None:
    with pytest.raises(AccessDenied, match="ValueError") as caught:
        await open_store("http://127.0.0.1:9", Missing()).check()
    assert SECRET not in str(caught.value)


async def test_listing_that_is_no_xml_is_asked_again_without_metadata(open_store: Open) -> None:
    heads: list[str] = []
    bad = answer(200, b"<ListBucketResult><Contents><UserMetadata><a!b></a!b></UserMetadata></Contents></L>")
    good = answer(
        200,
        b"<ListBucketResult><Name>bucket</Name><Prefix>p q</Prefix><IsTruncated>false</IsTruncated></ListBucketResult>",
    )
    async with scripted(play(bad, good, heads=heads)) as server:
        page = await open_store(server.endpoint).list_page("p q")
    assert page.objects == ()
    assert ["metadata=true" in head for head in heads] == [True, False]
    assert "prefix=p%20q" in heads[0]


async def test_truncated_listing_without_a_token(open_store: Open) -> None:
    bad = answer(200, b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>")
    async with scripted(play(*[bad] * 4)) as server:
        with pytest.raises(BadResponse):
            await open_store(server.endpoint).list_page("")


async def test_failed_deletes_are_told(open_store: Open) -> None:
    body = b"<DeleteResult><Error><Key>a</Key><Code>AccessDenied</Code><Message>no</Message></Error></DeleteResult>"
    async with scripted(play(answer(200, body))) as server:
        failed = await open_store(server.endpoint).delete_many(["a", "b"])
    assert {key: (type(why), str(why)) for key, why in failed.items()} == {"a": (AccessDenied, "AccessDenied: no")}


async def test_no_server(open_store: Open) -> None:
    async with scripted(play()) as server:
        endpoint = server.endpoint
    store = open_store(endpoint)
    for attempt in (store.check(), store.create_bucket()):
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1"):
            await attempt


async def test_tls(open_store: Open, tmp_path: Path) -> None:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key -out cert -subj /CN=localhost"
    await trio.run_process(
        [*command.split(), "-addext", "subjectAltName=DNS:localhost"], cwd=tmp_path, capture_stderr=True
    )
    body = b"x" * 300_000
    etag = hashlib.md5(body).hexdigest()
    data = answer(200, body, f'ETag: "{etag}"')
    async with scripted(play(data, STORED, answer(403, failure("InvalidAccessKeyId"))), certificate=tmp_path) as server:
        endpoint = server.endpoint.replace("127.0.0.1", "localhost")
        with pytest.raises(Refused, match="not trusted"):
            await open_store(endpoint).check()
        store = open_store(endpoint, ca_file=str(tmp_path / "cert"))
        buffer = bytearray(len(body))
        await store.get_into("k", 0, [memoryview(buffer)[:7], memoryview(buffer)[7:]], etag=etag)
        assert buffer == body
        await put(store)
        with pytest.raises(AccessDenied):
            await store.put("k", Bytes(b"x" * 400_000), metadata={}, headers={})
        assert server.connections == 2
