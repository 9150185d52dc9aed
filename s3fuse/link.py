"""How keeper and worker talk: messages of JSON over a socket pair, with descriptors where they hand some over.

Standard library only: the keeper imports nothing else.
"""

from __future__ import annotations

import json
import socket
from typing import Any

MOST_BYTES = 64 << 10
MOST_DESCRIPTORS = 4
#: Exit code of a worker that another one shall go on for (EX_TEMPFAIL of sysexits.h).
GO_ON = 75


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends: the keeper's, and the worker's, which its process inherits."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    return ours, theirs


def send(end: socket.socket, message: dict[str, Any], *descriptors: int) -> None:
    """Sends one message. Raises OSError where nobody has the other end."""
    socket.send_fds(end, [json.dumps(message).encode()], descriptors, socket.MSG_NOSIGNAL)


def receive(end: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message and its descriptors; None where the other end is closed. Raises OSError."""
    try:
        data, descriptors, _, _ = socket.recv_fds(end, MOST_BYTES, MOST_DESCRIPTORS)
    except ConnectionResetError:  # the other end did not hear all before it was closed; what it said is still there
        data, descriptors, _, _ = socket.recv_fds(end, MOST_BYTES, MOST_DESCRIPTORS)
    return (dict(json.loads(data)) if data else None), descriptors
