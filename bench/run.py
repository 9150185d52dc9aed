"""One workload on one filesystem: clocks that also read CPU, memory and traffic, and looking at the bucket itself.

A workload calls `begin`, works, and calls `record` once or more: each gives a sample from `begin` to then.
"""

from __future__ import annotations

import hashlib
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench import processes
from bench.systems import Broken, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from minio import Minio

    from bench.inputs import Inputs
    from bench.proxy import Counting, Counts
    from bench.systems import LocalPlace

#: Longest time that one workload may take on one filesystem.
LIMIT_S = 180.0
_DURABLE_S = 90.0


@dataclass(frozen=True)
class Sample:
    """One measurement. `asked_bytes` is what the programs asked for, where that says something about the traffic."""

    seconds: float
    cpu_s: float = 0.0
    peak_bytes: int = 0
    requests: Mapping[str, int] = field(default_factory=dict)
    sent_bytes: int = 0
    received_bytes: int = 0
    asked_bytes: int = 0


class BucketView:
    """A bucket seen through S3, past the proxy."""

    def __init__(self, client: Minio, name: str) -> None:
        self.client = client
        self.name = name

    def sizes(self) -> dict[str, int]:
        """Sizes of all objects that stand for files: no directories, and nothing of what s3fuse keeps for itself."""
        return {
            item.object_name: item.size or 0
            for item in self.client.list_objects(self.name, recursive=True)
            if item.object_name and not item.object_name.endswith("/") and not item.object_name.startswith(".s3fuse/")
        }

    def wait_for(self, expected: Mapping[str, int]) -> None:
        """Returns when the bucket holds exactly these files. Raises Broken after 90 s."""

        def missing() -> str:
            found = self.sizes()
            wrong = {k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)}
            return f"{len(wrong)} of {len(expected)} files are not in the bucket as they should be" if wrong else ""

        _poll(missing)

    def wait_for_content(self, key: str, digest: str) -> None:
        """Returns when the object has this SHA-256. Raises Broken after 90 s."""
        seen = {""}

        def missing() -> str:
            etag = self.client.stat_object(self.name, key).etag or ""
            if etag not in seen:
                seen.add(etag)
                answer = self.client.get_object(self.name, key)
                try:
                    found = hashlib.sha256()
                    for chunk in answer.stream(1 << 20):
                        found.update(chunk)
                finally:
                    answer.close()
                    answer.release_conn()
                if found.hexdigest() == digest:
                    return ""
            return f"{key} in the bucket has not the content that was written"

        _poll(missing)


def _poll(missing: Callable[[], str]) -> None:
    end = time.monotonic() + _DURABLE_S
    pause_s = 0.005
    while reason := missing():
        if time.monotonic() > end:
            raise Broken(f"after {_DURABLE_S:.0f} s {reason}")
        time.sleep(pause_s)  # looking must not become the load
        pause_s = min(pause_s * 1.5, 0.1)


class Run:
    """What a workload gets. `path` is the mounted directory, or for limits a directory like it."""

    def __init__(
        self, place: Place | LocalPlace, inputs: Inputs, bucket: BucketView | None, counting: Counting | None
    ) -> None:
        """`bucket` is None where nothing is stored as plain objects: durable is then when the call returns."""
        self.place = place
        self.path: Path = place.path
        self.inputs = inputs
        self.size = inputs.size
        self.bucket = bucket
        self.samples: dict[str, Sample] = {}
        self._counting = counting
        self._began: _Began | None = None

    def begin(self) -> None:
        """Starts the clocks."""
        pids = processes.marked(self.place.mark)
        processes.reset_peak(pids)
        counts = self._counting.counts() if self._counting else None
        self._began = _Began(pids, processes.cpu_s(pids), counts, time.perf_counter())

    def record(self, name: str, *, asked_bytes: int = 0) -> None:
        """Gives the measure `name` what was used since `begin`."""
        seconds = time.perf_counter()
        began = self._began
        assert began is not None
        counts = self._counting.counts().since(began.counts) if self._counting and began.counts else None
        self.samples[name] = Sample(
            seconds - began.at,
            processes.cpu_s(began.pids) - began.cpu_s,
            processes.peak_bytes(began.pids),
            dict(counts.requests) if counts else {},
            counts.sent_bytes if counts else 0,
            counts.received_bytes if counts else 0,
            asked_bytes,
        )

    def durable(self, expected: Mapping[str, int]) -> None:
        """Returns when the bucket holds exactly these files with these sizes, looked at through S3."""
        if self.bucket is not None:
            self.bucket.wait_for(expected)

    def durable_content(self, key: str, digest: str) -> None:
        """Returns when the object has this SHA-256, looked at through S3."""
        if self.bucket is not None:
            self.bucket.wait_for_content(key, digest)

    def settle(self, expected: Mapping[str, int]) -> None:
        """Waits, unmeasured, until nothing is left to send."""
        self.durable(expected)

    def remount(self, *, cold: bool) -> None:
        """Unmounts and mounts again, `cold` with an empty cache directory."""
        self.place.unmount()
        if cold:
            self.place.clear()
        self.place.mount()

    def program(self, *command: str | Path, cwd: Path | None = None) -> None:
        """Runs a program. Raises Broken if it fails, with its last words."""
        done = subprocess.run(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=cwd,
            timeout=LIMIT_S,
            check=False,
        )
        if done.returncode:
            words = done.stderr.decode(errors="replace").strip().splitlines() or ["no word"]
            raise Broken(f"{command[0]} ended with {done.returncode}: {words[-1][:160]}")


@dataclass(frozen=True)
class _Began:
    pids: list[int]
    cpu_s: float
    counts: Counts | None
    at: float


@contextmanager
def bounded(place: Place | LocalPlace, limit_s: float = LIMIT_S) -> Iterator[None]:
    """Ends the filesystem, and with it every call that hangs in it, if the work takes longer than `limit_s`."""
    over = threading.Event()

    def end() -> None:
        over.set()
        place.kill()

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if over.is_set():
            raise Broken(f"took longer than {limit_s:.0f} s") from error
        raise
    finally:
        timer.cancel()
