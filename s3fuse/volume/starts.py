"""How a volume's mount is begun: its mountpoint, the `s3fuse mount` on it, and when one that failed is tried again.

Whether it is to be begun is decided elsewhere (`mounts`), and what the command leaves running is watched there.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import trio

from s3fuse import kernel
from s3fuse.errors import UserError
from s3fuse.mountpoint import refuse_writes
from s3fuse.volume import jobs, process
from s3fuse.volume.jobs import Job

if TYPE_CHECKING:
    from s3fuse.volume.definition import Definition, MountOptions
    from s3fuse.volume.places import Places

log = logging.getLogger(__name__)

#: The pause after a start that failed: first and at most.
RETRY_S = (1.0, 60.0)


class Starts:
    """The starts of one volume's mount, one at a time."""

    def __init__(self, definition: Definition, options: MountOptions, places: Places) -> None:
        self._definition = definition
        self._options = options
        self._places = places
        self._mountpoint = places.mountpoint(definition.name)
        self._command: process.Command | None = None
        #: When the next start that nobody waits for may come (`time.monotonic()` seconds).
        self.retry_at = 0.0
        self._retry_s = 0.0

    async def start(self) -> None:
        """Runs `s3fuse mount`, which also replaces a dead mount and waits for one that still drains.

        Raises UserError with its words.
        """
        if self._definition.purge and not self._definition.purge_all:
            await self._own()
        try:
            await process.run(*await trio.to_thread.run_sync(self._prepare), started=self._started)
        finally:
            self._command = None

    async def _own(self) -> None:
        """Puts the owner's mark, before anything can be written: another node may have purged it. Raises UserError."""
        job = Job(do="own", volume=self._definition.name)
        found = await jobs.run(self._definition, self._options, self._places, job)
        if "refused" in found:
            raise UserError(f"the option purge cannot hold: {found['refused']}")

    @property
    def words(self) -> str:
        """What the command that runs now has complained of so far; "" where none runs."""
        return self._command.errors.strip() if self._command is not None else ""

    def put_off(self) -> None:
        """The next start that nobody waits for comes later, and later each time."""
        least, most = RETRY_S
        self._retry_s = min(most, max(least, self._retry_s * 2))
        self.retry_at = time.monotonic() + self._retry_s

    def succeeded(self) -> None:
        """The next start need not wait."""
        self._retry_s = self.retry_at = 0.0

    def remove_mountpoint(self) -> None:
        """Takes a dead mount and the directory away; one with something in it, or a living mount, stays. Blocks."""
        if kernel.is_dead(self._mountpoint):
            kernel.unmount(self._mountpoint, lazy=True)
        if kernel.mount_entry(self._mountpoint) is None:
            refuse_writes(self._mountpoint, on=False)
            try:
                self._mountpoint.rmdir()
            except FileNotFoundError:
                pass
            except OSError as error:
                log.warning("%s stays: %s", self._mountpoint, error.strerror)

    def _started(self, command: process.Command) -> None:
        self._command = command

    def _prepare(self) -> list[str]:
        """Makes the mountpoint, and gives the arguments of the command. Raises UserError."""
        definition, mountpoint = self._definition, self._mountpoint
        arguments = ["mount", *self._places.arguments(definition, self._options)]
        if not definition.ephemeral and "cache-dir" not in definition.options:
            arguments.append(f"--cache-dir={self._places.cache_directory(definition)}")
        if kernel.mount_entry(mountpoint) is None:  # a dead one is in the way of everything but a mount
            try:
                mountpoint.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise UserError(f"the mountpoint {mountpoint} cannot be made: {error.strerror}") from None
            refuse_writes(mountpoint)
        return [*arguments, "--", definition.place, str(mountpoint)]
