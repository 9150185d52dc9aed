"""No text that people see has anything of what a request is signed with: errors, their causes, the log."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING

import pytest

from s3fuse import errors
from s3fuse.credentials import Credentials
from s3fuse.errors import AccessDenied, NeedsCredentials, Refused, StoreError
from s3fuse.store.base import Bytes
from s3fuse.store.s3 import S3Store
from s3fuse.store.transport import Transport
from tests.store.scripted import scripted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from typing import Any

    from s3fuse.credentials import Keys
    from tests.store.scripted import Peer

SECRET = "a-secret-key-of-40-characters-with/+=abc"
TOKEN = "FwoGZXIvYXdzEBYaDHhBTEVGQUNF" * 20
ACCESS = "AKIAEXAMPLEEXAMPLE77"
#: Parts of them betray them as well.
PARTS = (SECRET[:20], SECRET[20:], TOKEN[:28], TOKEN[-28:], "Signature=", "AWS4-HMAC-SHA256 Credential=AKIA")


class Given:
    def __init__(self, keys: object) -> None:
        self.keys = keys

    def retrieve(self) -> Keys:
        if isinstance(self.keys, Exception):
            raise self.keys
        return self.keys  # type: ignore[return-value]


class FromSdk:
    """As an SDK's keys are, which nobody has checked."""

    def __init__(self, access: str = ACCESS, secret: str = SECRET, token: str | None = TOKEN) -> None:
        self.access_key, self.secret_key, self.session_token = access, secret, token

    def is_expired(self) -> bool:
        return False


def shown(error: BaseException, caplog: pytest.LogCaptureFixture) -> str:
    """All that anybody sees of an error, also of one that nobody foresaw."""
    logging.getLogger("test").error("it failed", exc_info=error)
    formatter = logging.Formatter()
    logged = "\n".join(formatter.format(record) for record in caplog.records)
    return "\n".join([str(error), repr(error), errors.described(error), *traceback.format_exception(error), logged])


def check(error: BaseException, caplog: pytest.LogCaptureFixture) -> str:
    text = shown(error, caplog)
    assert [part for part in PARTS if part in text] == []
    return text


@pytest.fixture
async def open_store() -> AsyncIterator[Callable[[str, object], S3Store]]:
    stores = []

    def make(endpoint: str, keys: object) -> S3Store:
        stores.append(S3Store(endpoint, "bucket", Given(keys), deadline_s=0.5))
        return stores[-1]

    yield make
    for store in stores:
        await store.aclose()


def echo(status: str, form: str) -> Callable[[Peer], Awaitable[None]]:
    """A server, or something before it, that shows the request's head in its answer."""

    async def script(peer: Peer) -> None:
        while head := (await peer.request())[0]:
            assert TOKEN in head
            body = form.replace("HEAD", head).replace("LINE", head.replace("\r\n", " ")).encode()
            await peer.send(
                f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nContent-Type: application/xml\r\n\r\n".encode()
                + (b"" if head.startswith("HEAD") else body)
            )

    return script


FORMS = [
    "<Error><Code>BadRequest</Code><Message>HEAD</Message></Error>",
    "<Error><Code>BadRequest</Code><Message>LINE</Message></Error>",
    f"<Error><Code>AccessDenied</Code><Message>{'x' * 150} LINE</Message></Error>",
    "<Error><Code>LINE</Code><Message>no</Message></Error>",
    "<Error><Code>SignatureDoesNotMatch</Code><Message>no</Message><CanonicalRequest>HEAD</CanonicalRequest></Error>",
    "<html><body><pre>HEAD</pre></body></html>",
    "HEAD",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("status", ["400 Bad Request", "403 Forbidden", "404 Not Found", "500 Oh", "200 OK"])
async def test_an_answer_that_shows_the_request(
    open_store: Callable[[str, object], S3Store], caplog: pytest.LogCaptureFixture, form: str, status: str
) -> None:
    async with scripted(echo(status, form)) as server:
        store = open_store(server.endpoint, Credentials(ACCESS, SECRET, TOKEN))
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: store.put("key", Bytes(b"data"), metadata={}, headers={}),
            lambda: store.list_page(""),
            lambda: store.multipart_create("key", metadata={}, headers={}),
            lambda: store.head("key"),
        ]
        for call in calls:
            try:
                await call()
            except StoreError as error:
                check(error, caplog)
        try:
            for reason in (await store.delete_many(["key"])).values():
                check(StoreError(reason), caplog)
        except StoreError as error:
            check(error, caplog)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (FromSdk(token=TOKEN + "ä"), "character 561 of the session token is not ASCII"),
        (FromSdk(token=TOKEN + "\r\nX: y"), "the session token has a blank, a line end"),
        (FromSdk(access="AKIÄ"), "character 4 of the access key is not ASCII"),
        (FromSdk(secret=SECRET + "\ufeff"), "character 41 of the secret key is not ASCII"),
        (FromSdk(secret=""), "the secret key is empty"),
        (ValueError(f"https://sts/?WebIdentityToken={TOKEN}"), "ValueError"),
        (UnicodeEncodeError("ascii", f"{TOKEN}ä", 560, 561, "no"), "UnicodeEncodeError"),
    ],
)
async def test_keys_that_cannot_be_used(
    open_store: Callable[[str, object], S3Store], caplog: pytest.LogCaptureFixture, keys: object, text: str
) -> None:
    async with scripted(echo("200 OK", "")) as server:
        with pytest.raises(NeedsCredentials, match=f"no credentials for 127.*: {text}") as raised:
            await open_store(server.endpoint, keys).check()
        assert server.connections == 0
    check(raised.value, caplog)


@pytest.mark.parametrize(
    ("target", "headers", "name"),
    [
        ("/bucket/ä", {}, "its first line"),
        ("/bucket/x HTTP/1.1\r\nX: y", {}, "its first line"),
        ("/bucket", {"x-amz-meta-note": "ä"}, "the header x-amz-meta-note"),
        ("/bucket", {"x-amz-meta-note": "a\r\nx-amz-acl: public-read"}, "the header x-amz-meta-note"),
        ("/bucket", {"Host": "mïnio"}, "the header Host"),
    ],
)
async def test_a_head_that_cannot_be_sent(
    caplog: pytest.LogCaptureFixture, target: str, headers: dict[str, str], name: str
) -> None:
    async with scripted(echo("200 OK", "")) as server:
        transport = Transport(server.endpoint)
        signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=AKIA", "x-amz-security-token": TOKEN, **headers}
        with pytest.raises(Refused, match=f"the request cannot be sent: {name} has a character") as raised:
            await transport.request("GET", target, signed, limit_s=5)
        assert server.connections == 0
        await transport.aclose()
    check(raised.value, caplog)


def test_what_a_codec_failed_at_is_not_described(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnicodeEncodeError) as raised:
        f"x-amz-security-token: {TOKEN}ä".encode("ascii")
    assert errors.described(raised.value).startswith("UnicodeEncodeError: 'ascii' codec can't encode")
    assert TOKEN not in errors.described(raised.value)
    assert errors.described(OSError(5, "Input/output error")) == "OSError(5, 'Input/output error')"


async def test_what_looks_like_a_key_by_chance_stays(open_store: Callable[[str, object], S3Store]) -> None:
    """A key as short as none is may be part of any word."""
    body = "<Error><Code>AccessDenied</Code><Message>you may not</Message></Error>"

    async def script(peer: Peer) -> None:
        while (await peer.request())[0]:
            await peer.send(f"HTTP/1.1 403 No\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

    async with scripted(script) as server:
        with pytest.raises(AccessDenied, match="403 AccessDenied: you may not"):
            await open_store(server.endpoint, Credentials("a", "o", "y")).put(
                "key", Bytes(b""), metadata={}, headers={}
            )
