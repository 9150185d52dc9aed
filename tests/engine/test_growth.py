"""Nothing grows without end: what s3fuse keeps in memory is as large after many rounds of work as after a few.

`sizes` goes through every object of a mount, so that a dictionary that is new is in the test at once.
"""

from __future__ import annotations

import os
import random
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse.namespace import changes, conflicts, inodes
from s3fuse.tree import unused
from s3fuse.writing import leftovers
from tests.engine.rig import SMALL_LIMITS, Bench, Rig, until

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What is as large as it may be from the beginning, or counts what is done and not what is kept.
BOUNDED = {
    "requests": "by operation",
    "failures": "of the faulty store, by operation",
    "_objects": "the bucket itself",
    "_blocks": "clean blocks, as many as `--memory` allows",
}


def _attributes(thing: object) -> Iterator[tuple[str, Any]]:
    for kind in type(thing).__mro__:
        for name in getattr(kind, "__slots__", ()):
            with suppress(AttributeError):
                yield name, getattr(thing, name)
    yield from list(getattr(thing, "__dict__", {}).items())


def sizes(*roots: object) -> dict[str, int]:
    """How much all collections hold together that are reached from these, by class and attribute."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    queue = deque(roots)
    while queue:
        thing = queue.popleft()
        if id(thing) in seen or not type(thing).__module__.startswith("s3fuse"):
            continue
        seen.add(id(thing))
        for name, value in _attributes(thing):
            if isinstance(value, (dict, set, list, deque)):
                if name not in BOUNDED:
                    key = f"{type(thing).__name__}.{name}"
                    found[key] = found.get(key, 0) + len(value)
                queue.extend(value.values() if isinstance(value, dict) else value)
                if isinstance(value, dict):
                    queue.extend(value)
            else:
                queue.append(value)
        if isinstance(thing, dict):
            key = type(thing).__name__
            found[key] = found.get(key, 0) + len(thing)
            queue.extend(thing.values())
    return found


async def work(rig: Rig, bench: Bench, number: int) -> None:
    """A round of everything, below a directory of its own, of which nothing is left."""
    chance = random.Random(number)
    top = f"round{number}"
    await rig.mkdir(top)
    await rig.drained()
    await bench.upload(f"{top}/theirs/{'n' * 300}", b"x")
    await bench.upload(f"{top}/theirs/seen", b"x")
    await rig.ls(f"{top}/theirs")
    await rig.exists(f"{top}/theirs/none{number}")
    for at in range(4):
        await rig.put(f"{top}/f{at}", chance.randbytes(40_000 if at else 10))
    rig.line.quiet = False
    rig.line.schedule("put", None, *[_refused()] * 2)
    rig.line.schedule("multipart_create", _refused(), None)
    await rig.drain(rounds=3)
    rig.line.quiet = True
    await rig.drained()
    await rig.mkdir(f"{top}/d")
    await rig.put(f"{top}/d/x", b"x")
    await rig.setxattr(f"{top}/d/x", b"user.name", b"value")
    await rig.drained()
    await rig.rename(f"{top}/d", f"{top}/e")
    await rig.rename(f"{top}/f1", f"{top}/e/y")
    reader = await rig.open(f"{top}/f2")
    await rig.unlink(f"{top}/f2")
    await rig.pread(reader)
    rig.close(reader)
    await _is_refused(rig, f"{top}/f3")
    await _conflict(rig, bench, f"{top}/f0")
    await _give_up_waiting(rig, f"{top}/f3")
    await rig.drained()
    await rig.ls(f"{top}/e")
    await bench.remove(f"{top}/theirs/{'n' * 300}", f"{top}/theirs/seen")
    await _remove(rig, top)


def _refused() -> Any:
    from s3fuse.store.faulty import refused

    return refused()


async def _is_refused(rig: Rig, path: str) -> None:
    handle = await rig.open(path, os.O_RDWR)
    with suppress(OSError):
        await rig.files.write(handle, 6 << 40, b"too far")
    await rig.truncate(path, 5)
    rig.close(handle)


async def _conflict(rig: Rig, bench: Bench, path: str) -> None:
    await rig.write(path, b"ours")
    await bench.upload(path, b"theirs")
    await rig.drain(rounds=3)


async def _give_up_waiting(rig: Rig, path: str) -> None:
    await rig.write(path, b"again")
    with rig.line.held("put"), trio.move_on_after(0.05):
        await rig.fsync(path)


async def _remove(rig: Rig, path: str) -> None:
    for name in await rig.ls(path):
        if (await rig.walk(f"{path}/{name}")).is_directory:
            await _remove(rig, f"{path}/{name}")
        else:
            await rig.unlink(f"{path}/{name}")
    await rig.drained()
    await rig.rmdir(path)


async def _settle(rig: Rig) -> None:
    """Everything is in the bucket, and all that is remembered for a while is old."""
    await rig.drained()
    for inode in list(rig.core.inodes.table.values()):
        rig.core.inodes.forget(inode.number, inode.lookups)
    await until(lambda: not rig.core.syncer.uploads.left)
    for _ in range(5):
        rig.core.directories.free_unused()
    rig.core.known._forget_steps()
    await rig.core.staging.give_back()


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("kept", [False, True])
async def test_nothing_grows(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, expected_log: list[str], kept: bool
) -> None:
    expected_log += ["was changed by somebody else", "cannot be shown", "unfinished upload"]
    monkeypatch.setattr(inodes, "ANSWER_S", 0.0)
    monkeypatch.setattr(unused, "KEEP_S", 0.0)
    monkeypatch.setattr(conflicts, "MOST_TOLD", 2)
    monkeypatch.setattr(changes, "MOST_VOID", 0)
    monkeypatch.setattr(leftovers, "LOOK_S", 0.0)
    monkeypatch.setattr(leftovers, "RETRY_S", 0.01)
    rig = await bench.rig(limits=SMALL_LIMITS, kept=kept, ttl_s=0.0)
    rig.core.inodes.deleted_at = type(rig.core.inodes.deleted_at)(1000, 0.001, rig.core.inodes.deleted_at.timer)
    roots = (rig.mount, rig.names, rig.files, rig.attributes)
    found = []
    for number in range(9):
        await work(rig, bench, number)
        await _settle(rig)
        if number in (2, 8):
            found.append(sizes(*roots))
    before, after = found
    assert len(before) > 30
    grown = [f"{name}: {before.get(name, 0)}, {size}" for name, size in after.items() if size > before.get(name, 0)]
    assert grown == [], grown
