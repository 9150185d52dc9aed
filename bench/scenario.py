"""What a workload is: its measures with their limits, what must be in the bucket before, and the work."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from bench.inputs import Inputs
    from bench.run import Run
    from s3fuse.store.s3 import S3Store

    RawLimit = Callable[[S3Store, Inputs], Awaitable[float]]
    Contents = Mapping[str, "bytes | Path"]

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Measure:
    """One line of the table.

    `limit` says what it cannot be quicker than: "raw" (the S3 client alone, by `raw`), "null" (a filesystem that does
    nothing) or "local" (a local directory), which run the same work.
    """

    name: str
    limit: Literal["raw", "null", "local"]
    raw: RawLimit | None = None


@dataclass(frozen=True)
class Scenario:
    """One workload. `work` records each of `measures` once.

    With `contents` (of the bucket, made once per session), only reading goes on: all runs, and all filesystems that
    show plain objects, share one bucket. Else each run has a fresh one.
    """

    name: str
    measures: tuple[Measure, ...]
    work: Callable[[Run], None]
    contents: Callable[[Inputs], Contents] | None = None


def read_through(path: Path) -> int:
    """Reads a file in order, 1 MiB at a time, and gives its length in bytes."""
    total = 0
    buffer = bytearray(BLOCK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total


def offsets(size_bytes: int, count: int) -> list[int]:
    """Offsets of `count` different 4 KiB blocks of a file, the same each time, in no order."""
    return [4096 * block for block in random.Random(count).sample(range(size_bytes // 4096), count)]
