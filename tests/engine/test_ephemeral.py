"""A mount that keeps nothing on disk does all that others do, and forgets."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest

from s3fuse.writing.ephemeral import MemoryStaging
from tests.engine.rig import SMALL_LIMITS, Bench, Rig

if TYPE_CHECKING:
    from pathlib import Path

BUDGET = 200_000


async def memory(bench: Bench) -> Rig:
    return await bench.rig(ephemeral=True, budget_bytes=BUDGET, limits=SMALL_LIMITS)


def used_bytes(rig: Rig) -> int:
    """What staged bytes beyond the slots take."""
    staging = rig.core.staging
    assert isinstance(staging, MemoryStaging)
    return os.fstat(staging._large).st_blocks * 512


@pytest.mark.usefixtures("_small_parts")
async def test_files_of_every_size(bench: Bench, tmp_path: Path) -> None:
    chance = random.Random(1)
    rig = await memory(bench)
    files = {f"f{n}": chance.randbytes(size) for n, size in enumerate([0, 1, 70_000, 140_000, 600_000, 90_000])}
    for name, data in files.items():
        handle = await rig.create(name)
        for at in range(0, len(data), 30_000):
            await rig.files.write(handle, at, data[at : at + 30_000])
        assert await rig.pread(handle) == data
        rig.close(handle)
        assert used_bytes(rig) <= BUDGET + 100_000
    await rig.write("f3", b"changed", 100_000)
    files["f3"] = files["f3"][:100_000] + b"changed" + files["f3"][100_007:]
    await rig.drained()
    assert bench.contents() == files
    for name, data in files.items():
        assert await rig.cat(name) == data
    assert used_bytes(rig) == 0
    assert rig.journal.nodes() == []
    assert not (tmp_path / "cache").exists()


async def test_a_crash_loses_what_was_not_uploaded(bench: Bench) -> None:
    rig = await memory(bench)
    await rig.put("kept", b"kept")
    await rig.drained()
    await rig.put("lost", b"lost")
    await rig.restart()
    assert await rig.ls() == ["kept"]
    assert rig.dirty() == []
