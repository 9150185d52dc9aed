"""A name has one inode, whatever others do to it, and what is known never goes back to an older answer."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse.errors import StoreError
from s3fuse.fuse.adapter import Adapter
from tests.engine.rig import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.engine.rig import Bench, Clock, Rig


def check_names(rig: Rig) -> None:
    """Every inode that has a name has it alone."""
    inodes = rig.core.inodes
    for number, inode in inodes.table.items():
        assert inode.number == number
        if inode.linked and inode.parent is not None:
            assert inode.parent.children.get(inode.name) is inode, inode
            assert inode.parent.linked
            assert inode.parent.is_directory
        for name, child in inode.children.items():
            assert child.name == name
            assert child.parent is inode
            assert child.linked
            assert inodes.table.get(child.number) is child


# -- a directory where others put a file, a file where others make a directory


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
async def test_a_directory_with_an_open_file_becomes_a_file(bench: Bench, flags: int) -> None:
    """The file stays reachable where it is written to, and what others made is shown once that is over."""
    await bench.upload("d/")
    await bench.upload("d/x", b"x")
    rig = await bench.rig(ttl_s=0.0)
    handle = await rig.open("d/x", flags)
    await bench.remove("d/", "d/x")
    await bench.upload("d", b"file")
    await rig.ls()
    check_names(rig)
    if flags == os.O_RDWR:
        assert (await rig.walk("d")).is_directory
        await rig.files.write(handle, 0, b"y")
        assert await rig.cat("d/x") == b"y"
    rig.forget()
    rig.close(handle)
    rig.forget()
    await rig.drain()
    check_names(rig)
    if flags == os.O_RDONLY:
        assert await rig.cat("d") == b"file"


async def test_a_prefix_appears_where_a_file_is_open_for_writing(bench: Bench, expected_log: list[str]) -> None:
    expected_log.append("cannot be shown")
    await bench.upload("d", b"file")
    rig = await bench.rig(ttl_s=0.0)
    handle = await rig.open("d", os.O_RDWR)
    await bench.upload("d/x", b"x")
    await rig.ls()
    check_names(rig)
    assert not (await rig.walk("d")).is_directory
    rig.close(handle)
    rig.forget()
    await rig.ls()
    check_names(rig)
    assert await rig.cat("d/x") == b"x"


@pytest.mark.parametrize("page_entries", [1, 2, 5])
async def test_file_and_directory_of_one_name_on_different_pages(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, page_entries: int, expected_log: list[str]
) -> None:
    """The directory is shown, and it is the same one in every listing; when it is gone the file is shown."""
    expected_log.append("cannot be shown")
    small_pages(bench, monkeypatch, page_entries)
    await bench.upload("d", b"file")
    for number in range(7):
        await bench.upload(f"d-{number}", b"between")
    await bench.upload("d/x", b"x")
    await bench.upload("e", b"behind")
    rig = await bench.rig(ttl_s=0.0)
    await rig.ls()
    first = await rig.walk("d")
    inside = await rig.walk("d/x")
    for _ in range(3):
        assert await rig.ls() == ["d", *(f"d-{number}" for number in range(7)), "e"]
        check_names(rig)
        assert await rig.walk("d") is first
        assert await rig.walk("d/x") is inside
    await bench.remove("d/x")
    await rig.ls()
    check_names(rig)
    assert await rig.cat("d") == b"file"


def small_pages(bench: Bench, monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    list_page = bench.store.list_page

    async def short(prefix: str, *, limit: int = 1000, **options: Any) -> Any:
        return await list_page(prefix, limit=min(limit, entries), **options)

    monkeypatch.setattr(bench.store, "list_page", short)


# -- what the kernel forgets never ends the worker


async def test_forgetting_never_raises(bench: Bench, expected_log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await bench.rig()
    inode = await rig.put("f", b"x")
    await rig.drained()
    adapter = Adapter(rig.core)
    inode.parent.children.pop("f")  # type: ignore[union-attr]
    await adapter.forget([(inode.number, inode.lookups), (999, 1)])
    assert inode.number not in rig.core.inodes.table

    def broken(*_: object) -> None:
        raise KeyError("f")

    monkeypatch.setattr(rig.core.inodes, "forget", broken)
    expected_log.append("what the kernel has forgotten is kept")
    await adapter.forget([(1, 1)])


# -- an older answer


class Late:
    """Holds the first answer for which `holds` is true: it was made in time and comes late."""

    def __init__(self, rig: Rig, patch: pytest.MonkeyPatch, holds: Callable[[str, str, Any], bool]) -> None:
        self.held = False
        self._go = trio.Event()
        faulty = rig.line._faulty

        async def called(operation: str, call: Callable[[], Awaitable[Any]], key: str) -> Any:
            answer = await faulty(operation, call, key)
            if not self.held and holds(operation, key, answer):
                self.held = True
                await self._go.wait()
            return answer

        patch.setattr(rig.line, "_faulty", called)

    async def while_held(self, asks: Callable[[], Awaitable[object]], do: Callable[[], Awaitable[object]]) -> None:
        """Does something between answer and arrival of what `asks` asks for."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(asks)
            await until(lambda: self.held)
            await do()
            self._go.set()


CHANGES = ["made", "replaced", "deleted", "made a directory", "a directory no more"]


async def before_change(bench: Bench, change: str) -> None:
    if change in ("replaced", "deleted"):
        await bench.upload("d/a", b"old")
    elif change == "a directory no more":
        await bench.upload("d/a/x", b"old")


async def make_change(bench: Bench, change: str) -> None:
    if change == "deleted":
        await bench.remove("d/a")
    elif change == "made a directory":
        await bench.upload("d/a/x", b"new")
    else:
        await bench.remove("d/a/x")
        await bench.upload("d/a", b"new version")


async def check_change(rig: Rig, change: str) -> None:
    if change == "deleted":
        assert not await rig.exists("d/a")
    elif change == "made a directory":
        assert await rig.cat("d/a/x") == b"new"
    else:
        assert await rig.cat("d/a") == b"new version"
    check_names(rig)


@pytest.mark.parametrize("ttl_s", [0.0, 1000.0])
@pytest.mark.parametrize("page", [0, 1])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("change", CHANGES)
async def test_an_older_listing_takes_nothing_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, clock: Clock, change: str, known: bool, page: int, ttl_s: float
) -> None:
    """Others change a name of the first page while a page is under way, and somebody looks at it."""
    small_pages(bench, monkeypatch, 3)
    for number in range(4):
        await bench.upload(f"d/f{number}", b"x")
    await before_change(bench, change)
    rig = await bench.rig(ttl_s=ttl_s)
    directory = await rig.walk("d")
    if known:
        await rig.ls("d")
        clock.advance(ttl_s + 1)
    late = Late(
        rig,
        monkeypatch,
        lambda operation, key, got: operation == "list" and key == "d/" and (got.next_token is None) == page,
    )

    async def look() -> None:
        await make_change(bench, change)
        await rig.core.directories._probe(directory, "a")

    await late.while_held(lambda: rig.core.directories.load(directory), look)
    found = directory.children.get("a")
    assert (found is not None) == (change != "deleted")
    await check_change(rig, change)
    clock.advance(ttl_s + 1)
    await check_change(rig, change)


@pytest.mark.parametrize("asked", ["probe", "learn", "tree"])
@pytest.mark.parametrize("change", CHANGES)
async def test_an_older_answer_about_one_name_takes_nothing_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, clock: Clock, change: str, asked: str
) -> None:
    """It comes after a listing that began later."""
    await bench.upload("d/f", b"x")
    await before_change(bench, change)
    rig = await bench.rig(ttl_s=1000.0)
    directory = await rig.walk("d")
    await rig.ls("d")
    clock.advance(1001.0)
    directories = rig.core.directories
    known = directory.children.get("a")
    if known is None and asked == "learn":
        return

    async def ask() -> None:
        if asked == "probe":
            await directories._probe(directory, "a")
        elif asked == "tree":
            await directories.tree(directory)
        else:
            assert known is not None
            await directories.learn(known)

    async def look() -> None:
        clock.advance(1.0)
        await make_change(bench, change)
        await directories.load(directory)

    late = Late(rig, monkeypatch, lambda operation, key, _: operation in ("list", "head"))
    await late.while_held(ask, look)
    found = directory.children.get("a")
    assert (found is not None) == (change != "deleted")
    await check_change(rig, change)


# -- anything


KEYS = ["a", "a/", "a/x", "a/b/y", "a-1", "b", "b/", "b/x"]
PATHS = ["a", "a/x", "a/b", "a/b/y", "b", "b/x"]


class Anything:
    """Does what others, programs and the kernel may do, in any order."""

    def __init__(self, rig: Rig, bench: Bench, seed: int) -> None:
        self.rig = rig
        self.bench = bench
        self.random = random.Random(seed)
        self.handles: list[int] = []
        self.count = 0

    async def step(self) -> None:
        rig, path = self.rig, self.random.choice(PATHS)
        match self.random.randrange(12):
            case 0 | 1 | 2:
                self.count += 1
                await self.bench.upload(self.random.choice(KEYS), b"%d" % self.count)
            case 3 | 4:
                await self.bench.remove(self.random.choice(KEYS))
            case 5 | 6:
                await rig.ls(self.random.choice(["", "a", "a/b", "b"]))
            case 7:
                self.handles.append(await rig.open(path, self.random.choice([os.O_RDONLY, os.O_RDWR])))
            case 8 if self.handles:
                self.rig.close(self.handles.pop(self.random.randrange(len(self.handles))))
            case 9:
                rig.forget()
            case 10:
                await rig.rename(path, self.random.choice(PATHS))
            case _:
                await rig.drain()
                await self.random.choice([rig.unlink, rig.rmdir, rig.mkdir, rig.walk, rig.put])(path)


@pytest.mark.parametrize("ttl_s", [0.0, 1000.0])
@pytest.mark.parametrize("seed", range(20))
async def test_a_name_has_one_inode_whatever_happens(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, expected_log: list[str], seed: int, ttl_s: float
) -> None:
    expected_log += ["cannot be shown", "by somebody else"]
    small_pages(bench, monkeypatch, 1 + seed % 4)
    rig = await bench.rig(ttl_s=ttl_s)
    anything = Anything(rig, bench, seed)
    for _ in range(150):
        with suppress(OSError, StoreError):
            await anything.step()
        check_names(rig)
