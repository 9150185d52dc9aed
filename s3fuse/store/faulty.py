"""A store that fails on purpose: faults by schedule or by seed, and gates that hold calls until a test lets them go.

Operations are named as in `Store.requests`, and `check`, `probe`, `create_bucket`.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import trio

from s3fuse.errors import BadResponse, StoreError, Unavailable
from s3fuse.store.base import ANY, NO_ETAGS
from s3fuse.store.health import Health

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from s3fuse.store.base import Body, Capabilities, Condition, ObjectInfo, Page, Part, Store, Upload

T = TypeVar("T")


class Kind(Enum):
    """What goes wrong."""

    #: The operation is late by `seconds`, then happens.
    LATE = auto()
    #: `error` (Unavailable by default) is raised and nothing happens.
    REFUSED = auto()
    #: The operation happens, then Unavailable is raised.
    LOST = auto()
    #: BadResponse; a get has filled the first half of its buffers.
    SHORT = auto()
    #: Nothing happens until cancelled, or for `seconds`; then Unavailable.
    STALLED = auto()


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong with one call."""

    kind: Kind
    seconds: float = 0.0
    error: StoreError | None = None


def late(seconds: float) -> Fault:
    """The call takes this much longer."""
    return Fault(Kind.LATE, seconds)


def stalled(seconds: float = 30.0) -> Fault:
    """The call gets no answer within the store's deadline of `seconds`."""
    return Fault(Kind.STALLED, seconds)


def refused(error: StoreError | None = None) -> Fault:
    """The call fails before anything happened."""
    return Fault(Kind.REFUSED, error=error)


LOST = Fault(Kind.LOST)
SHORT = Fault(Kind.SHORT)
#: What seeded mode draws from.
ANYTHING = (refused(), LOST, SHORT, late(0.01))


class Gate:
    """Holds the calls of one operation before anything happened."""

    def __init__(self) -> None:
        self._held: deque[trio.Event] = deque()
        self._passes = 0
        self._opened = False
        self._arrivals = trio.lowlevel.ParkingLot()

    async def arrived(self, count: int = 1) -> None:
        """Returns when `count` calls are held."""
        while len(self._held) < count:
            await self._arrivals.park()

    def release(self, count: int = 1) -> None:
        """Lets `count` calls go: those held, oldest first, then those to come."""
        for _ in range(count):
            if self._held:
                self._held.popleft().set()
            else:
                self._passes += 1

    def open(self) -> None:
        """Lets all calls go from now on."""
        self._opened = True
        self.release(len(self._held))

    async def passage(self) -> None:
        """Waits to be let go."""
        if self._opened or self._passes:
            self._passes -= not self._opened
            return
        go = trio.Event()
        self._held.append(go)
        self._arrivals.unpark_all()
        try:
            await go.wait()
        finally:
            if go in self._held:
                self._held.remove(go)


class FaultyStore:
    """`inner` with faults.

    Scheduled faults come first: each call of an operation takes the next of its queue, where None lets it pass.
    With a `seed`, every other call fails with probability `rate`, by a fault drawn from `faults`, the same way for
    the same seed and order of calls. `quiet` switches everything off.
    """

    def __init__(
        self, inner: Store, *, seed: int | None = None, rate: float = 0.1, faults: Sequence[Fault] = ANYTHING
    ) -> None:
        self.inner = inner
        self.health = Health()
        self.quiet = False
        #: Faults done so far, by operation.
        self.failures: Counter[str] = Counter()
        self._random = None if seed is None else random.Random(seed)
        self._rate = rate
        self._faults = faults
        self._scheduled: dict[str, deque[Fault | None]] = defaultdict(deque)
        self._gates: dict[str, Gate] = {}

    @property
    def requests(self) -> Counter[str]:
        return self.inner.requests

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    def schedule(self, operation: str, *faults: Fault | None) -> None:
        """Adds faults for the next calls of an operation."""
        self._scheduled[operation].extend(faults)

    @contextmanager
    def held(self, operation: str) -> Iterator[Gate]:
        """Within the context the calls of an operation wait at the gate; leaving it lets all go."""
        gate = self._gates[operation] = Gate()
        try:
            yield gate
        finally:
            del self._gates[operation]
            gate.open()

    async def _call(self, operation: str, call: Callable[[], Awaitable[T]], key: str = "") -> T:
        began = trio.current_time()
        try:
            result = await self._faulty(operation, call, key)
        except StoreError as error:
            if error.transient or error.needs:
                self.health.failed(operation, error, began)
            raise
        self.health.answered(operation)
        return result

    async def _faulty(self, operation: str, call: Callable[[], Awaitable[T]], key: str) -> T:
        gate = self._gates.get(operation)
        if gate is not None:
            await gate.passage()
        fault = self._next(operation)
        if fault is None:
            return await call()
        self.failures[operation] += 1
        match fault.kind:
            case Kind.LATE:
                await trio.sleep(fault.seconds)
                return await call()
            case Kind.STALLED:
                await trio.sleep(fault.seconds)
                raise Unavailable(f"{operation} {key}: no answer in {fault.seconds:g} s", key)
            case Kind.REFUSED:
                await trio.lowlevel.checkpoint()
                raise fault.error or Unavailable(f"{operation} {key}: made to fail", key)
            case Kind.LOST:
                await call()
                raise Unavailable(f"{operation} {key}: the answer was lost", key)
            case Kind.SHORT:
                await trio.lowlevel.checkpoint()
                raise BadResponse(f"{operation} {key}: the answer was cut off", key)

    def _next(self, operation: str) -> Fault | None:
        if self.quiet:
            return None
        queue = self._scheduled[operation]
        if queue:
            return queue.popleft()
        if self._random is not None and self._random.random() < self._rate:
            return self._random.choice(self._faults)
        return None

    def check_key(self, key: str) -> None:
        self.inner.check_key(key)

    async def check(self) -> None:
        await self._call("check", self.inner.check)

    async def probe(self) -> Capabilities:
        return await self._call("probe", self.inner.probe)

    async def create_bucket(self) -> None:
        await self._call("create_bucket", self.inner.create_bucket)

    async def list_page(
        self, prefix: str, *, delimiter: str = "/", token: str | None = None, start_after: str = "", limit: int = 1000
    ) -> Page:
        call = partial(
            self.inner.list_page, prefix, delimiter=delimiter, token=token, start_after=start_after, limit=limit
        )
        return await self._call("list", call, prefix)

    async def head(self, key: str) -> ObjectInfo:
        return await self._call("head", partial(self.inner.head, key), key)

    async def get_into(
        self, key: str, offset: int, buffers: Sequence[memoryview], *, etag: str, size_bytes: int | None = None
    ) -> None:
        # Whatever goes wrong, the buffers hold no content that a careless caller could take for an answer.
        for buffer in buffers:
            buffer[:] = b"\xdb" * len(buffer)
        call = partial(self.inner.get_into, key, offset, buffers, etag=etag, size_bytes=size_bytes)
        try:
            await self._call("get", call, key)
        except BadResponse:
            first = list(_first_half(buffers, sum(map(len, buffers))))
            if first:
                await self.inner.get_into(key, offset, first, etag=etag)
            raise

    async def put(
        self,
        key: str,
        body: Body,
        *,
        metadata: Mapping[str, str],
        headers: Mapping[str, str],
        condition: Condition = ANY,
    ) -> str:
        call = partial(self.inner.put, key, body, metadata=metadata, headers=headers, condition=condition)
        return await self._call("put", call, key)

    async def copy(
        self,
        source: str,
        target: str,
        *,
        source_etag: str,
        metadata: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        condition: Condition = ANY,
    ) -> str:
        call = partial(
            self.inner.copy,
            source,
            target,
            source_etag=source_etag,
            metadata=metadata,
            headers=headers,
            condition=condition,
        )
        return await self._call("copy", call, target)

    async def delete(self, key: str, *, etag: str = "") -> None:
        await self._call("delete", partial(self.inner.delete, key, etag=etag), key)

    async def delete_many(
        self, keys: Sequence[str], *, etags: Mapping[str, str] = NO_ETAGS
    ) -> Mapping[str, StoreError]:
        return await self._call("delete_many", partial(self.inner.delete_many, keys, etags=etags))

    async def multipart_create(self, key: str, *, metadata: Mapping[str, str], headers: Mapping[str, str]) -> str:
        call = partial(self.inner.multipart_create, key, metadata=metadata, headers=headers)
        return await self._call("multipart_create", call, key)

    async def multipart_put(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        call = partial(self.inner.multipart_put, key, upload_id, number, body)
        return await self._call("multipart_put", call, key)

    async def multipart_copy(
        self, key: str, upload_id: str, number: int, *, source: str, source_etag: str, start: int, stop: int
    ) -> Part:
        call = partial(
            self.inner.multipart_copy,
            key,
            upload_id,
            number,
            source=source,
            source_etag=source_etag,
            start=start,
            stop=stop,
        )
        return await self._call("multipart_copy", call, key)

    async def multipart_complete(
        self,
        key: str,
        upload_id: str,
        parts: Sequence[Part],
        *,
        condition: Condition = ANY,
        metadata: Mapping[str, str] | None = None,
    ) -> str:
        call = partial(self.inner.multipart_complete, key, upload_id, parts, condition=condition, metadata=metadata)
        return await self._call("multipart_complete", call, key)

    async def multipart_abort(self, key: str, upload_id: str) -> None:
        await self._call("multipart_abort", partial(self.inner.multipart_abort, key, upload_id), key)

    async def list_uploads(self, prefix: str) -> Sequence[Upload]:
        return await self._call("list_uploads", partial(self.inner.list_uploads, prefix), prefix)

    async def aclose(self) -> None:
        await self.inner.aclose()


def _first_half(buffers: Sequence[memoryview], size_bytes: int) -> Iterator[memoryview]:
    left = size_bytes // 2
    for buffer in buffers:
        if left:
            yield buffer[:left]
            left -= min(left, len(buffer))
