"""Files fetched ahead in a directory: enough for walks, none for single reads, each given once."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from s3fuse.reading.siblings import INITIAL_FILES, MAX_FILES, MAX_NAMES, MAX_WALKS, Siblings

NAMES = [f"f{number:04}" for number in range(500)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 49), st.booleans()), max_size=60))
def test_names_are_of_the_directory_and_given_once_while_a_walk_lasts(reads: list[tuple[int, int, bool]]) -> None:
    siblings = Siblings()
    names = NAMES[:50]
    at = [0] * 4
    for directory, place, follow in reads:
        at[directory] = min(at[directory] + 1, 49) if follow else place
        given_names = siblings.on_read(directory, names[at[directory]], names)
        assert set(given_names) <= set(names)
        assert len(set(given_names)) == len(given_names) <= MAX_FILES
        assert names[at[directory]] not in given_names


def test_a_walk_asks_for_every_file_once() -> None:
    siblings = Siblings()
    asked: list[str] = []
    for index, name in enumerate(NAMES):
        asked += siblings.on_read(1, name, NAMES)
        if index > 10:
            assert len(asked) >= min(index + MAX_FILES - 1, len(NAMES) - 2)  # it is at full width
    assert asked == NAMES[2:]


def test_a_single_read_asks_for_nothing() -> None:
    assert Siblings().on_read(1, NAMES[7], NAMES) == ()


def test_reads_in_no_order_ask_for_little() -> None:
    siblings = Siblings()
    names = NAMES[:]
    random.Random(1).shuffle(names)
    asked = [name for read in names for name in siblings.on_read(1, read, NAMES)]
    assert len(asked) < len(NAMES) // 5


def test_a_second_read_nearby_begins_a_walk() -> None:
    siblings = Siblings()
    siblings.on_read(1, NAMES[7], NAMES)
    assert siblings.on_read(1, NAMES[9], NAMES) == NAMES[10 : 10 + INITIAL_FILES]


def test_a_walk_goes_on_in_the_next_directory() -> None:
    siblings = Siblings()
    for name in NAMES[:3]:
        siblings.on_read(1, name, NAMES)
    assert siblings.on_read(2, NAMES[0], NAMES) == NAMES[1 : 1 + INITIAL_FILES]
    assert siblings.on_read(3, NAMES[300], NAMES) == ()  # not how a walk begins
    assert siblings.on_read(4, NAMES[0], NAMES) == ()


def test_several_readers_share_a_walk() -> None:
    siblings = Siblings()
    asked = [name for index in range(0, 40, 2) for read in (index + 1, index)
             for name in siblings.on_read(1, NAMES[read], NAMES)]  # fmt: skip
    assert len(asked) == len(set(asked)) >= 40


def test_a_large_directory_is_left_alone() -> None:
    many = [f"n{number}" for number in range(MAX_NAMES + 1)]
    siblings = Siblings()
    assert [siblings.on_read(1, name, many) for name in many[:3]] == [(), (), ()]


def test_few_walks_are_remembered() -> None:
    siblings = Siblings()
    siblings.on_read(0, NAMES[0], NAMES)
    for directory in range(1, MAX_WALKS + 1):
        siblings.on_read(directory, NAMES[0], NAMES)
    assert siblings.on_read(0, NAMES[1], NAMES) == ()


def test_a_name_that_came_later_is_no_harm() -> None:
    siblings = Siblings()
    for name in NAMES[:4]:
        siblings.on_read(1, name, NAMES[:10])
    assert list(siblings.on_read(1, "zzz", [*NAMES[:10], "zzz"])) == []
