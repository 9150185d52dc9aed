"""Each cached block is what the bucket holds, or held, under its key and etag, whatever happens at the same time.

Etags are MD5s: a file with content that it had before has the etag that it had before, and finds its blocks again.
"""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s3fuse.reading.records import BLOCK_BYTES
from s3fuse.store.memory import MemoryStore
from tests.engine.rig import Bench, Line, Rig, until
from tests.engine.test_model import Blob

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

EXAMPLES = int(os.environ.get("S3FUSE_CACHED_BYTES_EXAMPLES", "300"))
FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None

NAMES = ["a", "b"]
#: Few, so that contents come again; some are longer than a block.
SIZES = [0, 1, 1000, BLOCK_BYTES - 1, BLOCK_BYTES + 5]
LETTERS = b"AB"

name = st.sampled_from(NAMES)
text = st.builds(Blob, st.sampled_from(SIZES[1:]), st.sampled_from(LETTERS))
pause = st.integers(0, 3)
STEP = st.one_of(
    st.tuples(st.just("create"), name, text),
    st.tuples(st.just("rewrite"), name, text),
    st.tuples(st.just("write"), name, st.sampled_from([0, 10, BLOCK_BYTES - 2]), text),
    st.tuples(st.just("append"), name, st.builds(Blob, st.just(1), st.sampled_from(b"!A"))),
    st.tuples(st.just("truncate"), name, st.sampled_from(SIZES)),
    st.tuples(st.just("chmod"), name, st.sampled_from([0o600, 0o644])),
    st.tuples(st.just("rename"), name, name),
    st.tuples(st.just("unlink"), name),
    st.tuples(st.just("open"), name),
    st.tuples(st.just("close"), name),
    st.tuples(st.just("read"), name),
    st.tuples(st.just("send"), pause),
    st.tuples(st.just("drain")),
)


class Remembering(MemoryStore):
    """A bucket that knows every version it ever had."""

    def __init__(self) -> None:
        super().__init__()
        self.versions: dict[tuple[str, str], bytes] = {}

    def _store(self, key: str, data: bytes, etag: str, metadata: Mapping[str, str], headers: Mapping[str, str]) -> str:
        self.versions[key, etag] = data
        return super()._store(key, data, etag, metadata, headers)


class Slow(Line):
    """A line on which requests and answers take a while, each another one."""

    random: random.Random

    async def _faulty(self, operation: str, call: Callable[[], Awaitable[Any]], key: str) -> Any:
        for _ in range(self.random.randrange(12)):
            await trio.lowlevel.checkpoint()
        result = await super()._faulty(operation, call, key)
        for _ in range(self.random.randrange(12)):
            await trio.lowlevel.checkpoint()
        return result


class World:
    """A mount, and what its files hold."""

    def __init__(self, rig: Rig, store: Remembering) -> None:
        self.rig = rig
        self.store = store
        self.files: dict[str, bytes] = {}
        self.handles: dict[str, int] = {}

    async def do(self, kind: str, *arguments: Any) -> None:
        if kind not in ("create", "send", "drain", "close") and arguments[0] not in self.files:
            return
        values = (bytes([a.byte]) * a.size if isinstance(a, Blob) else a for a in arguments)
        await getattr(self, f"do_{kind}")(*values)
        self.check_blocks()

    def check_blocks(self) -> None:
        for (key, etag, *_, index), block in self.rig.core.blocks._blocks.items():
            if block.fetch is None:
                whole = self.store.versions[key, etag]
                due = whole[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                assert block.buffer[: len(due)] == due, f"block {index} of {key} {etag}"

    async def do_create(self, name: str, data: bytes) -> None:
        if name not in self.files:
            await self.rig.put(name, data)
            self.files[name] = data

    async def do_rewrite(self, name: str, data: bytes) -> None:
        await self.rig.write(name, data, flags=os.O_TRUNC)
        self.files[name] = data

    async def do_write(self, name: str, offset: int, data: bytes) -> None:
        await self.rig.write(name, data, offset)
        old = self.files[name]
        self.files[name] = old[:offset].ljust(offset, b"\0") + data + old[offset + len(data) :]

    async def do_append(self, name: str, data: bytes) -> None:
        await self.do_write(name, len(self.files[name]), data)

    async def do_truncate(self, name: str, size: int) -> None:
        await self.rig.truncate(name, size)
        self.files[name] = self.files[name][:size].ljust(size, b"\0")

    async def do_chmod(self, name: str, mode: int) -> None:
        await self.rig.chmod(name, mode)

    async def do_rename(self, old: str, new: str) -> None:
        await self.rig.rename(old, new)
        if old != new:
            self.files[new] = self.files.pop(old)
            self.handles.pop(new, None)
            if old in self.handles:
                self.handles[new] = self.handles.pop(old)

    async def do_unlink(self, name: str) -> None:
        await self.rig.unlink(name)
        del self.files[name]

    async def do_open(self, name: str) -> None:
        if name not in self.handles:
            self.handles[name] = await self.rig.open(name, os.O_RDWR)

    async def do_close(self, name: str) -> None:
        if name in self.handles:
            self.rig.close(self.handles.pop(name))

    async def do_read(self, name: str) -> None:
        assert await self.rig.cat(name) == self.files[name]

    async def do_send(self, turns: int) -> None:
        for inode in self.rig.dirty():
            self.rig.core.changes.queue(inode)
        for _ in range(turns * 5):
            await trio.lowlevel.checkpoint()
            self.check_blocks()

    async def do_drain(self) -> None:
        assert not await self.rig.drain()

    async def finish(self) -> None:
        for handle in list(self.rig.files.handles):
            self.rig.close(handle)
        await self.rig.drained()
        self.check_blocks()
        assert {key: found.data for key, found in self.store._objects.items()} == self.files
        for name, data in self.files.items():
            assert await self.rig.cat(name) == data
        self.rig.check_clean()


async def play(script: list[tuple[Any, ...]], seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        async with trio.open_nursery() as nursery:
            store = Remembering()
            bench = Bench(Path(folder), nursery, store)
            try:
                rig = await bench.rig()
                rig.line.__class__ = Slow
                rig.line.random = random.Random(seed)  # type: ignore[attr-defined]
                world = World(rig, store)
                for kind, *arguments in [*PRELUDE, *script]:
                    await world.do(kind, *arguments)
                await world.finish()
            finally:
                await bench.close()


#: What every script begins with: files that the bucket has and the cache, too.
PRELUDE: list[tuple[Any, ...]] = [("create", "a", Blob(1000, LETTERS[0])), ("drain",), ("read", "a"), ("open", "a")]


@given(st.lists(STEP, min_size=1, max_size=30), st.integers(0, 1000))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_cached_block_is_right_whatever_happens_at_the_same_time(
    script: list[tuple[Any, ...]], seed: int
) -> None:
    trio.run(play, script, seed)


@pytest.mark.parametrize("change", ["chmod", "rename"])
async def test_a_write_during_a_copy_is_not_taken_for_a_part_of_it(bench: Bench, change: str, copying: str) -> None:
    rig = await bench.rig()
    await rig.put("f", b"A" * 1000)
    await rig.drained()
    assert await rig.cat("f") == b"A" * 1000
    handle = await rig.open("f", os.O_RDWR)
    await rig.chmod("f", 0o600)
    if change == "rename":
        await rig.rename("f", "g")
    with rig.line.held(copying) as gate:
        rig.core.changes.queue(await rig.walk("g" if change == "rename" else "f"))
        await gate.arrived()
        await rig.files.write(handle, 0, b"B" * 1000)
        gate.release()
        await until(lambda: not rig.core.changes.in_flight)
    rig.close(handle)
    await rig.unlink("g" if change == "rename" else "f")
    await rig.drained()
    name = "g" if change == "rename" else "f"
    await rig.put(name, b"A" * 1000)
    await rig.drained()
    await rig.write(name, b"!", 1000)
    assert await rig.cat(name) == b"A" * 1000 + b"!"
    await rig.drained()
    assert bench.data(name) == b"A" * 1000 + b"!"


async def test_blocks_that_are_being_fetched_are_not_replaced(bench: Bench) -> None:
    """The content comes back while its first version is fetched anew: no buffer is lost, and none is two blocks'."""
    rig = await bench.rig()
    await bench.upload("f", b"A" * 1000)
    first = await bench.info("f")
    handle = await rig.open("f", os.O_RDWR)
    await rig.files.write(handle, 0, b"B" * 1000)
    await rig.files.fsync(handle)
    assert await rig.pread(handle) == b"B" * 1000
    with rig.line.held("get") as gate:
        rig.core.blocks.prefetch(first, 0, 1000)
        await gate.arrived()
        await rig.files.write(handle, 0, b"A" * 1000)
        await rig.files.fsync(handle)
        gate.release()
    blocks = rig.core.blocks
    await until(lambda: all(block.fetch is None for block in blocks._blocks.values()))
    assert await rig.pread(handle) == b"A" * 1000
    assert len(blocks._blocks) + len(blocks._free) == blocks._allocated
