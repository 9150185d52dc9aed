"""HTTP answers: their framing, done by llhttp (httptools), and the buffers that a body fills; pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httptools

from s3fuse.errors import BadResponse

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Two KiB of metadata in names of one letter are 170.
_MAX_HEADERS = 1000


@dataclass(slots=True)
class Answer:
    """An HTTP answer. Header names are lower case; `body` is empty where the bytes went into buffers."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Framing:
    """One answer as llhttp finds it in the bytes fed; interim (1xx) answers are skipped."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._count = 0
        self.answer: Answer | None = None
        #: The bytes of the body so far, in one piece: those of a hostile server come one by one.
        self.data = bytearray()
        self.complete = False
        self.keep_alive = False

    def feed(self, data: memoryview) -> None:
        """Takes the next bytes of the stream. Raises BadResponse where they are not HTTP."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if not self.complete:
                raise BadResponse(f"the answer is not HTTP: {exc}") from exc
            self.keep_alive = False

    def on_message_begin(self) -> None:
        if self.complete:
            self.keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.answer is not None:  # a trailer: nobody asked for any
            return
        self._count += 1
        if self._count > _MAX_HEADERS:
            raise BadResponse(f"the answer has more than {_MAX_HEADERS} headers")
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._headers = {}
        elif not self.complete:
            self.answer = Answer(status, self._headers)
            self.keep_alive = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        if not self.complete:
            self.data += data

    def on_message_complete(self) -> None:
        self.complete = self.answer is not None


class Sink:
    """Buffers filled one after the other; `room` is the rest of the current one, empty when all are full."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._rest = iter(buffers)
        self.room = memoryview(b"")
        self.advance(0)

    def advance(self, count: int) -> None:
        """Says that `count` bytes were written to `room`."""
        self.room = self.room[count:]
        while not self.room:
            following = next(self._rest, None)
            if following is None:
                return
            self.room = following

    def write(self, data: bytes | bytearray) -> None:
        """Copies bytes into the buffers. Raises BadResponse where they are full."""
        at = 0
        while at < len(data):
            if not self.room:
                raise BadResponse("the answer has more bytes than were due")
            count = min(len(data) - at, len(self.room))
            self.room[:count] = data[at : at + count]
            at += count
            self.advance(count)
