"""What others do at each await of an operation on names: the kernel forgets, uploads arrive, other nodes write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse.tree import unused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.engine.rig import Bench, Rig


class Between:
    """Does something before and after each call that the mount makes to the store, but for what that makes itself."""

    def __init__(self, rig: Rig, patch: pytest.MonkeyPatch) -> None:
        self.rig = rig
        self.do: Callable[[], Awaitable[object]] | None = None
        self.only: int | None = None  # at this place only
        self.places = 0
        faulty = rig.line._faulty

        async def called(operation: str, call: Callable[[], Awaitable[Any]], key: str) -> Any:
            await self._step()
            answer = await faulty(operation, call, key)
            await self._step()
            return answer

        patch.setattr(rig.line, "_faulty", called)

    async def _step(self) -> None:
        do, self.do = self.do, None
        if do is None:
            return
        self.places += 1
        if self.only is None or self.only == self.places:
            await do()
        self.do = do

    async def run(self, do: Callable[[], Awaitable[object]], operation: Awaitable[object]) -> None:
        self.do, self.places = do, 0
        try:
            await operation
        finally:
            self.do = None


async def forget(rig: Rig) -> None:
    """What the kernel may drop: not the directories that a request under way is about."""
    for inode in reversed(list(rig.core.inodes.walk(rig.core.inodes.root))):
        if not inode.opens and inode.name != "other":
            rig.core.inodes.forget(inode.number, inode.lookups)


async def arrive(rig: Rig) -> None:
    await rig.drain()


async def arrive_and_forget(rig: Rig) -> None:
    await rig.drain()
    await forget(rig)


async def list_all(rig: Rig) -> None:
    """As far as that does not wait for the operation itself."""
    for path in ("", "d", "d/sub"):
        with trio.move_on_after(0.02):
            if await rig.exists(path):
                await rig.ls(path)
    await forget(rig)


FILES = {"a": b"a", "b": b"bb", "sub/c": b"ccc", "sub/deep/e": b"eeee", "x": b"new", "sub/y": b"newer"}


@pytest.mark.parametrize("ttl_s", [0.0, 1000.0])
@pytest.mark.parametrize("meanwhile", [forget, arrive, arrive_and_forget, list_all])
@pytest.mark.parametrize("where", ["d2", "other/d", "empty"])
@pytest.mark.parametrize("place", [None, 1, 2, 3, 4])
async def test_a_directory_is_renamed_with_all_that_is_in_it(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    ttl_s: float,
    meanwhile: Callable[[Rig], Awaitable[None]],
    where: str,
    place: int | None,
) -> None:
    for name, data in FILES.items():
        if not data.startswith(b"new"):
            await bench.upload(f"d/{name}", data)
    await bench.upload("empty/")
    await bench.upload("other/")
    rig = await bench.rig(ttl_s=ttl_s)
    for name, data in FILES.items():
        if data.startswith(b"new"):
            await rig.put(f"d/{name}", data)
    between = Between(rig, monkeypatch)
    between.only = place
    await between.run(lambda: meanwhile(rig), rig.rename("d", where))
    await rig.drained()
    rig.forget()
    wanted = {f"{where}/{name}": data for name, data in FILES.items()}
    assert {key: data for key, data in bench.contents().items() if not key.endswith("/")} == wanted
    for name, data in FILES.items():
        assert await rig.cat(f"{where}/{name}") == data
    assert not await rig.exists("d")
    rig.check_clean()


@pytest.mark.parametrize("ttl_s", [0.0, 1000.0])
@pytest.mark.parametrize("meanwhile", [forget, arrive_and_forget, list_all])
@pytest.mark.parametrize("place", [None, 1, 2])
async def test_a_directory_with_something_in_it_is_not_removed(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    ttl_s: float,
    meanwhile: Callable[[Rig], Awaitable[None]],
    place: int | None,
) -> None:
    """Nor replaced by a rename."""
    await bench.upload("d/", b"")
    await bench.upload("d/a", b"a")
    await bench.upload("e/", b"")
    rig = await bench.rig(ttl_s=ttl_s)
    between = Between(rig, monkeypatch)
    between.only = place
    for operation in (rig.rmdir("d"), rig.rename("e", "d")):
        with pytest.raises(OSError, match="not empty"):
            await between.run(lambda: meanwhile(rig), operation)
    await rig.drained()
    assert bench.listed() == ["d/", "d/a", "e/"]


async def test_what_the_kernel_never_asked_for_is_freed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is old: what a rename that fails has found, what a lookup has listed, what was kept when forgotten."""
    for number in range(50):
        await bench.upload(f"d/{number}/f", b"x")
        await bench.upload(f"many/{number}", b"x")
    await bench.upload("e/x", b"x")
    rig = await bench.rig(ttl_s=0.0)
    with pytest.raises(OSError, match="not empty"):
        await rig.rename("d", "e")
    await rig.ls("many")
    inodes = rig.core.inodes
    for inode in reversed(list(inodes.walk(inodes.root))):
        if inode.lookups:
            inodes.forget(inode.number, inode.lookups)
    assert len(inodes.table) > 100
    inodes.sweep()
    assert len(inodes.table) > 100
    monkeypatch.setattr(unused, "KEEP_S", 0.0)
    for _ in range(4):  # children first
        inodes.sweep()
    assert set(inodes.table) == {1}
    assert not inodes.root.children
    assert len(inodes.unused) == 0
    assert not inodes.unused._held
    assert await rig.cat("d/7/f") == b"x"


async def test_what_is_in_use_is_not_freed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what the listing that is still good has shown, nor what is under a directory that is."""
    await bench.upload("d/open", b"open")
    await bench.upload("d/known", b"x")
    rig = await bench.rig(ttl_s=1000.0)
    handle = await rig.open("d/open")
    await rig.walk("d/known")
    await rig.put("new", b"new")
    monkeypatch.setattr(unused, "KEEP_S", -2000.0)
    rig.core.inodes.sweep()
    assert {inode.name for inode in rig.core.inodes.table.values()} == {"", "d", "open", "known", "new"}
    rig.forget()
    bench.counted()
    assert await rig.ls("d") == ["known", "open"]
    rig.close(handle)
    assert await rig.cat("new") == b"new"
