"""Workloads on the bytes of files: in order, at random, overwritten, appended to, several at once."""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from bench import raw
from bench.inputs import sha256
from bench.scenario import BLOCK_BYTES, Measure, Scenario, offsets, read_through
from bench.systems import Broken

if TYPE_CHECKING:
    from pathlib import Path

    from bench.inputs import Inputs
    from bench.run import Run
    from bench.scenario import Contents

WRITE_CLOSE = Measure("sequential write, until close", "null")
WRITE_DURABLE = Measure("sequential write, until durable", "raw", raw.put_big)
READ_COLD = Measure("sequential read, cold", "raw", raw.get_big)
READ_AGAIN = Measure("sequential read, again", "local")
READ_REMOUNTED = Measure("sequential read, remounted with its disk cache", "raw", raw.get_big)
READ_RANDOM = Measure("random 4 KiB reads, cold", "raw", raw.get_random)
PARALLEL_WRITE = Measure("4 files written at once, until durable", "raw", raw.put_parallel)
PARALLEL_READ = Measure("4 files read at once, cold", "raw", raw.get_parallel)
OVERWRITE = Measure("4 KiB overwrites of a big file, each with fsync", "local")
OVERWRITE_DURABLE = Measure("4 KiB overwrites of a big file, until durable", "local")
APPEND = Measure("appends, each with fsync", "local")


def _copy_in(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as copy:
        while block := file.read(BLOCK_BYTES):
            copy.write(block)


def _check_length(path: Path, found_bytes: int, expected_bytes: int) -> None:
    if found_bytes != expected_bytes:
        raise Broken(f"{path.name} has {found_bytes} bytes and not {expected_bytes}")


def write(run: Run) -> None:
    run.begin()
    _copy_in(run.inputs.big, run.path / "big")
    run.record(WRITE_CLOSE.name)
    run.durable({"big": run.size.big_bytes})
    run.record(WRITE_DURABLE.name, asked_bytes=run.size.big_bytes)


def read_contents(inputs: Inputs) -> Contents:
    return {"big": inputs.big}


def read(run: Run) -> None:
    size_bytes = run.size.big_bytes
    path = run.path / "big"
    run.begin()
    _check_length(path, read_through(path), size_bytes)
    run.record(READ_COLD.name, asked_bytes=size_bytes)
    run.begin()
    read_through(path)
    run.record(READ_AGAIN.name, asked_bytes=size_bytes)
    run.remount(cold=False)
    run.begin()
    _check_length(path, read_through(path), size_bytes)
    run.record(READ_REMOUNTED.name, asked_bytes=size_bytes)
    if sha256(path) != run.inputs.big_digest:
        raise Broken("reading gave other bytes than the object has")
    run.remount(cold=True)
    _random_reads(run, path)


def _random_reads(run: Run, path: Path) -> None:
    wanted = offsets(run.size.big_bytes, run.size.random_reads)
    found = hashlib.sha256()
    run.begin()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for offset in wanted:
            found.update(os.pread(descriptor, 4096, offset))
    finally:
        os.close(descriptor)
    run.record(READ_RANDOM.name, asked_bytes=4096 * len(wanted))
    expected = hashlib.sha256()
    with run.inputs.big.open("rb") as file:
        for offset in wanted:
            expected.update(os.pread(file.fileno(), 4096, offset))
    if found.digest() != expected.digest():
        raise Broken("random reads gave other bytes than the object has")


def _at_once(run: Run, work: str) -> None:
    paths = [run.path / f"parallel{number}" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        if work == "write":
            list(pool.map(lambda path: _copy_in(run.inputs.parallel, path), paths))
        else:
            for path, length in zip(paths, pool.map(read_through, paths), strict=True):
                _check_length(path, length, run.size.parallel_bytes)


def parallel_write(run: Run) -> None:
    size_bytes = run.size.parallel_bytes
    run.begin()
    _at_once(run, "write")
    run.durable({f"parallel{number}": size_bytes for number in range(4)})
    run.record(PARALLEL_WRITE.name, asked_bytes=4 * size_bytes)


def parallel_contents(inputs: Inputs) -> Contents:
    return {f"parallel{number}": inputs.parallel for number in range(4)}


def parallel_read(run: Run) -> None:
    run.begin()
    _at_once(run, "read")
    run.record(PARALLEL_READ.name, asked_bytes=4 * run.size.parallel_bytes)


def overwrite(run: Run) -> None:
    path = run.path / "file"
    expected = run.inputs.folder / "overwritten.expected"
    shutil.copyfile(run.inputs.overwritten, expected)
    shutil.copyfile(run.inputs.overwritten, path)
    run.settle({"file": run.size.overwritten_bytes})
    blocks = [(offset, os.urandom(4096)) for offset in offsets(run.size.overwritten_bytes, run.size.overwrites)]
    with expected.open("r+b") as copy:
        for offset, block in blocks:
            os.pwrite(copy.fileno(), block, offset)
    run.begin()
    descriptor = os.open(path, os.O_RDWR)
    try:
        for offset, block in blocks:
            os.pwrite(descriptor, block, offset)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    asked_bytes = 4096 * len(blocks)
    run.record(OVERWRITE.name, asked_bytes=asked_bytes)
    run.durable_content("file", sha256(expected))
    run.record(OVERWRITE_DURABLE.name, asked_bytes=asked_bytes)


def append(run: Run) -> None:
    line = b"a line of a log that somebody wants to keep, sixty-four bytes..\n"
    run.begin()
    descriptor = os.open(run.path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for _ in range(run.size.appends):
            os.write(descriptor, line)
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    run.record(APPEND.name, asked_bytes=len(line) * run.size.appends)
    run.settle({"log": len(line) * run.size.appends})


SCENARIOS = (
    Scenario("write", (WRITE_CLOSE, WRITE_DURABLE), write),
    Scenario("read", (READ_COLD, READ_AGAIN, READ_REMOUNTED, READ_RANDOM), read, read_contents),
    Scenario("parallel-write", (PARALLEL_WRITE,), parallel_write),
    Scenario("parallel-read", (PARALLEL_READ,), parallel_read, parallel_contents),
    Scenario("overwrite", (OVERWRITE, OVERWRITE_DURABLE), overwrite),
    Scenario("append", (APPEND,), append),
)
