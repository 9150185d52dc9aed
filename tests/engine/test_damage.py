"""The cache directory is damaged, in use or between: found, told, never uploaded, and nothing else is lost."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from s3fuse.errors import UserError
from s3fuse.namespace.recovery import lost_folders
from s3fuse.namespace.upkeep import mend
from s3fuse.writing.checks import BLOCK_BYTES
from tests.engine.rig import Bench, Rig, fails

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {"small": 3000, "large": 700_000}


@pytest.fixture
def expected_log() -> list[str]:
    return [
        r"staged data is damaged",
        r"the journal in .* was damaged \(.*\); it is written anew",
        r"somebody removed .*; it is put back",
        r"damaged: the journal was damaged and does not prove that all of it is there",
        r"the change of .* is not carried out, since the journal was damaged",
        r"; what was staged and is not known any more is kept in",
    ]


def staging_file(rig: Rig, path: str) -> Path:
    inode = rig.core.inodes.at(path)
    assert inode is not None
    own = rig.core.staging.directory / f"{inode.number}.{inode.data.layers[0].generation}"  # type: ignore[union-attr]
    return own if own.exists() else rig.core.staging.directory / "slab"


def flip(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 4]))


def damages(size: int) -> dict[str, Callable[[Path], None]]:
    return {
        "flipped": lambda file: flip(file, size // 2),
        "cut": lambda file: os.truncate(file, size - 1),
        "emptied": lambda file: os.truncate(file, 0),
        "removed": lambda file: file.unlink(),
    }


#: What is removed while it is open is put back instead: `test_removed_staging_files_are_put_back`.
KINDS = [
    *((kind, mounted) for kind in ("flipped", "cut", "emptied") for mounted in (False, True)),
    ("removed", False),
]


@pytest.mark.parametrize(("kind", "mounted"), KINDS)
@pytest.mark.parametrize("name", SIZES)
async def test_damaged_bytes_are_told_and_healed_by_writing_them_anew(
    bench: Bench, name: str, kind: str, mounted: bool
) -> None:
    size = SIZES[name]
    rig = await bench.rig()
    await rig.put(name, random.Random(1).randbytes(size))
    await bench.upload("other", b"other")
    file = staging_file(rig, name)
    if not mounted:
        await rig.crash()
    damages(size)[kind](file)
    if not mounted:
        await rig.start()
    with fails(5):
        await rig.cat(name)
    assert await rig.cat("other") == b"other"
    (failed,) = await rig.drain()
    assert "staged data is damaged" in (failed.error or "")
    assert bench.listed() == ["other"]
    await rig.restart()  # it stays known
    (failed,) = await rig.drain()
    assert "staged data is damaged" in (failed.error or "")
    assert bench.listed() == ["other"]
    await rig.write(name, b"anew", flags=os.O_TRUNC)
    assert await rig.cat(name) == b"anew"
    await rig.drained()
    assert bench.data(name) == b"anew"
    rig.check_clean()


@pytest.mark.parametrize("name", SIZES)
async def test_writing_over_everything_heals(bench: Bench, name: str) -> None:
    size = SIZES[name]
    rig = await bench.rig()
    await rig.put(name, bytes(size))
    flip(staging_file(rig, name), size // 3)
    assert await rig.drain()
    new = random.Random(2).randbytes(size)
    for start in range(0, size, 100_000):
        await rig.write(name, new[start : start + 100_000], start)
    assert await rig.cat(name) == new
    await rig.drained()
    assert bench.contents() == {name: new}
    rig.check_clean()


async def test_bytes_beside_the_damage_are_right_or_an_error(bench: Bench) -> None:
    rig = await bench.rig()
    data = random.Random(3).randbytes(5 * BLOCK_BYTES)
    await rig.put("f", data)
    flip(staging_file(rig, "f"), BLOCK_BYTES + 5)
    handle = await rig.open("f")
    assert await rig.pread(handle, 0, 1000) == data[:1000]
    with fails(5):
        await rig.pread(handle, BLOCK_BYTES + 1000, 10)
    assert await rig.pread(handle, 3 * BLOCK_BYTES, 1000) == data[3 * BLOCK_BYTES :][:1000]
    rig.close(handle)


async def test_damage_under_newer_writes_is_not_sent(bench: Bench) -> None:
    """A part written anew does not heal the rest, an append neither, nor does cutting something else off."""
    rig = await bench.rig()
    await rig.put("f", bytes(3000))
    file = staging_file(rig, "f")
    await rig.crash()
    flip(file, 1500)
    await rig.start()
    await rig.write("f", b"x" * 1000)
    await rig.write("f", b"y" * 1000, 3000)
    await rig.truncate("f", 2500)
    assert await rig.drain()
    with fails(5):
        await rig.cat("f")
    assert bench.listed() == []
    await rig.truncate("f", 1500)
    await rig.drain()
    await rig.write("f", b"z" * 500, 1000)
    await rig.drained()
    assert bench.contents() == {"f": b"x" * 1000 + b"z" * 500}


@pytest.mark.parametrize("what", ["slab", "file", "folder"])
async def test_removed_staging_files_are_put_back(bench: Bench, what: str) -> None:
    rig = await bench.rig()
    bodies = {name: random.Random(name).randbytes(size) for name, size in SIZES.items()}
    for name, body in bodies.items():
        await rig.put(name, body)
    handle = await rig.open("large")
    await rig.pread(handle)
    folder = rig.core.staging.directory
    if what == "folder":
        shutil.rmtree(folder)
    else:
        (folder / "slab" if what == "slab" else staging_file(rig, "large")).unlink()
    mend(rig.core.changes, rig.core.staging, rig.core.syncer.uploads)
    rig.close(handle)
    await rig.restart()
    assert {name: await rig.cat(name) for name in bodies} == bodies
    await rig.drained()
    assert bench.contents() == bodies


JOURNAL = "journal.sqlite"


@pytest.mark.parametrize("names", [[""], ["-wal"], ["-shm"], ["", "-wal", "-shm"]])
async def test_journal_removed_while_in_use_is_written_anew(bench: Bench, names: list[str]) -> None:
    await bench.upload("old", b"old")
    rig = await bench.rig()
    bodies = {name: random.Random(name).randbytes(size) for name, size in SIZES.items()}
    for name, body in bodies.items():
        await rig.put(name, body)
    await rig.rename("old", "renamed")
    await rig.mkdir("d")
    for name in names:
        (rig.cache / (JOURNAL + name)).unlink()
    mend(rig.core.changes, rig.core.staging, rig.core.syncer.uploads)
    assert not rig.journal.damage()
    await rig.put("d/later", b"later")
    await rig.restart()
    assert {name: await rig.cat(name) for name in bodies} == bodies
    await rig.drained()
    assert bench.contents() == {**bodies, "d/": b"", "d/later": b"later", "renamed": b"old"}
    rig.check_clean()


@pytest.mark.parametrize("name", ["", "-wal"])
async def test_journal_cut_while_in_use_is_written_anew(bench: Bench, name: str) -> None:
    rig = await bench.rig()
    await rig.put("f", b"data")
    if not name:
        rig.journal.checkpoint()
        mend(rig.core.changes, rig.core.staging, rig.core.syncer.uploads)
    os.truncate(rig.cache / (JOURNAL + name), 100)
    mend(rig.core.changes, rig.core.staging, rig.core.syncer.uploads)
    await rig.restart()
    assert await rig.cat("f") == b"data"
    await rig.drained()
    assert bench.contents() == {"f": b"data"}


def killed(rig: Rig, to: Path) -> None:
    """The cache directory as a process that is killed right now leaves it."""
    shutil.copytree(rig.cache, to)


def contents(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


@pytest.mark.parametrize("damage", ["removed", "cut", "flipped", "all removed", "journal removed"])
async def test_journal_that_lost_its_end_gives_up_no_bytes(bench: Bench, tmp_path: Path, damage: str) -> None:
    """What it does not name any more is kept aside, and told."""
    rig = await bench.rig()
    await rig.put("first", b"first")
    rig.journal.record_deferred()  # as the syncer does soon after
    rig.journal.checkpoint()
    for number in range(50):
        await rig.put(f"f{number}", b"body of %d" % number)
    await rig.put("large", b"L" * 100_000)
    killed(rig, tmp_path / "copy")
    log = tmp_path / "copy" / (JOURNAL + "-wal")
    if damage == "cut":
        os.truncate(log, log.stat().st_size // 2)
    elif damage == "flipped":
        flip(log, log.stat().st_size // 2)
    else:
        log.unlink()
    if damage.endswith("all removed"):
        (tmp_path / "copy" / (JOURNAL + "-shm")).unlink()
    if damage == "journal removed":
        (tmp_path / "copy" / JOURNAL).unlink()
    await rig.restart(tmp_path / "copy")
    assert rig.journal.lost
    (folder,) = lost_folders(rig.cache)
    assert rig.mount.answers.status()["cache"]["lost"] == [folder]
    kept = contents(Path(folder))
    assert b"body of 49" in kept
    assert b"L" * 100_000 in kept
    failed = await rig.drain()
    assert len(failed) <= 1  # its seal was among what is lost
    assert all("damaged" in (inode.error or "") for inode in failed)
    assert all(data == bench.data("first") or data.startswith(b"body of") for data in bench.contents().values())
    await rig.restart()
    assert not rig.journal.lost


async def test_whole_journal_has_lost_nothing(bench: Bench, tmp_path: Path) -> None:
    rig = await bench.rig()
    for number in range(50):
        await rig.put(f"f{number}", b"x")
    killed(rig, tmp_path / "one")
    rig.journal.checkpoint()
    killed(rig, tmp_path / "two")
    await rig.put("g", b"x")
    killed(rig, tmp_path / "three")
    for name in ("one", "two", "three"):
        await rig.restart(tmp_path / name)
        assert not rig.journal.lost
        assert len(rig.dirty()) == 50 + (name == "three")


async def test_cut_database_is_refused_with_its_name(bench: Bench) -> None:
    rig = await bench.rig()
    for number in range(100):
        await rig.put(f"f{number}", b"x" * 100)
    await rig.crash()
    database = rig.cache / JOURNAL
    assert database.stat().st_size > 8192
    os.truncate(database, 8192)
    with pytest.raises(UserError, match=r"journal in .*cache cannot be read"):
        rig.mount.journal.__init__(rig.cache, "memory/bucket/")  # type: ignore[misc]
    assert (rig.cache / "staging" / "slab").stat().st_size > 0
