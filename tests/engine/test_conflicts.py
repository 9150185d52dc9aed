"""Two nodes write one file, whole or in part: both versions survive, nothing waits and nothing is tried for ever."""

from __future__ import annotations

import errno
import os
import random
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s3fuse.errors import NotFound
from s3fuse.reading.records import BLOCK_BYTES
from s3fuse.store.faulty import refused
from s3fuse.store.memory import MINIO, SEAWEEDFS, MemoryStore
from s3fuse.writing.upload import Version
from tests.engine.rig import SMALL_LIMITS, Bench, Clock, Rig, fails, until
from tests.engine.test_cached_bytes import Slow

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

EXAMPLES = int(os.environ.get("S3FUSE_CONFLICT_EXAMPLES", "150"))
FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None

THEIRS = "those of the other version"
ZEROS = "zeros are in their place"


@pytest.fixture
def expected_log() -> list[str]:
    return [r"was changed by somebody else"]


def conflicts(bench: Bench) -> list[bytes]:
    """What is in the conflict files of the bucket."""
    return [data for key, data in bench.contents().items() if ".conflict-" in key]


async def two_nodes(bench: Bench, body: bytes) -> tuple[Rig, Rig]:
    """Two mounts; both know the file, the second has it in its cache, too."""
    one, two = await bench.rig("one", limits=SMALL_LIMITS), await bench.rig("two", limits=SMALL_LIMITS)
    await one.put("f", body)
    await one.drained()
    assert await two.cat("f") == body
    return one, two


SIZES = [10, 10_000, 40_000, 2 * BLOCK_BYTES + 7]


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("at", ["append", "start", "middle", "end"])
async def test_a_partial_write_that_lost_is_whole_where_its_base_is_cached(bench: Bench, at: str, size: int) -> None:
    body = os.urandom(size)
    one, two = await two_nodes(bench, body)
    offset = {"append": size, "start": 0, "middle": size // 2, "end": size - 1}[at]
    await one.write("f", b"A", size)
    await two.write("f", b"B", offset)
    await one.drained()
    with fails(errno.EIO):
        await two.fsync("f")
    await two.drained()
    assert bench.data("f") == body + b"A"
    assert conflicts(bench) == [body[:offset] + b"B" + body[offset + 1 :]]
    [told] = two.core.syncer.conflicts.resolved
    assert not told.endswith((THEIRS, ZEROS))
    one.check_clean()
    two.check_clean()


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("at", ["append", "start", "middle", "end"])
async def test_it_is_laid_over_the_other_version_where_its_base_is_gone(bench: Bench, at: str, size: int) -> None:
    body = os.urandom(size)
    one, two = await bench.rig("one", limits=SMALL_LIMITS), await bench.rig("two", limits=SMALL_LIMITS)
    await one.put("f", body)
    await one.drained()
    offset = {"append": size, "start": 0, "middle": size // 2, "end": size - 1}[at]
    await two.write("f", b"B", offset)
    theirs = os.urandom(size)
    await one.write("f", theirs + b"A", flags=os.O_TRUNC)
    await one.drained()
    with fails(errno.EIO):
        await two.fsync("f")
    await two.drained()
    assert bench.data("f") == theirs + b"A"
    assert conflicts(bench) == [theirs[:offset] + b"B" + theirs[offset + 1 :]]
    [told] = two.core.syncer.conflicts.resolved
    assert told.endswith(THEIRS)
    assert len(bench.listed()) == 2  # nothing temporary is left
    two.check_clean()


@pytest.mark.parametrize("cached", [True, False])
async def test_what_others_deleted_and_was_written_in_part(bench: Bench, cached: bool) -> None:
    one, two = await bench.rig("one"), await bench.rig("two")
    await one.put("f", b"0123456789")
    await one.drained()
    if cached:
        await two.cat("f")
    await two.write("f", b"B", 10)
    await one.unlink("f")
    await one.drained()
    await two.drained()
    if cached:
        assert bench.contents() == {"f": b"0123456789B"}
        assert two.core.syncer.conflicts.resolved == []
    else:
        assert conflicts(bench) == [bytes(10) + b"B"]
        [told] = two.core.syncer.conflicts.resolved
        assert told.endswith(ZEROS)
    two.check_clean()


@pytest.mark.parametrize("cached", [True, False])
async def test_what_is_written_anew_needs_no_base(bench: Bench, cached: bool) -> None:
    """The issue's case: an append that was tried, then the whole file."""
    one, two = await bench.rig("one"), await bench.rig("two")
    await one.put("f", b"0" * 10_000)
    await one.drained()
    await (two.cat if cached else two.walk)("f")
    await one.write("f", b"A", 10_000)
    await two.write("f", b"B", 10_000)
    await one.drained()
    with two.line.held("head") as gate:
        two.core.changes.queue(await two.walk("f"))
        await gate.arrived()  # its upload has failed, and it looks why
        await two.write("f", b"whole", flags=os.O_TRUNC)
        gate.open()
        await two.drained()
    assert bench.data("f") == b"0" * 10_000 + b"A"
    assert conflicts(bench) == [b"whole"]
    two.check_clean()


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("cached", [True, False])
async def test_a_crash_at_any_request_of_a_conflict(bench: Bench, cached: bool, moved: bool) -> None:
    for calls in range(12):
        name = f"f{calls}"
        await bench.upload(name, b"0123456789")
        rig = await bench.rig(f"cache{calls}")
        await (rig.cat if cached else rig.walk)(name)
        await rig.write(name, b"B", 10)
        await bench.upload(name, b"abcdefghij")
        if moved:
            await rig.rename(name, f"y{calls}")
        rig.line.calls_left = calls
        await rig.drain()
        await rig.restart()
        await rig.drained()
        found = {key: data for key, data in bench.contents().items() if key.startswith((name + ".", f"y{calls}"))}
        assert bench.data(name) == b"abcdefghij"
        assert [data[10:] for data in found.values()] == [b"B"]
        assert not [key for key in bench.listed() if key.startswith(".s3fuse")]
        rig.check_clean()
        await rig.crash()


async def test_a_handle_reads_no_mixture(bench: Bench) -> None:
    """Its file is laid over another version: what it wrote is kept, what it opened can be had no more."""
    one, two = await bench.rig("one"), await bench.rig("two")
    await one.put("f", b"0123456789")
    await one.drained()
    handle = await two.open("f", os.O_RDWR)
    await two.files.write(handle, 10, b"B")
    await bench.upload("f", b"abcdefghij")
    with fails(errno.EIO):
        await two.files.fsync(handle)
    with fails(errno.ESTALE):
        await two.pread(handle)
    await two.files.write(handle, 11, b"C")
    two.close(handle)
    await two.drained()
    [name] = [key for key in bench.listed() if key != "f"]
    assert bench.data(name) == b"abcdefghijBC"
    assert await two.cat(name) == b"abcdefghijBC"
    two.check_clean()


async def test_a_handle_with_a_cached_base_reads_on(bench: Bench) -> None:
    one, two = await two_nodes(bench, b"0123456789")
    handle = await two.open("f", os.O_RDWR)
    await two.files.write(handle, 10, b"B")
    await one.write("f", b"abcdefghijkl", flags=os.O_TRUNC)
    await one.drained()
    with fails(errno.EIO):
        await two.files.fsync(handle)
    assert await two.pread(handle) == b"0123456789B"
    two.close(handle)
    await two.drained()
    two.check_clean()


async def test_attributes_changed_here_bytes_changed_there_while_it_is_open_for_writing(bench: Bench) -> None:
    """What the open handle writes afterwards is not lost with the old version."""
    rig = await bench.rig()
    await rig.put("f", b"0123456789")
    await rig.drained()
    await rig.cat("f")
    handle = await rig.open("f", os.O_RDWR)
    await rig.chmod("f", 0o600)
    await bench.upload("f", b"theirs")
    await rig.files.fsync(handle)
    assert bench.store._objects["f"].metadata["mode"] == str(stat.S_IFREG | 0o600)
    await rig.files.write(handle, 10, b"B")
    rig.close(handle)
    await rig.drained()
    assert bench.data("f") == b"theirs"
    assert conflicts(bench) == [b"0123456789B"]
    rig.check_clean()


async def test_renamed_here_bytes_changed_there_while_it_is_open_for_writing(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"0123456789")
    await rig.drained()
    await rig.cat("f")
    handle = await rig.open("f", os.O_RDWR)
    await rig.rename("f", "g")
    await bench.upload("f", b"theirs")
    with fails(errno.EIO):
        await rig.files.fsync(handle)
    await rig.files.write(handle, 10, b"B")
    rig.close(handle)
    await rig.drained()
    assert bench.contents() == {"f": b"theirs", "g": b"0123456789B"}
    rig.check_clean()


async def test_a_write_that_fails_for_another_reason_is_no_conflict(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"0123456789")
    await rig.drained()
    await rig.write("f", b"B", 3)
    rig.line.quiet = False
    rig.line.schedule("put", refused(NotFound("no such upload", "f")), refused(NotFound("no such upload", "f")))
    await rig.drained()
    assert bench.contents() == {"f": b"012B456789"}
    rig.check_clean()


async def test_conflicts_without_end_are_a_failure_with_its_time_between_attempts(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"0123456789")
    await rig.drained()
    await rig.write("f", b"B", 3)
    rig.line.quiet = False
    rig.line.schedule("put", *[refused(NotFound("no such upload", "f"))] * 50)
    with fails(errno.EIO):
        await rig.fsync("f")
    assert rig.line.failures["put"] < 10
    [inode] = rig.dirty()
    assert inode.error is not None
    rig.line.quiet = True
    await rig.drained()
    assert bench.contents() == {"f": b"012B456789"}
    rig.check_clean()


async def test_an_error_of_our_own_is_told_once_and_loses_nothing(
    bench: Bench, expected_log: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected_log.append("failed; it stays in the journal")
    rig = await bench.rig()
    await rig.put("f", b"ours")

    def broken(*_: object) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(Version, "frozen", broken)
        for _ in range(5):
            rig.core.changes.queue(await rig.walk("f"))
            await until(lambda: not rig.core.changes.in_flight and bool(rig.core.syncer.last_error))
    [inode] = rig.dirty()
    assert inode.error is not None
    assert "AssertionError" in inode.error
    assert len([record for record in caplog.records if record.exc_info]) == 1
    await rig.restart()
    await rig.drained()
    assert bench.contents() == {"f": b"ours"}
    rig.check_clean()


# -- random histories of two nodes

name = st.sampled_from(["a", "b"])
node = st.integers(0, 1)
STEP = st.one_of(
    st.tuples(st.just("append"), node, name),
    st.tuples(st.just("append"), node, name),
    st.tuples(st.just("patch"), node, name),
    st.tuples(st.just("read"), node, name),
    st.tuples(st.just("chmod"), node, name, st.sampled_from([0o600, 0o644])),
    st.tuples(st.just("rename"), node, name, st.sampled_from(["a", "b", "c"])),
    st.tuples(st.just("send"), node, st.integers(0, 8)),
    st.tuples(st.just("look"), node),
    st.tuples(st.just("crash"), node),
    st.tuples(st.just("drain"), node),
)


class World:
    """Two mounts that append records to the same files: each record must be in the bucket in the end."""

    def __init__(self, rigs: list[Rig], clock: Clock) -> None:
        self.rigs = rigs
        self.clock = clock
        self.records: list[bytes] = []

    async def do(self, kind: str, *arguments: Any) -> None:
        try:
            await getattr(self, f"do_{kind}")(self.rigs[arguments[0]], *arguments[1:])
        except (FileNotFoundError, FileExistsError):
            pass
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise

    async def do_append(self, rig: Rig, name: str) -> None:
        inode = await rig.walk(name)
        record = b"<%03d>" % len(self.records)
        await rig.write(name, record, inode.size)
        self.records.append(record)

    async def do_patch(self, rig: Rig, name: str) -> None:
        """A record over the filling that each file begins with, where no other record is written."""
        record = b"<%03d>" % len(self.records)
        await rig.write(name, record, 10 * (len(self.records) + 1))
        self.records.append(record)

    async def do_read(self, rig: Rig, name: str) -> None:
        await rig.cat(name)

    async def do_chmod(self, rig: Rig, name: str, mode: int) -> None:
        await rig.chmod(name, mode)

    async def do_rename(self, rig: Rig, old: str, new: str) -> None:
        """Carried out while the other node sends nothing: between a look and a delete there is a gap in S3 itself."""
        for other in self.rigs:
            await until(lambda changes=other.core.changes: not changes.in_flight and not changes._timed)
        if not await rig.exists(new):
            await rig.rename(old, new, 1)
            await rig.drained()

    async def do_send(self, rig: Rig, turns: int) -> None:
        for inode in rig.dirty():
            rig.core.changes.queue(inode)
        for _ in range(turns * 5):
            await trio.lowlevel.checkpoint()

    async def do_look(self, rig: Rig) -> None:
        self.clock.advance(5000)
        await rig.ls()

    async def do_crash(self, rig: Rig) -> None:
        await rig.restart()

    async def do_drain(self, rig: Rig) -> None:
        await rig.drained()

    async def finish(self, bench: Bench) -> None:
        for _ in range(2):
            for rig in self.rigs:
                await rig.drained()
        for rig in self.rigs:
            rig.check_clean()
        contents = bench.contents()
        missing = [record for record in self.records if not any(record in data for data in contents.values())]
        assert not missing, (missing, contents)
        assert not [key for key in contents if key.startswith(".s3fuse")]
        self.clock.advance(5000)
        for rig in self.rigs:
            assert await rig.ls() == bench.listed()
            for key, data in contents.items():
                assert await rig.cat(key) == data


def slow(rig: Rig, seed: int) -> None:
    rig.line.__class__ = Slow
    rig.line.random = random.Random(seed)  # type: ignore[attr-defined]


async def play(script: list[tuple[Any, ...]], seed: int, clock: Clock, minio: bool) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        async with trio.open_nursery() as nursery:
            bench = Bench(Path(folder), nursery, MemoryStore(MINIO if minio else SEAWEEDFS))
            try:
                for name in "ab":
                    await bench.upload(name, b"." * 1000)
                rigs = [await bench.rig("one", ttl_s=1000.0), await bench.rig("two", ttl_s=1000.0)]
                world = World(rigs, clock)
                for kind, *arguments in script:
                    for rig in rigs:
                        if type(rig.line) is not Slow:
                            slow(rig, seed)
                    await world.do(kind, *arguments)
                with trio.fail_after(30):
                    await world.finish(bench)
            finally:
                await bench.close()


def run(call: Callable[..., Awaitable[None]], *arguments: object) -> None:
    """Runs it under trio; what fails is raised bare."""
    try:
        trio.run(call, *arguments)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


@pytest.mark.parametrize("minio", [True, False])
def test_no_record_is_lost_whatever_two_nodes_do(minio: bool, clock: Clock, expected_log: list[str]) -> None:
    expected_log += ["deleted by somebody else", "unfinished upload"]

    @given(st.lists(STEP, min_size=1, max_size=25), st.integers(0, 1000))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    def check(script: list[tuple[Any, ...]], seed: int) -> None:
        run(play, script, seed, clock, minio)

    check()
