"""Tells systemd how far a service is. The standard library only, for the keeper."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def tell(state: str) -> None:
    """Sends a state, such as "READY=1", where somebody wants to know (protocol: sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
