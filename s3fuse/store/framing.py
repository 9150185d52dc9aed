"""HTTP answers: their framing, done by llhttp (httptools), and the buffers that a body fills; pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httptools

from s3fuse.errors import BadResponse

if TYPE_CHECKING:
    from collections.abc import Sequence


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
        self.answer: Answer | None = None
        self.data: list[bytes] = []
        self.complete = False
        self.keep_alive = False

    def feed(self, data: memoryview) -> None:
        """Takes the next bytes of the stream. Raises BadResponse where they are not HTTP."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            if not self.complete:
                raise BadResponse(f"the answer is not HTTP: {exc}") from exc
            self.keep_alive = False

    def on_message_begin(self) -> None:
        if self.complete:
            self.keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.complete:
            return
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
            self.data.append(data)

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

    def write(self, pieces: Sequence[bytes]) -> None:
        """Copies bytes into the buffers. Raises BadResponse where they are full."""
        for piece in pieces:
            view = memoryview(piece)
            while view:
                if not self.room:
                    raise BadResponse("the answer has more bytes than were due")
                count = min(len(view), len(self.room))
                self.room[:count] = view[:count]
                view = view[count:]
                self.advance(count)
