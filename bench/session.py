"""One session: a server with a counting proxy, and every workload on every system, interleaved, in fresh buckets.

The order of systems moves on by one with each run, so that none of them always follows the same one.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import sqlite3
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
from minio import Minio

from bench import raw
from bench.inputs import SIZES, Inputs
from bench.profile import profiled
from bench.proxy import counting
from bench.results import OURS, Cell, Results, Row
from bench.run import BucketView, Run, Sample, bounded
from bench.scenarios import SCENARIOS
from bench.systems import Broken, LocalPlace, Place, systems
from s3fuse.store.s3 import S3Store
from tests.servers import minio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from bench.proxy import Counting
    from bench.scenario import Contents, RawLimit, Scenario
    from bench.systems import System
    from tests.servers import Server

RAW, LOCAL, NULL = "raw", "local", "null"
#: Longest time to fill a bucket through a filesystem that keeps no plain objects.
_FILL_S = 600.0


@dataclass(frozen=True)
class Options:
    """What to measure. Empty `only` and `fs` mean all; `profile` is a folder for flame graphs of s3fuse."""

    only: Sequence[str] = ()
    fs: Sequence[str] = ()
    size: str = "default"
    runs: int = 3
    latency_ms: float = 0.0
    profile: Path | None = None


@dataclass(frozen=True)
class Step:
    """One workload on one system in one run."""

    scenario: Scenario
    system: str
    number: int


@dataclass
class Session:
    """A running server and what was found on it so far."""

    options: Options
    folder: Path
    server: Server
    counting: Counting
    client: Minio
    inputs: Inputs
    results: Results
    known: dict[str, System]
    #: The bucket of plain objects of each workload that only reads.
    filled: dict[str, str] = field(default_factory=dict)
    places: dict[tuple[str, str], Place] = field(default_factory=dict)
    failed: set[tuple[str, str]] = field(default_factory=set)

    def plan(self) -> list[Step]:
        """Every step in order; the results get their rows."""
        chosen = [s for s in SCENARIOS if not self.options.only or s.name in self.options.only]
        self.results.rows = [Row(m.name, s.name, m.limit) for s in chosen for m in s.measures]
        names = list(self.results.systems)
        steps = []
        for number in range(self.options.runs):
            for scenario in chosen:
                turned = names[number % len(names) :] + names[: number % len(names)]
                limits = dict.fromkeys(measure.limit for measure in scenario.measures)
                steps += [Step(scenario, name, number) for name in (*limits, *turned)]
        return steps

    def end(self) -> None:
        """Ends whatever is still mounted."""
        for place in self.places.values():
            place.kill()

    def measure(self, step: Step) -> None:
        """Takes one step and keeps its samples; a failure is kept as its reason, and not tried again."""
        if (step.scenario.name, step.system) in self.failed:
            return
        samples, reason = (self._raw(step), "") if step.system == RAW else self._run(step)
        if reason:
            self.failed.add((step.scenario.name, step.system))
        for measure in step.scenario.measures:
            if step.system in (RAW, LOCAL, NULL) and measure.limit != step.system:
                continue
            cell = self.results.row(measure.name).cells.setdefault(step.system, Cell())
            if measure.name in samples:
                cell.samples.append(samples[measure.name])
            else:
                cell.failures.append(reason or "it was not recorded")

    def _raw(self, step: Step) -> dict[str, Sample]:
        """The limits that the S3 client alone sets, each in a bucket of its own or the shared one."""
        found = {}
        for measure in step.scenario.measures:
            if measure.raw is not None:
                contents = step.scenario.contents
                bucket = self._filled_bucket(step.scenario.name, contents) if contents else self._new_bucket()
                found[measure.name] = Sample(trio.run(self._raw_limit, measure.raw, bucket))
        return found

    async def _raw_limit(self, work: RawLimit, bucket: str) -> float:
        store = S3Store(self.counting.endpoint, bucket, self.server.credentials)
        try:
            await store.probe()
            return await work(store, self.inputs)
        finally:
            await store.aclose()

    def _run(self, step: Step) -> tuple[dict[str, Sample], str]:
        """The samples of one workload on one mounted system, and why not all of them are there ("" if they are)."""
        reads_only = step.scenario.contents is not None
        run = place = None
        try:
            place = self._place(step)
            run = Run(place, self.inputs, self._view(place), self.counting)
            with bounded(place):
                place.mount()
                with self._profiled(step, place):
                    step.scenario.work(run)
                place.unmount()
                if reads_only:
                    place.clear()
            return run.samples, ""
        except (Broken, OSError, sqlite3.Error, subprocess.SubprocessError) as error:
            return run.samples if run else {}, str(error).partition("\n")[0] or type(error).__name__
        finally:
            if place is not None:
                place.kill()
                if not reads_only or isinstance(place, LocalPlace):
                    shutil.rmtree(place.folder, ignore_errors=True)
                if not reads_only and isinstance(place, Place):
                    # Behind the server's back: asking it to delete every object takes longer than the workload.
                    shutil.rmtree(self.folder / "server" / "data" / place.bucket, ignore_errors=True)

    def _view(self, place: Place | LocalPlace) -> BucketView | None:
        listed = isinstance(place, Place) and place.system.durable == "listed"
        return BucketView(self.client, place.bucket) if isinstance(place, Place) and listed else None

    def _profiled(self, step: Step, place: Place | LocalPlace) -> AbstractContextManager[None]:
        if self.options.profile is None or step.system != OURS:
            return nullcontext()
        return profiled(place.mark, self.options.profile / f"{step.scenario.name}-{step.number}.svg")

    def _place(self, step: Step) -> Place | LocalPlace:
        """A place in a fresh bucket, or where nothing is written the one that this system had before."""
        scenario = step.scenario
        if step.system == LOCAL:
            place = LocalPlace(self._new_folder())
            if scenario.contents is not None:
                _write_contents(place.path, scenario.contents(self.inputs))
            return place
        if scenario.contents is None:
            return self._new_place(step.system, self._new_bucket())
        key = (scenario.name, step.system)
        if key not in self.places:
            self.places[key] = self._filled_place(scenario, scenario.contents, step.system)
        return self.places[key]

    def _filled_place(self, scenario: Scenario, contents: Callable[[Inputs], Contents], system: str) -> Place:
        if self.known[system].plain:
            return self._new_place(system, self._filled_bucket(scenario.name, contents))
        place = self._new_place(system, self._new_bucket())
        try:
            with bounded(place, _FILL_S):
                place.mount()
                _write_contents(place.path, contents(self.inputs))
                place.unmount()
                place.clear()
        finally:
            place.kill()
        return place

    def _filled_bucket(self, scenario: str, contents: Callable[[Inputs], Contents]) -> str:
        """A bucket with the workload's contents as plain objects, made once."""
        if scenario not in self.filled:
            bucket = self._new_bucket()
            raw.fill(self.client, bucket, contents(self.inputs))
            self.filled[scenario] = bucket
        return self.filled[scenario]

    def _new_place(self, system: str, bucket: str) -> Place:
        access = {
            "endpoint": self.counting.endpoint,
            "access_key": self.server.access_key,
            "secret_key": self.server.secret_key,
        }
        return Place(self.known[system], self._new_folder(), bucket, access)

    def _new_folder(self) -> Path:
        return self.folder / "places" / secrets.token_hex(4)

    def _new_bucket(self) -> str:
        name = f"bench-{secrets.token_hex(6)}"
        self.client.make_bucket(name)
        return name


def _write_contents(folder: Path, contents: Contents) -> None:
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            shutil.copyfile(data, path)


def choose(known: dict[str, System], wanted: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Titles of the systems to measure by name, and why others are left out."""
    peers = {name: system for name, system in known.items() if not system.limit and (not wanted or name in wanted)}
    missing = {name: f"{system.binary} is not on this machine" for name, system in peers.items() if not system.present}
    return {name: system.title for name, system in peers.items() if system.present}, missing


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "cores": os.cpu_count(),
        "cpu": model,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
    }


@contextmanager
def session(options: Options) -> Iterator[Session]:
    """A session with its server and proxy; everything is gone when it ends."""
    known = systems()
    titles, skipped = choose(known, options.fs)
    results = Results(
        machine=machine(),
        systems=titles,
        versions={name: known[name].version_text() for name in titles},
        options={
            "size": options.size,
            "runs": options.runs,
            "latency_ms": options.latency_ms,
            **asdict(SIZES[options.size]),
        },
        skipped=skipped,
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s3fuse-bench-")))
        for name in ("server", "inputs", "places"):
            (folder / name).mkdir()
        server = stack.enter_context(minio(folder / "server"))
        proxy = stack.enter_context(counting(server.endpoint, options.latency_ms / 1000))
        client = Minio(server.endpoint.partition("//")[2], server.access_key, server.secret_key, secure=False)
        inputs = Inputs(folder / "inputs", SIZES[options.size])
        began = time.monotonic()
        made = Session(options, folder, server, proxy, client, inputs, results, known)
        stack.callback(made.end)
        yield made
        results.took_s = time.monotonic() - began
