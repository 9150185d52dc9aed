"""Composes one mount: store, journal, kernel connection, FUSE loop, control socket; and ends it in the right order.

Start: everything that can fail is tried before the kernel mount is made, so that a failure leaves nothing behind.
End: the kernel is detached first (it writes its dirty pages back while we still answer), then what is dirty is
drained, then the connections close.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import trio

from s3fuse import attrs, credentials, kernel, starting, waits
from s3fuse.answers import Answers
from s3fuse.cachedir import disk_tier, reserve_bytes
from s3fuse.coherence.renewal import Renewal
from s3fuse.ending import Ending
from s3fuse.errors import ExitCode
from s3fuse.fuse.adapter import Adapter
from s3fuse.fuse.connection import Connection
from s3fuse.fuse.notify import invalidation
from s3fuse.fuse.signals import thread_is_signalled
from s3fuse.keeping import Keeping
from s3fuse.namespace.changes import Changes
from s3fuse.namespace.directories import Directories
from s3fuse.namespace.inodes import Inodes
from s3fuse.namespace.known import Known
from s3fuse.namespace.recovery import recover
from s3fuse.namespace.revival import revive
from s3fuse.namespace.syncer import Syncer
from s3fuse.namespace.upkeep import keep_up
from s3fuse.reading.blocks import BlockCache
from s3fuse.replacing import Replacing
from s3fuse.starting import Session
from s3fuse.store.s3 import S3Store
from s3fuse.vfs.budget import Budget
from s3fuse.vfs.carrying import carry_over
from s3fuse.vfs.core import Core
from s3fuse.writing.ephemeral import MemoryStaging
from s3fuse.writing.staging import Staging

if TYPE_CHECKING:
    from s3fuse.config import MountConfig
    from s3fuse.store.base import Capabilities
    from s3fuse.writing.journal import Journal

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 1024
#: How long uploads that were begun may take before another process goes on; requests are answered meanwhile.
UPLOADS_S = 5.0


def serve(config: MountConfig, keeping: Keeping) -> ExitCode | None:
    """Mounts, or goes on with a mount; serves until it is unmounted or told to stop, and drains.

    Gives None where another process is to go on. Raises UserError where it cannot begin.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # large dirty files and connections have one each
    return trio.run(_serve, config, keeping, restrict_keyboard_interrupt_to_checkpoints=True)


async def _serve(config: MountConfig, keeping: Keeping) -> ExitCode | None:
    where = credentials.resolve(config)
    if not keeping.is_successor:
        for warning in credentials.open_key_files(config):
            log.warning("%s", warning)
        kernel.check_mountpoint(config.mountpoint, nonempty=config.nonempty)
    store = S3Store(
        where.endpoint,
        config.bucket,
        where.provider,
        region=where.region,
        max_requests=config.max_requests,
        ca_file=config.ca_file,
    )
    try:
        if not keeping.is_successor:
            await starting.check_bucket(config, store, where.endpoint)
        journal = starting.open_journal(config, where.endpoint, is_successor=keeping.is_successor)
        try:
            gc.disable()  # it would look at all inodes again and again while they are made
            session = await starting.session(config, keeping, store, journal, where.endpoint)
            cache = None if config.ephemeral else journal.directory
            lease = Renewal(store, config.prefix, cache, config.mountpoint, read_only=config.read_only)
            if not keeping.is_successor:
                await lease.begin()
            async with trio.open_nursery() as nursery:
                can = store.capabilities
                mount = Mount(config, where.endpoint, store, can, journal, nursery, keeping, session, lease)
                gc.enable()
                code = await mount.run()
                nursery.cancel_scope.cancel()
            if code is None:
                journal.leave()
            return code
        finally:
            journal.close()
    finally:
        with trio.move_on_after(0 if keeping.is_successor else 5, shield=True):
            await store.aclose()


@dataclass
class Mount:
    """One mount from its first to its last request."""

    config: MountConfig
    endpoint: str
    store: S3Store
    capabilities: Capabilities
    journal: Journal
    nursery: trio.Nursery
    keeping: Keeping = field(default_factory=Keeping)
    session: Session = field(default_factory=Session)
    lease: Renewal | None = None  # None: other nodes are not told of this mount
    started_at: float = field(default_factory=time.time)
    _is_up: bool = False
    _telling: trio.CancelScope = field(default_factory=trio.CancelScope)  # while the kernel can be told of names

    def __post_init__(self) -> None:
        config = self.config
        defaults = attrs.Defaults(config.uid, config.gid, config.file_mode, config.dir_mode)
        root = attrs.decode(None, is_directory=True, modified_ns=time.time_ns(), defaults=defaults)
        inodes = Inodes(config.prefix, root, self.journal.undo)
        inodes.root.attributes_known = False
        earlier = self.session.earlier
        known = Known(inodes, self.journal, self.session.path, earlier)
        if earlier is not None:
            revive(inodes, known, earlier)
            self.started_at = earlier.facts.get("started_at", self.started_at)
            self._is_up = True
        changes = Changes(inodes, self.journal)
        can = self.capabilities
        directories = Directories(
            inodes, self.store, defaults, config.attr_ttl_s, lists_metadata=can.list_metadata and can.marker_metadata
        )
        folder = None if config.ephemeral else self.journal.directory
        staging = MemoryStaging(self.journal) if folder is None else Staging(folder / "staging", self.journal)
        disk = disk_tier(config, self.journal.directory, lambda: self.core.budget.taken_bytes())
        blocks = BlockCache(self.store, self.nursery, config.memory_bytes, disk)
        workers = max(2, config.max_requests // 2)
        syncer = Syncer(self.store, inodes, changes, directories, blocks, workers=workers)
        syncer.on_version = partial(carry_over, blocks)
        budget = Budget(
            config.dirty_size_bytes,
            staging,
            changes,
            syncer.parking,
            folder,
            0 if folder is None else reserve_bytes(folder),
            disk.make_room if disk is not None else lambda: None,
        )
        self.core = Core(config, inodes, directories, changes, staging, syncer, blocks, budget, known)
        self.ending = Ending(self.core, config.mountpoint, config.drain_timeout_s)
        recovered = recover(inodes, changes, staging, defaults)
        syncer.parking.restore(staging)
        self.answers = Answers(
            config,
            self.endpoint,
            self.store,
            self.capabilities,
            self.journal.directory,
            self.keeping,
            self.core,
            self.ending,
            self.started_at,
            recovered,
            self.lease,
        )

    async def run(self) -> ExitCode | None:
        """Serves until the mount has ended, and gives its exit code; None where another process goes on."""
        going_on = self.session.earlier is not None
        if not going_on and self.keeping.is_successor:
            return await self._only_drain()
        connection = self._connect()
        self.ending.cut_off = connection.end
        replacing = self.answers.replacing = Replacing(
            self.config,
            self.keeping,
            self.core.known,
            partial(self._hand_over, connection),
            self.ending.unmounted.is_set,
            self.answers.say_anew,
        )
        try:
            self._start()
            self.nursery.start_soon(replacing.run)
            self.nursery.start_soon(replacing.watch_memory)
            await self.nursery.start(self.answers.serve)
            if not going_on:
                self.nursery.start_soon(self._announce)
            handed_over = await connection.serve(Adapter(self.core), partial(self._hold, connection))
            self._telling.cancel()  # no await since then: the device is closed, and uploads go on
        except BaseException:
            self._telling.cancel()
            if not self._can_go_on(connection):
                self._detach()
            if self.lease is not None and not self._is_up:
                await self.lease.end()
            raise
        if handed_over:
            self.core.known.leave()
            return None
        self._detach()
        self.core.syncer.go_on()  # a hand-over that was under way is off
        self.keeping.say(stays=True)
        self.core.known.end()
        return await self._end()

    def _hold(self, connection: Connection) -> None:
        """From now on another process can go on with the mount."""
        known, keeping = self.core.known, self.keeping
        self.answers.can_resend = connection.can_resend
        self.nursery.start_soon(self._tell_kernel, connection.device)
        if keeping.device is None:
            keeping.hold_connection(connection.device, connection.init, connection.reply)
        keeping.hold_session(
            self.session.path,
            self.session.findings,
            after_death=known.is_kept and connection.can_resend,
            after_hand_over=known.is_kept,
        )
        keeping.say(serving=True)
        if keeping.since is not None:
            self.answers.pause_s = time.monotonic() - keeping.since
            log.info("%s goes on after %.0f ms", self.config.mountpoint, 1e3 * self.answers.pause_s)

    async def _tell_kernel(self, device: int) -> None:
        with self._telling:
            await self.core.syncer.stale.run(partial(invalidation, device))

    async def _hand_over(self, connection: Connection) -> None:
        """Lets another process go on. Uploads are not cut short if it can be helped: that leaves it in doubt."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._until_unmounted, nursery.cancel_scope)
            with trio.move_on_after(UPLOADS_S):
                await self.core.syncer.stop()
            nursery.cancel_scope.cancel()
        if not self.ending.unmounted.is_set():
            self.keeping.say(since=time.monotonic())
            await connection.hand_over()

    async def _until_unmounted(self, scope: trio.CancelScope) -> None:
        await self.ending.unmounted.wait()
        scope.cancel()

    def _connect(self) -> Connection:
        """The connection to the kernel: that of an earlier process, or of a mount that is made here."""
        config, keeping, known = self.config, self.keeping, self.core.known
        if keeping.device is not None:
            self.ending.device_number = known.facts["device"]
            self._restrict()
            return Connection(keeping.device, bytes.fromhex(keeping.held["init"]), bytes.fromhex(keeping.held["reply"]))
        device = kernel.mount(
            config.mountpoint, source=self._source(), allow_other=config.allow_other, flags=config.mount_flags()
        )
        entry = kernel.mount_entry(config.mountpoint)
        self.ending.device_number = entry.device if entry is not None else ""
        known.note(device=self.ending.device_number, findings=self.session.findings, started_at=self.started_at)
        return Connection(device)

    def _restrict(self) -> None:
        """An earlier version has mounted without flags that are the default now."""
        mountpoint = self.config.mountpoint
        try:
            if kernel.restrict(mountpoint, self.ending.device_number, self.config.mount_flags()):
                log.warning(
                    "set-uid files and devices on %s are no longer honoured, as an earlier version did; containers "
                    "that run keep what they have until they are started again; to have it so, mount with --suid --dev",
                    mountpoint,
                )
        except OSError as error:
            log.error(
                "%s cannot be made nosuid,nodev (%s); unmount and mount again to have it so", mountpoint, error.strerror
            )

    def _detach(self) -> None:
        kernel.detach(self.config.mountpoint, self.ending.device_number)
        self.ending.unmounted.set()

    def _can_go_on(self, connection: Connection) -> bool:
        """Whether another process can go on after this one."""
        return self._is_up and self.keeping.end is not None and self.core.known.is_kept and connection.can_resend

    def _start(self) -> None:
        """Everything that runs beside the requests."""
        core, start = self.core, self.nursery.start_soon
        start(core.syncer.run)
        start(self.store.health.watch, self.store.ping)
        if self.lease is not None:
            start(self.lease.run)
        if core.blocks.disk is not None:
            start(core.blocks.disk.run)
        start(keep_up, core.changes, core.staging, core.syncer.uploads)
        start(core.known.keep_short)
        start(core.directories.sweep)
        start(waits.watch, thread_is_signalled)
        start(self.ending.signals)
        start(self.ending.stop_when_asked)

    async def _only_drain(self) -> ExitCode:
        """The mount is gone, and what it left is uploaded."""
        self.ending.unmounted.set()
        self._start()
        await self.nursery.start(self.answers.serve)
        self.keeping.say(serving=True)
        log.warning("%s; what was not uploaded is uploaded now", self.keeping.given_up or "the mount is gone")
        return await self._end()

    def _source(self) -> str:
        return "s3fuse#" + "/".join(filter(None, (self.config.bucket, self.config.prefix.rstrip("/"))))

    async def _announce(self) -> None:
        """Says that the mount is up once the kernel has an answer from it."""
        await trio.to_thread.run_sync(os.stat, self.config.mountpoint)
        kernel.set_read_ahead(self.config.mountpoint, READ_AHEAD_KIB)  # the handshake would have put it back
        log.info("mounted %s on %s", self._source(), self.config.mountpoint)
        if self.config.ephemeral:
            log.info("kept in memory only: a crash loses what is not uploaded")
        self._is_up = True
        self.keeping.say(ready=True)

    async def _end(self) -> ExitCode:
        """Drains; what is left is named in the log, and those who asked at the control socket get their answers."""
        code = await self.ending.drain()
        for inode in self.core.changes.dirty.values():
            log.error("not in the bucket yet: %s (%s); %s", *self.answers.item(inode), self._what_becomes_of_it())
        with trio.move_on_after(5):
            if self.core.blocks.disk is not None:
                await self.core.blocks.disk.settle()
            await self.answers.ended.wait()
        if self.lease is not None and code is ExitCode.DONE:  # else what waits here is still about this place
            await self.lease.end()
        return code

    def _what_becomes_of_it(self) -> str:
        return "it is lost with --ephemeral" if self.config.ephemeral else f"it stays in {self.journal.directory}"
