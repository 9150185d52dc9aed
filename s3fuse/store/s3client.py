"""One signed S3 request with its retries: from (method, key, query) to an answer or a `StoreError`."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

import trio

from s3fuse.errors import (
    AccessDenied,
    BadResponse,
    NoSuchBucket,
    NotFound,
    PreconditionFailed,
    Refused,
    StoreError,
    Unavailable,
    Unsupported,
)
from s3fuse.store.s3xml import Failure, parse_failure
from s3fuse.store.signing import Signer
from s3fuse.store.transport import NotSent, Transport

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Mapping, Sequence

    from minio.credentials.providers import Provider

    from s3fuse.store.base import Body
    from s3fuse.store.framing import Answer

_ATTEMPTS = 7
#: A wrong answer is more likely to stay wrong than a missing one to stay away.
_WRONG_ATTEMPTS = 3
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 4.0
#: The deadline of a request grows with its size at this rate: slower than any link worth mounting over.
_SLOWEST_BYTES_PER_S = 256 << 10
#: 501 aside, a 5xx may come after the server acted; these codes say that it did not.
_UNTOUCHED = frozenset({"SlowDown", "SlowDownRead", "SlowDownWrite", "ServiceUnavailable", "ServerBusy"})
_DENIED = frozenset(
    {
        "AccessDenied",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "TokenRefreshRequired",
        "RequestTimeTooSkewed",
    }
)
_AGAIN = frozenset({"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "TooManyRequests"})


@dataclass(frozen=True, slots=True)
class Call:
    """A request before it is signed. `query` is encoded already; `size_bytes` is what it moves, for the deadline.

    `conditional` calls are not repeated by the client: their sender looks first at what became of them.
    """

    operation: str
    method: str
    key: str = ""
    query: str = ""
    headers: Mapping[str, str] | None = None
    body: Body | None = None
    buffers: Sequence[memoryview] = ()
    check: Callable[[Answer], None] | None = None
    size_bytes: int = 0
    conditional: bool = False
    head_only: bool = False


def acted(error: StoreError) -> bool:
    """Whether the server may have done what was asked although it failed for us."""
    return error.transient and not isinstance(error, NotSent | _Untouched)


class _Untouched(Unavailable):
    """The server said that it did nothing, and that later it may."""


class S3Client:
    """Sends calls for one bucket, path-style."""

    def __init__(
        self,
        transport: Transport,
        bucket: str,
        region: str,
        provider: Provider,
        requests: Counter[str],
        deadline_s: float,
    ) -> None:
        self._transport = transport
        self._signer = Signer(transport.scheme, transport.host, region, provider)
        self._bucket = bucket
        self._requests = requests
        self._deadline_s = deadline_s
        self._random = random.Random()
        #: The Server header of the last answer.
        self.server = ""

    def path(self, key: str) -> str:
        """The request path of a key: every byte outside RFC 3986's unreserved set and `/` is escaped."""
        return f"/{self._bucket}/{quote(key, safe='/~')}" if key else f"/{self._bucket}"

    async def send(self, call: Call) -> Answer:
        """The successful (2xx) answer. Raises a StoreError that names the bucket and key, after all retries."""
        self.check_key(call.key)
        limit_s = self._deadline_s + call.size_bytes / _SLOWEST_BYTES_PER_S
        started = trio.current_time()
        for attempt in itertools.count(1):
            try:
                return await self._renewing(call, max(1.0, limit_s - (trio.current_time() - started)))
            except StoreError as exc:
                exc.key = call.key
                allowed = _WRONG_ATTEMPTS if isinstance(exc, BadResponse) else _ATTEMPTS
                if not exc.transient or attempt >= allowed or (call.conditional and acted(exc)):
                    raise
                pause_s = self.backoff_s(attempt)
                if trio.current_time() - started + pause_s >= limit_s:
                    raise
            await trio.sleep(pause_s)
        raise AssertionError("unreachable")

    def check_key(self, key: str) -> None:
        """Refuses keys that this server silently takes for others: `a//b` for `a/b`, on SeaweedFS also `a\\b`."""
        empty_segment = key.startswith("/") or "//" in key
        if (empty_segment and self.server.startswith(("MinIO", "SeaweedFS"))) or (
            "\\" in key and self.server.startswith("SeaweedFS")
        ):
            raise Refused(f"{self.server} takes the key {key!r} for another one", key)

    def backoff_s(self, attempt: int) -> float:
        """How long to wait after failed attempt 1, 2, ...: exponential, between half and all of it."""
        longest_s: float = _FIRST_BACKOFF_S * 2.0 ** (attempt - 1)
        return min(_LAST_BACKOFF_S, longest_s) * (0.5 + self._random.random() / 2)

    async def _renewing(self, call: Call, limit_s: float) -> Answer:
        """One attempt, and at once another where the clock or the credentials were to blame and now differ."""
        answer, generation = await self._once(call, limit_s)
        if answer.status < 300:
            return answer
        failure = self._failure(answer)
        # A HEAD is refused without a code, so that the Date header alone has to tell.
        if answer.status in (401, 403) and (
            self._signer.learn_time(answer.headers.get("date")) or await self._signer.renew(generation)
        ):
            answer, _ = await self._once(call, limit_s)
            if answer.status < 300:
                return answer
            failure = self._failure(answer)
        raise self._error(call, answer.status, failure)

    async def _once(self, call: Call, limit_s: float) -> tuple[Answer, int]:
        path = self.path(call.key)
        headers = await self._signer.sign(call.method, path, call.query, call.headers or {})
        generation = self._signer.generation
        self._requests[call.operation] += 1
        try:
            answer = await self._transport.request(
                call.method,
                f"{path}?{call.query}" if call.query else path,
                headers,
                limit_s=limit_s,
                body=call.body,
                buffers=call.buffers,
                check=call.check,
                repeatable=not call.conditional,
                head_only=call.head_only,
            )
        except StoreError as exc:
            raise type(exc)(f"{call.operation} {self.name(call.key)}: {exc}", call.key) from exc
        self.server = answer.headers.get("server", "")
        return answer, generation

    def name(self, key: str) -> str:
        """How messages name a key: endpoint, bucket and key."""
        return f"{self._transport.endpoint}/{self._bucket}" + (f"/{key}" if key else "")

    def _failure(self, answer: Answer) -> Failure:
        failure = parse_failure(answer.body)
        return failure if failure.code else Failure(answer.headers.get("x-minio-error-code", ""))

    def hidden_failure(self, call: Call, body: bytes) -> None:
        """Raises the error that a 200 answer to a copy or a completion may carry."""
        failure = parse_failure(body)
        if failure.code:
            raise self._error(call, 500 if failure.code == "InternalError" else 400, failure)

    def _error(self, call: Call, status: int, failure: Failure) -> StoreError:
        code = failure.code
        told = f"{status} {code}".strip() + (f": {failure.message}" if failure.message else "")
        kind = error_kind(status, code)
        if kind is NotFound and code != "NoSuchUpload" and call.operation in ("put", "multipart_complete"):
            # MinIO's answer to If-Match where there is no object.
            kind = PreconditionFailed
        return kind(f"{call.operation} {self.name(call.key)}: {told}", call.key)


_KINDS: Mapping[str, type[StoreError]] = {
    "NoSuchBucket": NoSuchBucket,
    "NoSuchKey": NotFound,
    "NoSuchUpload": NotFound,
    "PreconditionFailed": PreconditionFailed,
    "NotImplemented": Unsupported,
    "MethodNotAllowed": Refused,
    "InvalidRange": BadResponse,
    "BadDigest": BadResponse,
    "XAmzContentChecksumMismatch": BadResponse,
    "IncompleteBody": BadResponse,
    **dict.fromkeys(_DENIED, AccessDenied),
    **dict.fromkeys(_AGAIN | _UNTOUCHED, _Untouched),
}


def error_kind(status: int, code: str) -> type[StoreError]:
    """The class of an answer that is no success."""
    if code in _KINDS:
        return _KINDS[code]
    match status:
        case 401 | 403:
            return AccessDenied
        case 404:
            return NotFound
        case 412:
            return PreconditionFailed
        case 408 | 429:
            return _Untouched
        case 501:
            return Unsupported
    return Unavailable if status >= 500 else BadResponse if status < 400 else Refused
