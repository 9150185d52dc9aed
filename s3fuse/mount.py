"""Composes one mount: store, journal, kernel connection, FUSE loop, control socket; and ends it in the right order.

Start: everything that can fail is tried before the kernel mount is made, so that a failure leaves nothing behind.
End: the kernel is detached first (it writes its dirty pages back while we still answer), then what is dirty is
drained, then the connections close.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import resource
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from s3fuse import attrs, control, credentials, kernel, starting, waits
from s3fuse.cachedir import disk_status, disk_tier, reserve_bytes
from s3fuse.ending import Ending
from s3fuse.errors import ExitCode, UserError
from s3fuse.fuse.adapter import Adapter
from s3fuse.fuse.connection import Connection
from s3fuse.fuse.signals import thread_is_signalled
from s3fuse.keeping import Keeping
from s3fuse.namespace.changes import Changes
from s3fuse.namespace.directories import Directories
from s3fuse.namespace.inodes import Inodes
from s3fuse.namespace.known import Known
from s3fuse.namespace.recovery import lost_folders, recover
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
    from collections.abc import Awaitable, Callable

    from s3fuse.config import MountConfig
    from s3fuse.namespace.inodes import Inode
    from s3fuse.store.base import Capabilities
    from s3fuse.writing.journal import Journal

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 1024
STATUS_ITEMS = 100
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
            async with trio.open_nursery() as nursery:
                mount = Mount(config, where.endpoint, store, store.capabilities, journal, nursery, keeping, session)
                gc.enable()
                code = await mount.run()
                nursery.cancel_scope.cancel()
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
    started_at: float = field(default_factory=time.time)
    answered: trio.Event = field(default_factory=trio.Event)
    recovered: int = 0
    pause_s: float | None = None  # how long nobody has served the mount before this process did
    replacing: Replacing | None = None
    _door: control.Door | None = None
    _is_up: bool = False
    _can_resend: bool = False

    def __post_init__(self) -> None:
        config = self.config
        defaults = attrs.Defaults(config.uid, config.gid, config.file_mode, config.dir_mode)
        root = attrs.decode(None, is_directory=True, modified_ns=time.time_ns(), defaults=defaults)
        inodes = Inodes(config.prefix, root)
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
        syncer = Syncer(self.store, inodes, changes, directories, workers=max(2, config.max_requests // 2))
        disk = disk_tier(config, self.journal.directory, lambda: self.core.budget.taken_bytes())
        blocks = BlockCache(self.store, self.nursery, config.memory_bytes, disk)
        syncer.read_base, syncer.on_version = blocks.copy, partial(carry_over, blocks)
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
        self.recovered = recover(inodes, changes, staging, defaults)
        syncer.parking.restore(staging)

    async def run(self) -> ExitCode | None:
        """Serves until the mount has ended, and gives its exit code; None where another process goes on."""
        going_on = self.session.earlier is not None
        if not going_on and self.keeping.is_successor:
            return await self._only_drain()
        connection = self._connect()
        self.ending.cut_off = connection.end
        self.replacing = Replacing(
            self.config,
            self.keeping,
            self.core.known,
            partial(self._hand_over, connection),
            self.ending.unmounted.is_set,
            self._say_anew,
        )
        try:
            self._start()
            self.nursery.start_soon(self.replacing.run)
            self.nursery.start_soon(self.replacing.watch_memory)
            await self.nursery.start(self._control)
            if not going_on:
                self.nursery.start_soon(self._announce)
            handed_over = await connection.serve(Adapter(self.core), partial(self._hold, connection))
        except BaseException:
            if not self._can_go_on(connection):
                self._detach()
            raise
        if handed_over:
            self.core.known.leave()
            return None
        self._detach()
        self.core.known.end()
        return await self._end()

    def _hold(self, connection: Connection) -> None:
        """From now on another process can go on with the mount."""
        known, keeping = self.core.known, self.keeping
        self._can_resend = connection.can_resend
        if keeping.device is None:
            keeping.hold_connection(connection.device, connection.init, connection.reply)
        keeping.hold_session(
            self.session.path, after_death=known.is_kept and connection.can_resend, after_hand_over=known.is_kept
        )
        keeping.say(serving=True)
        if keeping.since is not None:
            self.pause_s = time.monotonic() - keeping.since
            log.info("%s goes on after %.0f ms", self.config.mountpoint, 1e3 * self.pause_s)

    async def _hand_over(self, connection: Connection) -> None:
        """Lets another process go on. Uploads are not cut short if it can be helped: that leaves it in doubt."""
        with trio.move_on_after(UPLOADS_S):
            await self.core.syncer.stop()
        self.keeping.say(since=time.monotonic())
        await connection.hand_over()

    def _connect(self) -> Connection:
        """The connection to the kernel: that of an earlier process, or of a mount that is made here."""
        config, keeping, known = self.config, self.keeping, self.core.known
        if keeping.device is not None:
            self.ending.device_number = known.facts["device"]
            return Connection(keeping.device, bytes.fromhex(keeping.held["init"]), bytes.fromhex(keeping.held["reply"]))
        device = kernel.mount(
            config.mountpoint, source=self._source(), allow_other=config.allow_other, read_only=config.read_only
        )
        entry = kernel.mount_entry(config.mountpoint)
        self.ending.device_number = entry.device if entry is not None else ""
        known.note(device=self.ending.device_number, findings=self.session.findings, started_at=self.started_at)
        return Connection(device)

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
        if core.blocks.disk is not None:
            start(core.blocks.disk.run)
        start(keep_up, core.changes, core.staging, core.syncer.uploads)
        start(core.known.keep_short)
        start(waits.watch, thread_is_signalled)
        start(self.ending.signals)
        start(self.ending.stop_when_asked)

    async def _only_drain(self) -> ExitCode:
        """The mount is gone, and what it left is uploaded."""
        self.ending.unmounted.set()
        self._start()
        await self.nursery.start(self._control)
        self.keeping.say(serving=True)
        log.warning("%s; what was not uploaded is uploaded now", self.keeping.given_up or "the mount is gone")
        return await self._end()

    def _source(self) -> str:
        return "s3fuse#" + "/".join(filter(None, (self.config.bucket, self.config.prefix.rstrip("/"))))

    def _about(self) -> dict[str, Any]:
        return {
            "mountpoint": str(self.config.mountpoint),
            "pid": self.keeping.pid,
            "worker_pid": os.getpid(),
            "bucket": self.config.bucket,
            "prefix": self.config.prefix,
            "endpoint": self.endpoint,
            "cache_directory": str(self.journal.directory),
            "ephemeral": self.config.ephemeral,
            "log": str(self.config.log_file or "stderr"),
        }

    async def _control(self, task_status: trio.TaskStatus[None]) -> None:
        config, keeping = self.config, self.keeping
        if keeping.listener is None:
            door = control.open_door(config.mountpoint, self._about())
            keeping.hold_listener(*door)
        else:
            inode = keeping.held["socket_inode"]
            door = control.take_door(config.mountpoint, self._about(), keeping.listener, inode)
        self._door = door
        await control.serve(door, config.mountpoint, self._handlers(), self.ending.drained, task_status)
        self.answered.set()

    def _say_anew(self) -> None:
        """The keeper is gone: this process is the mount's from now on."""
        if self._door is not None:
            control.say_anew(self.config.mountpoint, self._about(), self._door)

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
            log.error("not in the bucket yet: %s (%s); %s", *self._item(inode), self._what_becomes_of_it())
        with trio.move_on_after(5):
            if self.core.blocks.disk is not None:
                await self.core.blocks.disk.settle()
            await self.answered.wait()
        return code

    def _what_becomes_of_it(self) -> str:
        return "it is lost with --ephemeral" if self.config.ephemeral else f"it stays in {self.journal.directory}"

    # -- what the control socket answers

    def _handlers(self) -> dict[str, Callable[[dict[str, Any], Callable[[dict[str, Any]], Awaitable[None]]], Any]]:
        handlers = {"status": self._on_status, "flush": self._on_flush, "umount": self._on_umount}
        return handlers | ({"restart": self.replacing.on_restart} if self.replacing is not None else {})

    async def _on_status(self, request: dict[str, Any], progress: object) -> dict[str, Any]:
        return self.status()

    async def _on_flush(
        self, request: dict[str, Any], progress: Callable[[dict[str, Any]], Awaitable[None]]
    ) -> dict[str, Any]:
        """Waits until all that is dirty now is in the bucket; `failed` lists what could not be brought there."""
        refused: OSError | None = None
        if self.ending.is_mounted():
            try:
                await trio.to_thread.run_sync(kernel.write_back, self.config.mountpoint)
            except OSError as error:
                refused = error  # of one file: the others are brought to the bucket all the same
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report, progress)
            failed = await self.core.syncer.arrivals.drain(give_up=True)
            nursery.cancel_scope.cancel()
        if refused is not None and not failed:
            raise UserError(
                f"something that programs wrote to {self.config.mountpoint} could not be taken ({refused.strerror}): "
                "they got or get an error from close or fsync; see the log, and write it again"
            )
        return {"failed": [self._entry(inode) for inode in failed]}

    async def _on_umount(
        self, request: dict[str, Any], progress: Callable[[dict[str, Any]], Awaitable[None]]
    ) -> dict[str, Any]:
        """Unmounts, refusing while files are open, then waits for the drain; `pending` lists what is left."""
        timeout_s = request.get("drain_timeout_s")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report, progress)
            await self.ending.unmount(None if timeout_s is None else float(timeout_s))
            nursery.cancel_scope.cancel()
        return {"pending": [self._entry(inode) for inode in list(self.core.changes.dirty.values())[:STATUS_ITEMS]]}

    async def _report(self, progress: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        while True:
            await progress(self._pending())
            await trio.sleep(0.25)

    # -- status

    def _pending(self) -> dict[str, Any]:
        return {"files": len(self.core.changes.dirty), "bytes": self.core.staging.staged_bytes}

    def _item(self, inode: Inode) -> tuple[str, str]:
        name = (
            self.core.inodes.key(inode) if inode.linked else (inode.remote.key if inode.remote else str(inode.number))
        )
        return name, inode.error or "waiting"

    def _entry(self, inode: Inode) -> dict[str, Any]:
        name, reason = self._item(inode)
        state = "open" if inode.writers else "uploading" if inode.number in self.core.changes.in_flight else "waiting"
        return {
            "name": name,
            "bytes": inode.data.staged_bytes if inode.data is not None else 0,
            "state": state if inode.linked else "deleting",
            "error": inode.error and reason,
        }

    def status(self) -> dict[str, Any]:
        """What `s3fuse status --json` shows of this mount."""
        core = self.core
        caps = self.capabilities
        return {
            **self._about(),
            "state": "unmounting" if self.ending.unmounted.is_set() else "mounted",
            "started_at": math.floor(self.started_at),
            "capabilities": {
                "server": caps.server,
                "list_metadata": caps.list_metadata,
                "conditional_put": caps.conditional_put,
                "conditional_multipart": caps.conditional_multipart,
                "snowball": caps.snowball,
                "notifications": caps.notifications,
                "conflict_check": "atomic" if caps.conditional_put else "best effort (HEAD before each upload)",
            },
            "pending": {
                **self._pending(),
                "items": [self._entry(inode) for inode in list(core.changes.dirty.values())[:STATUS_ITEMS]],
                "recovered_at_start": self.recovered,
            },
            "waiting_calls": waits.waiting(),
            "server": self.store.health.summary(),
            "last_error": core.syncer.last_error,
            "conflicts": list(core.syncer.conflicts.resolved),
            "hidden_keys": sum(core.directories.hidden.values()),
            "cache": {
                "directory": str(self.journal.directory),
                "ephemeral": self.config.ephemeral,
                "lost": lost_folders(self.journal.directory),
                "memory_bytes": core.blocks.used_bytes,
                "memory_limit_bytes": core.blocks.limit_bytes,
                "block_hits": core.blocks.hits,
                "block_misses": core.blocks.misses,
                **disk_status(core.blocks.disk),
                "staged_bytes": core.staging.staged_bytes,
                "dirty_limit_bytes": self.config.dirty_size_bytes,
                "waiting_writers": core.budget.waiting,
                "parked_bytes": core.syncer.parking.parked_bytes,
                "inodes": len(core.inodes.table),
            },
            "requests": dict(self.store.requests),
            "process": self._process(),
        }

    def _process(self) -> dict[str, Any]:
        """How often another process has gone on with the mount, and what would become of it after this one's death."""
        keeping, known = self.keeping, self.core.known
        why = "" if self.replacing is None else self.replacing.why_not()
        if not why and not self._can_resend:
            why = "this kernel (older than 6.9) does not send its requests again; s3fuse restart works"
        return {
            "restarts": keeping.restarts,
            "deaths": keeping.deaths,
            "last_death": keeping.reason,
            "last_pause_s": self.pause_s,
            "last_refusal": "" if self.replacing is None else self.replacing.refused,
            "session_bytes": known.used_bytes,
            "weaker": why and f"a process that dies takes the mount with it: {why}",
        }
