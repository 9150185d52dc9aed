"""`Extents` against a set of integers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from s3fuse.writing.extents import Extents

OFFSETS = st.integers(0, 60)
RANGES = st.tuples(OFFSETS, OFFSETS)
ADD = st.tuples(st.just("add"), RANGES)
CLIP = st.tuples(st.just("clip"), OFFSETS)
REMOVE = st.tuples(st.just("remove"), RANGES)


def check_shape(extents: Extents, model: set[int]) -> None:
    ranges = list(extents)
    assert {offset for start, stop in ranges for offset in range(start, stop)} == model
    assert all(start < stop for start, stop in ranges)
    assert all(before[1] < after[0] for before, after in pairwise(ranges))
    assert extents.total_bytes == len(model)
    assert extents.end == max(model, default=-1) + 1
    assert len(extents) == len(ranges)


@given(st.lists(ADD | CLIP | REMOVE, max_size=30))
def test_adds_removes_and_clips_as_a_set_does(steps: list[tuple[str, tuple[int, int] | int]]) -> None:
    extents, model = Extents(), set[int]()
    for step, argument in steps:
        if step == "remove":
            assert isinstance(argument, tuple)
            extents.remove(*argument)
            model.difference_update(range(*argument))
        elif isinstance(argument, tuple):
            extents.add(*argument)
            model.update(range(*argument))
        else:
            extents.clip(argument)
            model = {offset for offset in model if offset < argument}
        check_shape(extents, model)


@given(st.lists(RANGES, max_size=10), RANGES)
def test_questions_about_a_range(ranges: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    extents = Extents(ranges)
    model = {offset for start, stop in ranges for offset in range(start, stop)}
    wanted = set(range(*asked))
    assert extents.covers(*asked) == (wanted <= model)
    assert extents.overlaps(*asked) == bool(wanted & model)
    pieces = extents.pieces(*asked)
    assert [offset for start, stop, _ in pieces for offset in range(start, stop)] == sorted(wanted)
    assert all((offset in model) == inside for start, stop, inside in pieces for offset in range(start, stop))
    assert all(before[2] != after[2] for before, after in pairwise(pieces))


@given(st.lists(RANGES, max_size=10))
def test_order_of_construction_does_not_matter(ranges: list[tuple[int, int]]) -> None:
    assert Extents(ranges) == Extents(reversed(ranges)) == Extents(sorted(ranges))


def test_appending_stays_one_range() -> None:
    extents = Extents()
    for start in range(0, 100, 10):
        extents.add(start, start + 10)
    assert list(extents) == [(0, 100)]
    assert repr(extents) == "Extents([(0, 100)])"
    assert extents != [(0, 100)]
