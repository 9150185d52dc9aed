"""Another program fills the disk of the cache: a change fails with ENOSPC and has not happened, or it is kept."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest

from s3fuse.errors import UserError
from s3fuse.namespace.upkeep import mend
from s3fuse.vfs import budget
from s3fuse.writing import room, wal
from s3fuse.writing.journal import Journal
from tests.engine.rig import Bench, Rig, fails

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator
    from pathlib import Path

DISK_BYTES = 32 << 20
CACHE = "disk/cache"


@pytest.fixture
def expected_log() -> list[str]:
    return [r"the journal in .* was damaged \(a change was not recorded, the disk was full\); it is written anew"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk; `CACHE` is on it."""
    where = tmp_path / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", where], check=True, timeout=30)
    yield where
    subprocess.run(["umount", "-l", where], check=True, timeout=30)


def fill(disk: Path) -> Path:
    """Takes all that is free; gives the file that has it."""
    path = disk / "others"
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    status = os.statvfs(disk)
    assert status.f_bavail == 0
    return path


async def sent(rig: Rig) -> None:
    """Returns when all is in the bucket, with checkpoints as `keep_up` makes them."""
    await rig.drain()
    while rig.dirty():
        assert rig.journal.is_long(1 << 20)
        rig.journal.checkpoint()
        await rig.drain()


class Tree:
    """Files and directories, as they should be: path -> mode of a file, None for a directory."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.modes: dict[str, int | None] = {}
        self.refused: set[str] = set()
        self._chance = random.Random(seed)
        self._count = 0

    def _new(self) -> str:
        self._count += 1
        above = self._chance.choice(["", *(f"{path}/" for path, mode in self.modes.items() if mode is None)])
        return f"{above}{'n' * self._chance.randrange(1, 40)}{self._count}"

    def _some(self, *, directory: bool = False) -> str:
        return self._chance.choice([path for path, mode in self.modes.items() if (mode is None) == directory])

    async def step(self, kind: str) -> None:
        """One change, which also is in `modes` unless it was refused."""
        changes: dict[str, int | None] = {}
        gone: list[str] = []
        call: Awaitable[object]
        if kind == "create":
            path = self._new()
            call, changes[path] = self.rig.put(path), 0o644
        elif kind == "mkdir":
            path = self._new()
            call, changes[path] = self.rig.mkdir(path), None
        elif kind == "chmod":
            path, mode = self._some(), self._chance.randrange(0o1000)
            call, changes[path] = self.rig.chmod(path, mode), mode
        elif kind == "setxattr":
            call = self.rig.setxattr(self._some(), b"user.name", bytes(self._chance.randrange(100)))
        elif kind == "truncate":
            call = self.rig.truncate(self._some(), self._chance.randrange(1, 5000))
        elif kind == "unlink":
            gone = [self._some()]
            call = self.rig.unlink(gone[0])
        else:
            old, new = self._some(directory=self._chance.random() < 0.3), self._new()
            if new.startswith(f"{old}/"):
                return
            gone = [path for path in self.modes if path == old or path.startswith(f"{old}/")]
            changes = {new + path[len(old) :]: self.modes[path] for path in gone}
            call = self.rig.rename(old, new)
        try:
            await call
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.refused.add(kind)
            return
        for path in gone:
            del self.modes[path]
        self.modes.update(changes)

    async def check(self) -> None:
        found: dict[str, int | None] = {}
        above = [""]
        while above:
            directory = above.pop()
            for name in await self.rig.ls(directory):
                inode = await self.rig.walk(f"{directory}{name}")
                await self.rig.attributes.getattr(inode)
                found[f"{directory}{name}"] = None if inode.is_directory else inode.mode & 0o777
                if inode.is_directory:
                    above.append(f"{directory}{name}/")
        assert found == self.modes


KINDS = ["create", "mkdir", "chmod", "setxattr", "truncate", "unlink", "rename"]


@pytest.mark.parametrize("seed", range(3))
async def test_changes_are_refused_whole_before_the_disk_has_no_room(bench: Bench, disk: Path, seed: int) -> None:
    rig = await bench.rig(CACHE, paused=True)
    tree = Tree(rig, seed)
    for kind in ("mkdir", "mkdir", *["create"] * 30):
        await tree.step(kind)
    others = fill(disk)
    chance = random.Random(seed)
    for _ in range(5000):
        await tree.step(chance.choice(KINDS))
        if tree.refused == set(KINDS):
            break
    assert tree.refused == set(KINDS)
    assert len(tree.modes) > 40  # much went well on the full disk
    await tree.check()
    # Neither does a killed process leave anything else, and its successor can start where the disk still is full.
    await rig.restart()
    await tree.check()
    rig.paused = False
    await rig.restart()
    await rig.drained()
    await tree.check()
    assert set(bench.listed()) == {path + ("/" if mode is None else "") for path, mode in tree.modes.items()}
    others.unlink()
    rig.core.changes.journal.keep_room()
    tree.refused.clear()
    for kind in KINDS:
        await tree.step(kind)
    assert not tree.refused
    await rig.drained()
    rig.check_clean()


async def test_a_checkpoint_makes_room_on_a_full_disk(bench: Bench, disk: Path) -> None:
    rig = await bench.rig(CACHE, paused=True)
    tree = Tree(rig, 1)
    fill(disk)
    for _ in range(5):
        while not tree.refused:
            await tree.step("create")
        assert rig.journal.is_long(1 << 40)
        rig.journal.checkpoint()
        assert not rig.journal.is_long(0)
        tree.refused.clear()
        await tree.step("create")
        assert not tree.refused
    await rig.restart()
    await tree.check()


async def test_renaming_a_large_directory_is_refused_before_anything_moves(bench: Bench, disk: Path) -> None:
    names = {f"d/{number:04}" for number in range(1500)}
    for name in names:
        await bench.upload(name)
    rig = await bench.rig(CACHE)
    await rig.ls("d")
    others = fill(disk)
    with fails(errno.ENOSPC):
        await rig.rename("d", "e")
    assert not rig.dirty()
    assert await rig.exists("d/0000")
    assert not await rig.exists("e")
    others.unlink()
    await rig.rename("d", "e")
    await rig.restart()
    await sent(rig)
    assert set(bench.listed()) == {f"e{name[1:]}" for name in names}


async def test_what_a_killed_process_has_reserved_is_its_successor_s(bench: Bench, disk: Path, tmp_path: Path) -> None:
    rig = await bench.rig(CACHE, paused=True)
    tree = Tree(rig, 4)
    others = fill(disk)
    for _ in range(50):
        await tree.step("create")
    log = disk / "cache" / "journal.sqlite-wal"
    before, blocks = log.stat(), os.statvfs(disk).f_bfree
    with closing(wal.LogIndex(disk / "cache")) as index, closing(room.Room(disk / "cache", index)) as left:
        assert left.left_bytes > room.SPARE_BYTES
    assert (log.stat().st_blocks, os.statvfs(disk).f_bfree) == (before.st_blocks, blocks)
    others.unlink()


async def test_open_that_cannot_truncate_leaves_no_handle(bench: Bench, disk: Path) -> None:
    rig = await bench.rig(CACHE, paused=True)
    inode = await rig.put("f", b"data")
    fill(disk)
    tree = Tree(rig, 2)
    while not tree.refused:
        await tree.step("mkdir")
    with fails(errno.ENOSPC):
        await rig.open("f", os.O_WRONLY | os.O_TRUNC)
    assert (inode.opens, inode.writers) == (0, 0)
    assert await rig.cat("f") == b"data"


async def test_what_could_not_be_recorded_all_the_same_is_recorded_later(
    bench: Bench, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that reserves nothing may be full at the wrong moment: then nothing more is taken until that is mended."""

    def cannot(descriptor: int, mode: int, start: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(room, "fallocate", cannot)
    rig = await bench.rig(CACHE, paused=True)
    await rig.put("before", b"before")
    others = fill(disk)
    with fails(errno.ENOSPC):
        await rig.put("refused")
    assert not await rig.exists("refused")
    with monkeypatch.context() as patch:
        patch.setattr(room.Room, "check", lambda self, needed_bytes: None)
        with fails(errno.ENOSPC):
            for number in range(1000):
                await rig.put(f"new{number}")
    for change in (rig.put("later"), rig.unlink("before"), rig.chmod("before", 0o600)):
        with fails(errno.ENOSPC):
            await change
    with pytest.raises(UserError, match="is full; free space there"):
        mend(rig.core.changes, rig.core.staging, rig.core.syncer.uploads)
    assert not list((disk / "cache").glob("journal.part*"))
    others.unlink()
    mend(rig.core.changes, rig.core.staging, rig.core.syncer.uploads)
    await rig.put("later")
    names = await rig.ls()
    await rig.restart()
    assert await rig.ls() == names
    assert await rig.cat("before") == b"before"


async def test_who_sends_needs_less_room_than_who_changes(bench: Bench, disk: Path) -> None:
    rig = await bench.rig(CACHE)
    tree = Tree(rig, 3)
    fill(disk)
    while not tree.refused:
        await tree.step("create")
    before = len(rig.dirty())
    await rig.drain()
    assert len(rig.dirty()) < before - 50
    await sent(rig)
    assert set(bench.listed()) == set(tree.modes)
    rig.check_clean()


@pytest.mark.parametrize("free_kib", [0, 4, 8, 16, 32, 36, 40, 64, 128])
def test_journal_that_has_no_room_says_so(disk: Path, free_kib: int) -> None:
    """Whatever of it finds no room: the database, its log, or the log's index."""
    directory = disk / "cache"
    Journal(directory, "store").close()
    others = fill(disk)
    os.truncate(others, others.stat().st_size - (free_kib << 10))
    try:
        Journal(directory, "store").close()
    except UserError as error:
        assert "is full; free space there" in str(error)  # noqa: PT017 - it need not fail
    else:
        assert free_kib
    others.unlink()
    Journal(directory, "store").close()


async def test_bytes_that_cannot_be_taken_are_in_the_log(
    bench: Bench, disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for each file, as writes of the kernel come by the hundred and only the first error reaches a program."""
    monkeypatch.setattr(budget, "OTHERS_STALL_S", 0.01)
    rig = await bench.rig(CACHE, paused=True)
    await rig.put("f")
    others = fill(disk)
    caplog.set_level("INFO")
    for _ in range(2):
        with fails(errno.ENOSPC):
            await rig.write("f", bytes(100_000))
    assert caplog.text.count("bytes that a program wrote to 'f' could not be taken: [Errno 28]") == 1
    others.unlink()
    await rig.write("f", bytes(100_000))
    assert await rig.cat("f") == bytes(100_000)
