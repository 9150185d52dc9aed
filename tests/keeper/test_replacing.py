"""When a process asks for a successor, and with which options."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse import link, replacing
from s3fuse.config import MountConfig, from_json, to_json
from s3fuse.errors import ExitCode, UserError
from s3fuse.keeping import Keeping
from s3fuse.replacing import Replacing

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from trio.testing import MockClock

CONFIG = MountConfig(mountpoint=Path("/mnt"), bucket="bucket", log_file=Path("/log"), restart_above_bytes=1000)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = link.pair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


def make(end: socket.socket | None, config: MountConfig = CONFIG, *, is_kept: bool = True) -> Replacing:
    async def hand_over() -> None:
        raise AssertionError

    known: Any = SimpleNamespace(is_kept=is_kept)
    return Replacing(config, Keeping(end, 7), known, hand_over, lambda: False)


def heard(end: socket.socket) -> list[dict[str, Any]]:
    found = []
    while True:
        try:
            message, _ = link.receive(end)
        except BlockingIOError:
            return found
        assert message is not None
        found.append(message)


async def test_a_process_that_has_grown_asks_once_in_a_while(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    ours, theirs = ends
    size = 500
    monkeypatch.setattr(replacing, "resident_bytes", lambda: size)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make(theirs).watch_memory)
        await trio.sleep(10 * replacing.LEAST_LIFE_S)
        assert heard(ours) == []
        size = 2000
        await trio.sleep(2 * replacing.LOOK_S)
        assert [message["replace"] for message in heard(ours)] == [None]
        await trio.sleep(replacing.LEAST_LIFE_S / 2)
        assert heard(ours) == [], "it takes a while"
        nursery.cancel_scope.cancel()


async def test_one_that_is_too_large_from_the_beginning_is_left_alone_for_a_while(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    ours, theirs = ends
    monkeypatch.setattr(replacing, "resident_bytes", lambda: 2000)
    with trio.move_on_after(replacing.LEAST_LIFE_S / 2):
        await make(theirs).watch_memory()
    assert heard(ours) == []


async def test_without_a_limit_nothing_is_looked_at() -> None:
    await make(None, MountConfig(mountpoint=Path("/mnt"), bucket="bucket")).watch_memory()


async def test_new_options_take_the_place_of_those_that_may_change(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    changes = {"memory_bytes": 64 << 20, "log_file": "/other"}
    await make(theirs).on_restart({"changes": changes}, None)
    (message,) = heard(ours)
    wanted = from_json(message["replace"])
    assert (wanted.memory_bytes, wanted.log_file, wanted.restart_above_bytes) == (64 << 20, Path("/other"), 1000)


@pytest.mark.parametrize("name", ["bucket", "cache_dir", "read_only", "allow_other", "ephemeral", "endpoint"])
async def test_others_are_refused(ends: tuple[socket.socket, socket.socket], name: str) -> None:
    with pytest.raises(UserError, match=f"{name} cannot be changed by a restart") as raised:
        await make(ends[1]).on_restart({"changes": {name: 1}}, None)
    assert raised.value.exit_code == ExitCode.USAGE
    assert heard(ends[0]) == []


async def test_who_cannot_be_followed_says_why(ends: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(UserError, match="its session could not be kept"):
        await make(ends[1], is_kept=False).on_restart({}, None)
    with pytest.raises(UserError, match="its keeper is gone"):
        await make(None).on_restart({}, None)


def test_options_survive_the_way_to_another_process() -> None:
    config = MountConfig(mountpoint=Path("/mnt/a b"), bucket="bucket", cache_dir=Path("/c"), attr_ttl_s=0.5)
    assert from_json(to_json(config)) == config
    assert from_json({**to_json(config), "of a later version": 1}) == config
