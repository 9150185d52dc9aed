"""What a session found: samples of every measure on every system, medians, spreads, ratios, and their JSON form."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bench.run import Sample

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

OURS = "s3fuse"


@dataclass
class Cell:
    """All runs of one measure on one system. `failures` are reasons, one a run that failed."""

    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def median_s(self) -> float | None:
        """None if any run failed: a workload that fails is no time."""
        if self.failures or not self.samples:
            return None
        return statistics.median(sample.seconds for sample in self.samples)

    @property
    def low_s(self) -> float:
        return min(sample.seconds for sample in self.samples)

    @property
    def high_s(self) -> float:
        return max(sample.seconds for sample in self.samples)

    @property
    def middle(self) -> Sample:
        """The sample nearest to the median."""
        median = statistics.median(sample.seconds for sample in self.samples)
        return min(self.samples, key=lambda sample: abs(sample.seconds - median))


@dataclass(frozen=True)
class Ratio:
    """Our time divided by another's: of the medians, and the least and most that the runs allow."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Cell, other: Cell) -> Ratio | None:
        """None where either has no time."""
        if ours.median_s is None or other.median_s is None:
            return None
        return cls(ours.median_s / other.median_s, ours.low_s / other.high_s, ours.high_s / other.low_s)

    def agrees(self, other: Ratio) -> bool:
        """Whether both can be the same within their spreads."""
        return self.low <= other.high and other.low <= self.high


@dataclass
class Row:
    """One measure. `limit` is the system that it cannot be quicker than."""

    measure: str
    scenario: str
    limit: str
    cells: dict[str, Cell] = field(default_factory=dict)

    def cell(self, system: str) -> Cell:
        """What was found on a system; an empty cell if it was not measured."""
        return self.cells.get(system, Cell())

    def best_peer(self, peers: Sequence[str]) -> str | None:
        """The peer with the shortest median."""
        times = {peer: median for peer in peers if (median := self.cell(peer).median_s) is not None}
        return min(times, key=times.__getitem__, default=None)

    def ratio(self, other: str | None) -> Ratio | None:
        return Ratio.of(self.cell(OURS), self.cell(other)) if other is not None else None


@dataclass
class Results:
    """A whole session. `systems` are names and titles in the order of the table, without limits."""

    machine: dict[str, Any]
    systems: dict[str, str]
    versions: dict[str, str]
    options: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    #: How long the session took.
    took_s: float = 0.0

    @property
    def peers(self) -> list[str]:
        return [name for name in self.systems if name != OURS]

    def row(self, measure: str) -> Row:
        """Raises KeyError for a measure that was not made."""
        for row in self.rows:
            if row.measure == measure:
                return row
        raise KeyError(measure)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises ValueError or TypeError for a file that `save` did not write."""
        found = json.loads(path.read_text())
        rows = [
            Row(
                **{
                    **row,
                    "cells": {
                        name: Cell([Sample(**sample) for sample in cell["samples"]], cell["failures"])
                        for name, cell in row["cells"].items()
                    },
                }
            )
            for row in found.pop("rows")
        ]
        return cls(**found, rows=rows)


def disagreements(one: Results, other: Results) -> list[str]:
    """The measures whose ratio to a peer is not the same in both within the spreads, in words."""
    found = []
    for row in one.rows:
        try:
            twin = other.row(row.measure)
        except KeyError:
            continue
        for peer in one.peers:
            first, second = row.ratio(peer), twin.ratio(peer)
            if first is not None and second is not None and not first.agrees(second):
                found.append(
                    f"{row.measure}: {first.value:.2f} ({first.low:.2f} to {first.high:.2f}) and {second.value:.2f} "
                    f"({second.low:.2f} to {second.high:.2f}) times {peer}"
                )
    return found
