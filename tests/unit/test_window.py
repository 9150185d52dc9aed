"""The read-ahead window: enough for streams, little for random reads, never outside the file."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3fuse.reading.window import INITIAL_BYTES, Window, split

KIB = 1 << 10
MIB = 1 << 20
BLOCK = 128 * KIB
MOST = 32 * MIB
READS = st.lists(st.tuples(st.integers(0, 80 * MIB), st.integers(0, 2 * MIB), st.booleans()), max_size=40)


@given(READS, st.integers(0, 80 * MIB))
def test_the_window_holds_the_request_and_stays_in_the_file(reads: list[tuple[int, int, bool]], file_size: int) -> None:
    window = Window()
    frontier = 0
    for place, size, follow in reads:
        offset = frontier if follow else place
        start, stop = window.on_read(offset, size, file_size)
        end = min(offset + size, file_size)
        assert 0 <= start <= stop <= file_size
        if offset >= end:
            assert start == stop
            continue
        assert start <= offset
        assert stop >= end
        assert start % BLOCK == 0
        assert stop % BLOCK == 0 or stop == file_size
        frontier = max(frontier, end)
        assert stop <= frontier + MOST
        assert window.window_bytes <= MOST
        if not window.window_bytes:
            assert start > offset - BLOCK
            assert stop < end + BLOCK


@pytest.mark.parametrize("size", [4 * KIB, BLOCK, MIB])
@pytest.mark.parametrize("first", [0, 777 * MIB])
def test_a_stream_is_at_full_width_within_ten_reads(size: int, first: int) -> None:
    window = Window()
    offset = first
    for _ in range(9):
        _, stop = window.on_read(offset, size, 1 << 40)
        offset += size
    assert window.window_bytes == MOST
    assert stop - offset >= MOST * 3 // 4 - BLOCK
    assert stop % (8 * MIB) == 0


def test_a_first_read_at_the_start_begins_a_stream_modestly() -> None:
    assert Window().on_read(0, 4 * KIB, 1 << 30) == (0, INITIAL_BYTES)
    assert Window().on_read(0, 4 * KIB, 5000) == (0, 5000)
    assert Window().on_read(8 * KIB, 4 * KIB, 1 << 30) == (0, BLOCK)


def test_requests_out_of_order_and_small_skips_stay_one_stream() -> None:
    window = Window()
    order = [0, 2, 1, 3, 5, 4, 7, 6, 9, 10, 12]
    for place in order:
        start, stop = window.on_read(place * BLOCK, BLOCK, 1 << 30)
        assert start <= place * BLOCK < stop
        assert window.window_bytes
    assert window.window_bytes == MOST


def test_a_late_request_does_not_widen_the_window() -> None:
    window = Window()
    window.on_read(0, 2 * BLOCK, 1 << 30)
    before = window.window_bytes
    window.on_read(0, BLOCK, 1 << 30)
    assert window.window_bytes == before


def test_random_reads_fetch_only_what_they_touch() -> None:
    window = Window()
    places = random.Random(1)
    for _ in range(1000):
        offset = places.randrange(1, 1 << 28) * 4 * KIB
        start, stop = window.on_read(offset, 4 * KIB, 1 << 42)
        assert stop - start == BLOCK


def test_a_seek_ends_the_stream_and_reading_on_begins_another() -> None:
    window = Window()
    for offset in range(0, 10 * MIB, MIB):
        window.on_read(offset, MIB, 1 << 40)
    assert window.on_read(1 << 39, MIB, 1 << 40) == (1 << 39, (1 << 39) + MIB)
    assert window.window_bytes == 0
    window.on_read((1 << 39) + MIB, MIB, 1 << 40)
    assert window.window_bytes == INITIAL_BYTES


def test_the_end_of_the_file_is_nothing_to_fetch() -> None:
    window = Window()
    assert window.on_read(100, 10, 100) == (100, 100)
    assert window.on_read(200, 10, 100) == (100, 100)
    assert window.on_read(0, 0, 100) == (100, 100)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 100))
def test_split_cuts_at_multiples(start: int, stop: int, part: int) -> None:
    cuts = split(start, stop, part)
    assert [offset for cut in cuts for offset in range(*cut)] == list(range(start, stop))
    assert all(first < last and first // part == (last - 1) // part for first, last in cuts)
    assert all(last % part == 0 for _, last in cuts[:-1])
