"""Workloads on names alone: long listings of directories, cold and warm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import raw
from bench.scenario import Measure, Scenario

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.inputs import Inputs
    from bench.run import Run
    from bench.scenario import Contents

COLD = Measure("ls -l, cold", "raw", raw.list_names)
WARM = Measure("ls -l, again", "local")
MANY_COLD = Measure("ls -l of very many, cold", "raw", raw.list_names)
MANY_WARM = Measure("ls -l of very many, again", "local")


def _contents(count: Callable[[Inputs], int]) -> Callable[[Inputs], Contents]:
    """Empty files: they are not read, and it takes long enough to make them through a filesystem."""
    return lambda inputs: {f"names/entry-{number:06}": b"" for number in range(count(inputs))}


def _list(cold: Measure, warm: Measure) -> Callable[[Run], None]:
    def work(run: Run) -> None:
        for measure in (cold, warm):
            run.begin()
            run.program("ls", "-l", run.path / "names")
            run.record(measure.name)

    return work


SCENARIOS = (
    Scenario("names", (COLD, WARM), _list(COLD, WARM), _contents(lambda inputs: inputs.size.names)),
    Scenario(
        "many-names",
        (MANY_COLD, MANY_WARM),
        _list(MANY_COLD, MANY_WARM),
        _contents(lambda inputs: inputs.size.many_names),
    ),
)
