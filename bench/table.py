"""The results as a table on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from bench.results import OURS

if TYPE_CHECKING:
    from bench.results import Cell, Ratio, Results, Row
    from bench.run import Sample


def cell_text(cell: Cell) -> str:
    """The median in seconds with the spread of the runs, or that it failed."""
    median = cell.median_s
    if median is None:
        return "failed" if cell.failures else "—"
    if len(cell.samples) == 1:
        return number(median)
    return f"{number(median)} ({number(cell.low_s)}–{number(cell.high_s)})"


def ratio_text(ratio: Ratio | None) -> str:
    """The ratio with its spread."""
    if ratio is None:
        return "—"
    if ratio.low == ratio.high:
        return number(ratio.value)
    return f"{number(ratio.value)} ({number(ratio.low)}–{number(ratio.high)})"


def number(value: float) -> str:
    """Three digits that mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def best_text(row: Row, results: Results) -> str:
    """Our ratio to the best peer, and which that is."""
    best = row.best_peer(results.peers)
    return f"{ratio_text(row.ratio(best))} {results.systems[best]}" if best else "—"


def traffic_text(sample: Sample) -> str:
    """Requests by kind, and bytes both ways (for each byte asked for where that is known)."""
    kinds = " ".join(f"{kind} {count}" for kind, count in sorted(sample.requests.items(), key=lambda item: -item[1]))
    moved = sample.sent_bytes + sample.received_bytes
    per_byte = f", {number(moved / sample.asked_bytes)} per byte asked" if sample.asked_bytes else ""
    return f"{kinds or 'none'}; {number(moved / (1 << 20))} MiB{per_byte}"


def table(results: Results) -> Table:
    """Workload by filesystem; smaller is better everywhere."""
    made = Table(
        "workload", *(f"{title}, s" for title in results.systems.values()), "s3fuse / best peer", "s3fuse / limit",
        title=f"Medians of {results.options['runs']} runs (and their spread); smaller is better",
    )  # fmt: skip
    for row in results.rows:
        made.add_row(
            row.measure,
            *(cell_text(row.cell(name)) for name in results.systems),
            best_text(row, results),
            f"{ratio_text(row.ratio(row.limit))} {row.limit}",
        )
    return made


def failures(results: Results) -> list[str]:
    """What failed, and why, in words."""
    found = []
    for row in results.rows:
        for name, cell in row.cells.items():
            if cell.failures:
                found.append(f"{row.measure}: {results.systems.get(name, name)} failed: {cell.failures[0]}")
    return found


def own_costs(results: Results) -> list[tuple[str, str, str, str]]:
    """For each measure what s3fuse itself used: CPU seconds, peak memory, traffic."""
    rows = []
    for row in results.rows:
        cell = row.cell(OURS)
        if cell.median_s is not None:
            sample = cell.middle
            rows.append((row.measure, number(sample.cpu_s), f"{sample.peak_bytes >> 20} MiB", traffic_text(sample)))
    return rows
