"""The turns of a volume's mount in a world that is made up: what daemons, the kernel and containers do is said here."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse.cli import cli
from s3fuse.errors import UserError
from s3fuse.kernel import FSTYPE, MountEntry
from s3fuse.volume import flushing, mounts, starts
from s3fuse.volume.definition import MountOptions
from s3fuse.volume.inuse import Holders
from s3fuse.volume.mounts import VolumeMount
from s3fuse.volume.naming import NameRule
from s3fuse.volume.places import Places
from s3fuse.volume.uses import Use

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


#: The highest pid there may be, which hardly anybody has.
NOBODY = (1 << 22) - 1


@dataclass
class World:
    """What is outside of the plugin."""

    mounted: bool = False
    dead: bool = False
    held: bool = False
    pending: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)
    #: What the daemon answers instead of its status.
    trouble: Exception | None = None
    busy: bool = False
    #: What `s3fuse mount` fails with; it runs as long as `go` is not set.
    refusal: str = ""
    go: trio.Event = field(default_factory=trio.Event)
    starts: int = 0
    asked: list[str] = field(default_factory=list)

    async def run(self, *arguments: str, started: Callable[[Any], None]) -> str:
        self.starts += 1
        await self.go.wait()
        if self.refusal:
            raise UserError(self.refusal)
        self.mounted, self.dead = True, False
        return ""

    def mount_entry(self, mountpoint: Path) -> MountEntry | None:
        return MountEntry(str(mountpoint), "0:99", FSTYPE, "s3fuse#bucket") if self.mounted else None

    def request(self, mountpoint: Path, verb: str, **arguments: Any) -> dict[str, Any]:
        self.asked.append(verb)
        if not self.mounted or self.dead:
            raise ConnectionRefusedError
        if self.trouble is not None:
            raise self.trouble
        if verb == "flush":
            return {"failed": self.failed}
        if verb == "umount":
            if self.busy:
                raise UserError(f"{mountpoint} is in use")
            self.mounted = False
            return {"pending": []}
        return {"pid": NOBODY, "pending": {"files": self.pending, "bytes": 0}, "last_error": "", "server": {}}


class Kernel(Holders):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    async def have(self, device: str, *, age_s: float = 0.0) -> bool:
        await trio.lowlevel.checkpoint()
        return self.world.held and device == "0:99"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    world.go.set()
    monkeypatch.setattr(mounts.process, "run", world.run)
    monkeypatch.setattr(mounts.kernel, "mount_entry", world.mount_entry)
    monkeypatch.setattr(mounts.kernel, "is_dead", lambda mountpoint: world.dead)
    monkeypatch.setattr(mounts.control, "request", world.request)
    monkeypatch.setattr(mounts.control, "last_said", lambda mountpoint: {})
    monkeypatch.setattr(mounts.control, "draining", lambda directory: None)
    monkeypatch.setattr(starts, "refuse_writes", lambda directory, on=True: True)
    monkeypatch.setattr(mounts, "TICK_S", 0.05)
    monkeypatch.setattr(mounts, "BUSY_TICK_S", 0.02)
    monkeypatch.setattr(mounts, "FIRST_LOOK_S", 0.02)
    monkeypatch.setattr(flushing, "COPY_UP_S", 0.05)
    monkeypatch.setattr(flushing, "AGAIN_S", 0.01)
    monkeypatch.setattr(starts, "RETRY_S", (0.02, 0.1))
    return world


@asynccontextmanager
async def volume(world: World, tmp_path: Path, **more: float) -> AsyncIterator[VolumeMount]:
    times = {"linger_s": 0.1, "stale_s": 0.1, "unmount_s": 5.0, **more}
    places = Places(base_dir=tmp_path / "m", cache_root=tmp_path / "c", credentials_dirs=(), **times)
    options = MountOptions(cli.commands["mount"], {})
    definition = options.define("vol", {"bucket": "bucket"}, NameRule("{name}"), "")
    mount = VolumeMount(definition, options, places, Kernel(world))
    mount.owe(0)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.run)
            yield mount
            nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - what it looks at has no events
        await trio.sleep(0.005)


async def test_a_mount_is_begun_once_and_ends_after_its_last_user(world: World, tmp_path: Path) -> None:
    world.go = trio.Event()
    async with volume(world, tmp_path) as mount:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(mount.acquire, str(number))
            await until(lambda: world.starts)
            assert mount.state == "starting"
            world.go.set()
        assert (world.starts, mount.state, len(mount.uses.by_id)) == (1, "mounted", 5)
        for number in range(5):
            await mount.release(str(number))
        await until(lambda: mount.state == "unmounted")
        assert world.asked.count("umount") == 1
        assert not mount.uses


@pytest.mark.parametrize("what", ["held", "pending", "busy"])
async def test_what_keeps_a_mount(world: World, tmp_path: Path, what: str) -> None:
    async with volume(world, tmp_path) as mount:
        await mount.acquire("1")
        setattr(world, what, 1)
        await mount.release("1")
        looks = len(world.asked)
        await until(lambda: len(world.asked) > looks + 5)
        assert mount.state in ("mounted", "ending")
        assert world.mounted
        setattr(world, what, 0)
        await until(lambda: not world.mounted)


async def test_ids_without_an_unmount(world: World, tmp_path: Path) -> None:
    async with volume(world, tmp_path) as mount:
        await mount.acquire("1")
        await mount.acquire("2")
        world.held = True
        await until(lambda: all(use.seen for use in mount.uses.by_id.values()))
        world.held = False
        await until(lambda: not world.mounted)
        assert not mount.uses


async def test_a_container_that_comes_late_and_goes_soon_is_seen(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "TICK_S", 600)
    async with volume(world, tmp_path, stale_s=600) as mount:
        await mount.acquire("1")
        looks = len(world.asked)
        await until(lambda: len(world.asked) > looks + 2)
        world.held = True
        await until(lambda: mount.uses.by_id["1"].seen)


async def test_an_id_that_no_container_was_seen_with_counts_longer(world: World, tmp_path: Path) -> None:
    now = time.monotonic()
    unseen, left = Use(now - 5), Use(now - 5, seen=True, gone_at=now - 2)
    assert not unseen.is_stale(now, 1.0)
    assert unseen.is_stale(now, 0.4)
    assert left.is_stale(now, 1.0)
    assert not left.is_stale(now, 3.0)
    assert not Use(now - 99, seen=True).is_stale(now, 1.0)
    async with volume(world, tmp_path) as mount:
        await mount.acquire("copy")
        await until(lambda: not world.mounted)


async def test_a_refusal_is_told_and_the_next_one_tries_again(world: World, tmp_path: Path) -> None:
    world.refusal = "bucket 'bucket' does not exist"
    async with volume(world, tmp_path) as mount:
        with pytest.raises(UserError, match="volume vol: bucket 'bucket' does not exist"):
            await mount.acquire("1")
        assert (mount.state, bool(mount.uses), mount.last_error) == ("unmounted", False, world.refusal)
        starts = world.starts
        await trio.sleep(0.2)
        assert world.starts == starts, "nobody wants it any more"
        world.refusal = ""
        await mount.acquire("1")
        assert mount.last_error is None


async def test_a_mount_that_takes_too_long_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "MOUNT_S", 2.0)
    world.go = trio.Event()
    async with volume(world, tmp_path) as mount:
        with pytest.raises(UserError, match="volume vol is not mounted after 2 s, and still tries"):
            await mount.acquire("1")
        assert mount.state == "starting"
        world.go.set()
        await until(lambda: mount.state == "mounted")
        monkeypatch.setattr(mounts, "MOUNT_S", 30)
        await mount.acquire("1")
        assert world.starts == 1


async def test_a_dead_daemon_is_replaced_as_soon_as_that_can_be(world: World, tmp_path: Path) -> None:
    async with volume(world, tmp_path) as mount:
        await mount.acquire("1")
        world.dead, world.refusal = True, "the server is away"
        await until(lambda: world.starts > 3)
        assert mount.last_error == "the server is away"
        world.refusal = ""
        await until(lambda: mount.state == "mounted")
        assert "1" in mount.uses.by_id


@pytest.mark.parametrize("trouble", [TimeoutError("timed out"), ConnectionResetError("gone")])
async def test_a_daemon_that_does_not_answer_is_left_alone(world: World, tmp_path: Path, trouble: Exception) -> None:
    async with volume(world, tmp_path) as mount:
        await mount.acquire("1")
        world.trouble = trouble
        await mount.acquire("2")
        assert (mount.state, world.starts) == ("mounted", 1)
        assert mount.last_error is not None
        assert "its daemon does not answer" in mount.last_error
        world.trouble = None


async def test_a_living_mount_is_adopted(world: World, tmp_path: Path) -> None:
    world.mounted = world.held = True
    async with volume(world, tmp_path) as mount:
        await until(lambda: mount.state == "mounted")
        await mount.acquire("new")
        await mount.release("new")
        await mount.release("never seen here")
        looks = len(world.asked)
        await until(lambda: len(world.asked) > looks + 5)
        assert (world.mounted, world.starts) == (True, 0)
        world.held = False
        await until(lambda: not world.mounted)


async def test_what_docker_copied_is_told_once_what_a_container_wrote_is_not(world: World, tmp_path: Path) -> None:
    async with volume(world, tmp_path, linger_s=60) as mount:
        await mount.acquire("copy-up")
        world.failed = [{"name": "file", "error": "access denied", "state": "waiting"}]
        await mount.release("copy-up")
        with pytest.raises(UserError, match=r"volume vol: 1 files are not in the bucket.*file: access denied"):
            await mount.acquire("run")
        await mount.acquire("run")
        world.held = True
        await until(lambda: mount.uses.by_id["run"].seen)
        world.held = False
        await mount.release("run")
        await mount.acquire("again")
        await mount.release("again")
        world.failed = []
        await mount.acquire("healed")


async def test_a_failure_of_our_own_is_no_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One volume's trouble is not that of the others."""
    async with volume(world, tmp_path) as mount:
        with monkeypatch.context() as patch:
            patch.setattr(mounts.kernel, "mount_entry", lambda mountpoint: 1 / 0)
            with pytest.raises(UserError, match="volume vol: ZeroDivisionError"):
                await mount.acquire("1")
        await mount.acquire("1")
        assert mount.state == "mounted"
    assert "Traceback" in caplog.text


async def test_a_removed_volume_ends_at_once(world: World, tmp_path: Path) -> None:
    async with volume(world, tmp_path, linger_s=60) as mount:
        await mount.acquire("1")
        world.pending = 3
        with pytest.raises(UserError, match="volume vol is not removed: 3 changes in it wait for upload"):
            await mount.check_removable()
        world.pending, world.held = 0, True
        with pytest.raises(UserError, match="volume vol is in use by a container"):
            await mount.check_removable()
        world.held = False
        await mount.check_removable()
        mount.retire()
        await mount.retired.wait()
        assert not world.mounted
