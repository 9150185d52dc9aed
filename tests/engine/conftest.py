"""Nothing is sent by the passing of time, and an unexpected warning in the log fails the test."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

import pytest

from s3fuse.namespace import changes, directories, inodes, lateness, pages, syncer
from s3fuse.store import memory
from s3fuse.store.memory import MemoryStore
from s3fuse.writing.plan import Limits
from tests.engine.rig import SMALL_LIMITS, Bench, Clock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    import trio


@pytest.fixture(autouse=True)
def _no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "QUIET_S", 3600.0)
    monkeypatch.setattr(changes, "SETTLE_S", 3600.0)
    monkeypatch.setattr(changes, "GATHER_S", 0.001)
    monkeypatch.setattr(lateness, "LATE_S", 0.0)
    monkeypatch.setattr(syncer, "BEHIND_S", 0.001)


@pytest.fixture
def expected_log() -> list[str]:
    """Patterns of warnings that the test provokes."""
    return []


@pytest.fixture(autouse=True)
def _quiet_log(expected_log: list[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    texts = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    assert not [text for text in texts if not any(re.search(pattern, text) for pattern in expected_log)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of freshness, to be advanced."""
    fake = Clock()
    for module in (changes, directories, inodes, pages, syncer):
        monkeypatch.setattr(module, "time", fake)
    return fake


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store takes parts as small as `SMALL_LIMITS` says."""
    monkeypatch.setattr(memory, "MIN_PART_BYTES", SMALL_LIMITS.min_part_bytes)


@pytest.fixture(params=["sent", "parts", "whole"])
def copying(request: pytest.FixtureRequest, bench: Bench) -> str:
    """Has small objects copied in each of the ways that there are; gives the request that makes the copy."""
    if request.param == "whole":
        bench.store = MemoryStore(memory.ATOMIC)
        return "copy"
    if request.param == "parts":
        bench.limits = Limits(send_copy_bytes=0)
        return "multipart_complete"
    return "put"


@pytest.fixture
async def bench(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Bench]:
    """An empty bucket; its mounts end with the test."""
    bench = Bench(tmp_path, nursery)
    yield bench
    await bench.close()
