"""Checksums of staged bytes: right after any writes and cuts, and damage is never taken for right."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3fuse.writing import checks
from s3fuse.writing.checks import DAMAGED, IN_DOUBT, SYNCED, Damage, Segment, Segments

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 64
SIZE = 400


@pytest.fixture(autouse=True)
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "BLOCK_BYTES", BLOCK)
        yield


class Staged:
    """Bytes in a file, and their segments."""

    def __init__(self) -> None:
        self.content = bytearray(SIZE + 100)
        self.segments = Segments()

    def read(self, start: int, stop: int) -> bytes:
        return bytes(self.content[start:stop])

    def write(self, start: int, data: bytes) -> None:
        steps = self.segments.write(start, data, self.read)
        self.segments.doubt(steps)
        self.content[start : start + len(data)] = data
        for step in steps:
            self.segments.apply(step)

    def get(self, start: int, stop: int) -> bytes:
        return self.segments.read(start, stop, self.read)

    def check(self) -> None:
        found = list(self.segments)
        assert found == sorted(found)
        for segment, after in itertools.pairwise(found):
            assert segment.stop <= after.start
        for segment in found:
            assert segment.start < segment.stop
            assert segment.start // BLOCK == (segment.stop - 1) // BLOCK


Changes = st.lists(st.tuples(st.booleans(), st.integers(0, SIZE - 1), st.integers(1, 100)), max_size=40)
Events = st.lists(
    st.tuples(
        st.sampled_from(("write", "write", "cut", "sync", "half")), st.integers(0, SIZE - 1), st.integers(1, 100)
    ),
    max_size=40,
)


@settings(deadline=None)
@given(Events)
def test_what_was_synced_keeps_its_range(events: list[tuple[str, int, int]]) -> None:
    """And what was written while a sync was under way is not taken for synced."""
    staged = Staged()
    promised: set[int] = set()
    under_way: list[Segment] = []
    for what, start, length in events:
        if what == "write":
            staged.write(start, os.urandom(length))
        elif what == "cut":
            staged.segments.clip(start, staged.read)
            promised = {at for at in promised if at < start}
        elif what == "half" and not under_way:
            under_way = staged.segments.syncing()
        else:
            under_way = under_way or staged.segments.syncing()
            for segment in staged.segments.synced(under_way):
                promised |= set(range(segment.start, segment.stop))
            under_way = []
        staged.check()
        synced = [one for one in staged.segments if one.synced == SYNCED]
        assert {at for one in synced for at in range(one.start, one.stop)} == promised
        for at in range(0, SIZE, 37):
            assert staged.segments.has_synced(at) == any(one.synced and one.stop > at for one in staged.segments)
            near = any(one.synced and one.start < at + 30 and one.stop > at for one in staged.segments)
            assert staged.segments.has_synced(at, at + 30) == near
    assert all(segment.fits(staged.read(segment.start, segment.stop)) for segment in staged.segments)


@settings(deadline=None)
@given(Changes)
def test_what_was_written_is_read(changes: list[tuple[bool, int, int]]) -> None:
    staged = Staged()
    model: dict[int, int] = {}
    for is_write, start, length in changes:
        if is_write:
            data = os.urandom(length)
            staged.write(start, data)
            model |= {start + at: byte for at, byte in enumerate(data)}
        else:
            staged.segments.clip(start, staged.read)
            model = {at: byte for at, byte in model.items() if at < start}
        staged.check()
    covered = {at for segment in staged.segments for at in range(segment.start, segment.stop)}
    assert covered == set(model)
    for segment in staged.segments:
        assert segment.fits(staged.read(segment.start, segment.stop))
        middle = (segment.start + segment.stop) // 2
        assert staged.get(segment.start, middle) == bytes(model[at] for at in range(segment.start, middle))


@settings(deadline=None)
@given(Changes, st.integers(0, SIZE - 1), Changes)
def test_damage_is_found_whatever_is_written_later(
    before: list[tuple[bool, int, int]], where: int, after: list[tuple[bool, int, int]]
) -> None:
    staged = Staged()
    for is_write, start, length in before:
        if is_write:
            staged.write(start, os.urandom(length))
    damaged = any(segment.start <= where < segment.stop for segment in staged.segments)
    staged.content[where] ^= 1
    for is_write, start, length in after:
        if is_write:
            staged.write(start, os.urandom(length))
            damaged = damaged and not start <= where < start + length
        else:
            staged.segments.clip(start, staged.read)
            damaged = damaged and where < start
        staged.check()
    if damaged:
        with pytest.raises(Damage):
            staged.get(where, where + 1)


def test_a_long_write_is_cut_at_blocks() -> None:
    staged = Staged()
    staged.write(10, bytes(150))
    assert [(start, stop) for start, stop, *_ in staged.segments] == [(10, 64), (64, 128), (128, 160)]


def test_appending_reads_nothing() -> None:
    staged = Staged()
    staged.write(0, b"one")

    def read(start: int, stop: int) -> bytes:
        raise AssertionError("read")

    (step,) = staged.segments.write(3, b"two", read)
    assert not step.overwrites
    assert [(segment.start, segment.stop) for segment in step.after] == [(0, 6)]


def test_overwriting_whole_segments_makes_them_right() -> None:
    staged = Staged()
    staged.write(0, bytes(200))
    staged.content[70] ^= 1
    with pytest.raises(Damage):
        staged.get(0, 200)
    staged.write(32, b"x" * 64)  # the rest of the damaged block is still damaged
    with pytest.raises(Damage):
        staged.get(100, 110)
    assert staged.get(64, 96) == b"x" * 32
    staged.write(96, b"y" * 32)
    assert staged.get(0, 200) == bytes(32) + b"x" * 64 + b"y" * 32 + bytes(72)


def test_missing_bytes_are_damage() -> None:
    assert not Segment(0, 3, checks.crc32(b"ab")).fits(b"ab")
    assert not Segment(0, 2, IN_DOUBT).fits(b"a")
    assert Segment(0, 2, IN_DOUBT).fits(b"ab")
    assert not Segment(0, 2, DAMAGED).fits(b"ab")
