"""Requests of a process that was killed come to the bucket when its successor is at work already."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse.errors import NotFound, PreconditionFailed
from s3fuse.namespace import lateness
from s3fuse.namespace.changes import TOKEN, tokens
from s3fuse.namespace.lateness import DELETE, Lateness
from s3fuse.store.base import ANY, Bytes
from s3fuse.writing.ephemeral import MemoryJournal
from tests.engine.rig import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.engine.rig import Bench, Rig

#: How late requests may be here, and how late they are.
LATE_S, COMES_S = 2.0, 0.7


@pytest.fixture(autouse=True)
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lateness, "LATE_S", LATE_S)


@dataclass
class Sent:
    """Requests that were sent and have not come to the bucket."""

    calls: list[Callable[[], Awaitable[object]]] = field(default_factory=list)

    async def come(self) -> None:
        """They do, whatever becomes of them."""
        for call in self.calls:
            with suppress(PreconditionFailed, NotFound):
                await call()


@contextmanager
def on_the_way(bench: Bench, *operations: str) -> Iterator[Sent]:
    """What is asked of the bucket in the block stays on the way, with no answer."""
    sent = Sent()

    def kept(operation: str) -> Callable[..., Awaitable[None]]:
        work = getattr(bench.store, operation)

        async def call(*words: Any, **options: Any) -> None:
            if operation == "put":
                words = (words[0], Bytes(b"".join([bytes(chunk) async for chunk in words[1].chunks()])))
            if operation == "copy":  # as MinIO, which ignores its condition
                options["condition"] = ANY
            sent.calls.append(lambda: work(*words, **options))
            await trio.sleep_forever()

        return call

    with pytest.MonkeyPatch.context() as patch:
        for operation in operations:
            patch.setattr(bench.store, operation, kept(operation))
        yield sent


async def kill(rig: Rig, sent: Sent) -> None:
    """Sends everything dirty, and kills the process when that is on the way."""
    for inode in rig.dirty():
        rig.core.changes.queue(inode)
    await until(lambda: bool(sent.calls))
    await rig.crash()


async def come_late(bench: Bench, sent: Sent, key: str, began: float) -> None:
    """They come when the key is gone, or late."""
    with trio.move_on_at(began + COMES_S):
        await until(lambda: key not in bench.listed())
    await sent.come()


async def start(bench: Bench, rig: Rig, nursery: trio.Nursery, sent: Sent, key: str, *, resend: bool) -> None:
    """The next process; with `resend` it sends what the last one did, and that arrives."""
    began = trio.current_time()
    await rig.start()
    if resend:
        for inode in rig.dirty():
            rig.core.changes.queue(inode)
        await until(lambda: key in bench.listed() and not rig.core.changes.in_flight)
    nursery.start_soon(come_late, bench, sent, key, began)


@pytest.mark.parametrize("resend", [True, False])
@pytest.mark.parametrize("what", ["file", "directory", "rename"])
async def test_what_was_removed_does_not_come_back(bench: Bench, what: str, resend: bool) -> None:
    key = {"file": "f", "directory": "d/", "rename": "g"}[what]
    if what == "rename":
        await bench.upload("f", b"data")
    rig = await bench.rig()
    with on_the_way(bench, "put", "copy") as sent:
        match what:
            case "file":
                await rig.put("f", b"data")
            case "directory":
                await rig.mkdir("d")
            case _:
                await rig.rename("f", "g")
        await kill(rig, sent)
    async with trio.open_nursery() as nursery:
        await start(bench, rig, nursery, sent, key, resend=resend)
        await (rig.rmdir("d") if what == "directory" else rig.unlink(key))
        await rig.drained()
    assert bench.listed() == []
    assert await rig.ls() == []
    rig.check_clean()


@pytest.mark.parametrize("what", ["directory", "rename"])
async def test_what_was_changed_since_stays_so(bench: Bench, what: str) -> None:
    """A marker, and a copy on MinIO, have no condition."""
    key = "d/" if what == "directory" else "g"
    if what == "rename":
        await bench.upload("f", b"data")
    rig = await bench.rig()
    with on_the_way(bench, "put", "copy") as sent:
        await (rig.mkdir("d") if what == "directory" else rig.rename("f", "g"))
        await kill(rig, sent)
    async with trio.open_nursery() as nursery:
        await start(bench, rig, nursery, sent, key, resend=True)
        await rig.chmod(key.rstrip("/"), 0o700)
        if what == "rename":
            await rig.write("g", b"NEW")
        await rig.drained()
    assert int((await bench.info(key)).metadata["mode"]) & 0o777 == 0o700
    assert bench.contents() == ({"d/": b""} if what == "directory" else {"g": b"NEWa"})
    rig.check_clean()


async def test_the_next_process_but_one_knows_of_it(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("f", b"old")
    with on_the_way(bench, "put") as sent:
        await kill(rig, sent)
    async with trio.open_nursery() as nursery:
        await start(bench, rig, nursery, sent, "f", resend=True)
        await rig.unlink("f")
        await rig.crash()
        await rig.start()
        await rig.drained()
    assert bench.listed() == []
    rig.check_clean()


async def test_two_requests_on_their_way_to_one_key(bench: Bench) -> None:
    """A delete, and the first upload of the next file of the name, which is removed as well."""
    await bench.upload("f", b"old")
    rig = await bench.rig()
    await rig.unlink("f")
    with on_the_way(bench, "delete"):
        await rig.put("f", b"second")
        for inode in rig.dirty():
            rig.core.changes.queue(inode)
        await until(lambda: bool(rig.core.changes.in_flight))
        await rig.crash()
        began = trio.current_time()
        await rig.start()
        (first,) = [inode for inode in rig.dirty() if not inode.linked]
        rig.core.changes.queue(first)
        await until(lambda: first.number in rig.core.changes.in_flight)
        token = tokens(await rig.walk("f"))[0]
        await rig.unlink("f")
        await rig.crash()
    await bench.upload("f", b"second", **{TOKEN: token})
    assert trio.current_time() - began < LATE_S
    await rig.start()
    await rig.put("f", b"third")
    await rig.drained()
    assert bench.contents() == {"f": b"third"}
    assert await rig.ls() == ["f"]
    rig.check_clean()


def test_what_is_known_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = MemoryJournal("store")
    late = Lateness(journal)
    assert late.is_over
    late.expect([("a", DELETE), ("b", 7), ("c", -7), ("d/", -8), ("d/", DELETE)])
    for known in (late, Lateness(journal)):
        known.expect([])
        assert not known.is_over
        assert [bool(known.before_delete_s(key)) for key in ("a", "b", "c", "d/", "e")] == [0, 1, 1, 1, 0]
        assert [bool(known.before_write_s(key, 7)) for key in ("a", "b", "c", "d/", "e")] == [1, 0, 0, 1, 0]
        assert [bool(known.before_write_s(key, 8)) for key in ("a", "b", "c", "d/", "e")] == [1, 1, 1, 1, 0]
        assert [bool(known.before_rewrite_s(key)) for key in ("a", "b", "c", "d/", "e")] == [0, 0, 1, 1, 0]
        assert 0 < known.before_delete_s("b") <= LATE_S
    monkeypatch.setattr(lateness, "LATE_S", 0.0)
    afterwards = Lateness(journal)
    afterwards.expect([("f", DELETE)])
    assert afterwards.is_over
    assert journal.late() == []
