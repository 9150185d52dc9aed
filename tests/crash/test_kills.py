"""A short form of `make crash`: some kills on each server, named points and random moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.crash import load
from tests.crash.daemon import POINTS
from tests.crash.kills import RANDOM, campaign
from tests.crash.load import DIRECTORY, Doubt, Worker, accepts

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import Server

pytestmark = pytest.mark.timeout(300)

#: Those that the engine's tests cannot have: the kernel, the server and the process are real.
CHOSEN = {
    "minio": ["after bytes are journaled", "between copy and delete", "between parts", RANDOM, "after a name went"],
    "seaweedfs": ["after a put", "between parts", RANDOM],
}


@pytest.mark.parametrize("kind", CHOSEN)
def test_nothing_is_lost(request: pytest.FixtureRequest, tmp_path: Path, bucket_name: str, kind: str) -> None:
    server: Server = request.getfixturevalue(f"{kind}_server")
    with campaign(tmp_path, server, bucket_name, seed=5) as one:
        one.run(CHOSEN[kind])
    print(one.report)
    assert not one.report.problems
    assert one.report.kills.total() > 0
    assert one.report.kills.total() + one.report.uncounted == len(CHOSEN[kind])


# -- what the comparison takes for right


def worker(tmp_path: Path, **state: bytes | None) -> Worker:
    return Worker(tmp_path, "", load.USUAL, lambda: True, dict(state))


def test_what_was_acknowledged_is_demanded(tmp_path: Path) -> None:
    one = worker(tmp_path, a=b"a", d=DIRECTORY)
    assert accepts(one, {"a": b"a", "d": DIRECTORY}) == ""
    assert "a is lost" in accepts(one, {"d": DIRECTORY})
    assert "d is lost" in accepts(one, {"a": b"a"})
    assert "mixed or old" in accepts(one, {"a": b"b", "d": DIRECTORY})
    assert "x should not be there" in accepts(one, {"a": b"a", "d": DIRECTORY, "x": b""})


def test_a_call_in_doubt_happened_or_not(tmp_path: Path) -> None:
    one = worker(tmp_path, a=b"a", b=b"b")
    one.doubt = Doubt({"b": b"a"})  # a rename of a over b
    assert accepts(one, {"a": b"a", "b": b"b"}) == ""
    assert accepts(one, {"b": b"a"}) == ""
    assert accepts(one, {"a": b"a"})
    assert accepts(one, {"b": b"b"})
    assert accepts(one, {"a": b"a", "b": b"a"})


def test_a_write_in_doubt_may_be_half_there(tmp_path: Path) -> None:
    one = worker(tmp_path, a=b"old")
    one.doubt = Doubt({"a": b"newer"}, "a", b"old")
    for found in (b"old", b"new", b"newe", b"newer", b"old\0r", b"oew"):
        assert accepts(one, {"a": found}) == "", found
    for found in (b"ne", b"newest", b"xld", b""):
        assert accepts(one, {"a": found}), found


def test_points_name_what_is_there() -> None:
    import importlib

    for module, path, when in POINTS.values():
        holder, name = path.split(".")
        assert callable(getattr(getattr(importlib.import_module(module), holder), name))
        assert when in ("before", "after")
