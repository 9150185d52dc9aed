"""What the plugin asks the daemon of one mount at its control socket. Everything blocks, in threads of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import trio

from s3fuse import control
from s3fuse.errors import UserError
from s3fuse.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: A daemon that is asked for its status answers from memory.
STATUS_S = 5.0
#: With nothing to upload an unmount takes a moment, unless something that we do not see holds the mount.
UMOUNT_S = 60.0


#: A daemon that has answered to umount is about to end.
ENDED_S = 30.0
#: Threads that may wait for daemons: as many as there may be volumes, so that no hung one keeps others waiting.
WAITING = trio.CapacityLimiter(1000)


class NotFlushed(Exception):
    """Not all is in the bucket; the text says what is not, and why."""


def status(mountpoint: Path) -> dict[str, Any]:
    """Raises OSError (TimeoutError where the daemon is there and busy), ValueError or UserError. Blocks."""
    return control.request(mountpoint, "status", timeout_s=STATUS_S)


async def flush(mountpoint: Path, timeout_s: float, on_progress: Callable[[dict[str, Any]], None]) -> None:
    """Returns when all is in the bucket. Raises NotFlushed, or TimeoutError while it goes on."""
    try:
        result = await _ask(mountpoint, "flush", timeout_s, on_progress)
    except TimeoutError:
        raise
    except (OSError, ValueError, UserError) as error:
        raise NotFlushed(f"its daemon did not say whether all is uploaded: {error}") from None
    if failed := result["failed"]:
        first = failed[0]
        raise NotFlushed(
            f"{len(failed)} files are not in the bucket, and are tried again; the first is {printable(first['name'])}: "
            f"{printable(first['error'] or first['state'])}"
        )


async def umount(mountpoint: Path) -> None:
    """Returns when the mount is gone and drained. Raises UserError while files are open, OSError or ValueError."""
    await _ask(mountpoint, "umount", UMOUNT_S, lambda message: None)


async def ended(pid: int) -> None:
    """Returns when the process has ended, at the latest after `ENDED_S`."""
    await trio.to_thread.run_sync(control.wait_for_end, pid, ENDED_S, abandon_on_cancel=True, limiter=WAITING)


async def _ask(
    mountpoint: Path, verb: str, timeout_s: float, on_progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The daemon's result. Raises TimeoutError after `timeout_s` in all."""
    end = time.monotonic() + timeout_s

    def progress(message: dict[str, Any]) -> None:
        on_progress(message)
        if time.monotonic() > end:
            raise TimeoutError(f"no result after {timeout_s:g} s")

    def ask() -> dict[str, Any]:
        return control.request(mountpoint, verb, on_progress=progress, timeout_s=max(0.1, timeout_s))

    return await trio.to_thread.run_sync(ask, abandon_on_cancel=True, limiter=WAITING)
