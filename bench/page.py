"""The report page: Markdown with a plot of the ratios as SVG. python -m bench.page RESULTS.json DIRECTORY [NOTE]"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

from bench.results import OURS, Results
from bench.table import best_text, cell_text, failures, number, ratio_text, traffic_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.results import Row

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "s3fuse"  # the same results give the same file

from matplotlib import pyplot as plt  # noqa: E402

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def render(results: Results, folder: Path, note: str = "") -> Path:
    """Writes README.md, ratios.svg and results.json into the folder, and gives the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder / "results.json")
    _plot(results, folder / "ratios.svg")
    page = folder / "README.md"
    page.write_text("\n".join(_lines(results, note)) + "\n")
    return page


def _lines(results: Results, note: str) -> Iterator[str]:
    machine, options = results.machine, results.options
    yield "# s3fuse beside its peers"
    yield ""
    yield (
        f"Medians of {options['runs']} interleaved runs on one MinIO on loopback with {options['latency_ms']:g} ms of "
        f"latency, in seconds with their spread; smaller is better. {machine['cores']} cores ({machine['cpu']}), "
        f"{machine['memory_bytes'] / (1 << 30):.0f} GiB, Linux {machine['kernel']}, Python {machine['python']}; load "
        f"{machine['load_at_start']:.2f} at the start; the whole took {results.took_s / 60:.0f} minutes. "
        "Made by `make bench bench-report`."
    )
    if note:
        yield ""
        yield note
    yield ""
    yield f"Sizes: {_sizes(options)}."
    yield ""
    yield from (f"* {results.systems[name]}: {version}" for name, version in results.versions.items())
    yield from (f"* {name}: not measured, {reason}" for name, reason in results.skipped.items())
    yield ""
    yield "![s3fuse's time divided by each peer's](ratios.svg)"
    yield ""
    titles = list(results.systems.values())
    yield f"| workload | {' | '.join(titles)} | s3fuse / best peer | s3fuse / limit |"
    yield "|---" * (len(titles) + 3) + "|"
    for row in results.rows:
        cells = " | ".join(cell_text(row.cell(name)) for name in results.systems)
        limit = f"{ratio_text(row.ratio(row.limit))} {row.limit}"
        yield f"| {row.measure} | {cells} | {best_text(row, results)} | {limit} |"
    yield ""
    yield (
        "Limits: raw is the S3 client of s3fuse alone, null a filesystem in Python that does nothing, local a local "
        "directory. A workload that failed has no time:"
    )
    yield ""
    yield from (f"* {line}" for line in failures(results) or ["none failed"])
    yield ""
    yield "## What it cost"
    yield ""
    yield "CPU seconds and peak memory of the filesystem's processes, S3 requests by kind, bytes both ways."
    yield ""
    for row in results.rows:
        yield from _costs(results, row)


def _sizes(options: dict[str, object]) -> str:
    words = []
    for name, value in options.items():
        if isinstance(value, int) and name not in ("runs", "latency_ms"):
            text = f"{value >> 20} MiB" if name.endswith("_bytes") else f"{value:,}"
            words.append(f"{re.sub('_bytes$', '', name).replace('_', ' ')} {text}")
    return ", ".join(words)


def _costs(results: Results, row: Row) -> Iterator[str]:
    yield f"### {row.measure}"
    yield ""
    yield "| | CPU s | peak | S3 |"
    yield "|---|---|---|---|"
    for name, title in results.systems.items():
        cell = row.cell(name)
        if cell.median_s is not None:
            sample = cell.middle
            yield f"| {title} | {number(sample.cpu_s)} | {sample.peak_bytes >> 20} MiB | {traffic_text(sample)} |"
    yield ""


def _plot(results: Results, path: Path) -> None:
    """One line a measure, one dot a peer, at s3fuse's time divided by the peer's on a logarithmic scale."""
    rows = list(reversed(results.rows))
    figure, axes = plt.subplots(figsize=(9, 1 + 0.3 * max(len(rows), 1)))
    for colour, peer in zip(_COLOURS * 2, results.peers, strict=False):
        at = [(ratio, y) for y, row in enumerate(rows) if (ratio := row.ratio(peer)) is not None]
        axes.errorbar(
            [ratio.value for ratio, _ in at],
            [y for _, y in at],
            xerr=[[ratio.value - ratio.low for ratio, _ in at], [ratio.high - ratio.value for ratio, _ in at]],
            fmt="o", markersize=4, linewidth=1, color=colour, label=results.systems[peer],
        )  # fmt: skip
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.measure for row in rows], fontsize=8)
    axes.set_xlabel(f"time of {results.systems.get(OURS, OURS)} / time of the peer (left of 1: s3fuse is faster)")
    axes.grid(axis="x", alpha=0.3)
    if results.peers:
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    results = Results.load(Path(sys.argv[1]))
    print(render(results, Path(sys.argv[2]), *sys.argv[3:4]))


if __name__ == "__main__":
    main()
