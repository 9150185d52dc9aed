"""The cache directory of a mount: where it may be, what of it is ours, and how much of its disk may be used."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from s3fuse.coherence import renewal
from s3fuse.errors import UserError
from s3fuse.namespace.recovery import LOST
from s3fuse.reading.disk import DiskTier
from s3fuse.writing import wal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s3fuse.config import MountConfig

_MOST_RESERVE_BYTES = 1 << 30
BLOCKS = "blocks"
_OURS = ("lock", "staging", BLOCKS, renewal.FILE, renewal.PART)
_OURS_BEGIN = (wal.FILE, LOST)


def is_ours(name: str) -> bool:
    """Whether an entry of a cache directory is one that a mount makes."""
    return name in _OURS or name.startswith(_OURS_BEGIN)


def check_place(directory: Path, mountpoint: Path) -> None:
    """Raises UserError where a cache directory must not be: on the mount itself, or among files of others."""
    where = directory.resolve()
    if where == mountpoint.resolve() or mountpoint.resolve() in where.parents:
        raise UserError(
            f"cache directory {directory} is below the mountpoint {mountpoint}, and would wait for itself; choose "
            "another with --cache-dir"
        )
    if not directory.is_dir() or (directory / wal.FILE).exists():
        return
    others = sorted(name for name in os.listdir(directory) if not is_ours(name) and name != "lost+found")
    if others:
        raise UserError(
            f"cache directory {directory} has files that are not s3fuse's ({others[0]}); choose a new or empty one "
            "with --cache-dir"
        )


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
