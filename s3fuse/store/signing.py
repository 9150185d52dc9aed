"""Signatures of requests to one endpoint, with credentials that rotate and a clock that can be set."""

from __future__ import annotations

import logging
import re
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import trio

from s3fuse.credentials import StaticProvider
from s3fuse.errors import BadResponse, NeedsCredentials
from s3fuse.keytext import BadKeys, check_keys
from s3fuse.store import sigv4
from s3fuse.store.s3fields import http_time

if TYPE_CHECKING:
    from collections.abc import Mapping

    from s3fuse.credentials import Keys, Provider

log = logging.getLogger(__name__)

#: Providers may read files or ask the network: what they gave is used again for this long, seconds.
_REUSE_S = 5.0
#: No server takes a shorter key, and what is shorter is a part of many words.
_LEAST_SECRET = 8
#: What stands in the place of a key that is left out; one character, which no cut leaves half of.
BLACKED_OUT = "\N{FULL BLOCK}"
_AUTHORIZATION = re.compile(rb"(?i)AWS4-HMAC-SHA256|X-Amz-Signature|Signature=[^\s,&<>]*|Credential=[^\s,&<>]*")
#: No server refuses a signature that is less off: its Date header has whole seconds, and requests take time.
_TOLERATED_SKEW = timedelta(seconds=5)
#: No clock that is merely wrong is more off; time cannot be counted on for ever from a date in year 9999.
_MOST_SKEW = timedelta(days=36525)


class Signer:
    """Signs requests with credentials as fresh as their provider's."""

    def __init__(self, scheme: str, host: str, region: str, provider: Provider) -> None:
        self._scheme = scheme
        self._host = host
        self._region = region
        self._provider = provider
        self._credentials: Keys | None = None
        self._fetched = float("-inf")
        #: What requests were signed with lately: a request may be answered after the keys have changed.
        self._secrets: deque[bytes] = deque(maxlen=8)
        #: Counts changes of the credentials; read it right after `sign` to know which it used.
        self.generation = 0
        #: What is added to this host's clock; read it right after `sign` to know which it used.
        self.offset = timedelta()

    async def sign(self, method: str, path: str, query: str, headers: Mapping[str, str]) -> dict[str, str]:
        """`headers` with the host, date and signature. Raises NeedsCredentials if there are none."""
        credentials = await self._current()
        now = datetime.now(UTC) + self.offset
        signed = {
            "Host": self._host,
            "x-amz-content-sha256": sigv4.UNSIGNED,
            "x-amz-date": now.strftime("%Y%m%dT%H%M%SZ"),
            **headers,
        }
        if credentials.session_token:
            signed["x-amz-security-token"] = credentials.session_token
        signed["Authorization"] = sigv4.authorization(
            credentials.access_key, credentials.secret_key, self._region, method, path, query, signed
        )
        return signed

    def redacted(self, answer: bytes) -> bytes:
        """An answer without what a request was signed with, for people: what it says of keys of objects may differ."""
        mark = BLACKED_OUT.encode()
        for secret in self._secrets:
            answer = answer.replace(secret, mark)
        return _AUTHORIZATION.sub(mark, answer)

    def learn_time(self, date: str | None, used: timedelta) -> bool:
        """Follows the Date header of a refusal; True if that is far enough from the offset `used` to be its reason."""
        try:
            server = http_time(date or "")
        except BadResponse:
            return False
        offset = server - datetime.now(UTC)
        if abs(offset) > _MOST_SKEW:
            return False
        if abs(offset - self.offset) > _TOLERATED_SKEW:
            self.offset = offset
            seconds = round(offset.total_seconds())
            log.warning(
                "the clock of %s is %d s %s that of this host: requests are signed with the server's time",
                self._host,
                abs(seconds),
                "ahead of" if seconds > 0 else "behind",
            )
        return abs(self.offset - used) > _TOLERATED_SKEW

    async def renew(self, refused: int) -> bool:
        """Asks the provider again; True if it gives others than the credentials of generation `refused`."""
        if self.generation == refused:
            self._fetched = float("-inf")
            await self._current()
        return self.generation != refused

    async def _current(self) -> Keys:
        now = trio.current_time()
        if self._credentials is not None and now - self._fetched < _REUSE_S and not self._credentials.is_expired():
            return self._credentials
        credentials: Keys
        try:
            if isinstance(self._provider, StaticProvider):
                credentials = self._provider.retrieve()
            else:
                credentials = await trio.to_thread.run_sync(self._provider.retrieve, abandon_on_cancel=True)
            check_keys(credentials.access_key, credentials.secret_key, credentials.session_token)
        except Exception as exc:
            if self._credentials is not None and not self._credentials.is_expired():
                return self._credentials
            # Providers raise whatever their sources raise; the class alone is named, as a text might hold secrets. Nor
            # is the error itself the cause of ours: the log would show it.
            reason = str(exc) if isinstance(exc, BadKeys) else type(exc).__name__
            raise NeedsCredentials(f"no credentials for {self._host}: {reason}") from None
        if credentials != self._credentials:
            self._credentials = credentials
            self.generation += 1
            secrets = (credentials.session_token or "", credentials.secret_key)
            self._secrets += (text.encode() for text in secrets if len(text) >= _LEAST_SECRET)
        self._fetched = now
        return credentials
