"""What the checker of several nodes takes for right, and what it finds."""

from __future__ import annotations

import errno

import pytest

from tests.nodes.content import HEAD_BYTES, NOBODY, Id, Mixed, parse, record
from tests.nodes.history import Event, History

A, B, C = Id(1, 1), Id(2, 1), Id(3, 1)


def wrote(id: Id, began: float, *seen: Id, path: str = "d/a", **more: object) -> Event:
    """An acknowledged whole rewrite of a tenth of a second."""
    more = {"acknowledged": True, "verb": "write", "ended": began + 0.1, **more}
    return Event(id.node, path=path, id=id, seen=seen, began=began, **more)  # type: ignore[arg-type]


def did(node: int, verb: str, began: float, path: str = "d/a", target: str = "", *seen: Id, error: int = 0) -> Event:
    return Event(node, verb, path, target, None, seen, began, began + 0.1, error)


def judged(kept: list[Id], *events: Event) -> list[tuple[str, Id | None]]:
    return [(finding.kind, finding.id) for finding in History(list(events)).judge(kept)]


# -- contents

WHOLE = record(A, NOBODY, 100)
BOTH = WHOLE + record(B, A, 5000)


@pytest.mark.parametrize(("data", "ids"), [(b"", []), (WHOLE, [A]), (BOTH, [A, B]), (record(A, NOBODY, 0), [A])])
def test_records_are_read_as_they_were_written(data: bytes, ids: list[Id]) -> None:
    assert [one.id for one in parse(data)] == ids


@pytest.mark.parametrize(
    "data",
    [
        WHOLE[:-1],
        WHOLE + b"\0",
        b"\0" * len(WHOLE),
        WHOLE[:HEAD_BYTES] + bytes(100),
        WHOLE[:100] + BOTH[200:],
        WHOLE + record(C, NOBODY, 5),
        WHOLE + record(C, B, 5),
        record(B, A, 5),
        WHOLE[:HEAD_BYTES] + record(C, NOBODY, 100)[HEAD_BYTES:],
    ],
    ids=["short", "long", "zeros", "no filler", "cut", "two wholes", "other base", "no whole", "other filler"],
)
def test_what_nobody_wrote_so_is_mixed(data: bytes) -> None:
    with pytest.raises(Mixed):
        parse(data)


# -- histories


def test_what_is_kept_or_was_replaced_by_who_had_seen_it_is_right() -> None:
    assert judged([A], wrote(A, 0)) == []
    assert judged([A, B], wrote(A, 0), wrote(B, 0.05)) == []
    assert judged([B], wrote(A, 0), wrote(B, 5, A)) == []
    assert judged([C], wrote(A, 0), wrote(B, 5, A), wrote(C, 9, B)) == []


def test_a_write_that_nobody_replaced_is_lost() -> None:
    assert judged([], wrote(A, 0)) == [("lost", A)]
    assert judged([B], wrote(A, 0), wrote(B, 5)) == [("lost", A)]
    assert judged([C], wrote(A, 0), wrote(B, 5, A), wrote(C, 9, A)) == [("lost", B)]


def test_a_write_that_failed_replaces_nothing_unless_it_is_seen() -> None:
    failed = wrote(B, 5, A, acknowledged=False, errno=errno.ESTALE)
    assert judged([], wrote(A, 0), failed) == [("lost", A)]
    assert judged([B], wrote(A, 0), failed) == []
    assert judged([C], wrote(A, 0), failed, wrote(C, 9, B)) == []


def test_what_was_not_acknowledged_is_not_demanded() -> None:
    write = wrote(A, 0, acknowledged=False)
    assert judged([], write) == []
    history = History([write])
    history.acknowledge(1, until=0.05)
    assert list(history.judge([])) == []
    history.acknowledge(2, until=9)
    assert list(history.judge([])) == []
    history.acknowledge(1, until=9)
    assert [finding.kind for finding in history.judge([])] == ["lost"]


def test_an_append_keeps_what_it_has_seen() -> None:
    append = wrote(B, 5, A, verb="append")
    assert judged([A, B], wrote(A, 0), append) == []
    assert judged([B], wrote(A, 0), append) == [("lost", A)]


def test_removals() -> None:
    assert judged([], wrote(A, 0), did(2, "unlink", 5, "d/a", "", A)) == []
    assert judged([], wrote(A, 0), did(2, "rename", 5, "d/x", "d/a", A)) == []
    assert judged([], wrote(A, 0), did(2, "unlink", 5, "d/a", "", A, error=errno.ENOENT)) == [("lost", A)]
    assert judged([], wrote(A, 0), did(2, "unlink", 50)) == [("lost", A)]  # long known, and it saw another one
    assert judged([], wrote(A, 0), did(2, "unlink", 1)) == [("raced", A)]
    assert judged([], wrote(A, 0), did(2, "unlink", 1, "d/b")) == [("lost", A)]
    assert judged([], wrote(A, 3), did(2, "unlink", 2)) == [("window", A)]
    assert judged([], wrote(A, 3), did(2, "unlink", 2), did(2, "flush", 2.2, "")) == [("lost", A)]


def test_a_rename_takes_a_write_along_and_explains_no_loss_of_it() -> None:
    moved = did(2, "rename", 5, "d/a", "e/b")
    assert judged([A], wrote(A, 0), moved) == []
    assert judged([], wrote(A, 0), moved) == [("lost", A)]
    assert judged([], wrote(A, 0), moved, did(3, "unlink", 1, "e/b")) == [("lost", A)]
    assert judged([], wrote(A, 4.95), moved, did(3, "unlink", 5.2, "e/b")) == [("raced", A)]
    assert judged([], wrote(A, 4.95), did(2, "rename", 5, "d", "e")) == [("window", A)]


def test_errors() -> None:
    found = list(History([wrote(A, 0), wrote(B, 3, path="d/q"), did(2, "unlink", 1)]).judge([]))
    assert [(finding.kind, finding.is_error) for finding in found] == [("raced", False), ("lost", True)]
