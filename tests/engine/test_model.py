"""Random operations on a mount and on a reference, with crashes, faults, other writers and empty caches between.

Whatever a call acknowledged is there afterwards, whatever failed changed nothing, and in the end bucket and reference
are equal: no key too many, no byte wrong, nothing left in journal and staging. `S3FUSE_MODEL_EXAMPLES` makes it longer.
"""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s3fuse.errors import StoreError
from s3fuse.namespace import changes, directories, inodes, pages, syncer
from s3fuse.store import memory
from s3fuse.store.memory import MINIO, SEAWEEDFS, MemoryStore
from tests.engine.reference import Node, Tree
from tests.engine.rig import SMALL_LIMITS, Bench, Clock, Rig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

EXAMPLES = int(os.environ.get("S3FUSE_MODEL_EXAMPLES", "900"))
STEPS = int(os.environ.get("S3FUSE_MODEL_STEPS", "25"))
FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None

PATHS = ["a", "b", "d", "e", "d/a", "d/b", "d/s", "d/s/a", "e/a", "e/s", "e/s/a"]
#: What others put and delete; their directory stays, and nobody here makes names in it.
THEIRS = ["far/x", "far/y"]
SIZES = [0, 1, 5, 20_000, 70_000]
OFFSETS = [0, 3, 4096, 66_000]


class Blob(NamedTuple):
    """So many times the same byte, written short in a failure."""

    size: int
    byte: int


path = st.sampled_from(PATHS)
known = st.sampled_from([*PATHS, *THEIRS])
text = st.builds(Blob, st.sampled_from(SIZES[1:]), st.integers(1, 255))
slot = st.integers(0, 2)

OPERATIONS = {
    "create": st.tuples(path, text),
    "touch": st.tuples(path),
    "write": st.tuples(known, st.sampled_from(OFFSETS), text),
    "rewrite": st.tuples(known, text),
    "truncate": st.tuples(known, st.sampled_from(SIZES)),
    "rename": st.tuples(known, path),
    "unlink": st.tuples(known),
    "mkdir": st.tuples(path),
    "rmdir": st.tuples(path),
    "symlink": st.tuples(path),
    "chmod": st.tuples(known, st.sampled_from([0o600, 0o751])),
    "utimens": st.tuples(known, st.integers(-(10**18), 10**18)),
    "setxattr": st.tuples(known, st.binary(max_size=4)),
    "removexattr": st.tuples(known),
    "fsync": st.tuples(known),
    "read": st.tuples(known),
    "list": st.tuples(st.sampled_from(["", "d", "e", "d/s", "far"])),
    "open": st.tuples(slot, known),
    "pwrite": st.tuples(slot, st.sampled_from(OFFSETS), text),
    "pread": st.tuples(slot),
    "close": st.tuples(slot),
    "kick": st.tuples(st.integers(0, 5)),
    "drain": st.tuples(),
    "forget": st.tuples(),
    "theirs": st.tuples(st.sampled_from(THEIRS), text),
    "their_rm": st.tuples(st.sampled_from(THEIRS)),
    "crash": st.tuples(st.sampled_from(["now", "now", "cut"]), st.integers(0, 4), st.booleans()),
    "check": st.tuples(),
    "storm": st.tuples(),
    "calm": st.tuples(),
}
#: What every script begins with.
PRELUDE: list[tuple[str, tuple[Any, ...]]] = [
    ("mkdir", ("d",)),
    ("mkdir", ("d/s",)),
    ("mkdir", ("e",)),
    ("create", ("a", Blob(5, 1))),
    ("create", ("d/b", Blob(70_000, 2))),
    ("create", ("d/s/a", Blob(20_000, 3))),
    ("drain", ()),
]
step = st.sampled_from(sorted(OPERATIONS)).flatmap(lambda name: st.tuples(st.just(name), OPERATIONS[name]))
scripts = st.lists(step, min_size=1, max_size=STEPS)


@dataclass
class World:
    """One mount, its reference, and the operations on both."""

    bench: Bench
    clock: Clock
    rig: Rig
    tree: Tree = field(default_factory=Tree)
    handles: dict[int, tuple[int, Node]] = field(default_factory=dict)
    #: Keys of others that changed here since the last drain: nobody else touches them, else it would be a conflict.
    touched: set[str] = field(default_factory=set)

    async def do(self, name: str, arguments: tuple[Any, ...]) -> None:
        values = (bytes([a.byte]) * a.size if isinstance(a, Blob) else a for a in arguments)
        await getattr(self, f"do_{name}")(*values)

    async def both(self, ours: Callable[[], Awaitable[object]], reference: Callable[[], object]) -> bool:
        """Does it on the mount, then on the reference; both succeed or both fail alike. False where they failed.

        A failure of the store leaves everything as it was.
        """
        error: OSError | None = None
        due: OSError | None = None
        try:
            await ours()
        except StoreError:
            assert not self.rig.line.quiet
            return False
        except OSError as found:
            error = found
        try:
            reference()
        except OSError as expected:
            due = expected
        assert (error and error.errno) == (due and due.errno), f"{error!r} where {due!r} was due"
        return error is None

    def touch(self, *paths: str) -> None:
        self.touched.update(paths)

    # -- files

    async def do_create(self, path: str, data: bytes) -> None:
        async def ours() -> None:
            handle = await self.rig.create(path)
            await self.rig.files.write(handle, 0, data)
            self.rig.close(handle)

        await self.both(ours, lambda: self.tree.make(path, Node(stat.S_IFREG | 0o644, data)))

    async def do_touch(self, path: str) -> None:
        async def ours() -> None:
            self.rig.close(await self.rig.create(path))

        await self.both(ours, lambda: self.tree.make(path, Node(stat.S_IFREG | 0o644)))

    def _regular(self, path: str) -> Node | None:
        node = self.tree.nodes.get(path)
        return node if node is not None and node.is_regular else None

    @staticmethod
    def _write(node: Node, offset: int, data: bytes) -> None:
        node.data = node.data[:offset].ljust(offset, b"\0") + data + node.data[offset + len(data) :]
        node.mtime_ns = None

    async def do_write(self, path: str, offset: int, data: bytes) -> None:
        node = self._regular(path)
        if node is not None:
            self.touch(path)
            await self.both(lambda: self.rig.write(path, data, offset), lambda: self._write(node, offset, data))

    async def do_rewrite(self, path: str, data: bytes) -> None:
        node = self._regular(path)
        if node is None:
            return
        self.touch(path)

        def reference() -> None:
            node.data, node.mtime_ns = data, None

        await self.both(lambda: self.rig.write(path, data, flags=os.O_TRUNC), reference)

    async def do_truncate(self, path: str, size: int) -> None:
        node = self._regular(path)
        if node is None:
            return
        self.touch(path)

        def reference() -> None:
            if size != len(node.data):
                node.data, node.mtime_ns = node.data[:size].ljust(size, b"\0"), None

        await self.both(lambda: self.rig.truncate(path, size), reference)

    async def do_read(self, path: str) -> None:
        node = self._regular(path)
        found: list[bytes] = []

        async def ours() -> None:
            found.append(await self.rig.cat(path))

        if node is not None and await self.both(ours, lambda: None):
            assert found == [node.data]

    async def do_open(self, index: int, path: str) -> None:
        node = self._regular(path)
        if node is None:
            return
        await self.do_close(index)
        self.touch(path)
        opened: list[int] = []

        async def ours() -> None:
            opened.append(await self.rig.open(path, os.O_RDWR))

        if await self.both(ours, lambda: None):
            self.handles[index] = opened[0], node

    async def do_pwrite(self, index: int, offset: int, data: bytes) -> None:
        if index in self.handles:
            handle, node = self.handles[index]
            self.touched.update(path for path in THEIRS if self.tree.nodes.get(path) is node)
            await self.both(lambda: self.rig.files.write(handle, offset, data), lambda: self._write(node, offset, data))

    async def do_pread(self, index: int) -> None:
        if index not in self.handles:
            return
        handle, node = self.handles[index]
        found: list[bytes] = []

        async def ours() -> None:
            found.append(await self.rig.pread(handle))

        if await self.both(ours, lambda: None):
            assert found == [node.data]

    async def do_close(self, index: int) -> None:
        if index in self.handles:
            self.rig.close(self.handles.pop(index)[0])

    async def do_fsync(self, path: str) -> None:
        if path not in self.tree.nodes:
            return
        try:
            await self.rig.fsync(path)
        except (StoreError, OSError):
            assert not self.rig.line.quiet
            return
        node = self.tree.nodes[path]
        if node.is_regular:
            assert self.bench.data(path) == node.data

    # -- names

    async def do_rename(self, old: str, new: str) -> None:
        if old.startswith(f"{new}/"):
            return  # the kernel refuses it
        if await self.both(lambda: self.rig.rename(old, new), lambda: self.tree.rename(old, new)):
            self.touch(old)

    async def do_unlink(self, path: str) -> None:
        if await self.both(lambda: self.rig.unlink(path), lambda: self.tree.unlink(path)):
            self.touch(path)

    async def do_mkdir(self, path: str) -> None:
        await self.both(lambda: self.rig.mkdir(path), lambda: self.tree.make(path, Node(stat.S_IFDIR | 0o755)))

    async def do_rmdir(self, path: str) -> None:
        await self.both(lambda: self.rig.rmdir(path), lambda: self.tree.rmdir(path))

    async def do_symlink(self, path: str) -> None:
        node = Node(stat.S_IFLNK | 0o777, b"to/" + path.encode())
        await self.both(lambda: self.rig.symlink(path, node.data), lambda: self.tree.make(path, node))

    async def do_list(self, path: str) -> None:
        node = self.tree.nodes.get(path)
        found: list[str] = []

        async def ours() -> None:
            found.extend(await self.rig.ls(path))

        if node is not None and node.is_directory and await self.both(ours, lambda: None):
            assert found == sorted(p.rpartition("/")[2] for p in self.tree.below(path) if p.rpartition("/")[0] == path)

    # -- attributes

    async def do_chmod(self, path: str, mode: int) -> None:
        def reference() -> None:
            node = self.tree.at(path)
            node.mode = stat.S_IFMT(node.mode) | mode

        self.touch(path)
        await self.both(lambda: self.rig.chmod(path, mode), reference)

    async def do_utimens(self, path: str, mtime_ns: int) -> None:
        def reference() -> None:
            node = self.tree.at(path)
            node.mtime_ns = None if node.is_directory else mtime_ns  # a directory's moves with its names

        self.touch(path)
        await self.both(lambda: self.rig.utimens(path, mtime_ns), reference)

    async def do_setxattr(self, path: str, value: bytes) -> None:
        self.touch(path)
        await self.both(
            lambda: self.rig.setxattr(path, b"user.x", value),
            lambda: self.tree.at(path).xattrs.update({"user.x": value}),
        )

    async def do_removexattr(self, path: str) -> None:
        if "user.x" in getattr(self.tree.nodes.get(path), "xattrs", {}):
            self.touch(path)

            async def ours() -> None:
                await self.rig.attributes.removexattr(await self.rig.walk(path), b"user.x")

            await self.both(ours, lambda: self.tree.nodes[path].xattrs.pop("user.x"))

    # -- the world around

    async def do_kick(self, turns: int) -> None:
        """Everything dirty is sent from now on, for as long as a few turns of the scheduler take."""
        for inode in self.rig.dirty():
            self.rig.core.changes.queue(inode)
        for _ in range(turns * 5):
            await trio.lowlevel.checkpoint()

    async def do_drain(self) -> None:
        failed = await self.rig.drain()
        assert not failed or not self.rig.line.quiet, [(inode, inode.error) for inode in failed]
        if not failed and not self.rig.dirty():
            self.touched.clear()
            if not self.handles and self.rig.line.quiet:
                self.tree.check_bucket(self.bench)

    async def do_forget(self) -> None:
        self.rig.forget()

    async def do_theirs(self, key: str, data: bytes) -> None:
        if key not in self.touched and self.rig.line.quiet:
            await self.bench.upload(key, data)
            self.tree.nodes[key] = Node(stat.S_IFREG | 0o644, data)
            await self._see()

    async def do_their_rm(self, key: str) -> None:
        if key not in self.touched and key in self.tree.nodes and self.rig.line.quiet:
            await self.bench.remove(key)
            del self.tree.nodes[key]
            await self._see()

    async def _see(self) -> None:
        """What others did is seen once it is older than the TTL; while the bucket fails old answers are good."""
        self.clock.advance(5000)
        await self.do_list("far")

    async def do_storm(self) -> None:
        self.rig.line.quiet = False

    async def do_calm(self) -> None:
        self.rig.line.quiet = True

    async def do_check(self) -> None:
        quiet, self.rig.line.quiet = self.rig.line.quiet, True
        await self.tree.check_mount(self.rig)
        self.rig.line.quiet = quiet

    async def do_crash(self, how: str, calls: int, check: bool) -> None:
        """At once, or while everything is sent, after some requests."""
        if how == "cut":
            self.rig.line.calls_left = calls
            await self.rig.drain()
        quiet = self.rig.line.quiet
        await self.rig.restart()
        self.rig.line.quiet = quiet
        self.handles.clear()
        if check:
            await self.do_check()

    async def finish(self, empty: Path) -> None:
        self.rig.line.quiet = True
        for index in list(self.handles):
            await self.do_close(index)
        await self.tree.check_mount(self.rig)
        await self.rig.drained()
        self.tree.check_bucket(self.bench)
        await self.tree.check_mount(self.rig)
        assert self.rig.core.syncer.conflicts.resolved == []
        self.rig.check_clean()
        await self.rig.restart(empty)
        await self.tree.check_mount(self.rig)
        self.rig.check_clean()


@pytest.fixture
def expected_log() -> list[str]:
    """A cut line leaves uploads unfinished; a file at the key of a directory that is on its way out is shadowed."""
    return [r"unfinished upload", r"cannot be shown"]


#: The clock of freshness of all scripts.
clock = Clock()


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (changes, directories, inodes, pages, syncer):
            patch.setattr(module, "time", clock)
        patch.setattr(memory, "MIN_PART_BYTES", SMALL_LIMITS.min_part_bytes)
        yield


async def run(
    script: list[tuple[str, tuple[Any, ...]]], ttl_s: float, minio: bool, seed: int, budget_bytes: int | None
) -> None:
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        async with trio.open_nursery() as nursery:
            bench = Bench(Path(folder), nursery, MemoryStore(MINIO if minio else SEAWEEDFS))
            try:
                await bench.upload("far/stays", b"stays")
                rig = await bench.rig(ttl_s=ttl_s, limits=SMALL_LIMITS, seed=seed, budget_bytes=budget_bytes)
                world = World(bench, clock, rig)
                world.tree.make("far", Node(stat.S_IFDIR | 0o755))
                world.tree.make("far/stays", Node(stat.S_IFREG | 0o644, b"stays"))
                for name, arguments in [*PRELUDE, *script]:
                    await world.do(name, arguments)
                await world.finish(Path(folder) / "empty")
            finally:
                await bench.close()


def play(
    script: list[tuple[str, tuple[Any, ...]]],
    ttl_s: float,
    *,
    minio: bool,
    seed: int,
    budget_bytes: int | None = None,
) -> None:
    """Runs a script; what fails is raised bare, so that hypothesis can tell one failure from another."""
    try:
        trio.run(partial(run, script, ttl_s, minio, seed, budget_bytes))
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None


@given(scripts, st.sampled_from([0.0, 1000.0]), st.integers(0, 5))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_model(script: list[tuple[str, tuple[Any, ...]]], ttl_s: float, seed: int) -> None:
    play(script, ttl_s, minio=True, seed=seed)


@given(scripts, st.sampled_from([0.0, 1000.0]), st.integers(0, 5))
@settings(max_examples=EXAMPLES // 3, deadline=None, suppress_health_check=list(HealthCheck))
def test_model_where_listings_have_no_metadata(
    script: list[tuple[str, tuple[Any, ...]]], ttl_s: float, seed: int
) -> None:
    play(script, ttl_s, minio=False, seed=seed)


@given(scripts, st.sampled_from([20_000, 60_000]), st.integers(0, 5))
@settings(max_examples=EXAMPLES // 4, deadline=None, suppress_health_check=list(HealthCheck))
def test_model_with_a_small_dirty_budget(
    script: list[tuple[str, tuple[Any, ...]]], budget_bytes: int, seed: int
) -> None:
    """Files that are open are parked all the time."""
    play(script, 1000.0, minio=True, seed=seed, budget_bytes=budget_bytes)


#: Scripts that once failed, shortest form.
ONCE_FAILED: list[list[tuple[str, tuple[Any, ...]]]] = [
    [("unlink", ("d/b",)), ("crash", ("now", 0, False))],
    [("rmdir", ("e",)), ("touch", ("e",)), ("fsync", ("e",)), ("mkdir", ("e/a",))],
    [("rmdir", ("e",)), ("touch", ("e",)), ("crash", ("cut", 1, True))],
    [("rename", ("d/s", "b")), ("rename", ("d", "a"))],
    [("rename", ("d/s", "b")), ("unlink", ("a",)), ("rename", ("d", "a")), ("check", ())],
    [("unlink", ("d/s/a",)), ("rmdir", ("d/s",)), ("rename", ("d", "d2")), ("check", ())],
    [("create", ("b", Blob(20_000, 1))), ("crash", ("cut", 1, False))],
]


@pytest.mark.parametrize("minio", [True, False])
@pytest.mark.parametrize("ttl_s", [0.0, 1000.0])
@pytest.mark.parametrize("script", ONCE_FAILED)
def test_what_once_failed(script: list[tuple[str, tuple[Any, ...]]], ttl_s: float, minio: bool) -> None:
    play(script, ttl_s, minio=minio, seed=0)
