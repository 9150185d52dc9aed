"""Upload plans: whole, within the limits, and copying only what is the same."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3fuse.writing.layers import BASE, HOLE, Piece
from s3fuse.writing.plan import CopyPart, Limits, Multipart, SendPart, SinglePut, plan_upload

MIB = 1 << 20
SMALL = Limits(
    single_put_bytes=16,
    part_bytes=8,
    min_copy_bytes=10,
    copy_part_bytes=25,
    min_part_bytes=5,
    max_part_bytes=60,
    max_parts=40,
    max_copy_bytes=40,
    max_put_bytes=60,
    max_object_bytes=500,
)
RUNS = st.lists(st.tuples(st.sampled_from([0, 1, BASE, HOLE]), st.integers(1, 60)), max_size=60)


def make_pieces(runs: list[tuple[int, int]], largest: int) -> tuple[list[Piece], int]:
    pieces: list[Piece] = []
    at = 0
    for source, length in runs:
        stop = min(at + length, largest)
        if stop == at:
            break
        start = pieces.pop().start if pieces and pieces[-1].source == source else at
        pieces.append(Piece(source, start, stop))
        at = stop
    return pieces, at


@given(RUNS, st.booleans())
def test_parts_are_the_file_and_within_the_limits(runs: list[tuple[int, int]], copy_base: bool) -> None:
    pieces, size = make_pieces(runs, SMALL.max_object_bytes)
    plan = plan_upload(pieces, size, SMALL, copy_base=copy_base)
    if isinstance(plan, SinglePut):
        assert size <= SMALL.single_put_bytes
        return
    assert 0 < len(plan.parts) <= SMALL.max_parts
    at = 0
    base = {offset for piece in pieces if piece.source == BASE for offset in range(piece.start, piece.stop)}
    for number, part in enumerate(plan.parts, 1):
        assert part.start == at < part.stop
        at = part.stop
        assert part.stop - part.start >= SMALL.min_part_bytes or number == len(plan.parts)
        if isinstance(part, CopyPart):
            assert copy_base
            assert part.stop - part.start <= SMALL.max_copy_bytes
            assert base.issuperset(range(part.start, part.stop))
        else:
            assert part.stop - part.start <= SMALL.max_part_bytes
    assert at == size


@given(RUNS)
def test_little_more_is_sent_than_changed(runs: list[tuple[int, int]]) -> None:
    pieces, size = make_pieces(runs, 200)
    plan = plan_upload(pieces, size, SMALL)
    dirty = [piece.stop - piece.start for piece in pieces if piece.source != BASE]
    if isinstance(plan, Multipart):
        sent = sum(part.stop - part.start for part in plan.parts if isinstance(part, SendPart))
        assert sent <= sum(dirty) + (len(dirty) + 1) * (SMALL.min_copy_bytes + SMALL.min_part_bytes)


@pytest.mark.parametrize("size", [0, 1, 16 * MIB])
def test_small_files_are_one_request(size: int) -> None:
    assert plan_upload([Piece(0, 0, size)] if size else [], size) == SinglePut()


def test_a_small_file_that_changed_little_is_copied() -> None:
    pieces = [Piece(BASE, 0, 12 * MIB), Piece(0, 12 * MIB, 12 * MIB + 1)]
    copied = Multipart((CopyPart(0, 12 * MIB), SendPart(12 * MIB, 12 * MIB + 1)))
    assert plan_upload(pieces, 12 * MIB + 1) == copied
    assert plan_upload(pieces, 12 * MIB + 1, copy_base=False) == SinglePut()
    mostly_new = [Piece(0, 0, 16), Piece(BASE, 16, 26)]
    assert plan_upload(mostly_new, 26, replace(SMALL, single_put_bytes=26)) == SinglePut()


def test_a_change_in_the_middle_sends_one_small_part() -> None:
    middle = 500 * MIB
    pieces = [Piece(BASE, 0, middle), Piece(0, middle, middle + 1), Piece(BASE, middle + 1, 1000 * MIB)]
    assert plan_upload(pieces, 1000 * MIB) == Multipart(
        (CopyPart(0, middle), SendPart(middle, middle + 5 * MIB), CopyPart(middle + 5 * MIB, 1000 * MIB))
    )


def test_holes_are_sent() -> None:
    assert plan_upload([Piece(HOLE, 0, 20)], 20, SMALL) == Multipart(
        (SendPart(0, 8), SendPart(8, 16), SendPart(16, 20))
    )


@pytest.mark.parametrize("size", [17 * MIB, 80 << 30, (80 << 30) + 1, 5 << 40])
@pytest.mark.parametrize("source", [0, BASE])
def test_any_size_fits_into_ten_thousand_parts(size: int, source: int) -> None:
    plan = plan_upload([Piece(source, 0, size)], size)
    assert isinstance(plan, Multipart)
    assert len(plan.parts) <= 10_000
    assert plan.parts[-1].stop == size
    assert max(part.stop - part.start for part in plan.parts) < 2 << 30


def test_scattered_changes_in_a_huge_file_still_fit() -> None:
    step = 100 * MIB
    size = 20_000 * step
    pieces: list[Piece] = []
    for start in range(0, size, step):
        pieces += [Piece(0, start, start + 1), Piece(BASE, start + 1, start + step)]
    plan = plan_upload(pieces, size)
    assert isinstance(plan, Multipart)
    assert len(plan.parts) <= 10_000


def test_copies_too_many_for_the_parts_are_given_up_for_larger_sent_parts() -> None:
    pieces: list[Piece] = []
    for start in range(0, 490, 35):
        pieces += [Piece(0, start, start + 1), Piece(BASE, start + 1, start + 35)]
    plan = plan_upload(pieces, 490, replace(SMALL, max_parts=26))
    assert isinstance(plan, Multipart)
    assert len(plan.parts) <= 26


def test_few_changes_in_a_huge_file_cost_little() -> None:
    size = 4 << 40
    pieces: list[Piece] = []
    for start in range(0, size, 40 << 30):
        pieces += [Piece(0, start, start + 1), Piece(BASE, start + 1, min(start + (40 << 30), size))]
    plan = plan_upload(pieces, size)
    assert isinstance(plan, Multipart)
    assert (
        sum(part.stop - part.start for part in plan.parts if isinstance(part, SendPart)) == len(pieces) // 2 * 5 * MIB
    )


@pytest.mark.parametrize(("size", "limits"), [((5 << 40) + 1, Limits()), (11 << 30, Limits(max_parts=2))])
def test_too_large(size: int, limits: Limits) -> None:
    with pytest.raises(OSError, match="too large") as caught:
        plan_upload([Piece(0, 0, size)], size, limits)
    assert caught.value.errno == errno.EFBIG


def test_contradictory_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="contradictory"):
        Limits(part_bytes=1)
