"""Writes over an object whose answers were lost for good, and what programs do before they are repeated."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from s3fuse.errors import Unavailable
from s3fuse.store.faulty import LOST
from tests.engine.rig import until

if TYPE_CHECKING:
    import trio

    from tests.engine.rig import Bench, Rig


async def in_doubt(rig: Rig, operation: str, path: str) -> None:
    """Sends what is dirty there: it arrives, and the mount does not learn of it."""
    rig.line.schedule(operation, LOST)
    rig.line.quiet = False
    rig.core.changes.queue(await rig.walk(path))
    await until(lambda: rig.line.failures[operation] == 1)
    await until(lambda: not rig.core.changes.in_flight)


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("partly", [False, True])
@pytest.mark.parametrize(
    "then", ["nothing", "write", "unlink", "rename", "rename over", "rename away and a new one", "a new one", "circle"]
)
async def test_overwrite_whose_answer_was_lost(bench: Bench, then: str, partly: bool, crash: bool) -> None:
    rig = await bench.rig()
    await rig.put("f", b"old!")
    await rig.put("other", b"other")
    await rig.drained()
    await rig.write("f", b"NE" if partly else b"NEW!", flags=0 if partly else os.O_TRUNC)
    now = b"NEd!" if partly else b"NEW!"
    await in_doubt(rig, "put", "f")
    assert bench.data("f") == now
    if crash:
        await rig.restart()
    expected = {"f": now, "other": b"other"}
    match then:
        case "write":
            await rig.write("f", b"x", offset=3)
            expected["f"] = now[:3] + b"x"
        case "unlink":
            await rig.unlink("f")
            del expected["f"]
        case "rename":
            await rig.rename("f", "g")
            expected = {"g": now, "other": b"other"}
        case "rename over":
            await rig.rename("other", "f")
            expected = {"f": b"other"}
        case "rename away and a new one":
            await rig.rename("f", "g")
            await rig.put("f", b"second")
            expected |= {"f": b"second", "g": now}
        case "a new one":
            await rig.unlink("f")
            await rig.put("f", b"second")
            expected["f"] = b"second"
        case "circle":
            await rig.rename("f", "aside")
            await rig.rename("other", "f")
            await rig.rename("aside", "other")
            expected = {"f": b"other", "other": now}
    await rig.drained()
    assert bench.contents() == expected
    assert await rig.ls() == sorted(expected)
    assert rig.core.syncer.conflicts.resolved == []
    rig.check_clean()


@pytest.mark.parametrize("crash", [False, True])
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("then", ["write", "unlink", "rename", "rename over"])
async def test_copy_whose_answer_was_lost(bench: Bench, then: str, moves: bool, crash: bool, copying: str) -> None:
    """chmod, or a rename, that is there without our knowing it, and then more."""
    rig = await bench.rig()
    await rig.put("e", b"data")
    await rig.put("other", b"other")
    await rig.drained()
    if moves:
        await rig.rename("e", "f")
    else:
        await rig.chmod("e", 0o600)
    await in_doubt(rig, copying, "f" if moves else "e")
    if crash:
        await rig.restart()
    name = "f" if moves else "e"
    expected = {name: b"data", "other": b"other"}
    match then:
        case "write":
            await rig.write(name, b"D")
            expected[name] = b"Data"
        case "unlink":
            await rig.unlink(name)
            del expected[name]
        case "rename":
            await rig.rename(name, "g")
            expected = {"g": b"data", "other": b"other"}
        case "rename over":
            await rig.rename("other", name)
            expected = {name: b"other"}
    await rig.drained()
    assert bench.contents() == expected
    assert rig.core.syncer.conflicts.resolved == []
    rig.check_clean()


async def test_many_deletes_after_overwrites_whose_answers_were_lost(bench: Bench) -> None:
    """So many that a listing, which tells of no tokens, is asked instead of each."""
    rig = await bench.rig()
    names = [f"f{number:02}" for number in range(30)]
    for name in names:
        await rig.put(name, b"old")
    await rig.drained()
    for name in names:
        await rig.write(name, b"new")
    rig.line.schedule("put", *[LOST] * len(names))
    rig.line.quiet = False
    await rig.drain()
    assert rig.line.failures["put"] == len(names)
    for name in names:
        await rig.unlink(name)
    await rig.drained()
    assert bench.contents() == {}


@pytest.mark.parametrize("crash", [False, True])
async def test_removed_twice_before_the_first_delete(bench: Bench, nursery: trio.Nursery, crash: bool) -> None:
    """A new file took the place of a removed one, its answer was lost, and it is removed as well."""
    rig = await bench.rig(ttl_s=0.0)
    await rig.put("f", b"first")
    await rig.drained()
    await rig.unlink("f")
    await rig.put("f", b"second")
    await in_doubt(rig, "put", "f")
    assert bench.data("f") == b"second"
    await rig.unlink("f")
    if crash:
        await rig.restart()
    assert await rig.ls() == []
    with rig.line.held("delete") as gate:
        nursery.start_soon(rig.drain)
        await gate.arrived()
        assert await rig.ls() == []
    await rig.drained()
    assert bench.contents() == {}
    assert await rig.ls() == []
    rig.check_clean()


async def test_somebody_elses_version_is_not_taken_for_ours(bench: Bench, expected_log: list[str]) -> None:
    expected_log.append("was changed by somebody else")
    rig = await bench.rig()
    await rig.put("f", b"old!")
    await rig.drained()
    await rig.write("f", b"NEW!")
    await in_doubt(rig, "put", "f")
    await bench.upload("f", b"theirs")
    await rig.unlink("f")
    await rig.drained()
    assert bench.contents() == {"f": b"theirs"}


async def test_uploads_that_wait_go_on_when_the_server_is_back(bench: Bench) -> None:
    """Not after their own backoff, which grows to a minute."""
    rig = await bench.rig()
    for number in range(20):
        await rig.put(f"f{number}", b"data")
    rig.line.cut = True
    for _ in range(8):
        await rig.drain()
    assert bench.contents() == {}
    assert not rig.line.health.up
    assert rig.line.health.needs == ""
    with pytest.raises(Unavailable):
        await rig.line.head("f1")
    rig.line.cut = False
    await rig.line.list_page("")  # as the watch does
    await until(lambda: not rig.dirty())
    assert len(bench.contents()) == 20
    assert rig.line.health.up
    assert stat.S_ISREG((await rig.walk("f1")).mode)
