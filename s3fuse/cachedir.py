"""The cache directory of a mount: where it may be, what of it is ours, and how much of its disk may be used."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import stat
from typing import TYPE_CHECKING, Any

from s3fuse.coherence import renewal
from s3fuse.errors import UserError
from s3fuse.host.private import who
from s3fuse.namespace.recovery import LOST
from s3fuse.reading.disk import DiskTier
from s3fuse.writing import wal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from s3fuse.config import MountConfig

log = logging.getLogger(__name__)

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
    if others := _others(directory):
        raise UserError(
            f"cache directory {directory} has files that are not s3fuse's ({others[0]}); choose a new or empty one "
            "with --cache-dir"
        )


def make_private(directory: Path, *, is_new_mount: bool) -> None:
    """Gives a cache directory mode 0700 and all of ours in it 0600, so that nobody else reads what is staged there.

    Only where it is this user's, holds nothing else, and nobody else may write to it: what others may have put there is
    not believed. Else UserError is raised, with the command that mends it; a process that goes on with a mount only
    says so in the log.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # it is made so; why it cannot be opened is said by who locks it
    try:
        problem = _open_to(directory, descriptor) or _close_to_others(directory, descriptor)
    except OSError as error:
        problem = f"cache directory {directory} cannot be made private: {error.strerror}"
    finally:
        os.close(descriptor)
    if problem and is_new_mount:
        raise UserError(f"{problem}; or choose another with --cache-dir")
    if problem:
        log.warning("%s", problem)


def _open_to(directory: Path, descriptor: int) -> str:
    """Why a directory cannot simply be made private, and the command for it; "" where it can."""
    status = os.fstat(descriptor)
    quoted = shlex.quote(str(directory))
    if status.st_uid != os.geteuid():
        command = f"chown -R {os.geteuid()} {quoted}" if os.geteuid() == 0 else ""
        return _advised(f"cache directory {directory} belongs to {who(status.st_uid)}", command)
    if status.st_mode & 0o022:
        mode = stat.S_IMODE(status.st_mode)
        return _advised(f"others may write to cache directory {directory} (mode {mode:04o})", f"chmod 700 {quoted}")
    if status.st_mode & 0o055 and (others := _others(descriptor)):
        problem = f"others may read cache directory {directory}, in which are files that are not s3fuse's ({others[0]})"
        return _advised(problem, f"chmod 700 {quoted}")
    return ""


def _others(directory: Path | int) -> list[str]:
    """What is in a cache directory and not ours."""
    return sorted(name for name in os.listdir(directory) if not is_ours(name) and name != "lost+found")


def _advised(problem: str, command: str) -> str:
    return f"{problem}; see that all in it is yours, then: {command}" if command else problem


def _close_to_others(directory: Path, descriptor: int) -> str:
    """Takes others' rights away; gives what is another user's in it, "" for nothing. Links are not followed."""
    if os.fstat(descriptor).st_mode & 0o077:
        os.fchmod(descriptor, 0o700)
    for top, folders, files, folder in os.fwalk(".", dir_fd=descriptor):
        if top == ".":
            folders[:] = [name for name in folders if is_ours(name)]
            files = [name for name in files if is_ours(name)]
        for name in (*folders, *files):
            status = os.lstat(name, dir_fd=folder)
            if status.st_uid != os.geteuid():
                path = directory / top / name
                # Not to remove it: what waits for upload may be in it.
                command = f"chown -hR {os.geteuid()} {shlex.quote(str(path))}"
                return _advised(f"{path} belongs to {who(status.st_uid)}", command)
            if status.st_mode & 0o077 and not stat.S_ISLNK(status.st_mode):
                os.chmod(name, 0o700 if stat.S_ISDIR(status.st_mode) else 0o600, dir_fd=folder)
    return ""


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
