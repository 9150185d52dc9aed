"""A journal is flipped or cut anywhere: the bucket has the old or a new version of each file, never half of one.

The versions of a file are what was in the bucket, and what the file was whenever it was closed, and at the end. All
that was acknowledged is in the bucket, or still staged, or kept aside.
"""

from __future__ import annotations

import copy
import errno
import os
import random
import shutil
from typing import TYPE_CHECKING

import pytest

from s3fuse import caches
from s3fuse.errors import UserError
from s3fuse.writing.journal import Journal
from tests.engine.old_journals import of_42383ae
from tests.engine.rig import Bench, Rig, fails

if TYPE_CHECKING:
    from pathlib import Path

    import trio

KIB = 1 << 10
DATABASE, LOG = "journal.sqlite", "journal.sqlite-wal"


@pytest.fixture
def expected_log() -> list[str]:
    return [
        "what was staged and is not known any more is kept in",
        "damaged: the journal was damaged and does not prove that all of it is there",
        "is not carried out, since the journal was damaged",
        "staged data is damaged",
        "was changed by somebody else",
    ]


class Scene:
    """A mount that is killed in the midst, and what each key may hold after that: bytes, or None for no object."""

    def __init__(self, bench: Bench, rig: Rig, seed: int) -> None:
        self.bench = bench
        self.rig = rig
        self.chance = random.Random(seed)
        self.allowed: dict[str, set[bytes | None]] = {}
        self.now: dict[str, bytes] = {}  # what is to be had still of each file

    async def old(self, key: str, size: int) -> None:
        body = self.chance.randbytes(size)
        await self.bench.upload(key, body)
        self.allowed[key] = {body}

    def became(self, key: str, body: bytes | None) -> None:
        self.allowed.setdefault(key, {None}).add(body)
        self.now.pop(key, None)
        if body is not None:
            self.now[key] = body

    async def rewrite(self, key: str, size: int, *, close: bool = True) -> None:
        """As `cp` does: cut to nothing, then written in pieces."""
        handle = await self.rig.open(key, os.O_WRONLY | os.O_TRUNC)
        await self.fill(key, handle, size, close=close)

    async def create(self, key: str, size: int, *, close: bool = True) -> None:
        self.allowed.setdefault(key, {None})
        await self.fill(key, await self.rig.create(key), size, close=close)

    async def fill(self, key: str, handle: int, size: int, *, close: bool) -> None:
        body = self.chance.randbytes(size)
        for at in range(0, size, 40 * KIB):
            await self.rig.files.write(handle, at, body[at : at + 40 * KIB])
        self.became(key, body)
        if close:
            self.rig.close(handle)

    async def patch(self, key: str, at: int, size: int) -> None:
        """Writes into a file whose other bytes are in the bucket only."""
        body = self.chance.randbytes(size)
        before = self.now.get(key) or self.bench.data(key)
        await self.rig.write(key, body, at)
        self.became(key, before[:at] + body + before[at + size :])

    async def play(self, *, checkpoint: bool) -> None:
        rig = self.rig
        await self.create("first", 3000)
        await self.rewrite("cp", 150 * KIB)
        await self.patch("patched", 20_000, 5000)
        if checkpoint:
            rig.journal.record_deferred()
            rig.journal.checkpoint()
        await self.create("tmp", 9000)
        await rig.rename("tmp", "doc")  # as editors save
        self.became("doc", self.now["tmp"])
        self.became("tmp", None)
        await rig.unlink("gone")
        self.became("gone", None)
        await self.rewrite("twice", 50 * KIB)
        await self.rewrite("twice", 20 * KIB)
        await rig.rename("moved", "elsewhere")
        self.allowed["elsewhere"] = {None, *self.allowed["moved"]}
        self.allowed["moved"].add(None)
        await rig.chmod("mode", 0o600)
        for number in range(12):
            await self.create(f"small{number}", 1000 + number)
        await self.rewrite("first", 5000)
        await self.create("open", 100 * KIB, close=False)
        await self.rewrite("cut", 70 * KIB, close=False)


async def scene(bench: Bench, seed: int, *, checkpoint: bool) -> Scene:
    sizes = {"cp": 100_000, "patched": 60_000, "doc": 4000, "gone": 10, "twice": 90_000, "moved": 7000, "mode": 500}
    found = Scene(bench, await bench.rig(paused=True), seed)
    for key, size in (sizes | {"cut": 100_000}).items():
        await found.old(key, size)
    await found.play(checkpoint=checkpoint)
    return found


def damage(folder: Path, chance: random.Random) -> str:
    """Flips a bit, or cuts, in what is in use of the database or of its log; gives what it did."""
    file = folder / chance.choice([DATABASE, LOG, LOG])
    size = file.stat().st_size
    at = chance.randrange(size)
    if chance.random() < 0.25:
        os.truncate(file, at)
        return f"{file.name} cut to {at}"
    with file.open("r+b") as opened:
        opened.seek(at)
        (byte,) = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte ^ 1 << chance.randrange(8)]))
    return f"{file.name} flipped at {at}"


def all_bytes(folder: Path) -> bytes:
    """Whatever is staged or was kept aside."""
    places = [folder / "staging", *folder.glob("lost-*")]
    return b"".join(path.read_bytes() for place in places for path in sorted(place.iterdir()))


async def check(scenes: Scene, rig: Rig, what: str) -> None:
    await rig.drain(rounds=3)
    found = {key: one.data for key, one in rig.store._objects.items() if not key.startswith(".s3fuse")}
    for key in scenes.allowed.keys() | found.keys():
        name = key.partition(".conflict-")[0]
        assert found.get(key) in scenes.allowed[name], (what, key)
    kept = all_bytes(rig.cache)
    for key, body in scenes.now.items():
        for at in range(0, len(body), 16 * KIB):
            part = body[at : at + 1000]
            assert part in found.get(key, b"") or part in kept or any(part in other for other in found.values()), (
                what,
                key,
                at,
            )


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.timeout(240)
async def test_only_whole_versions_reach_the_bucket(
    bench: Bench, tmp_path: Path, nursery: trio.Nursery, seed: int, checkpoint: bool
) -> None:
    """25 places in each of 8 journals."""
    scenes = await scene(bench, seed, checkpoint=checkpoint)
    shutil.copytree(scenes.rig.cache, tmp_path / "killed")
    await scenes.rig.crash()
    chance = random.Random(seed + 100 * checkpoint)
    for number in range(25):
        folder = tmp_path / f"place{number}"
        shutil.copytree(tmp_path / "killed", folder / "cache")
        before = all_bytes(folder / "cache")
        what = damage(folder / "cache", chance)
        caches.look(folder / "cache")
        after = Bench(folder, nursery, copy.deepcopy(bench.store))
        try:
            rig = await after.rig()
        except UserError as error:
            if "cannot be read" not in str(error):
                raise
            assert all_bytes(folder / "cache") == before, what
            continue
        await check(scenes, rig, what)
        await rig.restart()  # what was held is held
        await check(scenes, rig, what)
        await after.close()
        shutil.rmtree(folder)


async def test_undamaged_it_all_arrives(bench: Bench, tmp_path: Path, nursery: trio.Nursery) -> None:
    scenes = await scene(bench, 1, checkpoint=True)
    shutil.copytree(scenes.rig.cache, tmp_path / "killed" / "cache")
    await scenes.rig.crash()
    after = Bench(tmp_path / "killed", nursery, copy.deepcopy(bench.store))
    rig = await after.rig()
    await rig.drained()
    assert {key: after.data(key) for key in scenes.now} == scenes.now
    await after.close()


OLD, NEW = random.Random(1).randbytes(100_000), random.Random(2).randbytes(150_000)
FRAME = 4096 + 24


async def cut_short(bench: Bench, folder: Path, frames: int | None = None, piece: int = 40 * KIB) -> int:
    """`f` is replaced as `cp` does it, the process killed, and the log damaged behind so many frames of that.

    Gives how many there are.
    """
    await bench.upload("f", OLD)
    rig = await bench.rig("killed", paused=True)
    await rig.put("other", b"other")
    rig.journal.record_deferred()
    log = rig.cache / LOG
    before = log.stat().st_size
    handle = await rig.open("f", os.O_WRONLY | os.O_TRUNC)
    for at in range(0, len(NEW), piece):
        await rig.files.write(handle, at, NEW[at : at + piece])
    rig.close(handle)
    rig.journal.record_deferred()
    shutil.copytree(rig.cache, folder)
    await rig.crash()
    size = log_bytes = (folder / LOG).stat().st_size
    if frames is not None:
        size = before + frames * FRAME
        with (folder / LOG).open("r+b") as opened:
            opened.seek(size + 100)
            (byte,) = opened.read(1)
            opened.seek(size + 100)
            opened.write(bytes([byte ^ 4]))
    return (log_bytes - before) // FRAME


@pytest.mark.parametrize("piece", [40 * KIB, len(NEW)])
async def test_a_replaced_file_is_old_or_new_wherever_the_log_ends(
    bench: Bench, tmp_path: Path, nursery: trio.Nursery, piece: int
) -> None:
    count = await cut_short(bench, tmp_path / "all" / "cache", piece=piece)
    seen = set()
    for frames in range(count + 1):
        folder = tmp_path / f"frames{frames}"
        source = Bench(folder / "source", nursery)
        await cut_short(source, folder / "cache", frames if frames < count else None, piece)
        after = Bench(folder, nursery, source.store)
        rig = await after.rig()
        failed = await rig.drain(rounds=3)
        found = after.data("f")
        assert after.data("other") == b"other"
        assert found in (OLD, NEW), frames
        if failed:
            (item,) = rig.mount.answers.status()["pending"]["items"]
            assert "damaged" in item["error"]
        if found == OLD:
            assert NEW[-1000:] in all_bytes(rig.cache)
        seen.add((found == NEW, bool(failed)))
        await after.close()
    assert seen >= {(False, True), (True, False)}


@pytest.mark.parametrize("how", ["open", "truncate", "cut", "unlink", "rename"])
async def test_only_what_replaces_all_of_it_heals(
    bench: Bench, tmp_path: Path, nursery: trio.Nursery, how: str
) -> None:
    await cut_short(bench, tmp_path / "cache", 4)
    after = Bench(tmp_path, nursery, bench.store)
    rig = await after.rig()
    assert await rig.drain()
    for flags in (os.O_RDONLY, os.O_RDWR):  # whatever length it seems to have, 0 also
        with fails(errno.EIO):
            await rig.open("f", flags)
    wanted = {"other": b"other", "f": b"anew"}
    if how == "open":
        await rig.write("f", b"anew", flags=os.O_TRUNC)
    elif how == "truncate":
        await rig.truncate("f", 0)
        await rig.write("f", b"anew")
    elif how == "cut":
        await rig.truncate("f", 4)
        handle = await rig.open("f", os.O_RDWR)
        with fails(errno.EIO):
            await rig.files.read(handle, 0, 4)
        await rig.files.write(handle, 0, b"anew")
        rig.close(handle)
    elif how == "unlink":
        await rig.unlink("f")
        del wanted["f"]
    else:
        await rig.put("g", b"anew")
        await rig.rename("g", "f")
    if how in ("open", "cut"):
        await rig.restart()  # before it is uploaded, too
    await rig.drained()
    assert after.contents() == wanted
    if how != "unlink":
        assert await rig.cat("f") == b"anew"
    rig.check_clean()
    await after.close()


async def test_a_process_killed_in_recovery_leaves_the_next_one_what_it_knew(
    bench: Bench, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """Opening a journal repairs it: afterwards nothing of the damage is to be seen in its own files."""
    await cut_short(bench, tmp_path / "first", 4)
    journal = Journal(tmp_path / "first", "memory/bucket/")
    lost = journal.lost
    assert lost
    shutil.copytree(tmp_path / "first", tmp_path / "cache")
    journal.close()
    after = Bench(tmp_path, nursery, bench.store)
    rig = await after.rig()
    assert rig.journal.lost == lost
    assert await rig.drain()
    assert after.data("f") == OLD
    await rig.restart()
    assert not rig.journal.lost
    await after.close()


async def test_it_is_listed_and_copied_out(bench: Bench, tmp_path: Path, nursery: trio.Nursery) -> None:
    await cut_short(bench, tmp_path / "cache", 4)
    for mounted in (False, True):
        if mounted:
            after = Bench(tmp_path, nursery, bench.store)
            await (await after.rig()).crash()
        found = caches.look(tmp_path / "cache")
        reasons = {item["name"]: item["reason"] for item in found.waiting}
        assert "damaged" in reasons["f"]
        assert "damaged" in found.why_kept() or "changes wait" in found.why_kept()
        copied = {one.name: one for one in caches.copy_out(tmp_path / "cache", tmp_path / f"out{mounted}")}
        assert not copied["f"].whole
        assert "damaged" in copied["f"].text
        out = [path.read_bytes() for path in (tmp_path / f"out{mounted}").rglob("*") if path.is_file()]
        assert any(NEW in body for body in out)
        assert (tmp_path / f"out{mounted}" / "other").read_bytes() == b"other"


async def test_a_journal_of_an_earlier_version(bench: Bench, nursery: trio.Nursery, tmp_path: Path) -> None:
    """It has no seals: whole, all of it is uploaded; damaged, nothing of it is known to be whole."""
    files = {f"f{n}": random.Random(n).randbytes(2000 + n) for n in range(5)}
    of_42383ae(tmp_path / "cache", "memory/bucket/", files)
    shutil.copytree(tmp_path / "cache", tmp_path / "damaged" / "cache")
    rig = await bench.rig()
    await rig.drained()
    assert bench.contents() == files
    (tmp_path / "damaged" / "cache" / f"{DATABASE}-before").write_text("5 0 0 the journal's log was damaged")
    after = Bench(tmp_path / "damaged", nursery)
    rig = await after.rig()
    assert len(await rig.drain()) == len(files)
    assert after.contents() == {}
    kept = all_bytes(rig.cache)
    assert all(body in kept for body in files.values())
    await after.close()
