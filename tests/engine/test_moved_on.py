"""A file is renamed, removed or made anew at each await of each operation of the write-back, also of a conflict.

Whatever comes in between: nobody else's name is touched, what was deleted stays so, and each version survives.
"""

from __future__ import annotations

import os
from binascii import crc32
from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse import keys
from s3fuse.store.memory import MINIO, SEAWEEDFS, MemoryStore
from tests.engine.rig import SMALL_LIMITS, Bench, Line, Rig
from tests.engine.test_conflicts import THEIRS as THEIRS_BELOW
from tests.engine.test_conflicts import ZEROS as ZEROS_BELOW

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.engine.rig import Clock

BASE = b"base" * 3000
OURS = b"ours" * 3000
THEIRS = b"they" * 3000
NEW = b"new"
#: More awaits than any operation has; each is a request, before it is sent or after it was answered.
MOST = 80
#: Of so many one is tried, another one for each combination; `S3FUSE_MOVED_ON_STRIDE=1` tries all.
STRIDE = int(os.environ.get("S3FUSE_MOVED_ON_STRIDE", "20"))


class Interrupted(Line):
    """Calls something at one of its moments: before a request, or between its answer and who waits for it."""

    at = -1
    action: Callable[[], Awaitable[None]]
    _busy = False

    async def _faulty(self, operation: str, call: Callable[[], Awaitable[Any]], key: str) -> Any:
        if self._busy:
            return await super()._faulty(operation, call, key)
        with trio.CancelScope(shield=True):
            await self._moment()
        try:
            return await super()._faulty(operation, call, key)
        finally:
            with trio.CancelScope(shield=True):
                await self._moment()

    async def _moment(self) -> None:
        self.at -= 1
        if self.at == 0:
            self._busy = True
            await self.action()
            self._busy = False


# -- what is to be brought to the bucket; each leaves `d/x` dirty


async def new_file(bench: Bench, rig: Rig) -> None:
    await rig.put("d/x", OURS)


async def base(bench: Bench, rig: Rig, *, cached: bool) -> None:
    await rig.put("d/x", BASE)
    await rig.drained()
    if cached:
        await rig.cat("d/x")


async def whole(bench: Bench, rig: Rig) -> None:
    await base(bench, rig, cached=False)
    await rig.write("d/x", OURS, flags=os.O_TRUNC)


async def part(bench: Bench, rig: Rig) -> None:
    await base(bench, rig, cached=False)
    await rig.write("d/x", OURS, 5000)


async def part_of_what_is_cached(bench: Bench, rig: Rig) -> None:
    await base(bench, rig, cached=True)
    await rig.write("d/x", OURS, 5000)


async def attributes(bench: Bench, rig: Rig) -> None:
    await base(bench, rig, cached=False)
    await rig.chmod("d/x", 0o600)


async def moved(bench: Bench, rig: Rig) -> None:
    await rig.put("d/w", BASE)
    await rig.drained()
    await rig.rename("d/w", "d/x")


async def moved_and_written(bench: Bench, rig: Rig) -> None:
    await moved(bench, rig)
    await rig.write("d/x", OURS, 5000)


async def replaced(bench: Bench, rig: Rig) -> None:
    await base(bench, rig, cached=False)
    await rig.put("d/t", OURS)
    await rig.rename("d/t", "d/x")


WORK = [new_file, whole, part, part_of_what_is_cached, attributes, moved, moved_and_written, replaced]
#: Those with bytes of ours that are nowhere else.
WRITES = [new_file, whole, part, part_of_what_is_cached, moved_and_written, replaced]


# -- what others have done before


async def nothing(bench: Bench) -> None:
    pass


async def upload(bench: Bench) -> None:
    await bench.upload("d/x", THEIRS)


async def delete(bench: Bench) -> None:
    await bench.remove("d/x", "d/w")


# -- what comes in between


async def rename(rig: Rig) -> None:
    await rig.rename("d/x", "y")


async def unlink(rig: Rig) -> None:
    await rig.unlink("d/x")


async def make_anew(rig: Rig) -> None:
    await rig.unlink("d/x")
    await rig.put("d/x", NEW)


async def rename_and_make_anew(rig: Rig) -> None:
    await rig.rename("d/x", "y")
    await rig.put("d/x", NEW)


async def there_and_back(rig: Rig) -> None:
    await rig.rename("d/x", "y")
    await rig.rename("y", "d/x")


async def write(rig: Rig) -> None:
    await rig.write("d/x", b"more", 2)


async def make_a_directory(rig: Rig) -> None:
    await rig.unlink("d/x")
    await rig.mkdir("d/x")
    await rig.put("d/x/z", NEW)


async def remove_its_directory(rig: Rig) -> None:
    for name in await rig.ls("d"):
        await rig.unlink(f"d/{name}")
    await rig.rmdir("d")


async def move_its_directory(rig: Rig) -> None:
    await rig.rename("d", "e")


BETWEEN = [
    rename,
    unlink,
    make_anew,
    rename_and_make_anew,
    there_and_back,
    write,
    make_a_directory,
    remove_its_directory,
    move_its_directory,
]


@pytest.fixture
def expected_log() -> list[str]:
    return ["by somebody else", "unfinished upload", "cannot be shown"]


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize(("others", "minio"), [(nothing, True), (upload, True), (delete, True), (upload, False)])
@pytest.mark.parametrize("work", WORK)
async def test_at_every_await(
    tmp_path: Any,
    nursery: trio.Nursery,
    clock: Clock,
    work: Callable[[Bench, Rig], Awaitable[None]],
    others: Callable[[Bench], Awaitable[None]],
    minio: bool,
    between: Callable[[Rig], Awaitable[None]],
) -> None:
    names = f"{work.__name__} {others.__name__} {between.__name__} {minio}"
    for at in range(1 + crc32(names.encode()) % STRIDE, MOST, STRIDE):
        bench = Bench(tmp_path / str(at), nursery, MemoryStore(MINIO if minio else SEAWEEDFS))
        rig = await bench.rig(limits=SMALL_LIMITS)
        try:
            if not await _at(bench, rig, clock, work, others, between, at):
                return
        finally:
            await bench.close()
    pytest.fail("an operation has more awaits than were tried")


async def _at(bench: Bench, rig: Rig, clock: Clock, work: Any, others: Any, between: Any, at: int) -> bool:
    """One operation with something at its moment `at`; False where it has fewer moments."""
    await rig.mkdir("d")
    await rig.put("d/stays", b"stays")
    await rig.drained()
    await work(bench, rig)
    await others(bench)

    settled: list[bool] = []
    missing: list[FileNotFoundError] = []

    async def action() -> None:
        settled.append(bool(rig.core.syncer.conflicts.resolved))  # then `d/x` is the others', if they have one
        try:
            await between(rig)
        except FileNotFoundError as error:
            missing.append(error)
        for inode in rig.dirty():  # what was changed in between does not wait for its time
            if inode.number not in rig.core.changes.in_flight:
                rig.core.changes.queue(inode)

    rig.line.__class__ = Interrupted
    rig.line.at, rig.line.action = at, action  # type: ignore[attr-defined]
    await rig.drain()
    if rig.line.at > 0:  # type: ignore[attr-defined]
        return False
    await rig.drained()
    assert not missing or others is delete, missing
    await _check_all(bench, rig, clock)
    if not missing:
        _check_names(bench, rig, work, others, between, settled[0])
    await _check_removal(bench, rig)
    return True


def _contents(bench: Bench) -> dict[str, bytes]:
    """The files in the bucket."""
    side = "/", keys.RESERVED + "/directories/"
    return {key: data for key, data in bench.contents().items() if not key.endswith(side[0]) and side[1] not in key}


async def _check_all(bench: Bench, rig: Rig, clock: Clock) -> None:
    rig.check_clean()
    rig.forget()
    clock.advance(5000)
    contents = _contents(bench)
    assert not [key for key in contents if key.startswith(keys.RESERVED)]
    for key, data in contents.items():
        if not any(key.startswith(f"{file}/") or file.startswith(f"{key}/") for file in contents):
            assert await rig.cat(key) == data


def _check_names(bench: Bench, rig: Rig, work: Any, others: Any, between: Any, settled: bool) -> None:
    contents, resolved = _contents(bench), rig.core.syncer.conflicts.resolved
    said = (contents.keys(), resolved)
    is_mixed = any(text.endswith((THEIRS_BELOW, ZEROS_BELOW)) for text in resolved)
    assert is_mixed or not [key for key in contents if key.startswith("y.conflict")], said
    if work in WRITES and settled and between is not remove_its_directory:
        assert any(OURS[100:1000] in data for data in contents.values()), said
    if settled:
        return
    gone = between in (unlink, make_anew, make_a_directory, remove_its_directory)
    if others is upload and between is not move_its_directory:
        # A rename of name or attributes takes the newest version along.
        assert any(data[:2] == THEIRS[:2] for data in contents.values()) or work not in WRITES, said
    if work in WRITES and not gone:
        assert any(OURS[100:1000] in data for data in contents.values()), said
    if between in (unlink, remove_its_directory):
        assert not [key for key in contents if "conflict" in key], said
    if between in (make_anew, rename_and_make_anew, make_a_directory):
        assert NEW in contents.values(), said
    if between is remove_its_directory:
        assert contents.keys() <= {"d/x"}, said


async def _check_removal(bench: Bench, rig: Rig) -> None:
    """Nothing is left that a program can stumble over."""
    for key in _contents(bench):
        if (await rig.walk(key)).is_directory:  # it shadows a file
            return
        await rig.unlink(key)
    await rig.drained()
    rig.forget()
    rig.check_clean()
