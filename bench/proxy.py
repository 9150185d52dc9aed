"""A proxy that counts: S3 requests by kind and bytes each way, in front of one server; it can add latency.

A process of its own, python -m bench.proxy PORT LATENCY_MS, so that it shares no interpreter lock with anything. Its
first line says where it listens; each line it reads is answered with the counts so far as JSON. Bodies are moved by
splice(2) and never enter Python. A client that sends a request before the last answer came is counted rightly too:
what is read of the client's side is framed, the server's side is passed on as it comes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator

_PIPE_BYTES = 1 << 20
_HEAD_BYTES = 64 << 10


@dataclass(frozen=True)
class Counts:
    """Requests by kind, and bytes of bodies and heads to and from the server."""

    requests: Counter[str] = field(default_factory=Counter)
    sent_bytes: int = 0
    received_bytes: int = 0

    def since(self, before: Counts) -> Counts:
        requests = Counter({kind: n - before.requests[kind] for kind, n in self.requests.items()})
        return Counts(+requests, self.sent_bytes - before.sent_bytes, self.received_bytes - before.received_bytes)


def kind(method: str, target: str, headers: dict[str, str]) -> str:
    """The S3 operation of a request: get, head, list, put, copy, part, part-copy, begin, complete, delete, other."""
    url = urlsplit(target)
    asked = dict(parse_qsl(url.query, keep_blank_values=True))
    in_bucket = "/" in url.path.strip("/")
    if method == "PUT" and in_bucket:
        what = "part" if "partNumber" in asked else "put"
        return what if "x-amz-copy-source" not in headers else "part-copy" if what == "part" else "copy"
    if method == "POST":
        return "begin" if "uploads" in asked else "complete" if "uploadId" in asked else "delete-many"
    if method == "DELETE":
        return "delete"
    if method == "HEAD":
        return "head" if in_bucket else "other"
    if method == "GET":
        return "get" if in_bucket else "list" if {"list-type", "prefix", "delimiter"} & asked.keys() else "other"
    return "other"


class Proxy:
    """Serves until the process ends: two threads a connection, one each way."""

    def __init__(self, port: int, latency_s: float) -> None:
        self._upstream = ("127.0.0.1", port)
        self._latency_s = latency_s
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._bytes = {"sent": 0, "received": 0}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]

    def counts(self) -> dict[str, object]:
        with self._lock:
            return {
                "requests": dict(self._requests),
                "sent_bytes": self._bytes["sent"],
                "received_bytes": self._bytes["received"],
            }

    def run(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(self._upstream)
            except OSError:
                return
            with server:
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                back = threading.Thread(target=self._pass_on, args=(server, client), daemon=True)
                back.start()
                with suppress(OSError):
                    self._requests_of(client, server)
                with suppress(OSError):
                    server.shutdown(socket.SHUT_WR)
                back.join()

    def _pass_on(self, server: socket.socket, client: socket.socket) -> None:
        """Answers, as they come, until the server closes."""
        with suppress(OSError), _pipe() as pipe:
            while moved := _move(server, client, _PIPE_BYTES, pipe):
                self._add("received", moved)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def _requests_of(self, client: socket.socket, server: socket.socket) -> None:
        held = b""
        with _pipe() as pipe:
            while True:
                while b"\r\n\r\n" not in held:
                    more = client.recv(_HEAD_BYTES)
                    if not more:
                        return
                    held += more
                head, _, held = held.partition(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                method, target, _ = lines[0].split(" ", 2)
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])
                }
                with self._lock:
                    self._requests[kind(method, target, headers)] += 1
                if self._latency_s:
                    time.sleep(self._latency_s)
                if "chunked" in headers.get("transfer-encoding", ""):
                    raise OSError("a chunked request: none of the clients measured sends one")
                left = int(headers.get("content-length", "0"))
                begin, held = held[:left], held[left:]
                server.sendall(head + b"\r\n\r\n" + begin)
                left -= len(begin)
                self._add("sent", len(head) + 4 + len(begin))
                while left:
                    moved = _move(client, server, min(left, _PIPE_BYTES), pipe)
                    if not moved:
                        return
                    left -= moved
                    self._add("sent", moved)

    def _add(self, way: str, count: int) -> None:
        with self._lock:
            self._bytes[way] += count


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def _move(source: socket.socket, target: socket.socket, most: int, pipe: tuple[int, int]) -> int:
    """Moves up to `most` bytes; 0 at the end of the source."""
    got = os.splice(source.fileno(), pipe[1], most)
    left = got
    while left:
        left -= os.splice(pipe[0], target.fileno(), left)
    return got


# -- the side that starts it


class Counting:
    """A running proxy. `endpoint` is its URL."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"

    def counts(self) -> Counts:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        return Counts(Counter(found["requests"]), found["sent_bytes"], found["received_bytes"])


@contextmanager
def counting(endpoint: str, latency_s: float = 0.0) -> Iterator[Counting]:
    """A proxy in front of `endpoint` (http://127.0.0.1:PORT), each request delayed by `latency_s`."""
    command = [sys.executable, "-m", "bench.proxy", str(urlsplit(endpoint).port), str(latency_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Counting(process)
        finally:
            process.kill()


def main() -> None:
    proxy = Proxy(int(sys.argv[1]), float(sys.argv[2]))
    threading.Thread(target=proxy.run, daemon=True).start()
    print(proxy.port, flush=True)
    for _ in sys.stdin:  # ends with the process that started it
        print(json.dumps(proxy.counts()), flush=True)


if __name__ == "__main__":
    main()
