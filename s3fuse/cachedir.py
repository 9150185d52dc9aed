"""What a mount may use of its cache disk, for clean blocks and for staged bytes together."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from s3fuse.reading.disk import DiskTier

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s3fuse.config import MountConfig

_MOST_RESERVE_BYTES = 1 << 30
BLOCKS = "blocks"


def reserve_bytes(directory: Path) -> int:
    """What stays free on the disk of this directory for others: a tenth of it, at most 1 GiB."""
    disk = os.statvfs(directory)
    return min(_MOST_RESERVE_BYTES, disk.f_blocks * disk.f_frsize // 10)


def disk_tier(config: MountConfig, directory: Path, staged_bytes: Callable[[], int]) -> DiskTier | None:
    """The disk tier of a mount below its cache directory; None where `--cache-size` is 0, and then nothing is there."""
    blocks = directory / BLOCKS
    if config.ephemeral:
        return None
    if not config.cache_size_bytes:
        shutil.rmtree(blocks, ignore_errors=True)
        return None
    return DiskTier(
        blocks,
        config.cache_size_bytes,
        # Clean blocks keep away from what writers may use up.
        reserve_bytes=2 * reserve_bytes(directory),
        queue_bytes=config.memory_bytes // 2,
        others_bytes=staged_bytes,
    )


def disk_status(disk: DiskTier | None) -> dict[str, Any]:
    """What `status` shows of it."""
    return {
        "disk_bytes": 0 if disk is None else disk.used_bytes,
        "disk_limit_bytes": 0 if disk is None else disk.limit_bytes,
        "disk_hits": 0 if disk is None else disk.hits,
        "disk_dropped": 0 if disk is None else disk.dropped,
        "disk_damaged": 0 if disk is None else disk.damaged,
    }
