"""`s3fuse cache`: what a cache directory holds, without a server, and without changing it."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import stat
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from s3fuse import caches
from s3fuse.cli import cli
from s3fuse.errors import AccessDenied, UserError
from s3fuse.store.faulty import refused

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engine.rig import Bench, Rig

BODY = random.Random(1).randbytes(300_000)


@pytest.fixture
def expected_log() -> list[str]:
    return ["staged data is damaged"]


@pytest.fixture(autouse=True)
def _own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("s3fuse.control.runtime_dir", lambda: tmp_path / "run")


async def crashed(bench: Bench) -> Rig:
    """Everything that can wait, and a daemon that is dead."""
    await bench.upload("base", b"base " * 50_000)
    await bench.upload("gone", b"gone")
    await bench.upload("moved", b"moved")
    rig = await bench.rig("xdg/s3fuse/cache")
    await rig.put("small", b"small")
    await rig.mkdir("d")
    await rig.put("d/large", BODY)
    await rig.put("empty")
    await rig.put("sparse", b"a")
    await rig.write("sparse", b"z", 200_000)
    await rig.symlink("link", b"d/large")
    await rig.mkfifo("fifo")
    await rig.chmod("small", 0o640)
    await rig.utimens("small", 10**18)
    await rig.write("base", b"CHANGED", 1000)
    await rig.unlink("gone")
    await rig.rename("moved", "elsewhere")
    await rig.crash()
    return rig


def journal_files(rig: Rig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in rig.cache.glob("journal*")}


def invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["cache", *map(str, arguments)])
    if isinstance(done.exception, UserError):
        return int(done.exception.exit_code), str(done.exception)
    return done.exit_code, done.output


async def test_list(bench: Bench) -> None:
    rig = await crashed(bench)
    before = journal_files(rig)
    found = caches.look(rig.cache)
    assert found.store == "memory/bucket/"
    assert not found.in_use
    assert found.size_bytes > len(BODY)
    assert {item["name"] for item in found.waiting} == {
        "small", "d/", "d/large", "empty", "sparse", "link", "fifo", "base", "gone (deleted)", "elsewhere",
    }  # fmt: skip
    assert {item["bytes"] for item in found.waiting if item["name"] == "d/large"} == {len(BODY)}
    assert all(item["reason"] for item in found.waiting)
    code, text = invoke("list")
    assert code == 0
    assert f"{rig.cache}: memory/bucket/, unused" in text
    assert "  d/large (300000 bytes): waits" in text
    code, text = invoke("list", "--json")
    assert json.loads(text)[0]["waiting_files"] == 10
    assert before == journal_files(rig)


async def test_list_names_damage(bench: Bench) -> None:
    rig = await bench.rig("xdg/s3fuse/cache")
    await rig.put("f", BODY)
    await rig.crash()
    (file,) = (rig.cache / "staging").glob("[0-9]*")
    os.truncate(file, 1000)
    (item,) = caches.look(rig.cache).waiting
    assert "staged data is damaged" in item["reason"]


async def test_recover(bench: Bench, tmp_path: Path) -> None:
    rig = await crashed(bench)
    before = journal_files(rig)
    code, text = invoke("recover", rig.cache, tmp_path / "out")
    out = tmp_path / "out"
    assert code == 1  # one file is not whole, and a fifo is not copied
    assert (out / "small").read_bytes() == b"small"
    assert (out / "small").stat().st_mode & 0o777 == 0o640
    assert (out / "small").stat().st_mtime_ns == 10**18
    assert (out / "d/large").read_bytes() == BODY
    assert (out / "empty").read_bytes() == b""
    assert (out / "sparse").read_bytes() == b"a" + bytes(199_999) + b"z"
    assert (out / "link").read_bytes() == BODY
    assert not (out / "base").exists()
    assert {path.name: path.read_bytes() for path in (out / "base.parts").iterdir()} == {"1000": b"CHANGED"}
    assert "base: not whole (the rest is in the bucket, base version" in text
    assert "elsewhere: its bytes are in the bucket, as moved of memory/bucket/" in text
    assert "gone: was deleted" in text
    assert before == journal_files(rig)
    await rig.start()
    await rig.drained()  # nothing of it was touched
    assert bench.data("d/large") == BODY


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6777, 0o7700, 0o600])
async def test_recover_gives_nobody_the_rights_of_who_runs_it(bench: Bench, tmp_path: Path, mode: int) -> None:
    """A user of the mount makes a set-uid file of their own; what root recovers is root's."""
    rig = await bench.rig("xdg/s3fuse/cache")
    await rig.put("f", b"program")
    await rig.chmod("f", mode)
    await rig.crash()
    assert invoke("recover", rig.cache, tmp_path / "out")[0] == 0
    assert stat.S_IMODE((tmp_path / "out/f").stat().st_mode) == mode & 0o777
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


@pytest.mark.parametrize("key", ["link/x", "link/d/x", "link/new/x", "small/x", "link/d/", "link"])
async def test_recover_stays_in_its_destination(bench: Bench, tmp_path: Path, key: str) -> None:
    """Whatever a journal says: a name below a symlink leads nowhere else."""
    (tmp_path / "outside/d").mkdir(parents=True)
    rig = await bench.rig("xdg/s3fuse/cache")
    await rig.symlink("link", str(tmp_path / "outside").encode())
    await rig.put("small", b"small")
    await rig.put("evil", b"evil")
    await rig.crash()
    with closing(sqlite3.connect(rig.cache / "journal.sqlite")) as db, db:
        # Without a checksum, as earlier versions wrote them, rows are believed.
        db.execute("UPDATE node SET key=?, row_crc=NULL WHERE key='evil'", (key,))
        db.execute("UPDATE node SET number=1000+number, row_crc=NULL WHERE key='link'")  # it may come first, or last
    code, text = invoke("recover", rig.cache, tmp_path / "out")
    assert code == 1
    assert "; not copied" in text
    assert list((tmp_path / "outside").iterdir()) == [tmp_path / "outside/d"]
    assert list((tmp_path / "outside/d").iterdir()) == []


async def test_recover_of_damaged_bytes(bench: Bench, tmp_path: Path) -> None:
    rig = await bench.rig("xdg/s3fuse/cache")
    await rig.put("f", BODY)
    await rig.crash()
    (file,) = (rig.cache / "staging").glob("[0-9]*")
    with file.open("r+b") as opened:
        opened.seek(200_000)
        opened.write(b"other")
    code, text = invoke("recover", rig.cache, tmp_path / "out")
    assert code == 1
    assert "staged data is damaged" in text
    found = {int(path.name): path.read_bytes() for path in (tmp_path / "out/f.parts").iterdir()}
    assert found
    assert all(BODY[start : start + len(data)] == data for start, data in found.items())
    assert sum(map(len, found.values())) < len(BODY)


async def test_in_use(bench: Bench, tmp_path: Path) -> None:
    rig = await bench.rig("xdg/s3fuse/cache")
    await rig.put("f", b"data")
    assert caches.look(rig.cache).in_use
    code, text = invoke("clean", rig.cache)
    assert code == 1
    assert "it is in use" in text
    code, text = invoke("recover", rig.cache, tmp_path / "out")
    assert code == 1
    assert "in use by another mount" in text
    assert not (tmp_path / "out").exists()


async def test_clean(bench: Bench, tmp_path: Path) -> None:
    rig = await crashed(bench)
    other = await bench.rig("xdg/s3fuse/other")
    await other.put("f", b"data")
    await other.drained()
    await other.crash()
    (tmp_path / "xdg/s3fuse/server").mkdir()
    (tmp_path / "xdg/s3fuse/server/data").touch()
    code, text = invoke("clean")
    assert code == 0
    assert f"removed {other.cache}" in text
    assert "10 changes wait for upload" in text
    assert not other.cache.exists()
    assert rig.cache.exists()
    assert (tmp_path / "xdg/s3fuse/server/data").exists()
    code, text = invoke("clean", rig.cache)
    assert code == 1
    assert rig.cache.exists()


async def test_clean_leaves_what_is_not_ours(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"data")
    await rig.drained()
    await rig.crash()
    (rig.cache / "photos").mkdir()
    (rig.cache / "photos/p.jpg").write_text("precious")
    code, text = invoke("clean", rig.cache)
    assert code == 1
    assert "not s3fuse's" in text
    assert "photos" in text
    assert os.listdir(rig.cache) == ["photos"]
    assert (rig.cache / "photos/p.jpg").read_text() == "precious"


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for verb in (["list", tmp_path], ["clean", tmp_path], ["recover", tmp_path, tmp_path / "out"]):
        code, text = invoke(*verb)
        assert code == 1
        assert "no cache directory" in text
    assert (tmp_path / "file").exists()


async def test_unreadable_journal_is_told_and_kept(bench: Bench) -> None:
    rig = await crashed(bench)
    for path in rig.cache.glob("journal*"):
        path.write_bytes(b"no database" * 1000)
    code, text = invoke("list")
    assert code == 0
    assert "its journal cannot be read" in text
    code, text = invoke("clean", rig.cache)
    assert code == 1
    assert "its journal cannot be read" in text
    assert rig.cache.exists()


async def test_recover_from_an_unreadable_journal(bench: Bench, tmp_path: Path) -> None:
    rig = await crashed(bench)
    for path in rig.cache.glob("journal*"):
        path.write_bytes(b"no database" * 1000)
    code, text = invoke("recover", rig.cache, tmp_path / "out")
    assert code == 1
    assert "the journal cannot be read" in text
    assert BODY in [path.read_bytes() for path in (tmp_path / "out/lost-staging").iterdir()]


async def test_why_a_change_was_refused_is_listed_after_the_mount(bench: Bench) -> None:
    rig = await bench.rig("xdg/s3fuse/cache")
    await rig.put("f", b"data")
    rig.line.quiet = False
    rig.line.schedule("put", refused(AccessDenied("put f: AccessDenied", "f")))
    assert [inode.name for inode in await rig.drain()] == ["f"]
    await rig.crash()
    (item,) = caches.look(rig.cache).waiting
    assert (item["name"], item["reason"]) == ("f", "put f: AccessDenied")
    await rig.start()
    await rig.drained()
    await rig.crash()
    assert not caches.look(rig.cache).waiting
    rig = await rig.start()
    assert rig.journal.refusals() == {}


async def test_destination_that_is_not_empty_is_refused(bench: Bench, tmp_path: Path) -> None:
    rig = await crashed(bench)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("mine")
    code, text = invoke("recover", rig.cache, tmp_path / "out")
    assert code == 1
    assert "not an empty directory" in text
    assert (tmp_path / "out/file").read_text() == "mine"


@pytest.mark.parametrize("damage", ["cut", "flipped", "removed"])
async def test_journal_that_lost_its_end(bench: Bench, tmp_path: Path, damage: str) -> None:
    """No mount has looked at it since the kill: what it does not name any more is neither removed nor left behind."""
    rig = await bench.rig()
    rig.journal.checkpoint()
    for number in range(50):
        await rig.put(f"f{number}", b"body of %d" % number)
    cache = tmp_path / "copy"
    shutil.copytree(rig.cache, cache)
    await rig.drained()
    log = cache / "journal.sqlite-wal"
    assert caches.look(cache).problem == ""
    if damage == "cut":
        os.truncate(log, log.stat().st_size // 2)
    elif damage == "removed":
        log.unlink()
    else:
        data = bytearray(log.read_bytes())
        data[len(data) // 2] ^= 1
        log.write_bytes(data)
    assert "the journal's log was" in caches.look(cache).problem
    assert "the journal's log was" in caches.remove(cache)
    copied = list(caches.copy_out(cache, tmp_path / "out"))
    assert not copied[-1].whole
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out" / copied[-1].name).iterdir())
    assert all(b"body of %d" % number in everything for number in range(50))
    assert (cache / "staging").is_dir()
