"""Replaces a mount's process by one of the program that is installed now: when asked to, or when it is too large."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from s3fuse.config import to_json
from s3fuse.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from s3fuse.config import MountConfig
    from s3fuse.keeping import Keeping
    from s3fuse.namespace.known import Known

log = logging.getLogger(__name__)

#: Options that a mount may get anew, by their names in `MountConfig`. The others are the kernel's, or tell which bytes
#: are whose.
CHANGEABLE = frozenset(
    {
        "region", "profile", "credentials_file", "ca_file", "cache_size_bytes", "memory_bytes", "dirty_size_bytes",
        "max_requests", "close", "fsync", "attr_ttl_s", "drain_timeout_s", "uid", "gid", "log_file", "log_level",
        "restart_above_bytes",
    }
)  # fmt: skip
#: How often the memory is looked at, and how long a process is left alone that is too large from the beginning.
LOOK_S = 1.0
LEAST_LIFE_S = 60.0


def resident_bytes() -> int:
    """How much memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Replacing:
    """One process's end by replacement. `hand_over` lets another one go on, and returns when it can.

    `on_orphaned` is called when the keeper is gone.
    """

    def __init__(
        self,
        config: MountConfig,
        keeping: Keeping,
        known: Known,
        hand_over: Callable[[], Awaitable[None]],
        is_ending: Callable[[], bool],
        on_orphaned: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.keeping = keeping
        self.known = known
        self.refused = keeping.refused  # why the last successor could not begin, or not with its options
        self._hand_over = hand_over
        self._is_ending = is_ending
        self._on_orphaned = on_orphaned

    async def run(self) -> None:
        """Does what the keeper says; runs until cancelled, or the keeper is gone."""
        if self.keeping.end is None:
            return
        while True:
            await trio.lowlevel.wait_readable(self.keeping.end)
            message = self.keeping.hear()
            if message is None:
                log.warning("the keeper is gone: from now on the mount ends with this process")
                self.keeping.end, self.keeping.keeper = None, 0
                self._on_orphaned()
                return
            if "refused" in message:
                self.refused = message["refused"]
            if "hand_over" in message:
                if self._is_ending() or not self.known.is_kept:
                    self.keeping.say(stays=True)
                else:
                    log.info("another process goes on")
                    await self._hand_over()

    async def on_restart(self, request: dict[str, Any], progress: object) -> dict[str, Any]:
        """Asks for a successor, with the options in `changes` in the place of this one's. Raises UserError."""
        why = self.why_not()
        if why:
            raise UserError(f"{self.config.mountpoint} cannot go on in another process: {why}; unmount and mount again")
        changes = dict(request.get("changes") or {})
        fixed = sorted(set(changes) - CHANGEABLE)
        if fixed:
            raise UserError(f"{fixed[0]} cannot be changed by a restart; unmount and mount again", ExitCode.USAGE)
        for name in ("credentials_file", "log_file"):
            if changes.get(name) is not None:
                changes[name] = Path(changes[name])
        self.refused = ""
        self.keeping.say(replace=to_json(dataclasses.replace(self.config, **changes)))
        return {"worker_pid": os.getpid()}

    def why_not(self) -> str:
        """Why no other process could go on, "" where one can."""
        if self.config.ephemeral:
            return "with --ephemeral all that it holds is in its memory"
        if self.keeping.end is None:
            return "its keeper is gone"
        if self._is_ending():
            return "it is being unmounted"
        if not self.known.is_kept:
            return "its session could not be kept, for the disk of the runtime directory is full"
        return ""

    async def watch_memory(self) -> None:
        """Asks for a successor when this process has more memory than it may; runs until cancelled."""
        began = trio.current_time()
        while self.config.restart_above_bytes:
            await trio.sleep(LOOK_S)
            size = resident_bytes()
            if (
                size > self.config.restart_above_bytes
                and trio.current_time() - began > LEAST_LIFE_S
                and not self.why_not()
            ):
                log.info("%d bytes of memory are more than --restart-above: another process is to go on", size)
                self.keeping.say(replace=None)
                began = trio.current_time()
