"""Reading a directory while it changes: what was there all the time is given once, under its name and as it is now."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyfuse3
import pytest

from s3fuse.errors import Unavailable
from s3fuse.fuse.adapter import Adapter
from s3fuse.store.faulty import refused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.engine.rig import Bench, Rig

CONTEXT: Any = SimpleNamespace(pid=77, uid=7, gid=8, umask=0o22)
COUNT = 12


@dataclass
class Reader:
    """Reads a directory as the kernel does, some entries a request."""

    rig: Rig
    patch: pytest.MonkeyPatch
    entries: int = 3
    given: list[tuple[str, int, int]] = field(default_factory=list)  # name, inode, size

    async def read(self, path: str, between: Callable[[int], Awaitable[object]]) -> list[str]:
        """The names; `between` is called after each request."""
        adapter = Adapter(self.rig.core)
        adapter.names, adapter.files = self.rig.names, self.rig.files
        left, place = 0, 0

        def reply(_: object, name: bytes, entry: pyfuse3.EntryAttributes, number: int) -> bool:
            nonlocal left, place
            if not left:
                return False
            left -= 1
            place = number
            self.given.append((name.decode(), entry.st_ino, entry.st_size))
            return True

        self.patch.setattr(pyfuse3, "readdir_reply", reply)
        directory = await self.rig.walk(path)
        handle = await adapter.opendir(directory.number, CONTEXT)
        requests, before = 0, -1
        while len(self.given) > before:
            left, before = self.entries, len(self.given)
            await adapter.readdir(handle, place, None)  # type: ignore[arg-type]
            requests += 1
            await between(requests)
        await adapter.releasedir(handle)
        return [name for name, _, _ in self.given]


async def filled(bench: Bench, ttl_s: float, *, dirty: bool = False) -> Rig:
    for number in range(COUNT):
        if not dirty or number % 2:
            await bench.upload(f"d/f{number:02}", b"x")
    await bench.upload("e/other", b"other")
    rig = await bench.rig(ttl_s=ttl_s)
    for number in range(0, COUNT if dirty else 0, 2):
        await rig.put(f"d/f{number:02}", b"new")
    return rig


NAMES = [f"f{number:02}" for number in range(COUNT)]


@pytest.mark.parametrize("ttl_s", [0.0, 1000.0])
async def test_a_file_that_is_moved_away_is_not_given_under_its_new_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, ttl_s: float
) -> None:
    rig = await filled(bench, ttl_s)

    async def move(requests: int) -> None:
        if requests == 1:
            await rig.rename("d/f07", "e/y")
            await rig.rename("d/f08", "d/z")

    names = await Reader(rig, monkeypatch).read("d", move)
    assert names == [name for name in NAMES if name not in ("f07", "f08")]


@pytest.mark.parametrize("ttl_s", [0.0, 1000.0])
async def test_a_file_that_is_replaced_is_given(bench: Bench, monkeypatch: pytest.MonkeyPatch, ttl_s: float) -> None:
    rig = await filled(bench, ttl_s)
    await rig.put("t", b"replacement")

    async def replace(requests: int) -> None:
        if requests == 1:
            await rig.rename("t", "d/f07")
        elif requests == 2:
            await bench.upload("d/f09", b"of others")
            await rig.core.directories._probe(await rig.walk("d"), "f09")

    reader = Reader(rig, monkeypatch)
    assert await reader.read("d", replace) == NAMES
    sizes = {name: size for name, _, size in reader.given}
    assert (sizes["f07"], sizes["f09"]) == (11, 9)


@pytest.mark.parametrize("ttl_s", [0.0, 1000.0])
@pytest.mark.parametrize("dirty", [False, True])
async def test_what_is_forgotten_or_arrives_meanwhile_is_given(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, ttl_s: float, dirty: bool
) -> None:
    rig = await filled(bench, ttl_s, dirty=dirty)

    async def forget(_: int) -> None:
        await rig.drain()
        for inode in list(rig.core.inodes.walk(rig.core.inodes.root)):
            if not inode.is_directory:
                rig.core.inodes.forget(inode.number, inode.lookups)

    assert await Reader(rig, monkeypatch).read("d", forget) == NAMES


async def test_a_failure_in_the_midst_takes_back_nothing_that_is_given(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server does not tell is asked for by the next request, which fails if it does."""
    rig = await filled(bench, 0.0)
    rig.line.quiet = False
    directory = await rig.walk("d")

    async def fail(requests: int) -> None:
        if requests == 1:
            rig.core.inodes.detach(directory.children["f04"])
            rig.core.inodes.detach(directory.children["f07"])
            directory.folder().complete = False
            rig.line.schedule("list", refused(Unavailable("away")))

    reader = Reader(rig, monkeypatch)
    assert await reader.read("d", fail) == NAMES


@pytest.mark.parametrize("ttl_s", [0.0, 1000.0])
@pytest.mark.parametrize("seed", range(15))
async def test_whatever_happens_meanwhile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, seed: int, ttl_s: float
) -> None:
    """Names that stay are given exactly once; what is given has that name at that moment."""
    rig = await filled(bench, ttl_s, dirty=bool(seed % 2))
    chance = random.Random(seed)
    touched: set[str] = set()
    directory = await rig.walk("d")

    async def anything(_: int) -> None:
        name = chance.choice(NAMES)
        match chance.randrange(6):
            case 0:
                touched.add(name)
                await rig.rename(f"d/{name}", f"e/{name}") if await rig.exists(f"d/{name}") else None
            case 1:
                touched.add(name)
                await rig.unlink(f"d/{name}") if await rig.exists(f"d/{name}") else None
            case 2:
                await rig.put("t", b"t")
                await rig.rename("t", f"d/{name}")
            case 3:
                await rig.drain()
            case 4:
                for inode in list(directory.children.values()):
                    rig.core.inodes.forget(inode.number, inode.lookups)
            case _:
                await rig.ls("d")

    reader = Reader(rig, monkeypatch, entries=1 + seed % 3)
    reply = reader.read("d", anything)
    names = await reply
    assert len(names) == len(set(names))
    assert set(names) <= set(NAMES)
    assert set(NAMES) - touched <= set(names)
