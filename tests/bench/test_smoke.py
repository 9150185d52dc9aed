"""The whole harness on s3fuse alone, at tiny sizes: it works, and counts what s3fuse sends. Never a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.inputs import SIZES
from bench.results import OURS, Results
from bench.scenarios import SCENARIOS
from bench.session import Options, session

if TYPE_CHECKING:
    from pathlib import Path

    from bench.run import Sample

SIZE = SIZES["smoke"]


@pytest.fixture(scope="module")
def results() -> Results:
    with session(Options(fs=[OURS], size="smoke", runs=1)) as made:
        for step in made.plan():
            made.measure(step)
    return made.results


def ours(results: Results, measure: str) -> Sample:
    return results.row(measure).cell(OURS).middle


@pytest.mark.timeout(240)
def test_every_workload_runs_on_s3fuse_and_on_its_limit(results: Results) -> None:
    assert [row.measure for row in results.rows] == [m.name for s in SCENARIOS for m in s.measures]
    for row in results.rows:
        assert {name: cell.failures for name, cell in row.cells.items() if cell.failures} == {}
        assert len(row.cell(OURS).samples) == 1
        assert len(row.cell(row.limit).samples) == 1


def test_a_file_is_sent_once(results: Results) -> None:
    sample = ours(results, "sequential write, until durable")
    assert SIZE.big_bytes <= sample.sent_bytes < SIZE.big_bytes * 1.05


def test_a_file_is_fetched_once_and_then_from_memory(results: Results) -> None:
    cold = ours(results, "sequential read, cold")
    assert SIZE.big_bytes <= cold.received_bytes < SIZE.big_bytes * 1.05
    assert ours(results, "sequential read, again").requests.get("get", 0) == 0


def test_random_reads_fetch_little(results: Results) -> None:
    sample = ours(results, "random 4 KiB reads, cold")
    assert sample.received_bytes <= SIZE.random_reads * (128 << 10) + (64 << 10)


def test_an_overwrite_sends_the_part_it_is_in_and_not_the_file(results: Results) -> None:
    sample = ours(results, "4 KiB overwrites of a big file, each with fsync")
    assert sample.sent_bytes <= SIZE.overwrites * SIZE.overwritten_bytes * 1.1


def test_a_listing_needs_no_request_for_each_name(results: Results) -> None:
    sample = ours(results, "ls -l, cold")
    assert sum(sample.requests.values()) <= 5
    assert sum(ours(results, "ls -l, again").requests.values()) <= 3


def test_a_tree_is_removed_by_few_requests(results: Results) -> None:
    requests = ours(results, "rm -rf of source files, until gone from the bucket").requests
    assert sum(requests.values()) <= SIZE.tree_files


def test_a_profile_is_a_flame_graph(tmp_path: Path) -> None:
    options = Options(only=["append"], fs=[OURS], size="smoke", runs=1, profile=tmp_path)
    with session(options) as made:
        for step in made.plan():
            made.measure(step)
    assert made.results.row("appends, each with fsync").cell(OURS).failures == []
    assert "<svg" in (tmp_path / "append-0.svg").read_text()
