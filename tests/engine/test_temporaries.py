"""Objects set aside for a moment: nothing of them is left, whenever the process is killed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from s3fuse.namespace import lateness
from s3fuse.namespace.recovery import rewrite
from s3fuse.store.faulty import LOST
from tests.engine.rig import until
from tests.engine.test_crashes import begin, unheard
from tests.engine.test_lateness import on_the_way

if TYPE_CHECKING:
    from tests.engine.rig import Bench, Rig

WAYS = ["two names exchanged", "three names in a circle", "open and replaced"]
CONTENTS = {
    "two names exchanged": {"a": b"b", "b": b"a", "c": b"c"},
    "three names in a circle": {"a": b"c", "b": b"a", "c": b"b"},
    "open and replaced": {"a": b"new", "b": b"b", "c": b"c"},
}


async def prepared(bench: Bench, way: str) -> Rig:
    """A mount whose changes need an object set aside."""
    for name in "abc":
        await bench.upload(name, name.encode())
    rig = await bench.rig()
    match way:
        case "two names exchanged":
            moves = ("a", "t"), ("b", "a"), ("t", "b")
        case "three names in a circle":
            moves = ("c", "t"), ("b", "c"), ("a", "b"), ("t", "a")
        case _:
            moves = ()
            await rig.open("a")
            await rig.unlink("a")
            await rig.put("a", b"new")
    for old, new in moves:
        await rig.rename(old, new)
    return rig


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rebuilt", [False, True])
async def test_killed_between_the_copy_and_the_journal(bench: Bench, way: str, rebuilt: bool) -> None:
    rig = await prepared(bench, way)
    with unheard(bench, "copy") as done:
        await begin(rig, done)
        assert [key for key in bench.listed() if key.startswith(".s3fuse/")]
        if rebuilt:  # as where somebody damaged it: all that it had comes from memory
            rig.journal.rebuild(partial(rewrite, rig.core.changes, rig.core.syncer.uploads))
        await rig.crash()
    await rig.start()
    await rig.drained()
    assert bench.contents() == CONTENTS[way]
    assert rig.journal.temporaries() == []
    rig.check_clean()


@pytest.mark.parametrize("way", WAYS)
async def test_a_copy_that_comes_when_its_process_is_dead(
    bench: Bench, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lateness, "LATE_S", 2.0)
    rig = await prepared(bench, way)
    with on_the_way(bench, "copy") as sent:
        for inode in rig.dirty():
            rig.core.changes.queue(inode)
        await until(lambda: bool(sent.calls))
        await rig.crash()
    await rig.start()
    # What is copied stays as it is: a new file of its name waits for what may come there.
    with rig.line.held("copy"):
        for _ in range(300):  # who looks for what may be there has done so, or waits
            await trio.lowlevel.checkpoint()
        await sent.come()
    await rig.drained()
    assert bench.contents() == CONTENTS[way]
    rig.check_clean()


@pytest.mark.parametrize("way", WAYS)
async def test_copies_whose_answers_are_lost(bench: Bench, way: str) -> None:
    rig = await prepared(bench, way)
    rig.line.schedule("copy", LOST, LOST)
    rig.line.quiet = False
    await rig.drain(rounds=3)
    rig.line.quiet = True
    await rig.restart()
    await rig.drained()
    assert bench.contents() == CONTENTS[way]
    assert rig.journal.temporaries() == []
    rig.check_clean()
