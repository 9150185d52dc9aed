"""Where a late request may still come: a file and a directory of the same name are one place."""

from __future__ import annotations

import pytest

from s3fuse.namespace.lateness import DELETE, LATE_S, Lateness
from s3fuse.writing.ephemeral import MemoryJournal


def expecting(*requests: tuple[str, int]) -> Lateness:
    late = Lateness(MemoryJournal("bucket"))
    late.expect(requests)
    return late


@pytest.mark.parametrize(
    ("sent", "key"),
    [
        (("d/n/", DELETE), "d/n"),  # SeaweedFS deletes an empty file
        (("d/n", DELETE), "d/n/"),
        (("d/n/", -7), "d/n"),
        (("d/n", 7), "d/n/"),
        (("d/n/in it", 7), "d/n"),
        (("d/n/e/in it", 7), "d/n"),
        (("d/n", 7), "d/n/in it"),
        (("d/n", 7), "d/n/e/"),
        (("d/n", 7), "d/n"),
        (("d/n", DELETE), "d/n"),
        (("d/n/", DELETE), "d/n/"),
    ],
)
def test_another_inode_is_not_written_where_a_late_request_would_take_its_place(
    sent: tuple[str, int], key: str
) -> None:
    assert LATE_S - 1 < expecting(sent).before_write_s(key, 9) <= LATE_S


@pytest.mark.parametrize(
    ("sent", "key"),
    [
        (("d/n/", -7), "d/n/in it"),
        (("d/n/", DELETE), "d/n/in it"),
        (("d/n/in it", DELETE), "d/n"),
        (("d/n/in it", 7), "d/n/"),
        (("d/n/", -7), "d/n/"),  # written again
        (("d/n", 9), "d/n"),
        (("d/n", -9), "d/n"),
        (("d/n", 7), "d/n2"),
        (("d/n/in it", 7), "d/n2"),
        (("d/n2/in it", 7), "d/n"),
    ],
)
def test_nothing_else_waits(sent: tuple[str, int], key: str) -> None:
    assert expecting(sent).before_write_s(key, 9) == 0.0


def test_nothing_is_deleted_where_a_write_of_either_kind_may_come() -> None:
    for key in ("d/n", "d/n/"):
        assert expecting(("d/n", 7)).before_delete_s(key) > 0
        assert expecting(("d/n/", -7)).before_delete_s(key) > 0
        assert expecting(("d/n/", DELETE), ("d/n", DELETE)).before_delete_s(key) == 0.0
