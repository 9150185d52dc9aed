"""After a power failure: with `--fsync local` every fsynced file is whole, and no other is a mixture.

`Disk` stands for a disk with a volatile cache. What was synced, by the syncs that the daemon makes, is there; of the
rest anything may be: the state at the last sync, the state now, or pages of both. Names are there if their directory
was synced since they were made.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engine.rig import Bench, until

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio

    from tests.engine.rig import Rig

PAGE_BYTES = 4096
#: SQLite syncs it itself, and nothing is moved into it here.
DATABASE = "journal.sqlite"


class Disk:
    """What is on the disk of a cache directory."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.calls: list[str] = []
        self._bodies: dict[str, bytes] = {}
        self._names: set[str] = set()
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, sync: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(descriptor: int) -> None:
            sync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path != self.root and self.root not in path.parents:
                return
            name = str(path.relative_to(self.root))
            self.calls.append(name)
            if path.is_dir():
                self._names -= {known for known in self._names if Path(known).parent == Path(name)}
                self._names |= {str(entry.relative_to(self.root)) for entry in path.iterdir()}
            else:
                self._bodies[name] = path.read_bytes()

        return wrapped

    def image(self, target: Path, rng: random.Random | None) -> None:
        """Writes what is there after a power failure; without `rng` nothing that was not synced."""
        target.mkdir()
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if path.is_dir():
                (target / name).mkdir()
                continue
            if name.endswith("-shm"):
                continue
            now = path.read_bytes()
            if name == DATABASE:
                (target / name).write_bytes(now)
                continue
            if name not in self._names and (rng is None or rng.random() < 0.5):
                continue
            (target / name).write_bytes(self._left(self._bodies.get(name, b""), now, rng))

    @staticmethod
    def _left(synced: bytes, now: bytes, rng: random.Random | None) -> bytes:
        kind = "synced" if rng is None else rng.choice(("synced", "now", "pages", "pages"))
        if kind == "synced":
            return synced
        if kind == "now" or rng is None:
            return now
        size = rng.choice((len(synced), len(now)))
        pages = []
        for at in range(0, size, PAGE_BYTES):
            page = rng.choice((synced, now))[at : min(size, at + PAGE_BYTES)]
            pages.append(page.ljust(min(size, at + PAGE_BYTES) - at, b"\0"))
        return b"".join(pages)


@pytest.fixture
def disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(bench.directory / "cache", monkeypatch)


async def local(bench: Bench) -> Rig:
    """A mount that uploads nothing."""
    return await bench.rig(fsync_to="local", paused=True)


async def recovered(
    disk: Disk, nursery: trio.Nursery, folder: Path, bodies: set[str], rng: random.Random | None
) -> dict[str, bytes]:
    """What the bucket has once the cache directory was mounted after a power failure."""
    os.mkdir(folder)
    disk.image(folder / "cache", rng)
    after = Bench(folder, nursery)
    rig = await after.rig()
    for _ in range(6):
        await rig.drain()
    await after.close()
    return after.contents()


async def test_order_of_syncs(bench: Bench, disk: Disk) -> None:
    """The bytes, the names of new files, and then the journal's rows."""
    rig = await local(bench)
    assert {"staging", "."} <= set(disk.calls)
    handle = await rig.create("file")
    await rig.files.write(handle, 0, b"body")
    disk.calls.clear()
    await rig.files.fsync(handle)
    assert disk.calls == ["staging/slab", "journal.sqlite-wal"]
    disk.calls.clear()
    await rig.files.write(handle, 4, bytes(1 << 20))
    await rig.files.fsync(handle)
    inode = await rig.walk("file")
    assert inode.data is not None
    own = f"staging/{inode.number}.{inode.data.layers[0].generation}"
    # It leaves the slab, where its first bytes were synced, before the fsync.
    assert disk.calls == [own, "staging", "journal.sqlite-wal"] * 2
    disk.calls.clear()
    await rig.files.sync_directory(rig.core.inodes.root)
    assert disk.calls == ["journal.sqlite-wal"]


async def test_bytes_that_move_while_they_are_synced(
    bench: Bench, disk: Disk, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write during the fsync makes the file outgrow the slab; what was fsynced is in the new file."""
    rig = await local(bench)
    handle = await rig.create("file")
    await rig.files.write(handle, 0, b"body")
    real = rig.core.staging.slab.descriptor
    synced = False

    def late(descriptor: int, sync: Callable[[int], None] = os.fdatasync) -> None:
        nonlocal synced
        if not synced and os.path.samestat(os.fstat(descriptor), os.fstat(real)):
            synced = True
            import trio

            trio.from_thread.run(rig.files.write, handle, 4, bytes(100_000))
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", late)
    await rig.files.fsync(handle)
    assert synced
    found = await recovered(disk, nursery, bench.directory / "after", {"file"}, None)
    assert found == {"file": b"body" + bytes(100_000)}


@pytest.mark.parametrize("seed", range(12))
async def test_fsynced_files_are_whole(
    bench: Bench, disk: Disk, nursery: trio.Nursery, expected_log: list[str], seed: int
) -> None:
    """T08: even ones are fsynced, and small ones share the slab with others that are not."""
    expected_log += ["damaged", "not what was written", "staging"]
    rng = random.Random(seed)
    rig = await local(bench)
    bodies: dict[str, bytes] = {}
    for n in range(30):
        name = f"file{n}"
        bodies[name] = rng.randbytes(rng.choice((1, 5_000, 60_000, 200_000)))
        handle = await rig.create(name)
        half = len(bodies[name]) // 2
        await rig.files.write(handle, 0, bodies[name][:half] or b"")
        await rig.files.write(handle, half, bodies[name][half:])
        if n % 2 == 0:
            await rig.files.fsync(handle)
        rig.close(handle)
    fsynced = {name for name in bodies if int(name[4:]) % 2 == 0}
    found = await recovered(disk, nursery, bench.directory / "after", set(bodies), rng if seed else None)
    for name, body in bodies.items():
        if name in fsynced:
            assert found.get(name) == body, name
        elif name in found:
            half = len(body) // 2
            assert found[name] in (b"", body[:half], body), name


@pytest.mark.parametrize("seed", range(30))
async def test_what_was_fsynced_stays_whatever_is_written_later(
    bench: Bench,
    disk: Disk,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    expected_log: list[str],
    seed: int,
) -> None:
    """Each byte of a file is what it was at its last fsync, or what it became later; as on a disk."""
    expected_log += ["were not synced and are lost", "are lost; what was staged"]
    rng = random.Random(seed)
    rig = await local(bench)
    states: dict[str, list[bytes]] = {f"file{n}": [b""] for n in range(6)}
    limits = {name: rng.choice((300, 9_000, 60_000, 70_000, 400_000)) for name in states}
    handles = {name: await rig.create(name) for name in states}
    for handle in handles.values():
        await rig.files.fsync(handle)
    for _ in range(rng.randrange(10, 80)):
        name = rng.choice(list(states))
        body = states[name][-1]
        kind = rng.choice(("append", "overwrite", "overwrite", "rewrite", "cut", "cut", "fsync", "fsync", "room"))
        if kind == "room":  # others need what was cut off
            await rig.core.staging.give_back()
        if kind == "fsync":
            await rig.files.fsync(handles[name])
            states[name] = [body]
        if kind in ("cut", "rewrite"):
            size = rng.randrange(len(body) + 1) if kind == "cut" else 0
            rig.files.truncate(await rig.walk(name), size)
            body = body[:size]
            states[name].append(body)
        if kind in ("append", "overwrite", "rewrite"):
            start = rng.randrange(len(body) + 1) if kind == "overwrite" else len(body)
            data = rng.randbytes(rng.randrange(1, max(2, limits[name] - start)))
            await rig.files.write(handles[name], start, data)
            body = body[:start] + data + body[start + len(data) :]
            states[name].append(body)
    monkeypatch.setattr("s3fuse.writing.journal.boot_id", lambda: "the next")
    found = await recovered(disk, nursery, bench.directory / "after", set(states), rng if seed else None)
    for name, later in states.items():
        assert name in found, name
        body = found[name]
        shortest, longest = min(map(len, later)), max(map(len, later))
        assert shortest <= len(body) <= longest, name
        for at, byte in enumerate(body[:shortest]):
            assert any(byte == state[at] for state in later), (name, at)


async def test_an_uploaded_file_whose_slot_was_used_again(
    bench: Bench, disk: Disk, nursery: trio.Nursery, expected_log: list[str]
) -> None:
    """The journal forgot that it is in the bucket, and its bytes are another file's now: the bucket's are right."""
    expected_log += ["damaged", "not what was written"]
    rig = await bench.rig(fsync_to="local")
    await rig.put("old", b"old body")
    await rig.fsync("old")
    before = (bench.directory / "cache" / "journal.sqlite-wal").read_bytes()
    await rig.drained()
    handle = await rig.create("new")
    await rig.files.write(handle, 0, b"new bytes")
    await rig.crash()
    (bench.directory / "image").mkdir()
    disk.image(bench.directory / "image" / "cache", random.Random(0))
    image = bench.directory / "image" / "cache"
    (image / "staging" / "slab").write_bytes((bench.directory / "cache" / "staging" / "slab").read_bytes())
    (image / "journal.sqlite-wal").write_bytes(before)
    after = Bench(bench.directory / "image", nursery, bench.store)
    rig = await after.rig()
    await rig.drained()
    assert bench.contents() == {"old": b"old body"}
    assert await rig.cat("old") == b"old body"
    await until(lambda: not rig.dirty())
    await after.close()


@pytest.mark.parametrize("seed", range(24))
async def test_no_zeros_stand_for_bytes_that_were_not_synced(
    bench: Bench, disk: Disk, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, expected_log: list[str], seed: int
) -> None:
    """The journal's rows are on the disk, and of what they name only what was synced: programs wrote no zero at all."""
    expected_log += ["were not synced and are lost"]
    rng = random.Random(seed)
    rig = await local(bench)
    handle = await rig.create("file")
    await rig.files.fsync(handle)
    body, synced, shortest = b"", b"", 0
    for _ in range(rng.randrange(2, 12)):
        kind = rng.choice(("append", "append", "append", "overwrite", "cut", "fsync") if seed else ("append",))
        if kind == "fsync":
            await rig.files.fsync(handle)
            synced, shortest = body, len(body)
        elif kind == "cut":
            body = body[: rng.randrange(len(body) + 1)]
            rig.files.truncate(await rig.walk("file"), len(body))
            shortest = min(shortest, len(body))
        else:
            start = rng.randrange(len(body) + 1) if kind == "overwrite" else len(body)
            data = bytes(rng.randrange(1, 256) for _ in range(rng.choice((1, 300, 5000, 40_000))))
            await rig.files.write(handle, start, data)
            body = body[:start] + data + body[start + len(data) :]
    monkeypatch.setattr("s3fuse.writing.journal.boot_id", lambda: "the next")
    folder = bench.directory / "after"
    folder.mkdir()
    disk.image(folder / "cache", None)
    log = f"{DATABASE}-wal"
    (folder / "cache" / log).write_bytes((bench.directory / "cache" / log).read_bytes())
    after = Bench(folder, nursery)
    rig = await after.rig(fsync_to="local")
    await rig.drain(rounds=3)
    await after.close()
    found = after.data("file")
    assert b"\0" not in found
    assert shortest <= len(found) <= max(len(body), len(synced))


@pytest.mark.parametrize("size", [8, 100_000])
@pytest.mark.parametrize("was_there", [False, True])
async def test_an_uploaded_file_whose_place_is_the_disk_s_again(
    bench: Bench,
    disk: Disk,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    expected_log: list[str],
    size: int,
    was_there: bool,
) -> None:
    """The same for bytes that nobody has fsynced: the journal still names them, and their place is gone."""
    expected_log += ["damaged", "not what was written", "were not synced and are lost", "are lost; what was staged"]
    body = random.Random(1).randbytes(size)
    rig = await bench.rig(fsync_to="local")
    if was_there:
        await bench.upload("old", b"before")
        await rig.write("old", body, flags=os.O_TRUNC)
    else:
        await rig.put("old", body)
    await rig.put("other", b"other")
    await rig.fsync("other")
    before = (bench.directory / "cache" / "journal.sqlite-wal").read_bytes()
    await rig.drained()
    await rig.core.staging.give_back()
    await rig.crash()
    (bench.directory / "image").mkdir()
    disk.image(bench.directory / "image" / "cache", random.Random(0))
    image = bench.directory / "image" / "cache"
    for path in (image / "staging").iterdir():
        path.unlink()
    (image / "staging" / "slab").write_bytes((bench.directory / "cache" / "staging" / "slab").read_bytes())
    (image / "journal.sqlite-wal").write_bytes(before)
    monkeypatch.setattr("s3fuse.writing.journal.boot_id", lambda: "the next")
    after = Bench(bench.directory / "image", nursery, bench.store)
    rig = await after.rig(fsync_to="local")
    await rig.drained()
    assert bench.contents() == {"old": body, "other": b"other"}
    assert await rig.cat("old") == body
