"""A process that is killed anywhere, and another one that goes on: the kernel sees what it would have seen without."""

from __future__ import annotations

import errno
import os
import random
import sqlite3
import stat
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyfuse3
import pytest
import trio

from s3fuse.fuse.adapter import Adapter
from s3fuse.fuse.resent import Resent
from s3fuse.namespace import known
from s3fuse.session import operations
from s3fuse.session.log import Log
from s3fuse.writing.journal import Journal
from tests.engine.rig import Bench, Rig, fails

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

ROOT = pyfuse3.ROOT_INODE
CONTEXT: Any = SimpleNamespace(pid=77, uid=7, gid=8, umask=0o22)


class Killed(BaseException):
    """Stands for SIGKILL."""


class Killer:
    """Ends the process before or after any record of session or journal."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left = -1  # records until the end; -1: none comes
        self.dead = False
        self.task: trio.lowlevel.Task | None = None  # whose records count
        append, execute = Log.append, Journal._execute
        self.nothing = nothing = sqlite3.connect(":memory:")

        def appended(log: Log, kind: int, content: bytes) -> None:
            if self.dead:
                return  # what runs while the exception passes would not have run
            self._count()
            append(log, kind, content)
            self._count()

        def executed(journal: Journal, statement: str, values: Any = ()) -> Any:
            if self.dead and trio.lowlevel.current_task() is not self.task:
                return nothing.execute("SELECT 1 WHERE 0")  # what runs on for a moment
            if self.dead:
                raise Killed
            self._count()
            result = execute(journal, statement, values)
            self._count()
            return result

        patch.setattr(Log, "append", appended)
        patch.setattr(Journal, "_execute", executed)

    def _count(self) -> None:
        if trio.lowlevel.current_task() is not self.task:
            return  # what is sent meanwhile
        if self.left == 0:
            self.left, self.dead = -1, True
            raise Killed
        self.left -= self.left > 0


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Killer]:
    killer = Killer(monkeypatch)
    yield killer
    killer.nothing.close()


@dataclass
class Kernel:
    """What the kernel remembers of a mount's answers; a request is sent again until it is answered."""

    rig: Rig
    killer: Killer
    adapter: Adapter = field(init=False)
    counts: dict[int, int] = field(default_factory=dict)
    kills: int = 0

    def __post_init__(self) -> None:
        self.adapter = Adapter(self.rig.core)

    async def restart(self, *resent: Resent) -> None:
        await self.rig.crash()
        self.killer.dead = False
        await self.rig.start()
        self.adapter = Adapter(self.rig.core)
        self.adapter.repeats.expect(resent)
        for number, count in self.counts.items():
            assert self.rig.core.inodes[number].lookups >= count
        self.kills += 1

    async def ask(self, resent: Resent | None, call: Callable[[Adapter], Awaitable[Any]], *, lost: bool = False) -> Any:
        """The answer to a request; `lost`: the process is killed before it could give the first one."""
        while True:
            try:
                answer = await call(self.adapter)
                if not lost:
                    return answer
                lost = False
            except Killed:
                pass
            await self.restart(*([resent] if resent else []))

    def known(self, entry: pyfuse3.EntryAttributes) -> int:
        self.counts[entry.st_ino] = self.counts.get(entry.st_ino, 0) + 1
        return entry.st_ino

    # -- requests

    async def create(self, parent: int, name: bytes, *, lost: bool = False) -> tuple[int, int]:
        again = Resent(operations.CREATE, parent, CONTEXT.pid, name)
        info, entry = await self.ask(
            again, lambda adapter: adapter.create(parent, name, 0o644, os.O_RDWR, CONTEXT), lost=lost
        )
        return info.fh, self.known(entry)

    async def mkdir(self, parent: int, name: bytes, *, lost: bool = False) -> int:
        again = Resent(operations.MKDIR, parent, CONTEXT.pid, name)
        return self.known(await self.ask(again, lambda adapter: adapter.mkdir(parent, name, 0o755, CONTEXT), lost=lost))

    async def unlink(self, parent: int, name: bytes, *, lost: bool = False) -> None:
        again = Resent(operations.UNLINK, parent, CONTEXT.pid, name)
        await self.ask(again, lambda adapter: adapter.unlink(parent, name, CONTEXT), lost=lost)

    async def rmdir(self, parent: int, name: bytes, *, lost: bool = False) -> None:
        again = Resent(operations.RMDIR, parent, CONTEXT.pid, name)
        await self.ask(again, lambda adapter: adapter.rmdir(parent, name, CONTEXT), lost=lost)

    async def rename(self, parent: int, name: bytes, to: int, new: bytes, *, lost: bool = False) -> None:
        again = Resent(operations.RENAME, parent, CONTEXT.pid, operations.renaming(name, to, new))
        await self.ask(again, lambda adapter: adapter.rename(parent, name, to, new, 0, CONTEXT), lost=lost)

    async def lookup(self, parent: int, name: bytes) -> int:
        """The inode, 0 for none."""
        entry = await self.ask(None, lambda adapter: adapter.lookup(parent, name, CONTEXT))
        return self.known(entry) if entry.st_ino else 0

    async def getattr(self, number: int) -> pyfuse3.EntryAttributes:
        return await self.ask(None, lambda adapter: adapter.getattr(number, CONTEXT))

    async def open(self, number: int, flags: int = os.O_RDWR, *, lost: bool = False) -> int:
        again = Resent(operations.OPEN, number, CONTEXT.pid, flags=flags)
        info = await self.ask(again, lambda adapter: adapter.open(number, flags, CONTEXT), lost=lost)
        return int(info.fh)

    async def write(self, handle: int, at: int, data: bytes, *, lost: bool = False) -> None:
        done = await self.ask(None, lambda adapter: adapter.write(handle, at, data), lost=lost)
        assert done == len(data)

    async def read(self, handle: int) -> bytes:
        return bytes(await self.ask(None, lambda adapter: adapter.read(handle, 0, 1 << 20)))

    async def release(self, handle: int, *, lost: bool = False) -> None:
        await self.ask(None, lambda adapter: adapter.release(handle), lost=lost)

    async def setxattr(self, number: int, name: bytes, value: bytes, *, new: bool = False, lost: bool = False) -> None:
        again = Resent(operations.SETXATTR, number, CONTEXT.pid, name, os.XATTR_CREATE if new else 0)

        async def call(adapter: Adapter) -> None:  # what pyfuse3 makes of it
            if new:
                with pytest.raises(pyfuse3.FUSEError):
                    await adapter.getxattr(number, name, CONTEXT)
            await adapter.setxattr(number, name, value, CONTEXT)

        await self.ask(again, call, lost=lost)

    async def forget(self, number: int) -> None:
        count = self.counts.pop(number, 0)
        if count:
            await self.adapter.forget([(number, count)])


@pytest.fixture
async def kernel(bench: Bench, killer: Killer) -> Kernel:
    return Kernel(await bench.rig(kept=True), killer)


async def test_a_lost_answer_is_given_again(kernel: Kernel) -> None:
    directory = await kernel.mkdir(ROOT, b"d", lost=True)
    handle, number = await kernel.create(directory, b"f", lost=True)
    await kernel.write(handle, 0, b"data", lost=True)
    await kernel.rename(directory, b"f", ROOT, b"g", lost=True)
    assert await kernel.lookup(ROOT, b"g") == number
    await kernel.setxattr(number, b"user.a", b"1", new=True, lost=True)
    again = await kernel.open(number, lost=True)
    assert await kernel.read(again) == b"data"
    assert len(kernel.adapter.files.handles) == 2
    await kernel.release(again, lost=True)
    await kernel.rmdir(ROOT, b"d", lost=True)
    await kernel.unlink(ROOT, b"g", lost=True)
    assert await kernel.read(handle) == b"data"
    assert (await kernel.getattr(number)).st_size == 4
    await kernel.release(handle, lost=True)
    assert kernel.kills == 10
    await kernel.rig.drained()
    kernel.rig.check_clean()


async def test_a_request_that_is_new_is_carried_out(kernel: Kernel) -> None:
    await kernel.mkdir(ROOT, b"d")
    await kernel.restart()
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await kernel.mkdir(ROOT, b"d")
    assert raised.value.errno == errno.EEXIST


async def test_the_same_request_once_more_is_not_the_one_that_was_answered(kernel: Kernel) -> None:
    """The first open was answered, since its thread opens again; that one has not been carried out."""
    _, number = await kernel.create(ROOT, b"f")
    first = await kernel.open(number)
    kernel.adapter.known.begin_open(number, CONTEXT.pid, os.O_RDWR)
    await kernel.restart(Resent(operations.OPEN, number, CONTEXT.pid, flags=os.O_RDWR))
    assert await kernel.open(number) != first


async def test_an_open_file_without_a_name_keeps_its_bytes_over_any_number_of_ends(kernel: Kernel) -> None:
    handle, number = await kernel.create(ROOT, b"f")
    await kernel.write(handle, 0, b"a" * 100_000)
    await kernel.unlink(ROOT, b"f")
    for count in range(4):
        await kernel.restart()
        await kernel.write(handle, count, b"b")
        assert await kernel.read(handle) == b"b" * (count + 1) + b"a" * (99_999 - count)
    found = await kernel.getattr(number)
    assert (found.st_size, found.st_nlink, stat.S_IMODE(found.st_mode)) == (100_000, 0, 0o644)
    await kernel.release(handle)
    await kernel.forget(number)
    await kernel.rig.drained()
    kernel.rig.check_clean()
    assert number not in kernel.rig.core.inodes.table


async def test_a_handle_reads_the_version_it_opened_also_in_another_process(kernel: Kernel, bench: Bench) -> None:
    await bench.upload("f", b"first")
    number = await kernel.lookup(ROOT, b"f")
    handle = await kernel.open(number, os.O_RDONLY)
    await kernel.restart()
    assert await kernel.read(handle) == b"first"
    await bench.upload("f", b"second")
    await kernel.restart()
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await kernel.read(handle)
    assert raised.value.errno == errno.ESTALE
    other = await kernel.lookup(ROOT, b"f")
    assert other != number


async def test_nothing_is_asked_for_names_that_are_known(kernel: Kernel, bench: Bench) -> None:
    for number in range(50):
        await bench.upload(f"d/f{number}", b"x" * number)
    directory = await kernel.lookup(ROOT, b"d")
    numbers = {number: await kernel.lookup(directory, b"f%d" % number) for number in range(50)}
    bench.counted()
    await kernel.restart()
    assert bench.counted() == {}
    assert {number: await kernel.lookup(directory, b"f%d" % number) for number in range(50)} == numbers
    assert sum(bench.counted().values()) < 10
    for number in numbers.values():
        await kernel.forget(number)
    await kernel.restart()
    assert not kernel.rig.core.inodes.table.keys() & set(numbers.values())


async def test_a_new_number_is_none_that_the_kernel_has_ever_got(kernel: Kernel) -> None:
    numbers = set()
    for _ in range(5):
        handle, number = await kernel.create(ROOT, b"f")
        numbers.add(number)
        await kernel.unlink(ROOT, b"f")
        await kernel.release(handle)
        await kernel.forget(number)
        await kernel.restart()
    assert len(numbers) == 5


async def test_a_directory_is_read_on_where_it_was(kernel: Kernel, bench: Bench) -> None:
    for number in range(30):
        await bench.upload(f"f{number:02d}")
    handle = kernel.adapter.listings.open(kernel.rig.core.inodes.root)
    kernel.adapter._opened(handle, kernel.rig.core.inodes.root, 0, CONTEXT)
    names, _ = await kernel.adapter.listings.entries(handle, 0)
    kernel.adapter.known.read_up_to(handle, 10, names[9])
    kernel.adapter.known.read_up_to(handle, 20, names[19])
    await bench.remove("f00", "f05", "f25")
    await bench.upload("f01a")
    for start in (10, 20):
        await kernel.restart()
        names, shift = await kernel.adapter.listings.entries(handle, start)
        left = names[start + shift :]
        assert left == [f"f{number:02d}" for number in range(start, 30) if number != 25]


@pytest.mark.parametrize("restarted", [False, True])
async def test_the_log_stays_short(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, restarted: bool) -> None:
    """Also where no process lives long enough to see it grow much."""
    handle, number = await kernel.create(ROOT, b"f")
    await kernel.write(handle, 0, b"data")
    await kernel.unlink(ROOT, b"f")
    for _ in range(50):
        gone = await kernel.mkdir(ROOT, b"gone")
        below = await kernel.mkdir(gone, b"below")
        await kernel.rmdir(gone, b"below")
        await kernel.rmdir(ROOT, b"gone")
        await kernel.forget(below)
        await kernel.forget(gone)
    directory = await kernel.mkdir(ROOT, b"d")
    monkeypatch.setattr(known, "SHORT_BYTES", 10_000)
    monkeypatch.setattr(known, "LOOK_S", 0.0)
    for _ in range(1000):
        await kernel.lookup(ROOT, b"d")
    if restarted:
        await kernel.restart()
    before = kernel.rig.core.known.used_bytes
    with trio.move_on_after(0.2):
        await kernel.rig.core.known.keep_short()
    assert kernel.rig.core.known.used_bytes < before / 4
    assert kernel.rig.core.known.steps.keys() == {ROOT}
    await kernel.restart()
    assert kernel.rig.core.inodes[directory].lookups >= kernel.counts[directory]
    assert await kernel.read(handle) == b"data"
    assert (await kernel.getattr(number)).st_nlink == 0


@pytest.mark.parametrize("seed", range(12))
async def test_any_end_at_any_moment(kernel: Kernel, killer: Killer, seed: int) -> None:
    """Random requests; kills between any two records. Names and bytes are those of a directory in memory."""
    rng = random.Random(seed)
    killer.task = trio.lowlevel.current_task()
    names: dict[bytes, int] = {}  # what the root holds
    data: dict[int, bytes] = {}
    handles: dict[int, int] = {}
    directories: set[int] = set()
    for _ in range(120):
        killer.left = rng.choice([-1, rng.randrange(12)])
        name, other = (b"n%d" % rng.randrange(6) for _ in range(2))
        lost = rng.random() < 0.1
        what = rng.randrange(9)
        there = names.get(name)
        if what == 0 and there is None:
            handle, number = await kernel.create(ROOT, name, lost=lost)
            names[name], data[number], handles[handle] = number, b"", number
        elif what == 1 and there is None:
            names[name] = await kernel.mkdir(ROOT, name, lost=lost)
            directories.add(names[name])
        elif what == 2 and there in data:
            await kernel.unlink(ROOT, name, lost=lost)
            del names[name]
        elif what == 3 and there in directories:
            await kernel.rmdir(ROOT, name, lost=lost)
            del names[name]
        elif what == 4 and there in data and names.get(other) not in directories and other != name:
            await kernel.rename(ROOT, name, ROOT, other, lost=lost)
            names[other] = names.pop(name)
        elif what == 5 and there in data:
            handles[await kernel.open(there, lost=lost)] = there
        elif what in (6, 7) and handles:
            handle = rng.choice(list(handles))
            number = handles[handle]
            block = rng.randbytes(rng.choice([10, 5000]))
            at = rng.randrange(len(data[number]) + 1)
            await kernel.write(handle, at, block, lost=lost)
            data[number] = data[number][:at] + block + data[number][at + len(block) :]
            assert await kernel.read(handle) == data[number]
        elif what == 8 and handles:
            handle = rng.choice(list(handles))
            await kernel.release(handle, lost=lost)
            number = handles.pop(handle)
            killer.left = -1
            if number not in names.values() and number not in handles.values():
                await kernel.forget(number)
        killer.left = -1
        if rng.random() < 0.1:
            await kernel.rig.drain(rounds=3)
    for name in [b"n%d" % number for number in range(6)]:
        assert await kernel.lookup(ROOT, name) == names.get(name, 0)
    for handle in list(handles):
        assert await kernel.read(handle) == data[handles[handle]]
        await kernel.release(handle)
    assert kernel.kills > 10
    await kernel.rig.drained()
    kernel.rig.check_clean()
    contents = {name.decode(): data[number] for name, number in names.items() if number in data}
    contents |= {f"{name.decode()}/": b"" for name, number in names.items() if number in directories}
    found = kernel.rig.store
    assert {key: found._objects[key].data for key in found._objects} == contents


async def test_a_session_that_is_not_there_is_none(bench: Bench, tmp_path: Path) -> None:
    rig = await bench.rig()
    assert not rig.core.known.is_kept
    with fails(errno.ENOENT):
        await rig.walk("f")
