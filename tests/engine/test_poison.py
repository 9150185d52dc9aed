"""A write that cannot be taken: its range is poisoned, never zeros, and its file stays out of the bucket till healed.

The kernel's writeback cache has told the program that it is written: only fsync and close can still fail, and a
program that looks at neither never knows.
"""

from __future__ import annotations

import errno
import os
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from s3fuse import caches
from s3fuse.namespace.upkeep import mend
from s3fuse.vfs import budget
from s3fuse.vfs.budget import Budget
from s3fuse.writing.journal import Journal
from tests.engine.rig import Bench, Rig, fails

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OLD = b"old bytes " * 700


@pytest.fixture
def expected_log() -> list[str]:
    return [r"the journal in .* was damaged"]


def raises(code: int) -> Callable[..., None]:
    def call(*args: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


async def no_room(self: Budget, *args: object) -> None:
    raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


def partial_write(descriptor: int, data: bytes, offset: int, write: Callable[..., int] = os.pwrite) -> int:
    """What a failing disk leaves: some of the bytes."""
    write(descriptor, data[: len(data) // 2], offset)
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody makes room here, so nobody waits for it."""
    monkeypatch.setattr(budget, "STALL_S", 0.01)
    monkeypatch.setattr(budget, "OTHERS_STALL_S", 0.01)
    monkeypatch.setattr(budget, "LOOK_S", 0.01)
    monkeypatch.setattr(budget, "SLOWEST_BYTES_PER_S", 1 << 40)


def refuse(way: str, patch: pytest.MonkeyPatch) -> None:
    """Has each write fail in some way until `patch` is undone."""
    if way == "budget":
        patch.setattr(Budget, "is_full", lambda self, size: True)
        patch.setattr(Budget, "wait", no_room)
    elif way == "partial":
        patch.setattr(os, "pwrite", partial_write)
    elif way == "journal room":
        patch.setattr(Journal, "check_room", raises(errno.EDQUOT))
    elif way == "rows":
        for name in ("change_segments", "put_layer"):
            patch.setattr(Journal, name, raises(errno.EIO))
    else:
        patch.setattr(os, "pwrite", raises({"EIO": errno.EIO, "EDQUOT": errno.EDQUOT, "EROFS": errno.EROFS}[way]))


@contextmanager
def refused(way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The write in the block fails in some way."""
    with monkeypatch.context() as patch:
        refuse(way, patch)
        with pytest.raises(OSError, match="Errno"):
            yield


WAYS = ["budget", "partial", "journal room", "rows", "EIO", "EDQUOT", "EROFS"]
HEALS = ["rewrite", "truncate", "cut", "unlink"]


async def heal(rig: Rig, how: str, lost: bytes, start: int) -> bytes | None:
    """Gives what the file is to be from then on, where `start` is the first lost byte; None: it is gone."""
    if how == "unlink":
        await rig.unlink("f")
        return None
    if how == "rewrite":
        await rig.write("f", lost, start)
        return OLD[:1000] + bytes(start - 1000) + lost + b"after"
    if how == "truncate":
        await rig.write("f", b"anew", flags=os.O_TRUNC)
        return b"anew"
    await rig.truncate("f", start)
    return OLD[:1000] + bytes(start - 1000)


@pytest.mark.parametrize("how", HEALS)
@pytest.mark.parametrize("size", [3000, 200_000])
@pytest.mark.parametrize("way", WAYS)
async def test_a_refused_range_is_poisoned_until_it_is_healed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, way: str, size: int, how: str
) -> None:
    await bench.upload("f", OLD)
    rig = await bench.rig()
    start, lost = 9000, random.Random(size).randbytes(size)
    await rig.truncate("f", 1000)
    await rig.truncate("f", start)
    handle = await rig.open("f", os.O_RDWR)
    with refused(way, monkeypatch):
        await rig.files.write(handle, start, lost)
    await rig.files.write(handle, start + size, b"after")
    rig.close(handle)
    for _ in range(2):
        (failed,) = await rig.drain()
        assert f"bytes {start} to {start + size} that a program wrote could not be taken" in (failed.error or "")
        assert bench.contents() == {"f": OLD}
        (item,) = rig.mount.answers.status()["pending"]["items"]
        assert item["name"] == "f"
        assert f"bytes {start} to {start + size}" in item["error"]
        handle = await rig.open("f")
        assert await rig.pread(handle, 0, start) == OLD[:1000] + bytes(start - 1000)
        assert await rig.pread(handle, start + size) == b"after"
        with fails(errno.EIO):
            await rig.files.read(handle, start - 1, 2)
        with fails(errno.EIO):
            await rig.files.read(handle, start + size - 1, 1)
        rig.close(handle)
        await rig.restart()
    wanted = await heal(rig, how, lost, start)
    await rig.drained()
    assert bench.contents() == ({} if wanted is None else {"f": wanted})
    rig.check_clean()


async def test_fsync_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for fsync_to in ("upload", "local"):
        rig = await bench.rig(fsync_to, fsync_to=fsync_to)
        handle = await rig.create(fsync_to)
        with refused("EIO", monkeypatch):
            await rig.files.write(handle, 5, b"lost")
        for _ in range(2):
            with fails(errno.EIO):
                await rig.files.fsync(handle)
        await rig.files.write(handle, 5, b"here")
        await rig.files.fsync(handle)
        await rig.drained()
        assert bench.data(fsync_to) == bytes(5) + b"here"
        rig.close(handle)


async def test_status_names_it_while_the_file_is_open(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await bench.rig()
    handle = await rig.create("f")
    with refused("EIO", monkeypatch):
        await rig.files.write(handle, 4096, bytes(4096))
    (item,) = rig.mount.answers.status()["pending"]["items"]
    assert "bytes 4096 to 8192" in item["error"]
    assert os.strerror(errno.EIO) in item["error"]
    await rig.files.write(handle, 4096, bytes(4096))
    (item,) = rig.mount.answers.status()["pending"]["items"]
    assert item["error"] is None


async def test_a_journal_that_cannot_be_written_learns_of_it_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that has become read-only: until then memory knows."""
    await bench.upload("f", OLD)
    rig = await bench.rig()
    handle = await rig.open("f", os.O_RDWR)
    with monkeypatch.context() as patch:
        refuse("EROFS", patch)
        for name in ("put_layer", "put_node", "poison"):
            patch.setattr(Journal, name, raises(errno.EROFS))
        with fails(errno.EROFS):
            await rig.files.write(handle, 100, b"lost")
    with fails(errno.EIO):
        await rig.pread(handle)
    rig.close(handle)
    assert await rig.drain()
    rig.journal.suspect = "a statement failed"  # as `_execute` notes it
    mend(rig.core.changes, rig.core.staging, rig.core.syncer.uploads)
    await rig.restart()
    with fails(errno.EIO):
        await rig.cat("f")
    assert await rig.drain()
    assert bench.contents() == {"f": OLD}


async def test_an_upload_under_way_brings_the_version_before(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await bench.rig()
    await rig.put("f", b"whole")
    inode = await rig.walk("f")
    put, handles = rig.line.put, []

    async def refused_meanwhile(*args: object, **options: object) -> str:
        if not handles:
            handles.append(await rig.open("f", os.O_RDWR))
            with refused("EIO", monkeypatch):
                await rig.files.write(handles[0], 1, b"lost")
        return await put(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.line, "put", refused_meanwhile)
    await rig.drain()
    rig.close(handles[0])
    assert bench.contents() == {"f": b"whole"}
    assert await rig.drain() == [inode]
    with fails(errno.EIO):
        await rig.cat("f")
    await rig.write("f", b"OLE!", 1)
    await rig.drained()
    assert bench.contents() == {"f": b"wOLE!"}


async def test_a_poisoned_file_is_not_parked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await bench.rig(budget_bytes=256 << 10)
    handle = await rig.create("f")
    await rig.files.write(handle, 0, bytes(64 << 10))
    with refused("EIO", monkeypatch):
        await rig.files.write(handle, 64 << 10, bytes(64 << 10))
    await rig.files.write(handle, 128 << 10, bytes(64 << 10))
    inode = await rig.walk("f")
    assert not rig.core.syncer.parking.can(inode)
    await rig.files.write(handle, 64 << 10, bytes(64 << 10))
    assert rig.core.syncer.parking.can(inode)


async def test_too_few_descriptors_lose_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that wait give theirs up; where not even that helps, the range is poisoned."""
    rig = await bench.rig()
    handles = [await rig.create(f"f{n}") for n in range(20)]
    real_open, most = os.open, 5
    held = rig.core.staging.open_files

    def scarce(path: object, *args: object, **options: object) -> int:
        if str(path).startswith(str(rig.core.staging.directory)) and len(held) >= most:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real_open(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", scarce)
    for n, handle in enumerate(handles):
        await rig.files.write(handle, 0, bytes([n]) * 100_000)
    most = 0
    with fails(errno.EMFILE):
        await rig.files.write(handles[0], 100_000, b"lost")
    monkeypatch.undo()
    for handle in handles:
        rig.close(handle)
    (failed,) = await rig.drain()
    assert failed.name == "f0"
    assert bench.contents() == {f"f{n}": bytes([n]) * 100_000 for n in range(1, 20)}


async def test_cache_list_and_recover_show_what_is_there(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await bench.rig()
    handle = await rig.create("f")
    await rig.files.write(handle, 0, b"first")
    with refused("EIO", monkeypatch):
        await rig.files.write(handle, 5, b"lost!")
    await rig.files.write(handle, 10, b"last")
    await rig.crash()
    (item,) = caches.look(rig.cache).waiting
    assert "bytes 5 to 10" in item["reason"]
    assert os.strerror(errno.EIO) in item["reason"]
    (copied,) = caches.copy_out(rig.cache, tmp_path / "out")
    assert not copied.whole
    assert "bytes 5 to 10" in copied.text
    parts = {path.name: path.read_bytes() for path in (tmp_path / "out" / "f.parts").iterdir()}
    assert parts == {"0": b"first", "10": b"last"}


class Model:
    """A file as programs may see it: its bytes, and which of them are lost."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.lost: set[int] = set()

    def write(self, start: int, data: bytes, *, taken: bool) -> None:
        stop = start + len(data)
        self.data.extend(bytes(max(0, stop - len(self.data))))
        self.data[start:stop] = data
        self.lost = self.lost - set(range(start, stop)) if taken else self.lost | set(range(start, stop))

    def truncate(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.lost = {at for at in self.lost if at < size}


async def check(rig: Rig, model: Model) -> None:
    handle = await rig.open("f")
    assert (await rig.walk("f")).size == len(model.data)
    for at in range(0, len(model.data), 7):
        part = range(at, min(at + 7, len(model.data)))
        if model.lost.isdisjoint(part):
            assert await rig.pread(handle, at, 7) == model.data[at : at + 7]
        else:
            with fails(errno.EIO):
                await rig.files.read(handle, at, 7)
    rig.close(handle)


@pytest.mark.parametrize("seed", range(40))
async def test_any_order_of_writes_refusals_and_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The bucket only ever has what a program wrote as a whole, and nothing that is read is wrong."""
    chance = random.Random(seed)
    model, whole = Model(), [b"x" * 60]
    model.write(0, whole[0], taken=True)
    await bench.upload("f", whole[0])
    rig = await bench.rig()
    handle = await rig.open("f", os.O_RDWR)
    for _ in range(50):
        kind = chance.choice(["write", "write", "refuse", "refuse", "truncate", "send", "crash", "read"])
        start, data = chance.randrange(150), chance.randbytes(chance.randrange(1, 60))
        if kind == "write":
            await rig.files.write(handle, start, data)
            model.write(start, data, taken=True)
        elif kind == "refuse":
            with refused(chance.choice(WAYS[:3] + WAYS[4:]), monkeypatch):
                await rig.files.write(handle, start, data)
            model.write(start, data, taken=False)
        elif kind == "truncate":
            await rig.truncate("f", start)
            model.truncate(start)
        elif kind == "read":
            await check(rig, model)
        else:
            rig.close(handle)
            if kind == "crash":
                await rig.restart()
            failed = await rig.drain(rounds=3)
            assert bool(failed) == bool(model.lost)
            if not failed:
                whole.append(bytes(model.data))
            assert bench.data("f") == whole[-1]
            handle = await rig.open("f", os.O_RDWR)
    await check(rig, model)
