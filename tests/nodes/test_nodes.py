"""A short form of `make nodes`: three nodes, each with a kill of its worker, on both servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.nodes.node import WEIGHTS, Plan
from tests.nodes.run import play

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import Server


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["minio", "seaweedfs"])
def test_nothing_is_lost_or_mixed(request: pytest.FixtureRequest, tmp_path: Path, bucket_name: str, kind: str) -> None:
    server: Server = request.getfixturevalue(f"{kind}_server")
    weights = {**WEIGHTS, "kill": 2, "crash": 0}
    report = play(tmp_path, server, bucket_name, Plan(seed=7, operations=60, weights=weights, big=0.0))
    print(report)
    assert not report.errors
    assert sum(event.acknowledged for event in report.history.events) > 20
