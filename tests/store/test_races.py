"""A short form of `races`: what s3fuse does undoes nothing, on any server; the fake has the servers' weaknesses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from s3fuse.store.memory import MINIO, SEAWEEDFS, MemoryStore
from s3fuse.writing.plan import Limits
from tests.store import races
from tests.store.races import COPIES, Races

if TYPE_CHECKING:
    from s3fuse.store.base import Capabilities
    from tests.store.conftest import Subject

ROUNDS = 20


@pytest.mark.parametrize("size_bytes", [0, 5_000, 300_000])
@pytest.mark.parametrize("race", COPIES)
async def test_copies_undo_nothing(subject: Subject, race: str, size_bytes: int) -> None:
    tally = await Races(subject.store, size_bytes).run(race, ROUNDS)
    assert tally.undone == []
    assert tally.ours
    assert tally.theirs


async def test_a_delete_of_one_version_undoes_nothing(subject: Subject) -> None:
    tally = await Races(subject.store, 0).run("delete", ROUNDS)
    assert tally.undone == [] or not subject.capabilities.conditional_delete


@pytest.mark.parametrize("able", [MINIO, SEAWEEDFS])
@pytest.mark.parametrize("race", ["free", "chmod"])
async def test_the_fake_undoes_what_servers_undo(
    able: Capabilities, race: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(races, "MOST_LAG_S", 0.0)  # the order of tasks alone decides
    store = MemoryStore(able)
    assert (await Races(store, 100, atomic=False).run(race, 200)).undone
    assert (await Races(store, 100).run(race, 200)).undone == []
    assert (await Races(store, 100, limits=Limits(send_copy_bytes=0)).run(race, 200)).undone == []
