"""Workloads of programs as they are: git, SQLite, and many processes at once."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from bench.run import LIMIT_S
from bench.scenario import Measure, Scenario
from bench.systems import Broken

if TYPE_CHECKING:
    from bench.run import Run

CLONE = Measure("git clone", "local")
STATUS = Measure("git status", "local")
INSERTS = Measure("SQLite inserts, one transaction each", "local")
MIXED = Measure("processes at once, mixed work", "local")


def git(run: Run) -> None:
    clone = run.path / "clone"
    run.begin()
    # The tree belongs to whom the filesystem says: git would refuse to look at another's.
    run.program("git", "-c", "safe.directory=*", "clone", "-q", "--no-local", run.inputs.repository, clone)
    run.record(CLONE.name)
    run.begin()
    run.program("git", "-c", "safe.directory=*", "-C", clone, "status", "--porcelain")
    run.record(STATUS.name)


def sqlite(run: Run) -> None:
    run.begin()
    with closing(sqlite3.connect(run.path / "data.sqlite", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE line (number INTEGER PRIMARY KEY, text TEXT)")
        for number in range(run.size.inserts):
            connection.execute("INSERT INTO line VALUES (?, ?)", (number, "text " * 20))
    run.record(INSERTS.name)
    with closing(sqlite3.connect(run.path / "data.sqlite")) as connection:
        (count,) = connection.execute("SELECT count(*) FROM line").fetchone()
    if count != run.size.inserts:
        raise Broken(f"the database has {count} rows of {run.size.inserts}")


def mixed(run: Run) -> None:
    run.begin()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.scenarios.worker", str(run.path), str(number), str(run.size.operations)],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(run.size.processes)
    ]
    failed = ""
    for worker in workers:
        _, said = worker.communicate(timeout=LIMIT_S)
        if worker.returncode:
            failed = (said.strip().splitlines() or ["a worker failed"])[-1]
    if failed:
        raise Broken(failed)
    run.record(MIXED.name)


SCENARIOS = (
    Scenario("git", (CLONE, STATUS), git),
    Scenario("sqlite", (INSERTS,), sqlite),
    Scenario("mixed", (MIXED,), mixed),
)
