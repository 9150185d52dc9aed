"""The mount of one volume: started, adopted, watched, ended.

All of that is done by one task, `run`, in turns: it looks what is there, makes it what it has to be, and sleeps until
something happens. Requests only say what they want and wait for a turn; so no two of them can start a second daemon,
and a request that gives up undoes nothing. What is true of the mount is asked of the kernel and of the daemon's control
socket at each turn, since anybody may unmount or kill.

A mount ends by itself only when nobody holds it and nothing waits for upload, and then `linger_s` after its last use.
Docker's mount IDs are a hint (see `uses`). How it is begun is in `starts`, what ends the task's sleep in `wakeup`.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from s3fuse import control, kernel
from s3fuse.errors import UserError
from s3fuse.volume import daemon, process, starts
from s3fuse.volume.flushing import Flushing
from s3fuse.volume.uses import Uses
from s3fuse.volume.wakeup import Wakeup

if TYPE_CHECKING:
    from s3fuse.volume.definition import Definition, MountOptions
    from s3fuse.volume.inuse import Holders
    from s3fuse.volume.places import Places

log = logging.getLogger(__name__)

#: Docker gives a Mount 120 s.
MOUNT_S = 100.0
#: How long a look at a mount is good: that nobody asks about, and that somebody does.
TICK_S = 15.0
ASKED_TICK_S = 1.0
BUSY_TICK_S = 1.0
#: After a Mount the looks at who holds it begin with this pause; each is about as long as all before it.
FIRST_LOOK_S = 0.1


@dataclass
class _Waiter:
    """A Mount request that waits for a turn."""

    id: str
    done: trio.Event = field(default_factory=trio.Event)
    error: str | None = None


class VolumeMount:
    """The mount of one volume."""

    def __init__(self, definition: Definition, options: MountOptions, places: Places, holders: Holders) -> None:
        self.definition = definition
        self.mountpoint = places.mountpoint(definition.name)
        self.cache_directory = places.cache_directory(definition)
        self.places = places
        self.holders = holders
        #: "unmounted", "starting", "mounted", "ending"
        self.state = "unmounted"
        self.device = ""
        self.pid: int | None = None
        self.status: dict[str, Any] = {}
        self.last_error: str | None = None
        #: How many changes wait in the cache directory while nothing is mounted.
        self.left_files = 0
        #: Set once the mount of a removed volume is gone.
        self.retired = trio.Event()
        #: Set once it is known what waits in the cache directory from before.
        self.looked_at = trio.Event()
        self.uses = Uses()
        self._waiters: list[_Waiter] = []
        self._flushing = Flushing(definition.name, self.mountpoint, places.unmount_s, self._on_progress)
        #: The volume is to be mounted although nobody asked: its daemon died, or something waits in its cache.
        self._owed = False
        #: What waits in the cache directory is not known, as somebody else ended the mount or its daemon died.
        self._unsure = False
        self._looked_at = 0.0
        #: The device of the last mount: its daemon lives as long as a container has it, although it is unmounted here.
        self._before = ""
        self._retiring = False
        self._starts = starts.Starts(definition, options, places)
        self._wakeup = Wakeup()

    # -- what requests do

    def poke(self) -> None:
        """There is something to do: the next turn comes at once."""
        self._wakeup.poke()

    def refresh(self) -> None:
        """Somebody was told what is known, and may ask again."""
        if time.monotonic() - self._looked_at >= ASKED_TICK_S:
            self.poke()

    @property
    def pending_files(self) -> int:
        """How many changes wait for upload, as far as is known."""
        pending = self.status.get("pending") if self.state in ("mounted", "ending") else None
        return int(pending["files"]) if pending else self.left_files

    async def acquire(self, identity: str) -> None:
        """Returns once the volume is mounted and answers. Raises UserError with the reason in time for Docker."""
        if self.state == "mounted":
            await self._flushing.tell_of_loss()
        waiter = _Waiter(identity)
        self._waiters.append(waiter)
        self.poke()
        try:
            with trio.move_on_after(MOUNT_S):
                await waiter.done.wait()
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        if not waiter.done.is_set():
            raise UserError(
                f"volume {self.definition.name} is not mounted after {MOUNT_S:.0f} s, and still tries: "
                + (self._starts.words or self.last_error or f"see the log of its mount, {self.log_file}")
            )
        if waiter.error is not None:
            raise UserError(waiter.error)

    async def release(self, identity: str) -> None:
        """Takes a user's ID off. After the last one it returns when all is in the bucket, or after `unmount_s`."""
        use = self.uses.end(identity)
        if self.state == "mounted" and self.uses.is_last_gone and not await self._is_held() and not self._waiters:
            await self._flushing.flush(by_container=use is None or use.seen)
            self.uses.last_at = time.monotonic()
        self.poke()

    async def check_removable(self) -> None:
        """Raises UserError while a container holds the volume or something waits for upload."""
        name = self.definition.name
        await self.looked_at.wait()
        if self.state != "unmounted":
            if await self.holders.have(self.device):
                raise UserError(f"volume {name} is in use by a container")
            with trio.move_on_after(0.05):
                await trio.to_thread.run_sync(self._ask, abandon_on_cancel=True, limiter=daemon.WAITING)
        if self.state == "unmounted" and self._unsure:
            raise UserError(
                f"volume {name} is not removed: its mount ended by itself, and what waits for upload is not known yet; "
                "try again"
            )
        if count := self.pending_files:
            where = f"s3fuse status {self.mountpoint}" if self.state != "unmounted" else f"its log, {self.log_file}"
            raise UserError(
                f"volume {name} is not removed: {count} changes in it wait for upload"
                f"{self._reason()}; try again when they are in the bucket, see {where}"
            )

    def retire(self) -> None:
        """The volume is removed: its mount ends now. `retired` is set when that is done."""
        self._retiring = True
        self.poke()

    def owe(self, left_files: int) -> None:
        """What waits in the cache directory from before: if something does, it is mounted to upload that."""
        self.left_files = left_files
        self._owed = self._owed or left_files > 0
        self.looked_at.set()
        self.poke()

    @property
    def log_file(self) -> str:
        return str(control.socket_path(self.mountpoint).with_suffix(".log"))

    def is_there(self) -> bool:
        """Whether something of ours is mounted, dead or alive."""
        entry = kernel.mount_entry(self.mountpoint)
        return entry is not None and entry.fstype == kernel.FSTYPE

    # -- turns

    async def run(self) -> None:
        """Does what is to be done until cancelled, or until the removed volume is gone."""
        while True:
            self._wakeup.arm()
            waiters = list(self._waiters)
            try:
                await self._turn(waiters)
            except Exception as error:  # that of one volume must not end those of others
                log.exception("volume %s", self.definition.name)
                self.last_error = repr(error)
                self._resolve(waiters, f"volume {self.definition.name}: {error!r}; see the log of s3fuse plugin")
                await trio.sleep(starts.RETRY_S[0])
            if self._retiring and self.state == "unmounted":
                break
            pids = [int(pid) for pid in (self.pid, self.status.get("worker_pid")) if pid is not None]
            await self._wakeup.sleep(self._pause_s(), pids)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._starts.remove_mountpoint)
        self.retired.set()

    async def _turn(self, waiters: list[_Waiter]) -> None:
        await self._look()
        if self._retiring:
            self._resolve(waiters, f"volume {self.definition.name} is being removed")
            if self.state == "mounted":
                await self._end()
            return
        if self.state == "unmounted" and self._wanted(waiters):
            await self._start()
            if self.state != "mounted":
                self._resolve(waiters, f"volume {self.definition.name}: {self.last_error}")
        if self.state == "mounted":
            self._resolve(list(self._waiters), None)
            if await self._is_idle():
                await self._end()
        elif self._unsure:
            await self._see_what_is_left()

    def _resolve(self, waiters: list[_Waiter], error: str | None) -> None:
        for waiter in waiters:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                waiter.error = error
                waiter.done.set()
                if error is None:
                    self.uses.begin(waiter.id)

    def _wanted(self, waiters: list[_Waiter]) -> bool:
        return bool(waiters) or ((bool(self.uses) or self._owed) and time.monotonic() >= self._starts.retry_at)

    async def _look(self) -> None:
        """Finds out what is mounted, whoever mounted or unmounted it, and what its daemon says."""
        before = self.state
        await trio.to_thread.run_sync(self._look_at_mount, abandon_on_cancel=True, limiter=daemon.WAITING)
        self._looked_at = time.monotonic()
        if self.state == "mounted":
            if before == "unmounted":
                where = f"{self.definition.place} on {self.mountpoint}, pid {self.pid}"
                log.info("volume %s: %s", self.definition.name, where)
                if not self._waiters and not self.uses:
                    self.uses.adopt()
        elif before == "mounted":
            what = "its daemon is dead" if self._owed else "somebody unmounted it"
            log.warning("volume %s: %s", self.definition.name, what)
            self._unsure = not self.definition.ephemeral  # its daemon may still drain

    def _look_at_mount(self) -> None:
        entry = kernel.mount_entry(self.mountpoint)
        if entry is None or entry.fstype != kernel.FSTYPE:
            self._set_unmounted()
            return
        problem = self._ask()
        if problem is not None and not isinstance(problem, TimeoutError) and kernel.is_dead(self.mountpoint):
            self._set_unmounted()
            self._before = ""
            self._owed, self._unsure = True, not self.definition.ephemeral
            return
        self.state, self.device = "mounted", entry.device
        self.pid = self.status.get("pid") if problem is None else control.last_said(self.mountpoint).get("pid")
        self.last_error = f"its daemon does not answer: {problem}" if problem else self.status.get("last_error") or None

    def _ask(self) -> Exception | None:
        """Has the daemon say its status; gives why it did not."""
        try:
            self.status = daemon.status(self.mountpoint)
        except (OSError, ValueError, UserError) as error:
            return error
        return None

    def _set_unmounted(self) -> None:
        self.left_files = 0 if self.definition.ephemeral else self.pending_files
        self._before = self.device or self._before
        self.state, self.device, self.pid, self.status = "unmounted", "", None, {}

    async def _see_what_is_left(self) -> None:
        """What waits in the cache directory of a mount that ended by itself, and whose daemon may still drain."""
        draining = await trio.to_thread.run_sync(
            control.draining, self.cache_directory, abandon_on_cancel=True, limiter=daemon.WAITING
        )
        if draining is not None:
            self.left_files = int(draining["pending"]["files"])
            return
        found = await process.waiting_in([self.cache_directory])
        self.left_files = sum(int(one["waiting_files"]) for one in found.values())
        self._unsure = any(one["in_use"] for one in found.values())

    def _pause_s(self) -> float:
        """How long the next turn may wait if nothing happens."""
        now = time.monotonic()
        if self.state != "mounted":
            return max(0.05, self._starts.retry_at - now) if self.uses or self._owed else TICK_S
        if self.pending_files or self._retiring:
            return BUSY_TICK_S
        least_s = min(TICK_S, max(0.05, self.places.stale_s))
        if self.uses:
            # A container that nobody saw counts as not there yet, so even a short-lived one is to be seen.
            return min(least_s, max(FIRST_LOOK_S, self.uses.age_s()))
        lingers_s = self.uses.last_at + self.places.linger_s - now
        # After that something holds it whose end nobody will tell.
        return min(least_s, lingers_s if lingers_s > 0 else max(BUSY_TICK_S, self.places.linger_s))

    # -- starting

    async def _start(self) -> None:
        """Has it mounted, unless containers still have the mount before it. Where it fails, `last_error` says why."""
        if self._before and await self.holders.have(self._before):
            self.last_error = (
                f"somebody unmounted {self.mountpoint} while containers use it; they go on, and until they end it "
                "cannot be mounted again"
            )
            self._put_off()
            return
        self.state = "starting"
        try:
            await self._starts.start()
            self.last_error = None
        except UserError as error:
            self.last_error = str(error)
        finally:
            self.state = "unmounted"
        if self.last_error is None:
            self._owed = False
            await self._look()
            if self.state != "mounted":
                self.last_error = f"its mount ended at once; see {self.log_file}"
        if self.last_error is not None:
            self._put_off()
            return
        self._starts.succeeded()
        self._wakeup.expect_new_processes()
        self._unsure = False
        self.left_files = 0

    def _put_off(self) -> None:
        self._starts.put_off()
        log.error("volume %s cannot be mounted: %s", self.definition.name, self.last_error)

    # -- while it is mounted

    async def _is_idle(self) -> bool:
        """Whether the mount is to end now."""
        lingered = not self.uses and time.monotonic() - self.uses.last_at >= self.places.linger_s
        held = await self._is_held(age_s=0.0 if lingered else min(TICK_S - 1, self.uses.age_s() / 2))
        if held or self._waiters or self._flushing.under_way:
            return False
        if self.uses.forget_stale(self.places.stale_s):
            log.info("volume %s: nobody holds it, its last Unmount did not come", self.definition.name)
            lingered = not await self._is_held()
        return lingered and not self.uses and not self.pending_files and not self._waiters

    async def _is_held(self, *, age_s: float = 0.0) -> bool:
        """Whether a container holds the mount, as of at most `age_s` ago."""
        held = await self.holders.have(self.device, age_s=age_s)
        self.uses.note(held=held)
        return held

    def _on_progress(self, left: dict[str, Any]) -> None:
        if self.status.get("pending"):
            self.status["pending"].update(left)

    def _reason(self) -> str:
        server = self.status.get("server") or {}
        error = server.get("last_error") if server.get("needs") or server.get("state") != "up" else None
        error = error or self.last_error
        return f" ({error})" if error else ""

    # -- ending

    async def _end(self) -> None:
        """Unmounts. The daemon drains what was written since it was last asked; that it is over is seen by its end."""
        self.state = "ending"
        pid = self.pid
        try:
            await daemon.umount(self.mountpoint)
        except UserError as error:  # somebody on this host has a file open
            log.info("volume %s stays mounted: %s", self.definition.name, error)
            self.state = "mounted"
            self.uses.last_at = time.monotonic()
            return
        except (OSError, ValueError) as error:
            log.warning("volume %s: its daemon did not answer to umount: %s", self.definition.name, error)
        if pid is not None:
            await daemon.ended(pid)
        if not await trio.to_thread.run_sync(kernel.mount_entry, self.mountpoint):
            self._set_unmounted()
            self._unsure = self.left_files > 0
            log.info("volume %s is unmounted", self.definition.name)
