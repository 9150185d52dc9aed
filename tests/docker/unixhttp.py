"""HTTP over a unix socket, as dockerd speaks it to a plugin and we to dockerd."""

from __future__ import annotations

import http.client
import json
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

ACCEPT = "application/vnd.docker.plugins.v1.2+json"


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def request(path: Path, method: str, target: str, body: Any = None, *, timeout_s: float = 60) -> tuple[int, bytes]:
    """Status and body of the answer. Raises OSError."""
    connection = _Connection(path, timeout_s)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        connection.request(method, target, data, {"Accept": ACCEPT, "Host": ""})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def call(path: Path, method: str, body: Any = None, *, timeout_s: float = 150) -> dict[str, Any]:
    """Calls a plugin as dockerd does, e.g. "VolumeDriver.List"; gives the whole answer, with "Err" if it failed."""
    _, answer = request(path, "POST", f"/{method}", body, timeout_s=timeout_s)
    found: dict[str, Any] = json.loads(answer)
    return found
