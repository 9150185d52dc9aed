"""python -m bench: s3fuse beside its peers on one MinIO."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.inputs import SIZES
from bench.results import OURS, Results, disagreements
from bench.scenarios import SCENARIOS
from bench.session import Options, session
from bench.systems import systems
from bench.table import failures, table

OUT = Path(__file__).parent / "out"


def measured(options: Options, console: Console, path: Path) -> Results:
    """Runs a session with progress on a terminal; what is found so far is in the file at `path`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting the server", total=None)
        with session(options) as made:
            steps = made.plan()
            for done, step in enumerate(steps):
                what = f"{step.scenario.name} on {step.system}, run {step.number + 1}"
                progress.update(bar, description=what, completed=done, total=len(steps))
                made.measure(step)
                made.results.save(path)
    made.results.save(path)
    return made.results


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, type=click.Choice([s.name for s in SCENARIOS]), help="These workloads.")
@click.option("--fs", multiple=True, type=click.Choice(list(systems())), help="These filesystems.")
@click.option("--latency-ms", type=click.FloatRange(min=0), default=0.0, help="Delay of each request.")
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True, help="Runs to take medians of.")
@click.option("--size", type=click.Choice(list(SIZES)), default="default", show_default=True)
@click.option("--profile", is_flag=True, help="s3fuse alone, with a flame graph of each workload beside the results.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, help="Folder for the results.")
@click.option(
    "--compare", type=click.Path(path_type=Path, exists=True), help="Earlier results: says which ratios moved."
)
def main(
    only: tuple[str, ...],
    fs: tuple[str, ...],
    latency_ms: float,
    runs: int,
    size: str,
    profile: bool,
    out: Path,
    compare: Path | None,
) -> None:
    """Measure s3fuse beside its peers; prints a table and keeps the results as JSON."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is mounted is unmounted then, too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells have it ignored
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 200)
    options = Options(only, (OURS,) if profile else fs, size, runs, latency_ms, out / "profile" if profile else None)
    path = out / f"results-{time.strftime('%Y%m%d-%H%M%S')}.json"
    results = measured(options, console, path)
    console.print(table(results))
    for line in (*(f"{name}: {reason}" for name, reason in results.skipped.items()), *failures(results)):
        console.print(line, highlight=False)
    results.save(out / "latest.json")
    console.print(f"kept in {path} after {results.took_s / 60:.1f} minutes", highlight=False)
    if compare is not None:
        moved = disagreements(Results.load(compare), results)
        console.print("\n".join(moved) or f"every ratio agrees with {compare} within its spread", highlight=False)


if __name__ == "__main__":
    main()
