"""The kernel owns the times of a file that is written: those that a program sees after its close stay as they are."""

from __future__ import annotations

import mmap
import os
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

#: Writes that come within one tick of the kernel's coarse clock (4 ms) are what goes wrong; so each way is tried often.
TRIES = 12


def once(path: Path) -> None:
    path.write_bytes(b"once")


def twice(path: Path) -> None:
    path.write_bytes(b"once")
    with path.open("r+b") as file:
        file.write(b"twice")


def twice_synced(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"once")
        file.flush()
        os.fsync(file.fileno())
        file.write(b"twice")


def appended(path: Path) -> None:
    for _ in range(5):
        with path.open("ab") as file:
            file.write(b"again")


def directly(path: Path) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
    with mmap.mmap(-1, 4096) as page:
        os.pwrite(file, page, 0)
        os.pwrite(file, page, 4096)
    os.close(file)


def mapped(path: Path) -> None:
    with path.open("w+b") as file:
        file.truncate(10_000)
        with mmap.mmap(file.fileno(), 10_000) as memory:
            memory[5:9] = b"text"


def mapped_beyond_the_close(path: Path) -> None:
    with path.open("w+b") as file:
        file.truncate(10_000)
        memory = mmap.mmap(file.fileno(), 10_000)
    memory[5:9] = b"text"
    memory.flush()
    memory[5000:5004] = b"more"
    memory.close()


def mapped_twice(path: Path) -> None:
    path.write_bytes(bytes(10_000))
    for at in (5, 5000):
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            memory[at : at + 4] = b"text"
            memory.flush()


def cut(path: Path) -> None:
    path.write_bytes(bytes(10_000))
    with path.open("r+b") as file:
        file.write(b"head")
        file.truncate(5000)


def changed_its_mode(path: Path) -> None:
    path.write_bytes(b"once")
    path.chmod(0o600)


WAYS = [
    once,
    twice,
    twice_synced,
    appended,
    directly,
    mapped,
    mapped_beyond_the_close,
    mapped_twice,
    cut,
    changed_its_mode,
]


def times(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_ctime_ns


def test_times_stay_as_they_are_after_the_close(mounts: Mounts, server: Server, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(server)
    bucket = buckets(server, mount.bucket)
    seen: dict[str, tuple[int, int]] = {}
    for number in range(TRIES):
        for way in WAYS:
            path = mount.path / f"{way.__name__}-{number}"
            way(path)
            if way is mapped_beyond_the_close:  # the pages of a mapping are written when the kernel wants to
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            seen[path.name] = times(path)
    mount.flush()
    assert {name: times(mount.path / name) for name in seen} == seen
    stored = {}
    for name in seen:
        metadata = bucket.metadata(name)
        stored[name] = tuple(int(Decimal(metadata[which]) * 10**9) for which in ("mtime", "ctime"))
    moved = {name: [a - b for a, b in zip(stored[name], seen[name], strict=True)] for name in seen}
    assert {name: by for name, by in moved.items() if any(by)} == {}
    mount.remount()
    assert {name: times(mount.path / name) for name in seen} == seen
