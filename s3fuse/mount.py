"""Composes one mount: store, journal, kernel connection, FUSE loop, control socket; and ends it in the right order.

Start: everything that can fail is tried before the kernel mount is made, so that a failure leaves nothing behind.
End: the kernel is detached first (it writes its dirty pages back while we still answer), then what is dirty is
drained, then the connections close.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

from s3fuse import attrs, control, credentials, kernel, waits
from s3fuse.cachedir import check_place, disk_status, disk_tier, reserve_bytes
from s3fuse.ending import Ending
from s3fuse.errors import AccessDenied, ExitCode, NoSuchBucket, StoreError, Unavailable, UserError
from s3fuse.fuse.adapter import Adapter
from s3fuse.fuse.signals import thread_is_signalled
from s3fuse.fuse.wait import quick_device
from s3fuse.namespace.changes import Changes
from s3fuse.namespace.directories import Directories
from s3fuse.namespace.inodes import Inodes
from s3fuse.namespace.recovery import lost_folders, recover
from s3fuse.namespace.syncer import Syncer
from s3fuse.namespace.upkeep import keep_up
from s3fuse.reading.blocks import BlockCache
from s3fuse.store.s3 import S3Store
from s3fuse.vfs.budget import Budget
from s3fuse.vfs.carrying import carry_over
from s3fuse.vfs.core import Core
from s3fuse.writing.ephemeral import MemoryJournal, MemoryStaging
from s3fuse.writing.journal import Journal
from s3fuse.writing.staging import Staging

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from s3fuse.config import MountConfig
    from s3fuse.namespace.inodes import Inode
    from s3fuse.store.base import Capabilities

log = logging.getLogger(__name__)

#: A mount command answers within 10 s, also when the server does not.
START_S = 8.0
READ_AHEAD_KIB = 1024
STATUS_ITEMS = 100


def serve(config: MountConfig, ready: Callable[[], None]) -> ExitCode:
    """Mounts, calls `ready`, serves until unmounted or told to stop, drains. Raises UserError before `ready` only."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # large dirty files and connections have one each
    return trio.run(_serve, config, ready, restrict_keyboard_interrupt_to_checkpoints=True)


async def _serve(config: MountConfig, ready: Callable[[], None]) -> ExitCode:
    where = credentials.resolve(config)
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
        capabilities = await _check_bucket(config, store, where.endpoint)
        name = f"{where.endpoint}/{config.bucket}/{config.prefix}"
        journal = MemoryJournal(name) if config.ephemeral else _open_journal(config, where.endpoint, name)
        try:
            async with trio.open_nursery() as nursery:
                mount = Mount(config, where.endpoint, store, capabilities, journal, nursery)
                code = await mount.run(ready)
                nursery.cancel_scope.cancel()
            return code
        finally:
            journal.close()
    finally:
        with trio.move_on_after(5, shield=True):
            await store.aclose()


def _open_journal(config: MountConfig, endpoint: str, name: str) -> Journal:
    directory = config.cache_path(endpoint)
    check_place(directory, config.mountpoint)
    return Journal(directory, name)


async def _check_bucket(config: MountConfig, store: S3Store, endpoint: str) -> Capabilities:
    """Finds out in time whether the bucket can be used. Raises UserError that names what is wrong."""
    try:
        with trio.fail_after(START_S):
            try:
                await store.check()
            except NoSuchBucket:
                if not config.create_bucket:
                    raise
                await store.create_bucket()
            return await store.probe()
    except trio.TooSlowError:
        raise UserError(
            f"{endpoint} does not answer within {START_S:.0f} s; check --endpoint and that the server is running",
            ExitCode.REFUSED,
        ) from None
    except NoSuchBucket:
        raise UserError(
            f"bucket {config.bucket!r} does not exist at {endpoint}; check its name or add --create-bucket",
            ExitCode.REFUSED,
        ) from None
    except AccessDenied as error:
        raise UserError(
            f"{endpoint} refuses these credentials; check the keys and what they may do: {error}",
            ExitCode.REFUSED,
        ) from None
    except Unavailable as error:
        raise UserError(
            f"{endpoint} cannot be reached; check --endpoint (http or https, host, port) and that the server runs "
            f"({error})",
            ExitCode.REFUSED,
        ) from None
    except StoreError as error:
        raise UserError(
            f"bucket {config.bucket!r} at {endpoint} cannot be used; check that --endpoint is an S3 server: {error}",
            ExitCode.REFUSED,
        ) from None


@dataclass
class Mount:
    """One mount from its first to its last request."""

    config: MountConfig
    endpoint: str
    store: S3Store
    capabilities: Capabilities
    journal: Journal
    nursery: trio.Nursery
    started_at: float = field(default_factory=time.time)
    answered: trio.Event = field(default_factory=trio.Event)
    recovered: int = 0

    def __post_init__(self) -> None:
        config = self.config
        defaults = attrs.Defaults(config.uid, config.gid, config.file_mode, config.dir_mode)
        root = attrs.decode(None, is_directory=True, modified_ns=time.time_ns(), defaults=defaults)
        inodes = Inodes(config.prefix, root)
        inodes.root.attributes_known = False
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
        self.core = Core(config, inodes, directories, changes, staging, syncer, blocks, budget)
        self.ending = Ending(self.core, config.mountpoint, config.drain_timeout_s)
        self.recovered = recover(inodes, changes, staging, defaults)
        syncer.parking.restore(staging)

    async def run(self, ready: Callable[[], None]) -> ExitCode:
        config = self.config
        device = kernel.mount(
            config.mountpoint, source=self._source(), allow_other=config.allow_other, read_only=config.read_only
        )
        entry = kernel.mount_entry(config.mountpoint)
        self.ending.device_number = entry.device if entry is not None else ""
        try:
            pyfuse3.init(Adapter(self.core), f"/dev/fd/{device}", set(pyfuse3.default_options))
            self.nursery.start_soon(self.core.syncer.run)
            self.nursery.start_soon(self.store.health.watch, self.store.ping)
            if self.core.blocks.disk is not None:
                self.nursery.start_soon(self.core.blocks.disk.run)
            self.nursery.start_soon(keep_up, self.core.changes, self.core.staging, self.core.syncer.uploads)
            self.nursery.start_soon(waits.watch, thread_is_signalled)
            self.nursery.start_soon(self.ending.signals)
            self.nursery.start_soon(self.ending.stop_when_asked)
            await self.nursery.start(self._control)
            self.nursery.start_soon(self._announce, ready)
            with quick_device():
                await pyfuse3.main()
        finally:
            kernel.detach(config.mountpoint, self.ending.device_number)
            self.ending.unmounted.set()
            pyfuse3.close(unmount=False)
        return await self._end()

    def _source(self) -> str:
        return "s3fuse#" + "/".join(filter(None, (self.config.bucket, self.config.prefix.rstrip("/"))))

    def _about(self) -> dict[str, Any]:
        return {
            "mountpoint": str(self.config.mountpoint),
            "pid": os.getpid(),
            "bucket": self.config.bucket,
            "prefix": self.config.prefix,
            "endpoint": self.endpoint,
            "cache_directory": str(self.journal.directory),
            "ephemeral": self.config.ephemeral,
        }

    async def _control(self, task_status: trio.TaskStatus[None]) -> None:
        handlers = self._handlers()
        await control.serve(
            self.config.mountpoint, self._about(), handlers, self.ending.drained, task_status=task_status
        )
        self.answered.set()

    async def _announce(self, ready: Callable[[], None]) -> None:
        """Says that the mount is up once the kernel has an answer from it."""
        await trio.to_thread.run_sync(os.stat, self.config.mountpoint)
        kernel.set_read_ahead(self.config.mountpoint, READ_AHEAD_KIB)  # the handshake would have put it back
        log.info("mounted %s on %s", self._source(), self.config.mountpoint)
        if self.config.ephemeral:
            log.info("kept in memory only: a crash loses what is not uploaded")
        ready()

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
        return {"status": self._on_status, "flush": self._on_flush, "umount": self._on_umount}

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
        }
