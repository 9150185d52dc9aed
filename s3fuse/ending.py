"""How a mount ends: by a signal, by `s3fuse umount`, or by anybody's umount; in each case what is dirty is uploaded.

The kernel is detached first: it writes its dirty pages back while requests are still answered. Then the drain begins,
bounded by the drain timeout from there on. What is left is in the journal, and the exit code says so.
"""

from __future__ import annotations

import errno
import logging
import math
import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import trio

from s3fuse import kernel, waits
from s3fuse.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from s3fuse.vfs.core import Core

log = logging.getLogger(__name__)

#: How long the last requests may take once nobody finds the mount any more, before open files are cut off.
LAST_REQUESTS_S = 2.0
#: More than the kernel holds of what was written to one mount: a hundredth of what it lets be dirty in all.
KERNEL_DIRTY_BYTES = 256 << 20
#: How often the log tells how much is left.
TELL_S = 10.0


class Ending:
    """The end of one mount. `timeout_s` is the longest that uploads are waited for."""

    def __init__(self, core: Core, mountpoint: Path, timeout_s: float) -> None:
        self.core = core
        self.mountpoint = mountpoint
        self.timeout_s = timeout_s
        #: The number of the mounted device, "" before it is mounted: another mount on the mountpoint is left alone.
        self.device_number = ""
        #: Ends the service of requests, where files stay open on a mount that nobody finds any more.
        self.cut_off: Callable[[], None] = lambda: None
        self.unmounted = trio.Event()
        self.drained = trio.Event()
        self._asked = trio.Event()
        self._deadline = math.inf
        self._scopes: set[trio.CancelScope] = set()

    def limit(self, timeout_s: float) -> None:
        """From now on the end takes at most this long."""
        self._deadline = trio.current_time() + timeout_s
        for scope in self._scopes:
            scope.deadline = self._deadline

    def _begin(self) -> None:
        if self._deadline == math.inf:
            self.limit(self.timeout_s)

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """The block is cut short at the deadline, wherever that is moved to meanwhile."""
        with trio.CancelScope(deadline=self._deadline) as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)

    @contextmanager
    def _more_room(self) -> Iterator[None]:
        """The last writes are taken above the limit: the kernel waits for them, and they may wait for the server."""
        self.core.budget.extra_bytes = KERNEL_DIRTY_BYTES
        waits.give_up(for_room=True)
        try:
            yield
        finally:
            self.core.budget.extra_bytes = 0

    # -- signals

    async def signals(self) -> None:
        """SIGTERM and SIGINT end the mount; the second one ends the wait for uploads. Runs until cancelled."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async for _ in received:
                if self._asked.is_set():
                    log.info("told again to end: what is not uploaded stays in the journal")
                    self.limit(0)
                self._asked.set()

    async def stop_when_asked(self) -> None:
        """Detaches the mount when told to; the FUSE loop then ends by itself, or is ended where files stay open."""
        await self._asked.wait()
        if self.unmounted.is_set():
            return
        self._begin()
        with self._more_room():
            with self._patience():
                await trio.to_thread.run_sync(self._write_back, abandon_on_cancel=True)
            kernel.detach(self.mountpoint, self.device_number)
            with trio.move_on_after(LAST_REQUESTS_S):
                await self.unmounted.wait()
        if not self.unmounted.is_set():
            log.warning("files on %s are still open; what their programs write from now on fails", self.mountpoint)
            self.cut_off()
            waits.give_up()

    def _write_back(self) -> None:
        """Has the kernel send its dirty pages (blocks)."""
        with suppress(OSError):
            kernel.write_back(self.mountpoint)

    # -- unmounting

    async def unmount(self, timeout_s: float | None) -> None:
        """Unmounts and returns when the drain is over, which it limits. Raises UserError while files are open."""
        self.timeout_s = self.timeout_s if timeout_s is None else timeout_s
        with trio.CancelScope(shield=True):  # a client that goes away does not undo this
            if self.is_mounted():
                await self._unmount()
        if timeout_s is not None:
            self.limit(timeout_s)
        await self.drained.wait()

    def is_mounted(self) -> bool:
        """Whether the mountpoint shows this mount, and not what is below or above it."""
        entry = kernel.mount_entry(self.mountpoint)
        return entry is not None and entry.device == self.device_number and not self.unmounted.is_set()

    async def _unmount(self) -> None:
        with self._more_room():
            try:
                await trio.to_thread.run_sync(kernel.unmount, self.mountpoint)
            except OSError as error:
                if error.errno == errno.EINVAL and not self.is_mounted():
                    return  # somebody else was faster
                raise UserError(
                    f"{self.mountpoint} is in use ({error.strerror}); close what is open there, see "
                    f"fuser -vm {self.mountpoint}"
                ) from None
            waits.give_up()  # nobody waits for them any more
            await self.unmounted.wait()

    async def drain(self) -> ExitCode:
        """Uploads what is dirty, up to the drain timeout. The rest stays in the journal and the log names it."""
        self._begin()
        changes = self.core.changes
        for inode in list(changes.dirty.values()):
            inode.opens = inode.writers = 0
        with self._patience():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell)
                while changes.dirty and not await self.core.syncer.arrivals.drain():
                    pass
                nursery.cancel_scope.cancel()
        self.drained.set()
        return ExitCode.PENDING if changes.dirty else ExitCode.DONE

    async def _tell(self) -> None:
        while True:
            await trio.sleep(TELL_S)
            left = len(self.core.changes.dirty)
            log.info("%s is unmounted; %d files are still to be uploaded", self.mountpoint, left)
