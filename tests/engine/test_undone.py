"""What others have written is never undone by a rename, a change of attributes, a set-aside or a delete of ours.

They write, as a conditional PUT does, at each point where the bucket lets somebody run while ours goes on: before each
request, and in the windows of those that look first and write later.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from s3fuse.store.memory import ATOMIC, MINIO, SEAWEEDFS, MemoryStore
from s3fuse.writing.plan import Limits
from tests.engine.rig import Bench

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import trio

    from s3fuse.store.base import Capabilities
    from tests.engine.rig import Rig

THEIRS = b"theirs, which was acknowledged"
SERVERS = {"minio": MINIO, "seaweedfs": SEAWEEDFS, "atomic": ATOMIC}
#: Small files as they are, and as if they were large.
SIZES = {"small": Limits(), "large": Limits(send_copy_bytes=0)}


class Crowded(MemoryStore):
    """A bucket in which somebody else acts when others run for the `at`-th time."""

    def __init__(self, capabilities: Capabilities) -> None:
        super().__init__(capabilities)
        self.at = self.points = 0
        self.intrude: Callable[[], None] = lambda: None

    def begin(self, at: int, intrude: Callable[[], None]) -> None:
        self.points, self.at, self.intrude = 0, at, intrude

    async def _others_run(self) -> None:
        await super()._others_run()
        self.points += 1
        if self.points == self.at:
            self.intrude()

    def put_at_once(self, key: str, etag: str | None) -> bool:
        """A conditional PUT of theirs over that version (None: a new name); whether it is acknowledged."""
        found = self._objects.get(key)
        if (found.etag if found is not None else None) != etag:
            return False
        self._store(key, THEIRS, hashlib.md5(THEIRS).hexdigest(), {}, {"content-type": "text/x-theirs"})
        return True


@pytest.fixture(params=SERVERS)
def able(request: pytest.FixtureRequest) -> Capabilities:
    return SERVERS[request.param]


@pytest.fixture(params=SIZES)
def limits(request: pytest.FixtureRequest) -> Limits:
    return SIZES[request.param]


@pytest.fixture
def expected_log() -> list[str]:
    return ["was changed by somebody else", "was deleted by somebody else"]


async def change(rig: Rig, how: str) -> str:
    """Makes a change that is not sent yet; gives the key at which others write."""
    match how:
        case "renamed to a free name":
            await rig.rename("a", "free")
            return "free"
        case "renamed over another":
            await rig.rename("a", "b")
            return "b"
        case "renamed away":
            await rig.rename("a", "free")
            return "a"
        case "chmod":
            await rig.chmod("a", 0o600)
            return "a"
        case "set aside":
            await rig.open("a")
            await rig.unlink("a")
            await rig.put("a", b"the next one")
            return "a"
        case "circle":
            await rig.rename("a", "t")
            await rig.rename("b", "a")
            await rig.rename("t", "b")
            return "b"
        case "removed with others":
            for number in range(3):
                await rig.unlink(f"more{number}")
            await rig.unlink("a")
            return "a"
        case _:
            await rig.unlink("a")
            return "a"


def points(how: str, able: Capabilities, size: Limits, directory: Path, nursery: trio.Nursery) -> Iterator[Bench]:
    """A bench for each point at which others may run during the change."""
    for at in range(1, 200):
        bench = Bench(directory / f"{at}", nursery, store := Crowded(able))
        bench.limits = size
        store.at = at
        yield bench
        if store.points < at:
            return
    raise AssertionError("the change never ends")


async def run(bench: Bench, how: str) -> bool:
    """Makes the change while others write; whether their write was acknowledged."""
    store = bench.store
    assert isinstance(store, Crowded)
    at, acknowledged = store.at, []
    for key in "ab":
        await bench.upload(key, key.encode() * 100)
    for number in range(3):
        await bench.upload(f"more{number}", b"more")
    rig = await bench.rig()
    await rig.ls()
    key = await change(rig, how)
    found = store._objects.get(key)
    etag = found.etag if found is not None else None
    store.begin(at, lambda: acknowledged.append(store.put_at_once(key, etag)))
    await rig.drain(rounds=4)
    await bench.close()
    if acknowledged == [True]:
        assert THEIRS in bench.contents().values(), f"point {at}: {bench.contents()}"
    return acknowledged == [True]


@pytest.mark.parametrize("how", ["renamed to a free name", "renamed over another", "chmod", "set aside", "circle"])
async def test_what_others_wrote_stays(
    how: str, able: Capabilities, limits: Limits, tmp_path: Path, nursery: trio.Nursery
) -> None:
    acknowledged = 0
    for bench in points(how, able, limits, tmp_path, nursery):
        acknowledged += await run(bench, how)
        # What theirs replaced is gone by their will; all the rest is there.
        ours = {"renamed to a free name": b"ab", "renamed over another": b"a", "chmod": b"b"}
        for name in ours.get(how, b""):
            assert bytes([name]) * 100 in bench.contents().values(), bench.contents()
    assert acknowledged


@pytest.mark.parametrize("how", ["renamed away", "removed", "removed with others"])
async def test_deletes_leave_what_others_wrote(
    how: str, able: Capabilities, tmp_path: Path, nursery: trio.Nursery
) -> None:
    """Where the server looks at the version. Elsewhere one moment is left, between our look and the delete."""
    undone = acknowledged = 0
    for bench in points(how, able, Limits(), tmp_path, nursery):
        try:
            acknowledged += await run(bench, how)
        except AssertionError:
            undone += 1
    assert acknowledged
    # Of many at once each is looked at, and then all are deleted; by us one of four files after the other.
    windows = {"renamed away": 1, "removed": 1, "removed with others": 5}
    assert undone <= (how == "removed with others" if able.conditional_delete else windows[how])


@pytest.mark.parametrize("name", SERVERS)
async def test_deletes_are_counted(bench: Bench, name: str) -> None:
    bench.store = MemoryStore(SERVERS[name])
    rig = await bench.rig()
    for path in ("one", "theirs", *(f"many{number}" for number in range(12))):
        await rig.put(path, b"ours")
    await rig.drained()
    await rig.unlink("one")
    await rig.drained()
    await rig.unlink("theirs")
    await bench.upload("theirs", b"changed")
    await rig.drained()
    for number in range(12):
        await rig.unlink(f"many{number}")
    await rig.drained()
    conditional, looked = (0, 13) if name == "minio" else (13, 0)
    assert asdict(rig.core.syncer.deletes.counts) == {
        "conditional": conditional,
        "looked_before": looked,
        "left": 1,
    }
    assert bench.contents() == {"theirs": b"changed"}
