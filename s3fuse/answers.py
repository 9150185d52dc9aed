"""What a mount answers at its control socket: `status`, `flush` and `umount`; `control` is the socket itself.

`restart` is answered by `replacing`.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from s3fuse import control, kernel, waits
from s3fuse.cachedir import disk_status
from s3fuse.errors import UserError
from s3fuse.metrics.tables import tables
from s3fuse.namespace.recovery import lost_folders
from s3fuse.writing.copying import conflict_check, delete_check

if TYPE_CHECKING:
    from pathlib import Path

    from s3fuse.coherence.renewal import Renewal
    from s3fuse.config import MountConfig
    from s3fuse.control import Handler, Progress
    from s3fuse.ending import Ending
    from s3fuse.keeping import Keeping
    from s3fuse.namespace.inodes import Inode
    from s3fuse.replacing import Replacing
    from s3fuse.store.base import Capabilities
    from s3fuse.store.s3 import S3Store
    from s3fuse.vfs.core import Core

STATUS_ITEMS = 100


@dataclass
class Answers:
    """The control socket of one mount, and the answers there. `mount` says what changes while it is served."""

    config: MountConfig
    endpoint: str
    store: S3Store
    capabilities: Capabilities
    cache_directory: Path
    keeping: Keeping
    core: Core
    ending: Ending
    started_at: float  # as `time.time()`
    recovered: int  # how many files the journal had at the start
    lease: Renewal | None = None
    replacing: Replacing | None = None  # None where only what was left is uploaded
    pause_s: float | None = None  # how long nobody has served the mount before this process did
    can_resend: bool = False  # whether the kernel sends its requests again after this process's death
    ended: trio.Event = field(default_factory=trio.Event)  # those who asked have their answers
    _door: control.Door | None = None

    def _about(self) -> dict[str, Any]:
        return {
            "mountpoint": str(self.config.mountpoint),
            "pid": self.keeping.pid,
            "worker_pid": os.getpid(),
            "bucket": self.config.bucket,
            "prefix": self.config.prefix,
            "endpoint": self.endpoint,
            "cache_directory": str(self.cache_directory),
            "ephemeral": self.config.ephemeral,
            "log": str(self.config.log_file or "stderr"),
        }

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Answers until the mount has ended and is drained. Started (in trio's sense) once the socket is there.

        Raises UserError where the socket cannot be made.
        """
        config, keeping = self.config, self.keeping
        if keeping.listener is None:
            door = control.open_door(config.mountpoint, self._about())
            keeping.hold_listener(*door)
        else:
            inode = keeping.held["socket_inode"]
            door = control.take_door(config.mountpoint, self._about(), keeping.listener, inode)
        self._door = door
        await control.serve(door, config.mountpoint, self._handlers(), self.ending.drained, task_status)
        self.ended.set()

    def say_anew(self) -> None:
        """The keeper is gone: this process is the mount's from now on."""
        if self._door is not None:
            control.say_anew(self.config.mountpoint, self._about(), self._door)

    # -- the verbs

    def _handlers(self) -> dict[str, Handler]:
        handlers: dict[str, Handler] = {"status": self._on_status, "flush": self._on_flush, "umount": self._on_umount}
        return handlers | ({"restart": self.replacing.on_restart} if self.replacing is not None else {})

    async def _on_status(self, request: dict[str, Any], progress: object) -> dict[str, Any]:
        return self.status()

    async def _on_flush(self, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
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

    async def _on_umount(self, request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Unmounts, refusing while files are open, then waits for the drain; `pending` lists what is left."""
        timeout_s = request.get("drain_timeout_s")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report, progress)
            await self.ending.unmount(None if timeout_s is None else float(timeout_s))
            nursery.cancel_scope.cancel()
        return {"pending": [self._entry(inode) for inode in list(self.core.changes.dirty.values())[:STATUS_ITEMS]]}

    async def _report(self, progress: Progress) -> None:
        while True:
            await progress(self._pending())
            await trio.sleep(0.25)

    # -- status

    def _pending(self) -> dict[str, Any]:
        to_go_bytes = self.core.staging.staged_bytes - self.core.syncer.uploads.sent_bytes
        return {"files": len(self.core.changes.dirty), "bytes": max(0, to_go_bytes)}

    def item(self, inode: Inode) -> tuple[str, str]:
        """The key of a changed file, or the number of its inode where it has none; and why it is not uploaded yet."""
        name = (
            self.core.inodes.key(inode) if inode.linked else (inode.remote.key if inode.remote else str(inode.number))
        )
        return name, self._why_not(inode) or "waiting"

    @staticmethod
    def _why_not(inode: Inode) -> str:
        """Why a change cannot be uploaded, as far as is known; "" where nothing is wrong with it."""
        return inode.error or (inode.data.poisoned_text() if inode.data is not None else "")

    def _entry(self, inode: Inode) -> dict[str, Any]:
        name, _ = self.item(inode)
        state = "open" if inode.writers else "uploading" if inode.number in self.core.changes.in_flight else "waiting"
        return {
            "name": name,
            "bytes": inode.data.staged_bytes if inode.data is not None else 0,
            "state": state if inode.linked else "deleting",
            "error": self._why_not(inode) or None,
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
                "conditional_delete": caps.conditional_delete,
                "atomic_put": caps.atomic_put,
                "atomic_multipart": caps.atomic_multipart,
                "atomic_copy": caps.atomic_copy,
                "snowball": caps.snowball,
                "notifications": caps.notifications,
                "conflict_check": conflict_check(caps, core.syncer.limits),
                "delete_check": delete_check(caps),
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
            "lease": None if self.lease is None else {"key": self.lease.key, "problem": self.lease.problem},
            "unreadable_entries": sum(core.directories.unreadable.values()),
            "cache": {
                "directory": str(self.cache_directory),
                "ephemeral": self.config.ephemeral,
                "lost": lost_folders(self.cache_directory),
                "memory_bytes": core.blocks.used_bytes,
                "memory_limit_bytes": core.blocks.limit_bytes,
                "block_hits": core.blocks.hits,
                "block_misses": core.blocks.misses,
                **disk_status(core.blocks.disk),
                "staged_bytes": core.staging.staged_bytes,
                "held_bytes": core.staging.ledger.held_bytes,
                "dirty_limit_bytes": self.config.dirty_size_bytes,
                "waiting_writers": core.budget.waiting,
                "parked_bytes": core.syncer.parking.parked_bytes,
                "inodes": len(core.inodes.table),
            },
            "tables": tables(core),
            "deletes": asdict(core.syncer.deletes.counts),
            "requests": dict(self.store.requests),
            "process": self._process(),
        }

    def _process(self) -> dict[str, Any]:
        """How often another process has gone on with the mount, and what would become of it after this one's death."""
        keeping, known = self.keeping, self.core.known
        why = "" if self.replacing is None else self.replacing.why_not()
        if self.replacing is not None and not why and not self.can_resend:
            why = "this kernel (older than 6.9) does not send its requests again; s3fuse restart works"
        return {
            "restarts": keeping.restarts,
            "deaths": keeping.deaths,
            "last_death": keeping.reason,
            "last_pause_s": self.pause_s,
            "given_up": keeping.given_up,
            "last_refusal": "" if self.replacing is None else self.replacing.refused,
            "session_bytes": known.used_bytes,
            "weaker": why and f"a process that dies takes the mount with it: {why}",
        }
