"""What makes local files survive a power failure: syncs of their bytes, and of the directories that name them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def boot_id() -> str:
    """Another text after each start of the machine (see random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def sync_names(directory: Path) -> None:
    """Returns when what was made, renamed or removed in a directory is on the disk (blocks)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_new_directory(directory: Path) -> None:
    """Returns when a directory that was just made, perhaps with some above it, is on the disk with its names (blocks).

    Those above that may not be read were not made by us.
    """
    sync_names(directory)
    for above in directory.absolute().parents[:3]:
        with suppress(OSError):
            sync_names(above)


def sync_files(descriptors: Sequence[int]) -> None:
    """Returns when the bytes of open files are on the disk, and closes the descriptors (blocks). Raises OSError."""
    failed: OSError | None = None
    for descriptor in descriptors:
        try:
            os.fdatasync(descriptor)
        except OSError as error:
            failed = error
        finally:
            os.close(descriptor)
    if failed is not None:
        raise failed
