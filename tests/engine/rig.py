"""A mount without a kernel: the real parts of `s3fuse.mount` over a store in memory, driven as the kernel would.

`Rig.crash` ends everything but the cache directory and the bucket: the store's line is cut first, so that nothing
that still runs can reach the bucket any more. Nothing is sent by the passing of time here (see `conftest`): tests say
when with `drain` or `queue`.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import pytest
import trio

from s3fuse.config import MountConfig
from s3fuse.errors import Unavailable
from s3fuse.mount import Mount
from s3fuse.session.state import load
from s3fuse.starting import Session
from s3fuse.store.base import Bytes, ObjectInfo
from s3fuse.store.faulty import FaultyStore
from s3fuse.store.memory import MemoryStore
from s3fuse.vfs.attributes import AttributeOperations, Wanted
from s3fuse.vfs.files import Files
from s3fuse.vfs.names import Names
from s3fuse.writing.ephemeral import MemoryJournal
from s3fuse.writing.journal import Journal
from s3fuse.writing.plan import Limits

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from s3fuse.namespace.inodes import Inode
    from s3fuse.store.s3 import S3Store
    from s3fuse.vfs.core import Core

T = TypeVar("T")

MIB = 1 << 20
#: Small enough that files of a few KiB go in parts; `conftest.small_parts` makes the store take them.
SMALL_LIMITS = Limits(
    single_put_bytes=16 << 10,
    part_bytes=8 << 10,
    min_copy_bytes=4 << 10,
    copy_part_bytes=16 << 10,
    min_part_bytes=4 << 10,
)


class Clock:
    """Stands in for the module `time` where freshness is decided; `advance` makes what is known old."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def advance(self, seconds: float) -> None:
        self.offset_s += seconds

    def monotonic(self) -> float:
        return time.monotonic() + self.offset_s

    def time(self) -> float:
        return time.time()

    def time_ns(self) -> int:
        return time.time_ns()


class Line(FaultyStore):
    """The way of one mount to the bucket: faulty on demand, and it can be cut."""

    def __init__(self, inner: MemoryStore, *, seed: int | None = None, rate: float = 0.2) -> None:
        super().__init__(inner, seed=seed, rate=rate)
        self.cut = False
        self.calls_left: int | None = None  # then it is cut

    async def _faulty(self, operation: str, call: Callable[[], Awaitable[T]], key: str) -> T:
        if self.calls_left is not None:
            self.calls_left -= 1
            self.cut = self.cut or self.calls_left < 0
        if self.cut:
            await trio.lowlevel.checkpoint()
            raise Unavailable(f"{operation} {key}: the line is cut", key)
        return await super()._faulty(operation, call, key)


@dataclass
class Rig:
    """One mount. Paths are relative to its root, "" is the root."""

    store: MemoryStore
    cache: Path
    parent: trio.Nursery
    ttl_s: float = 1000.0
    prefix: str = ""
    fsync_to: str = "upload"
    dirty_size_bytes: int = 1 << 30
    memory_bytes: int = 16 << 20
    budget_bytes: int | None = None  # a dirty budget smaller than the option allows
    limits: Limits = field(default_factory=Limits)
    seed: int | None = None
    paused: bool = False  # the syncer does not run
    ephemeral: bool = False
    kept: bool = False  # the session is recorded, and a restart goes on with it

    async def start(self) -> Rig:
        self.line = Line(self.store, seed=self.seed)
        self.line.quiet = True
        self._ended = trio.Event()
        await self.parent.start(self._serve)
        return self

    async def _serve(self, task_status: trio.TaskStatus[None]) -> None:
        config = MountConfig(
            mountpoint=Path("/nowhere"),
            bucket="bucket",
            prefix=self.prefix,
            cache_dir=None if self.ephemeral else self.cache,
            ephemeral=self.ephemeral,
            attr_ttl_s=self.ttl_s,
            fsync="local" if self.fsync_to == "local" else "upload",
            dirty_size_bytes=self.dirty_size_bytes,
            memory_bytes=self.memory_bytes,
            cache_size_bytes=0,
        )
        name = f"memory/bucket/{self.prefix}"
        journal = MemoryJournal(name) if self.ephemeral else Journal(self.cache, name)
        try:
            async with trio.open_nursery() as nursery:
                store = cast("S3Store", self.line)
                session = self._session(journal)
                self.mount = Mount(config, "memory", store, self.store.capabilities, journal, nursery, session=session)
                self.core: Core = self.mount.core
                self.core.syncer.limits = self.core.syncer.parking.limits = self.limits
                self.core.syncer.copies.limits = self.limits
                if self.budget_bytes is not None:
                    self.core.budget.limit_bytes = self.budget_bytes
                self.names = Names(self.core)
                self.files = Files(self.core)
                self.attributes = AttributeOperations(self.core, self.files)
                if not self.paused:
                    nursery.start_soon(self.core.syncer.run)
                nursery.start_soon(self.core.syncer.stale.run, lambda directory, name: lambda: None)
                self._scope = nursery.cancel_scope
                task_status.started()
                await trio.sleep_forever()
        finally:
            journal.close()
            self._ended.set()

    def _session(self, journal: Journal) -> Session:
        path = self.cache.with_suffix(".session")
        if not self.kept:
            return Session()
        if not path.exists():
            return Session(path=path)
        return Session(path=path, earlier=load(path, journal.step()))

    async def crash(self) -> None:
        """Ends it as SIGKILL would."""
        if self._ended.is_set():
            return
        self.line.cut = True
        self._scope.cancel()
        with trio.CancelScope(shield=True):
            await self._ended.wait()
        for inode in self.core.inodes.table.values():
            if inode.data is not None:
                inode.data.close()
        self.core.staging.close()
        self.core.known.leave()

    async def restart(self, cache: Path | None = None) -> Rig:
        """Crashes and mounts again, on another cache directory if one is given."""
        await self.crash()
        self.cache = cache or self.cache
        return await self.start()

    # -- state

    @property
    def journal(self) -> Journal:
        return self.core.changes.journal

    def staged(self) -> set[str]:
        return set(os.listdir(self.core.staging.directory))

    def dirty(self) -> list[Inode]:
        return list(self.core.changes.dirty.values())

    async def drain(self, rounds: int = 1) -> list[Inode]:
        """Sends everything; what failed is tried again at once, `rounds` times in all. Gives what still fails."""
        failed: list[Inode] = []
        for _ in range(rounds):
            with trio.fail_after(5):
                failed = await self.core.syncer.arrivals.drain(give_up=True)
            if not failed and not self.core.changes.dirty:
                break
        return failed

    async def drained(self) -> None:
        """Returns when nothing is dirty, orphans included; fails if that needs more than a few rounds."""
        failed = await self.drain(rounds=12)
        assert not failed, [(inode, inode.error) for inode in failed]
        assert not self.dirty()

    def check_clean(self) -> None:
        """Nothing is left over once everything is in the bucket and closed."""
        core = self.core
        assert self.journal.nodes() == []
        assert self.journal.layers() == {}
        assert self.staged() == {"slab"}
        assert core.staging.staged_bytes == 0
        assert core.staging.slab.used == 0
        assert core.staging.ledger.held_bytes == core.staging.ledger.idle_bytes
        assert not core.staging.surplus
        assert core.inodes.displaced == {}
        assert not +core.inodes.displaced._below
        assert not core.changes.in_flight
        assert not core.syncer._busy
        assert not core.changes.retries
        assert not core.syncer.parking.wanted
        assert not core.inodes.claimed
        assert not any(inode.dirty or inode.opens for inode in core.inodes.table.values())

    # -- what programs do

    async def walk(self, path: str) -> Inode:
        """The inode; each step is a lookup that the kernel counts. Raises ENOENT and ENOTDIR as a path walk does."""
        inode = self.core.inodes.root
        for name in filter(None, path.split("/")):
            if not inode.is_directory:
                raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            child = await self.names.lookup(inode, name.encode())
            if child is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            child.lookups += 1
            inode = child
        return inode

    async def exists(self, path: str) -> bool:
        try:
            await self.walk(path)
        except FileNotFoundError:
            return False
        return True

    async def _at(self, path: str) -> tuple[Inode, bytes]:
        above, _, name = path.rpartition("/")
        parent = await self.walk(above)
        if not parent.is_directory:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return parent, name.encode()

    def forget(self) -> None:
        """The kernel drops every dentry that nobody has open, deepest first."""
        for inode in reversed(list(self.core.inodes.walk(self.core.inodes.root))):
            if not inode.opens:
                self.core.inodes.forget(inode.number, inode.lookups)

    async def create(self, path: str, mode: int = 0o644) -> int:
        """A new file, open for writing."""
        parent, name = await self._at(path)
        inode = await self.names.create(parent, name, mode, 7, 8)
        inode.lookups += 1
        return self.files.open_known(inode, writes=True)

    async def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        return await self.files.open(await self.walk(path), flags)

    def close(self, handle: int) -> None:
        self.files.release(handle)

    async def put(self, path: str, data: bytes = b"") -> Inode:
        """A new file with this content, closed."""
        handle = await self.create(path)
        if data:
            await self.files.write(handle, 0, data)
        self.close(handle)
        return await self.walk(path)

    async def write(self, path: str, data: bytes, offset: int = 0, flags: int = 0) -> None:
        """Writes into a file that is there."""
        handle = await self.open(path, os.O_RDWR | flags)
        try:
            await self.files.write(handle, offset, data)
        finally:
            self.close(handle)

    async def pread(self, handle: int, offset: int = 0, size: int = 1 << 30) -> bytes:
        """Reads as far as there is something, in requests of at most 1 MiB."""
        parts = []
        while size:
            part = bytes(await self.files.read(handle, offset, min(size, MIB)))
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)

    async def cat(self, path: str) -> bytes:
        handle = await self.open(path)
        try:
            return await self.pread(handle)
        finally:
            self.close(handle)

    async def ls(self, path: str = "") -> list[str]:
        return [child.name for child in await self.names.entries(await self.walk(path))]

    async def rename(self, old: str, new: str, flags: int = 0) -> None:
        parent, name = await self._at(old)
        new_parent, new_name = await self._at(new)
        await self.names.rename(parent, name, new_parent, new_name, flags)

    async def unlink(self, path: str) -> None:
        await self.names.unlink(*await self._at(path))

    async def mkdir(self, path: str, mode: int = 0o755) -> Inode:
        inode = await self.names.mkdir(*await self._at(path), mode, 7, 8)
        inode.lookups += 1
        return inode

    async def rmdir(self, path: str) -> None:
        await self.names.rmdir(*await self._at(path))

    async def symlink(self, path: str, target: bytes) -> Inode:
        inode = await self.names.symlink(*await self._at(path), target, 7, 8)
        inode.lookups += 1
        return inode

    async def mkfifo(self, path: str) -> Inode:
        inode = await self.names.mknod(*await self._at(path), stat.S_IFIFO | 0o600, 0, 7, 8)
        inode.lookups += 1
        return inode

    async def chmod(self, path: str, mode: int) -> None:
        await self.attributes.setattr(await self.walk(path), Wanted(mode=mode))

    async def utimens(self, path: str, mtime_ns: int) -> None:
        await self.attributes.setattr(await self.walk(path), Wanted(mtime_ns=mtime_ns, atime_ns=mtime_ns))

    async def truncate(self, path: str, size: int) -> None:
        await self.attributes.setattr(await self.walk(path), Wanted(size=size))

    async def setxattr(self, path: str, name: bytes, value: bytes) -> None:
        await self.attributes.setxattr(await self.walk(path), name, value)

    async def fsync(self, path: str) -> None:
        await self.files.sync(await self.walk(path))


class Bench:
    """A bucket and the mounts on it."""

    def __init__(self, directory: Path, nursery: trio.Nursery, store: MemoryStore | None = None) -> None:
        self.directory = directory
        self.nursery = nursery
        self.store = store or MemoryStore()
        self.limits = Limits()
        self.rigs: list[Rig] = []

    async def rig(self, cache: str = "cache", **options: object) -> Rig:
        """A mount on the cache directory of that name."""
        options.setdefault("limits", self.limits)
        rig = Rig(self.store, self.directory / cache, self.nursery, **options)  # type: ignore[arg-type]
        self.rigs.append(rig)
        return await rig.start()

    async def close(self) -> None:
        for rig in self.rigs:
            await rig.crash()

    # -- the bucket, past every mount

    async def upload(self, key: str, data: bytes = b"", **metadata: str) -> str:
        """Somebody else puts an object; not counted."""
        before = self.store.requests.copy()
        etag = await self.store.put(key, Bytes(data), metadata=metadata, headers={"content-type": "text/x-theirs"})
        self._recount(before)
        return etag

    async def remove(self, *keys: str) -> None:
        """Somebody else deletes objects; not counted."""
        before = self.store.requests.copy()
        for key in keys:
            await self.store.delete(key)
        self._recount(before)

    async def info(self, key: str) -> ObjectInfo:
        before = self.store.requests.copy()
        info = await self.store.head(key)
        self._recount(before)
        return info

    def _recount(self, before: Counter[str]) -> None:
        self.store.requests.clear()
        self.store.requests.update(before)

    def listed(self) -> list[str]:
        return sorted(self.store._objects)

    def data(self, key: str) -> bytes:
        return self.store._objects[key].data

    def contents(self) -> dict[str, bytes]:
        """Every key with its bytes."""
        return {key: found.data for key, found in sorted(self.store._objects.items())}

    def counted(self) -> dict[str, int]:
        """The requests since the last call."""
        counts = dict(self.store.requests)
        self.store.requests.clear()
        return counts


@contextmanager
def fails(number: int) -> Iterator[None]:
    """The block must raise OSError with this errno."""
    with pytest.raises(OSError, match="Errno") as caught:
        yield
    assert caught.value.errno == number


async def until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Lets others run until something is true."""
    with trio.fail_after(timeout_s):
        while not true():
            await trio.lowlevel.checkpoint()


async def gather(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T | BaseException]:
    """What each call gives or raises; all run at once."""
    results: list[T | BaseException] = [RuntimeError("did not end")] * len(calls)

    async def run(index: int) -> None:
        try:
            results[index] = await calls[index]()
        except Exception as error:
            results[index] = error

    async with trio.open_nursery() as nursery:
        for index in range(len(calls)):
            nursery.start_soon(run, index)
    return results
