"""When the plugin purges, and when not: what the processes that do it answer is said here."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse.cli import cli
from s3fuse.errors import UserError
from s3fuse.volume import purges as module
from s3fuse.volume import removal as removals
from s3fuse.volume.definition import Definition, MountOptions
from s3fuse.volume.naming import NameRule
from s3fuse.volume.places import Places
from s3fuse.volume.purges import Purges
from s3fuse.volume.removal import Removal
from s3fuse.volume.state import State

if TYPE_CHECKING:
    from pathlib import Path

    from s3fuse.volume.jobs import Job

OPTIONS = MountOptions(cli.commands["mount"], {})


def define(name: str, prefix: str = "", purge: str = "true") -> Definition:
    given = {"bucket": "bucket", "prefix": prefix, "purge": purge}
    return OPTIONS.define(name, given, NameRule("{name}"), "2026-01-01T00:00:00Z")


@dataclass
class Volume:
    """As much of a `VolumeMount` as purges look at."""

    definition: Definition
    cache_directory: Path
    status: dict[str, Any] = field(default_factory=dict)


class World:
    """A plugin's purges, and the processes that they run."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path
        self.state = State(tmp_path / "state")
        self.state.folder.mkdir(exist_ok=True)
        places = Places(base_dir=tmp_path, cache_root=tmp_path, credentials_dirs=(), linger_s=1, stale_s=1, unmount_s=1)
        self.volumes: dict[str, Volume] = {}
        self.purges = Purges(self.state, OPTIONS, places, self.volumes)  # type: ignore[arg-type]
        self.jobs: list[Job] = []
        #: What the next jobs of a kind come to; else they succeed.
        self.answers: dict[str, list[dict[str, Any] | Exception]] = {}
        #: Purges under way end when this is set.
        self.go = trio.Event()
        self.go.set()
        self.begun = trio.Event()

    async def run(self, definition: Definition, options: MountOptions, places: Places, job: Job) -> dict[str, Any]:
        self.jobs.append(job)
        if job.do == "purge":
            self.begun.set()
            await self.go.wait()
        answer = next(iter(self.answers.get(job.do, [])), {"now_ns": 7} if job.do == "look" else {})
        self.answers[job.do] = self.answers.get(job.do, [])[1:]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def add(self, name: str, prefix: str = "", purge: str = "true") -> Volume:
        volume = Volume(define(name, prefix, purge), self.folder / name)
        self.volumes[name] = volume
        self.state.save(volume.definition)
        return volume

    def removed(self, volume: Volume, removal: Removal) -> Definition:
        """What the driver does between the question and the purge."""
        self.state.remove(volume.definition, removal)
        del self.volumes[volume.definition.name]
        self.purges.waiting.add(volume.definition.name)
        return volume.definition

    @property
    def done(self) -> list[str]:
        return [job.do for job in self.jobs]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr(module.jobs, "run", world.run)
    return world


async def test_a_removal_asks_and_its_purge_takes_the_servers_time(world: World) -> None:
    volume = world.add("vol")
    volume.status = {"lease": {"key": ".s3fuse/lease-1"}}
    removal = await world.purges.ask(volume)  # type: ignore[arg-type]
    assert removal is not None
    definition = world.removed(volume, removal)
    assert world.state.load() == ([], [(definition, removal)])
    await world.purges.run(definition, removal)
    look, purge = world.jobs
    assert look.own == purge.own == (".s3fuse/lease-1",)
    assert (look.do, purge.do, purge.not_after_ns) == ("look", "purge", 7)
    assert world.state.load() == ([], [])
    assert not world.purges.waiting


async def test_a_use_refuses_the_removal(world: World) -> None:
    world.answers["look"] = [{"in_use": "node B has it"}]
    with pytest.raises(UserError, match=r"volume vol is not removed.*node B has it"):
        await world.purges.ask(world.add("vol"))  # type: ignore[arg-type]
    assert world.done == ["look"]


async def test_a_server_that_is_away_is_asked_again_until_it_answers(
    world: World, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    away = UserError("away")
    world.answers = {"look": [away], "purge": [away, away]}
    volume = world.add("vol")
    removal = await world.purges.ask(volume)  # type: ignore[arg-type]
    assert removal is not None
    assert removal.server_ns is None
    await world.purges.run(world.removed(volume, removal), removal)
    assert world.done == ["look", "purge", "purge", "purge"]
    assert all(job.removed_ns == removal.elapsed_ns for job in world.jobs[1:])
    assert caplog.text.count("is not purged yet: away") == 2


async def test_a_use_that_began_after_the_removal_ends_the_purge_for_good(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.answers["purge"] = [{"in_use": "node B has it"}]
    volume = world.add("vol")
    removal = await world.purges.ask(volume)  # type: ignore[arg-type]
    assert removal is not None
    await world.purges.run(world.removed(volume, removal), removal)
    assert world.done == ["look", "purge", "disown"]
    assert "node B has it. It stays for good" in caplog.text
    assert world.state.load() == ([], [])


async def test_what_is_given_up_is_never_taken_up_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever used it has ended when the rest of the work can be done: it is his data all the same."""
    world.answers = {"purge": [{"in_use": "node B has it"}], "disown": [UserError("away")] * 3}
    volume = world.add("vol")
    removal = await world.purges.ask(volume)  # type: ignore[arg-type]
    assert removal is not None
    definition = world.removed(volume, removal)
    monkeypatch.setattr(module, "RETRY_S", (0.001, 3600.0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.purges.run, definition, removal)
        while "disown" not in world.done:  # noqa: ASYNC110 - what it looks at has no events
            await trio.sleep(0.001)
        nursery.cancel_scope.cancel()  # the plugin ends
    (_, [(definition, kept)]) = world.state.load()
    assert kept == dataclasses.replace(removal, keep=True)
    await world.purges.run(definition, kept)
    assert world.done[:3] == ["look", "purge", "disown"]
    assert set(world.done[3:]) == {"disown"}


@pytest.mark.parametrize(
    ("prefix", "other", "overlaps"),
    [("", "", True), ("", "p", True), ("p", "", True), ("p", "p", True), ("p", "pp", False), ("p/q", "p/r", False)],
)
async def test_a_new_volume_at_the_place_ends_a_purge_that_waits(
    world: World, prefix: str, other: str, overlaps: bool
) -> None:
    volume = world.add("vol", prefix)
    removal = await world.purges.ask(volume)  # type: ignore[arg-type]
    assert removal is not None
    definition = world.removed(volume, removal)
    async with world.purges.making(define("other", other)):  # it is not begun yet: no reason to refuse
        world.add("other", other, "false")
    await world.purges.run(definition, removal)
    assert world.done == ["look", "disown" if overlaps else "purge"]


async def test_no_volume_is_made_where_a_purge_is_under_way(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    world.go = trio.Event()
    volume = world.add("vol", "p")
    removal = await world.purges.ask(volume)  # type: ignore[arg-type]
    assert removal is not None
    definition = world.removed(volume, removal)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.purges.run, definition, removal)
        await world.begun.wait()
        for name, prefix in (("a", "p"), ("b", "p/q"), ("c", ""), ("vol", "elsewhere")):
            with pytest.raises(UserError, match="try again later"):
                async with world.purges.making(define(name, prefix)):
                    pytest.fail("it is made")
        async with world.purges.making(define("d", "q")):
            world.add("d", "q")
        world.go.set()
    async with world.purges.making(define("vol", "p")):
        pass
    assert world.done == ["look", "purge"]


async def test_a_purge_does_not_begin_while_a_volume_is_made_there(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    volume = world.add("vol", "p")
    removal = await world.purges.ask(volume)  # type: ignore[arg-type]
    assert removal is not None
    definition = world.removed(volume, removal)
    async with trio.open_nursery() as nursery, world.purges.making(define("new", "p")):
        nursery.start_soon(world.purges.run, definition, removal)
        await trio.sleep(60)
        assert world.done == ["look"]
        world.add("new", "p")
    assert world.done == ["look", "disown"]


async def test_a_definition_that_cannot_be_read_holds_removals_and_purges(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    volume = world.add("vol", "p")
    removal = await world.purges.ask(volume)  # type: ignore[arg-type]
    assert removal is not None
    other = world.add("other", "elsewhere")
    path = world.state.folder / "broken.json"
    path.write_text("{")
    world.state.load()
    with pytest.raises(UserError, match="volume broken of this node may have that, too"):
        await world.purges.ask(other)  # type: ignore[arg-type]
    definition = world.removed(volume, removal)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.purges.run, definition, removal)
        await trio.sleep(3600)
        assert "purge" not in world.done
        path.unlink()
    assert world.done[-1] == "purge"
    await world.purges.ask(other)  # type: ignore[arg-type]


async def test_a_volume_without_purge_asks_nobody(world: World) -> None:
    volume = world.add("vol", purge="false")
    await world.purges.own(volume.definition)
    assert await world.purges.ask(volume) is None  # type: ignore[arg-type]
    await world.purges.clean_up(volume)  # type: ignore[arg-type]
    assert world.done == []


async def test_a_volume_is_made_only_where_purge_can_hold(world: World) -> None:
    world.answers["own"] = [{"refused": "too much is there"}, UserError("away")]
    with pytest.raises(UserError, match="volume vol cannot have the option purge: too much is there"):
        await world.purges.own(define("vol"))
    await world.purges.own(define("vol"))  # its first mount does it
    await world.purges.own(define("vol", purge="all"))  # which needs no proof
    assert world.done == ["own", "own"]


@pytest.mark.parametrize("step_s", [-86400, -1, 0, 3600, 10**9])
def test_a_clock_that_is_set_changes_no_removal(step_s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    removal = Removal.now()
    monkeypatch.setattr(removals.time, "time_ns", lambda: time.time_ns() + step_s * 10**9)
    assert removal.removed_ns == removal.elapsed_ns
    assert Removal.from_json(removal.to_json()) == removal


def test_after_a_start_of_the_machine_its_clock_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    removal = Removal.now()
    wall_ns = removal.wall_ns
    monkeypatch.setattr(removals, "boot_id", lambda: "another")
    monkeypatch.setattr(removals, "_elapsed_ns", lambda: 60 * 10**9)
    monkeypatch.setattr(removals.time, "time_ns", lambda: wall_ns + 3600 * 10**9)
    assert removal.removed_ns == (60 - 3600) * 10**9
    monkeypatch.setattr(removals.time, "time_ns", lambda: wall_ns - 5)
    assert removal.removed_ns == 60 * 10**9
