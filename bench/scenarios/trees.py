"""Workloads on trees of small files: in, out, searched, removed, moved."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from bench import raw
from bench.inputs import files_of
from bench.scenario import Measure, Scenario
from bench.systems import Broken

if TYPE_CHECKING:
    from pathlib import Path

    from bench.inputs import Inputs
    from bench.run import Run
    from bench.scenario import Contents

UNTAR = Measure("untar of source files, until it returns", "local")
UNTAR_DURABLE = Measure("untar of source files, until durable", "raw", raw.put_tree)
REMOVE = Measure("rm -rf of source files, until it returns", "local")
REMOVE_DURABLE = Measure("rm -rf of source files, until gone from the bucket", "raw", raw.delete_tree)
GREP = Measure("grep -r of small files, cold", "raw", raw.get_small)
COPY_OUT = Measure("cp -a of source files out, cold", "raw", raw.get_tree)
MOVE = Measure("mv of a directory, until it returns", "local")
MOVE_DURABLE = Measure("mv of a directory, until durable", "raw", raw.copy_directory)


def _sizes(tree: Path) -> dict[str, int]:
    return {str(path.relative_to(tree)): path.stat().st_size for path in files_of(tree)}


def untar(run: Run) -> None:
    archive = run.inputs.archive
    expected = {f"tree/{name}": size for name, size in _sizes(run.inputs.tree).items()}
    target = run.path / "tree"
    target.mkdir()
    run.begin()
    run.program("tar", "-xf", archive, "-C", target)
    run.record(UNTAR.name)
    run.durable(expected)
    run.record(UNTAR_DURABLE.name, asked_bytes=sum(expected.values()))
    run.begin()
    run.program("rm", "-rf", target)
    run.record(REMOVE.name)
    run.durable({})
    run.record(REMOVE_DURABLE.name)


def out_contents(inputs: Inputs) -> Contents:
    small = {f"small/{name}": data for name, data in inputs.small.items()}
    return small | {f"tree/{name}": data for name, data in raw.tree_contents(inputs.tree).items()}


def out(run: Run) -> None:
    run.begin()
    run.program(
        "sh", "-c", 'grep -rc "a word that is in none of them" "$0" >/dev/null || [ $? = 1 ]', run.path / "small"
    )
    run.record(GREP.name, asked_bytes=sum(map(len, run.inputs.small.values())))
    run.remount(cold=True)
    target = run.inputs.folder / "copied"
    expected = _sizes(run.inputs.tree)
    try:
        run.begin()
        run.program("cp", "-a", run.path / "tree", target)
        run.record(COPY_OUT.name, asked_bytes=sum(expected.values()))
        if _sizes(target) != expected:
            raise Broken("the copy is not what the bucket has")
    finally:
        shutil.rmtree(target, ignore_errors=True)


def move(run: Run) -> None:
    old = run.path / "old"
    old.mkdir()
    for number in range(run.size.renamed):
        (old / f"file{number:04}").write_bytes(b"x" * 100)
    run.settle({f"old/file{number:04}": 100 for number in range(run.size.renamed)})
    run.begin()
    run.program("mv", old, run.path / "new")
    run.record(MOVE.name)
    run.durable({f"new/file{number:04}": 100 for number in range(run.size.renamed)})
    run.record(MOVE_DURABLE.name)


SCENARIOS = (
    Scenario("untar", (UNTAR, UNTAR_DURABLE, REMOVE, REMOVE_DURABLE), untar),
    Scenario("tree-out", (GREP, COPY_OUT), out, out_contents),
    Scenario("move", (MOVE, MOVE_DURABLE), move),
)
