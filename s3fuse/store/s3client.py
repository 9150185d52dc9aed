"""One signed S3 request with its retries: from (method, key, query) to an answer or a `StoreError`."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, urlencode

import trio

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
from s3fuse.store.health import Health
from s3fuse.store.s3listing import Asked, parse_page
from s3fuse.store.s3xml import Failure, parse_failure, parse_result
from s3fuse.store.signing import BLACKED_OUT, Signer
from s3fuse.store.transport import NotSent, Transport

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from s3fuse.credentials import Provider
    from s3fuse.store.base import Body
    from s3fuse.store.framing import Answer

Result = TypeVar("Result")

_ATTEMPTS = 7
#: A wrong answer is more likely to stay wrong than a missing one to stay away; a bucket that was there and a permission
#: that was given are seen missing for a moment where there is a proxy, or when keys have just been changed.
_WRONG_ATTEMPTS = {BadResponse: 3, NoSuchBucket: 3, NeedsCredentials: 1, AccessDenied: 2}
#: The least time without progress after which an attempt is given up, however late it begins.
_LEAST_STALL_S = 5.0
#: What programs wait for; everything else is background work, whose time counts from when its turn comes.
_READS = frozenset({"list", "head", "get"})
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 4.0
#: The deadline of a request grows with its size at this rate: slower than any link worth mounting over.
_SLOWEST_BYTES_PER_S = 256 << 10
#: The same for what a server copies: it sends nothing until that is done.
_SLOWEST_COPY_BYTES_PER_S = 8 << 20
#: 501 aside, a 5xx may come after the server acted; these codes say that it did not.
_UNTOUCHED = frozenset({"SlowDown", "SlowDownRead", "SlowDownWrite", "ServiceUnavailable", "ServerBusy"})
_BAD_KEYS = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
)
_AGAIN = frozenset({"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "TooManyRequests"})


@dataclass(frozen=True, slots=True)
class Call:
    """A request before it is signed. `query` is encoded already; `size_bytes` is what it moves, for the deadline.

    `answer_bytes` is the most that an answer in memory may have, `copied_bytes` what the server has to copy before it
    answers, `out_of_range` what the refusal of a range means. `conditional` calls are not repeated by the client: their
    sender looks first at what became of them. `ping` calls are sent once, without waiting for others.
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
    answer_bytes: int = 1 << 20
    out_of_range: type[StoreError] = BadResponse
    copied_bytes: int = 0
    conditional: bool = False
    head_only: bool = False
    ping: bool = False


def acted(error: StoreError) -> bool:
    """Whether the server may have done what was asked although it failed for us."""
    return error.transient and not isinstance(error, NotSent | _Untouched)


class _Untouched(Unavailable):
    """The server said that it did nothing, and that later it may."""


@dataclass(slots=True)
class _Signed:
    """What a request was signed with."""

    generation: int = 0
    offset: timedelta = timedelta()


async def _itself(answer: Answer) -> Answer:
    return answer


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
        self.bucket = bucket
        self._requests = requests
        #: How long a read waits for a server that does not answer.
        self.deadline_s = deadline_s
        self._random = random.Random()
        self.health = Health()
        #: The Server header of the first good answer: errors may come from something in between.
        self.server = ""

    def path(self, key: str) -> str:
        """The request path of a key: every byte outside RFC 3986's unreserved set and `/` is escaped."""
        return f"/{self.bucket}/{quote(key, safe='/~')}" if key else f"/{self.bucket}"

    async def send(self, call: Call) -> Answer:
        """The successful (2xx) answer. Raises a StoreError that names the bucket and key, after all retries."""
        return await self.ask(call, _itself)

    async def ask(self, call: Call, read: Callable[[Answer], Awaitable[Result]]) -> Result:
        """What `read` makes of the successful (2xx) answer; an answer that it finds bad is asked for again.

        Raises a StoreError that names the bucket and key, after all retries. A read from a server that sends nothing
        ends `deadline_s` after the call, or at most `_LEAST_STALL_S` later; one that follows another's failure at once
        only has those `_LEAST_STALL_S`, since the kernel repeats a page that its read-ahead did not get.
        """
        self.check_key(call.key)
        started = trio.current_time()
        if call.operation in _READS and self.health.just_failed:
            started -= max(0.0, self.deadline_s - _LEAST_STALL_S)
        for attempt in itertools.count(1):
            try:
                answer = await self._renewing(call, started)
                result = await self._read(call, answer, read)
            except StoreError as exc:
                exc.key = call.key
                pause_s = self.backoff_s(attempt)
                if self._is_final(call, exc, attempt, trio.current_time() + pause_s - started):
                    self._note(call, exc, started)
                    raise
            else:
                self.server = self.server or answer.headers.get("server", "")
                self.health.answered(call.operation)
                return result
            await trio.sleep(pause_s)
        raise AssertionError("unreachable")

    async def _read(self, call: Call, answer: Answer, read: Callable[[Answer], Awaitable[Result]]) -> Result:
        try:
            return await read(answer)
        except BadResponse as exc:
            raise BadResponse(f"{call.operation} {self.name(call.key)}: {exc}", call.key) from exc

    def _limit_s(self, call: Call) -> float:
        return self.deadline_s + call.size_bytes / _SLOWEST_BYTES_PER_S

    def _is_final(self, call: Call, error: StoreError, attempt: int, elapsed_s: float) -> bool:
        """Whether an error is told instead of trying again `elapsed_s` after the first attempt began."""
        few = next((_WRONG_ATTEMPTS[kind] for kind in type(error).__mro__ if kind in _WRONG_ATTEMPTS), None)
        allowed = few or (_ATTEMPTS if error.transient else 1)
        limit_s = self.deadline_s if call.operation in _READS else self._limit_s(call)
        return call.ping or attempt >= allowed or (call.conditional and acted(error)) or elapsed_s >= limit_s

    def _note(self, call: Call, error: StoreError, began: float) -> None:
        if error.transient or error.needs:
            self.health.failed(call.operation, error, began)
        else:
            self.health.answered(call.operation)

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

    async def _renewing(self, call: Call, started: float) -> Answer:
        """One attempt, and at once another where the clock or the credentials were to blame and now differ."""
        answer, signed = await self._once(call, started)
        if answer.status < 300:
            return answer
        failure = self._failure(answer)
        # A HEAD is refused without a code, so that the Date header alone has to tell.
        if (answer.status in (401, 403) or failure.code in _BAD_KEYS) and (
            self._signer.learn_time(answer.headers.get("date"), signed.offset)
            or await self._signer.renew(signed.generation)
        ):
            answer, _ = await self._once(call, started)
            if answer.status < 300:
                return answer
            failure = self._failure(answer)
        if answer.status in (403, 404) and not failure.code:
            await self._find_out(call, answer.status, started)
        raise self._error(call, answer.status, failure)

    async def _find_out(self, call: Call, status: int, started: float) -> None:
        """Raises what a listing shows to be wrong; returns where it agrees that only this key is missing or refused.

        The answer to HEAD has no body that says whether the key or the bucket is missing, the permission or the keys
        are refused; and a 404 may come from something in between.
        """
        if call.operation != "head":
            if status == 403:
                return
            raise BadResponse(
                f"{call.operation} {self.name(call.key)}: 404 that does not say what is missing", call.key
            )
        fields = {"encoding-type": "url", "list-type": "2", "max-keys": "1", "prefix": call.key}
        query = urlencode(fields).replace("+", "%20")
        listing = Call("list", "GET", query=query)
        answer, _ = await self._once(listing, started)
        if answer.status >= 300:
            raise self._error(listing, answer.status, self._failure(answer))
        try:
            page = parse_page(answer.body, Asked(self.bucket, call.key), metadata_known=False)
        except BadResponse as exc:
            raise BadResponse(f"list {self.name(call.key)}: {exc}", call.key) from exc
        # SeaweedFS lists directories that have no marker.
        unmade = call.key.endswith("/") and self.server.startswith("SeaweedFS")
        if status == 404 and call.key in (*(found.key for found in page.objects), *page.unreadable) and not unmade:
            raise BadResponse(f"head {self.name(call.key)}: 404, but a listing has it", call.key)

    async def _once(self, call: Call, started: float) -> tuple[Answer, _Signed]:
        path = self.path(call.key)
        elapsed_s = trio.current_time() - started
        signed = _Signed()

        async def sign() -> Mapping[str, str]:
            headers = await self._signer.sign(call.method, path, call.query, call.headers or {})
            signed.generation, signed.offset = self._signer.generation, self._signer.offset
            self._requests[call.operation] += 1
            return headers

        try:
            answer = await self._transport.request(
                call.method,
                f"{path}?{call.query}" if call.query else path,
                sign,
                limit_s=max(1.0, self._limit_s(call) - elapsed_s),
                stall_s=max(_LEAST_STALL_S, self.deadline_s - elapsed_s),
                silent_s=call.copied_bytes / _SLOWEST_COPY_BYTES_PER_S,
                wait_s=self._wait_s(call, elapsed_s),
                body=call.body,
                buffers=call.buffers,
                check=call.check,
                text_bytes=call.answer_bytes,
                repeatable=not call.conditional,
                head_only=call.head_only,
            )
        except StoreError as exc:
            raise type(exc)(f"{call.operation} {self.name(call.key)}: {exc}", call.key) from exc
        return answer, signed

    def _wait_s(self, call: Call, elapsed_s: float) -> float:
        """How long the call may wait for its turn."""
        if call.ping:
            return 0.0
        return max(1.0, self.deadline_s - elapsed_s) if call.operation in _READS else math.inf

    def name(self, key: str) -> str:
        """How messages name a key: endpoint, bucket and key."""
        return f"{self._transport.endpoint}/{self.bucket}" + (f"/{key}" if key else "")

    def shows_keys(self, text: bytes) -> bool:
        """Whether a server has sent back what a request was signed with, as some do that echo its head."""
        return self._signer.redacted(text) != text

    def _failure(self, answer: Answer) -> Failure:
        failure = self._told(answer.body)
        return failure if failure.code else Failure(answer.headers.get("x-minio-error-code", ""))

    def _told(self, body: bytes) -> Failure:
        """What a document says of a failure; not its message where that shows keys."""
        failure = parse_failure(self._signer.redacted(body))
        if BLACKED_OUT in failure.message:
            return Failure(failure.code, "the reason shows keys and is left out")
        return failure

    async def ask_result(self, call: Call, kind: str, field: str) -> str:
        """One field of the small document that is the answer; a 200 may carry an error instead."""

        async def read(answer: Answer) -> str:
            failure = self._told(answer.body)
            if failure.code:
                raise self._error(call, 500 if failure.code == "InternalError" else 400, failure)
            return parse_result(answer.body, kind, field)

        return await self.ask(call, read)

    def _error(self, call: Call, status: int, failure: Failure) -> StoreError:
        code = failure.code
        told = f"{status} {code}".strip() + (f": {failure.message}" if failure.message else "")
        kind = call.out_of_range if status == 416 or code == "InvalidRange" else error_kind(status, code)
        if kind is NotFound and code != "NoSuchUpload" and call.operation in ("put", "multipart_complete"):
            # MinIO's answer to If-Match where there is no object.
            kind = PreconditionFailed
        return kind(f"{call.operation} {self.name(call.key)}: {told}", call.key)


_KINDS: Mapping[str, type[StoreError]] = {
    "NoSuchBucket": NoSuchBucket,
    "NoSuchKey": NotFound,
    "NoSuchUpload": NotFound,
    "PreconditionFailed": PreconditionFailed,
    "AccessDenied": AccessDenied,
    "RequestTimeTooSkewed": ClockSkew,
    "NotImplemented": Unsupported,
    "MethodNotAllowed": Refused,
    "BadDigest": BadResponse,
    "XAmzContentChecksumMismatch": BadResponse,
    "IncompleteBody": BadResponse,
    **dict.fromkeys(_BAD_KEYS, NeedsCredentials),
    **dict.fromkeys(_AGAIN | _UNTOUCHED, _Untouched),
}


def error_kind(status: int, code: str) -> type[StoreError]:
    """The class of an answer that is no success."""
    if code in _KINDS:
        return _KINDS[code]
    match status:
        case 401:
            return NeedsCredentials
        case 403:
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
