"""A change of names or attributes that fails anywhere leaves tree, journal, session and bucket as they were."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

import s3fuse
from s3fuse.vfs.attributes import Wanted
from s3fuse.vfs.links import Links
from tests.engine import state

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import FrameType

    from tests.engine.rig import Bench, Rig

HOME = Path(s3fuse.__file__).parent
#: Where a step may fail: everything that changes memory or records it.
ROOMS = tuple(str(HOME / room) for room in ("vfs", "namespace", "writing", "session", "attrs.py"))
#: A record of the session is whole or not there: `Log.append` never raises. To open a file is only counted.
NEVER = {"append", "_grow", "open", "open_known"}
#: Once the journal has a step, the session counts it.
NOT_AFTER_COMMIT = {"transaction", "_committed", "_step_done", "_append"}


#: In the write-back: loops that serve all inodes, ends of attempts and of transactions, functions with a nursery.
NEVER_SENDING = NEVER | {"transaction", "_committed", "_wake_waiters", "_attempt", "_postpone", "failed", "is_at"}
NEVER_SENDING |= {"<setcomp>", "close", "_still_ours", "park", "upload", "_keys", "_places", "queue", "_enter"}
NEVER_SENDING |= {"_wait_behind", "ended_well", "is_failing", "is_hopeless", "failed_with"}


class Raised(Exception):
    """What no part of the program expects."""


class Tracer:
    """Raises when the `line`-th line of `ROOMS` is about to run."""

    def __init__(self, rig: Rig, line: int) -> None:
        self.left = line
        self.where = ""
        self.committed = False
        self._database = rig.journal._db
        self._began = False
        self._task = trio.lowlevel.current_task()

    def __enter__(self) -> Tracer:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(ROOMS) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event != "line" or trio.lowlevel.current_task() is not self._task:
            return self._line
        self.committed |= self._began and not self._database.in_transaction
        self._began |= self._database.in_transaction
        if frame.f_code.co_name in (NEVER | NOT_AFTER_COMMIT if self.committed else NEVER):
            return self._line
        self.left -= 1
        if self.left == 0:
            self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
            raise Raised(self.where)
        return self._line


async def fill(rig: Rig, bench: Bench) -> None:
    """Names of every kind: in the bucket and not, open, with staged bytes, moved and not yet arrived."""
    await rig.put("f", b"0123456789")
    await rig.put("over", b"over")
    await rig.put("open", b"open")
    for name in ("d", "d/deep", "empty", "other"):
        await rig.mkdir(name)
    await rig.put("d/a", b"a")
    await rig.put("d/deep/b", b"b")
    await rig.put("moved", b"moved")
    await rig.symlink("s", b"f")
    await rig.setxattr("f", b"user.x", b"1")
    await rig.drained()
    await rig.open("open", os.O_RDWR)
    await rig.rename("moved", "moved2")
    await rig.put("new", b"n" * 5000)
    await rig.put("d/new", b"n")
    await rig.write("over", b"OV")
    await rig.mkdir("fresh")
    for inode in rig.core.inodes.table.values():
        if inode.lookups:
            rig.core.known.counted(inode)


async def link(rig: Rig) -> None:
    rig.core.config = replace(rig.core.config, hard_links="copy")
    links = Links(rig.core, rig.names, rig.files, rig.attributes)
    await links.link(await rig.walk("s"), rig.core.inodes.root, b"linked")


async def setattr_all(rig: Rig) -> None:
    wanted = Wanted(mode=0o600, uid=1, gid=2, size=3, mtime_ns=5, atime_ns=6)
    await rig.attributes.setattr(await rig.walk("f"), wanted)


async def removexattr(rig: Rig) -> None:
    await rig.attributes.removexattr(await rig.walk("f"), b"user.x")


async def create(rig: Rig) -> None:
    parent, name = await rig._at("d/made")
    await rig.names.create(parent, name, 0o600, 1, 2)


OPERATIONS: dict[str, Callable[[Rig], Awaitable[object]]] = {
    "create": create,
    "mkdir": lambda rig: rig.mkdir("d/made"),
    "mknod": lambda rig: rig.mkfifo("d/made"),
    "symlink": lambda rig: rig.symlink("d/made", b"a"),
    "link": link,
    "unlink": lambda rig: rig.unlink("f"),
    "unlink what is not in the bucket": lambda rig: rig.unlink("new"),
    "unlink what is open": lambda rig: rig.unlink("open"),
    "unlink what has not arrived": lambda rig: rig.unlink("moved2"),
    "rmdir": lambda rig: rig.rmdir("empty"),
    "rmdir of a new one": lambda rig: rig.rmdir("fresh"),
    "rename": lambda rig: rig.rename("f", "d/g"),
    "rename over": lambda rig: rig.rename("f", "over"),
    "rename of a new file over": lambda rig: rig.rename("new", "f"),
    "rename back": lambda rig: rig.rename("moved2", "moved"),
    "rename of a tree": lambda rig: rig.rename("d", "other/tree"),
    "rename of a tree over": lambda rig: rig.rename("d", "empty"),
    "chmod": lambda rig: rig.chmod("f", 0o600),
    "chmod of a directory": lambda rig: rig.chmod("d", 0o700),
    "utimens": lambda rig: rig.utimens("f", 10**20),
    "truncate": lambda rig: rig.truncate("f", 3),
    "truncate of staged bytes": lambda rig: rig.truncate("new", 100),
    "truncate to grow": lambda rig: rig.truncate("over", 200_000),
    "setattr": setattr_all,
    "setxattr": lambda rig: rig.setxattr("f", b"user.y", b"2"),
    "removexattr": removexattr,
    "open to truncate": lambda rig: rig.open("f", os.O_RDWR | os.O_TRUNC),
}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_it_fails_anywhere(bench: Bench, operation: str, expected_log: list[str]) -> None:
    """Each line in turn raises. A change that is committed by then is there in full; a link may be undone again."""
    expected_log.append("something is left behind")
    call = OPERATIONS[operation]
    outcomes = []
    tracer, failed, line, again = None, 0, 0, True
    while tracer is None or tracer.where:
        line += 1
        if again:
            rig = await prepared(bench, line)
            before, earlier = state.everything(rig, bench), state.outcome(rig)
        tracer = Tracer(rig, line)
        with suppress(Raised), tracer:
            await call(rig)
        assert not rig.journal.undo.is_on, tracer.where
        assert not rig.journal._db.in_transaction, tracer.where
        again = tracer.committed or not tracer.where
        if again:
            outcomes.append((tracer.where, state.outcome(rig)))
            continue
        failed += 1
        found = state.differences(before, state.everything(rig, bench))
        assert not found, (tracer.where, found)
    assert failed > 30
    for where, outcome in outcomes:
        if operation == "link" and where and outcome == earlier:
            continue
        assert not state.differences(outcomes[-1][1], outcome), where


async def prepared(bench: Bench, number: int) -> Rig:
    for rig in bench.rigs:
        await rig.crash()
    await bench.remove(*bench.listed())
    rig = await bench.rig(f"cache{number}", kept=True)
    await fill(rig, bench)
    await rig.core.syncer.stop()  # nothing else changes from here on
    return rig


class SendingTracer(Tracer):
    """The same in whatever task brings an inode to the bucket."""

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        return None if frame.f_code.co_name in NEVER_SENDING else super()._call(frame, event, arg)

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        self._task = trio.lowlevel.current_task()
        self.committed = False
        return super()._line(frame, event, arg) if "_attempt" in self._task.name else self._line


async def change_all(rig: Rig) -> None:
    """Something of each kind that is brought to the bucket."""
    await rig.write("f", b"XX", 3)
    await rig.rename("d", "e")
    await rig.unlink("gone")
    await rig.put("new", b"n" * 5000)
    await rig.rename("new", "over")
    await rig.chmod("e/a", 0o600)
    await rig.symlink("s", b"f")


@pytest.mark.parametrize("first", [1, 20])
async def test_the_write_back_fails_anywhere(bench: Bench, first: int, expected_log: list[str]) -> None:
    """Some of its lines in turn raise: the next attempts bring all of it to the bucket, and nothing is left over."""
    expected_log.append(".")
    wanted = {"e/": b"", "e/a": b"a", "f": b"012XX56789", "over": b"n" * 5000, "s": b"f"}
    where, line = "the start", first
    while where:
        for rig in bench.rigs:
            await rig.crash()
        await bench.remove(*bench.listed())
        rig = await bench.rig(f"cache{line}", kept=True)
        for name, data in (("f", b"0123456789"), ("over", b"over"), ("gone", b"gone")):
            await rig.put(name, data)
        await rig.mkdir("d")
        await rig.put("d/a", b"a")
        await rig.drained()
        await change_all(rig)
        tracer = SendingTracer(rig, line)
        with tracer, trio.move_on_after(3):
            await rig.drain()
        await rig.drained()
        assert bench.contents() == wanted, tracer.where
        rig.forget()
        rig.check_clean()
        where, line = tracer.where, line + 41
    assert line > 1000
