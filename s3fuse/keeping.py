"""The worker's side of its keeper: what it was given, and what it has to say."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from s3fuse import link

if TYPE_CHECKING:
    import socket
    from pathlib import Path


@dataclass
class Keeping:
    """Without an `end` there is no keeper, and the mount ends with its process."""

    end: socket.socket | None = None
    keeper: int = 0  # its pid
    held: dict[str, Any] = field(default_factory=dict)
    restarts: int = 0
    deaths: int = 0
    reason: str = ""  # of the last death
    given_up: str = ""  # why nobody serves the mount any more: what waits is only to be uploaded
    refused: str = ""  # why the options of the last restart do not hold
    since: float | None = None  # since when nobody serves it, as `time.monotonic()`
    device: int | None = None  # the connection to the kernel, where an earlier worker has made it
    listener: int | None = None  # the control socket

    @classmethod
    def begin(cls, end: socket.socket) -> tuple[Keeping, dict[str, Any]]:
        """Waits for the keeper to give this worker the mount; with the mount's options. Raises EOFError, OSError."""
        message, descriptors = link.receive(end)
        if message is None:
            raise EOFError
        options = dict(message.pop("config"))
        for name, descriptor in zip(message.pop("descriptors"), descriptors, strict=True):
            os.set_inheritable(descriptor, False)
            message[name] = descriptor
        return cls(end, **message), options

    @property
    def is_successor(self) -> bool:
        return "session" in self.held

    @property
    def pid(self) -> int:
        """The process that lives as long as the mount."""
        return self.keeper or os.getpid()

    def hold_connection(self, device: int, init: bytes, reply: bytes) -> None:
        """The keeper keeps the connection from now on."""
        self._send({"hold": {"init": init.hex(), "reply": reply.hex()}}, device=device)

    def hold_session(
        self, session: Path | None, findings: dict[str, Any], *, after_death: bool, after_hand_over: bool
    ) -> None:
        """Whether another worker can go on, with which session, and what is known of the store where that is gone."""
        self._send(
            {
                "hold": {
                    "session": session and str(session),
                    "findings": findings,
                    "after_death": after_death,
                    "after_hand_over": after_hand_over,
                }
            }
        )

    def hold_listener(self, listener: socket.socket, inode: int) -> None:
        """The keeper keeps the control socket, whose name has this inode, from now on."""
        self._send({"hold": {"socket_inode": inode}}, listener=listener.fileno())

    def say(self, **words: Any) -> None:
        self._send(words)

    def hear(self) -> dict[str, Any] | None:
        """What the keeper says next; None where it is gone."""
        assert self.end is not None
        try:
            return link.receive(self.end)[0]
        except OSError:
            return None

    def _send(self, message: dict[str, Any], **descriptors: int) -> None:
        if self.end is not None:
            message["descriptors"] = list(descriptors)
            with suppress(OSError):  # it is gone: the mount goes on without it
                link.send(self.end, message, *descriptors.values())
