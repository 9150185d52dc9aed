"""What is written to a volume is in the bucket when its last user has gone, or somebody is told that it is not."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import trio

from s3fuse.errors import UserError
from s3fuse.volume import daemon

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)

#: How long failed uploads of what Docker copied into a volume are tried again before the next Mount tells of them.
COPY_UP_S = 10.0
AGAIN_S = 0.5


class Flushing:
    """The flushes of one volume. `on_progress` is given what is left, again and again."""

    def __init__(
        self, name: str, mountpoint: Path, unmount_s: float, on_progress: Callable[[dict[str, Any]], None]
    ) -> None:
        self._name = name
        self._mountpoint = mountpoint
        self._unmount_s = unmount_s
        self._on_progress = on_progress
        self._lost: str | None = None
        #: How many are under way.
        self.under_way = 0

    async def flush(self, *, by_container: bool) -> None:
        """Waits until all is in the bucket, or `unmount_s` have passed; the daemon goes on after that.

        What Docker itself copied into the volume (no container held it meanwhile) must not seem complete if it cannot
        be uploaded: the next Mount tells, as Docker does not look at what an Unmount answers.
        """
        self.under_way += 1
        try:
            failed = await self._flush(0 if by_container else min(COPY_UP_S, self._unmount_s))
        finally:
            self.under_way -= 1
        if failed:
            log.warning("volume %s: %s", self._name, failed)
            self._lost = None if by_container else failed

    async def _flush(self, patience_s: float) -> str | None:
        began = time.monotonic()
        failed = await self._once(self._unmount_s)
        while failed and time.monotonic() - began < patience_s:
            await trio.sleep(AGAIN_S)
            again = await self._once(self._unmount_s - (time.monotonic() - began))
            failed = failed if again is None else again
        return failed

    async def _once(self, timeout_s: float) -> str | None:
        """What is not in the bucket and why; "" where all is, None where it takes longer."""
        try:
            await daemon.flush(self._mountpoint, timeout_s, self._on_progress)
        except TimeoutError:
            log.warning("volume %s: changes are still to be uploaded; that goes on", self._name)
            return None
        except daemon.NotFlushed as error:
            return str(error)
        return ""

    async def tell_of_loss(self) -> None:
        """Raises UserError, once, for what Docker copied into the volume and is still not in the bucket."""
        if self._lost is None:
            return
        now = await self._once(COPY_UP_S)
        lost, self._lost = self._lost if now is None else now, None
        if lost:
            raise UserError(f"volume {self._name}: {lost}")
