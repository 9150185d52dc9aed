"""Whether the server answers, what it lacks, and who is told when it is well again.

Fed with the outcome of every operation. The server is down when an operation failed for good although it may
succeed later, and nothing was answered since it began: one bad answer among good ones is no outage. While something
is wrong `watch` asks the server, so that what waits goes on at once when it is back, not after its own backoff.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from s3fuse.errors import ClockSkew, NeedsCredentials, NoSuchBucket, StoreError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

#: Refusals of everything: any answer shows that they are over.
_GENERAL = (ClockSkew, NeedsCredentials, NoSuchBucket)
#: For so long after a failure the server is believed to be still down.
JUST_S = 1.0
#: So many failures of one operation in a row are the server's, not of one key.
_ROW = 3
#: What was refused longer ago counts no more: nobody has asked again, and uploads are tried each minute.
FORGOTTEN_S = 120.0
_FIRST_PAUSE_S = 0.5
_LAST_PAUSE_S = 5.0
_PATIENCE_S = 5.0


@dataclass(slots=True)
class _Trouble:
    error: StoreError
    failures: int = 0
    failed_at: float = 0.0


class Health:
    """What is known of one server. Operations are named as in `Store.requests`; times are seconds since the epoch."""

    def __init__(self) -> None:
        self.up = True
        self.since = time.time()
        self.last_error = ""
        self.last_error_at = 0.0
        #: `trio.current_time()` of the last answer.
        self.answered_at = float("-inf")
        self._down_at = float("-inf")
        self._trouble: dict[str, _Trouble] = {}
        self._listeners: list[Callable[[], None]] = []
        self._troubled = trio.Event()

    @property
    def just_failed(self) -> bool:
        """Whether the server is down and an operation found that out a moment ago: the next one need not wait long."""
        return not self.up and trio.current_time() - self._down_at < JUST_S

    def on_recovery(self, listener: Callable[[], None]) -> None:
        """Calls `listener`, which must not await, whenever it is worth trying again what has failed."""
        self._listeners.append(listener)

    @property
    def needs(self) -> str:
        """What has to be given before the server does what is asked: credentials, permission ... or ""."""
        since = trio.current_time() - FORGOTTEN_S
        return next(
            (one.error.needs for one in self._trouble.values() if one.error.needs and one.failed_at > since), ""
        )

    def answered(self, operation: str) -> None:
        """The server did what was asked, or said why not as servers do."""
        self.answered_at = trio.current_time()
        if self.up and not self._trouble:
            return
        recovered = not self.up
        if not self.up:
            self.up, self.since = True, time.time()
        for name, trouble in list(self._trouble.items()):
            general = isinstance(trouble.error, _GENERAL)
            if name == operation or general:
                del self._trouble[name]
                recovered = recovered or general or trouble.failures >= _ROW
        if recovered:
            for listener in self._listeners:
                listener()

    def failed(self, operation: str, error: StoreError, began: float) -> None:
        """An operation that began at `began` (`trio.current_time()`) failed after all its retries."""
        self.last_error, self.last_error_at = str(error), time.time()
        trouble = self._trouble.setdefault(operation, _Trouble(error))
        trouble.error = error
        trouble.failures += 1
        trouble.failed_at = trio.current_time()
        if self.up and error.transient and self.answered_at < began:
            self.up, self.since = False, time.time()
        if not self.up:
            self._down_at = trio.current_time()
        if self._worth_asking():
            self._troubled.set()

    def _worth_asking(self) -> bool:
        return not self.up or any(isinstance(trouble.error, _GENERAL) for trouble in self._trouble.values())

    async def watch(self, ask: Callable[[], Awaitable[object]]) -> None:
        """Asks the server by `ask`, which feeds this object, as long as something is wrong. Runs until cancelled."""
        while True:
            await self._troubled.wait()
            pause_s = _FIRST_PAUSE_S
            while self._worth_asking():
                await trio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(_LAST_PAUSE_S, pause_s * 2)
                with trio.move_on_after(_PATIENCE_S):
                    try:
                        await ask()
                    except StoreError:
                        continue
            self._troubled = trio.Event()

    def summary(self) -> dict[str, Any]:
        """The part of `s3fuse status --json` about the server."""
        return {
            "state": "up" if self.up else "down",
            "since": int(self.since),
            "needs": self.needs,
            "last_error": self.last_error,
            "last_error_at": int(self.last_error_at),
        }
