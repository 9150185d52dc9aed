"""Packing of staged ranges, and overlays byte by byte (how they resolve is in `test_layers`)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from s3fuse.writing.extents import Extents
from s3fuse.writing.layers import PARKED, Piece
from s3fuse.writing.overlay import Overlay, Parked, Range, pack
from s3fuse.writing.plan import CopyPart, Limits, Multipart, SendPart, plan_upload

offset = st.integers(0, 60)
ranges = st.lists(st.tuples(offset, offset).map(sorted).map(tuple), max_size=8).map(Extents)


@given(ranges, st.integers(1, 20))
def test_packs_hold_every_byte_once_and_none_is_small(extents: Extents, size: int) -> None:
    packs = pack(extents, extents.total_bytes, size)
    found = [cut for of_pack in packs for cut in of_pack]
    assert [at for start, stop in found for at in range(start, stop)] == [
        at for start, stop in extents for at in range(start, stop)
    ]
    sizes = [sum(stop - start for start, stop in of_pack) for of_pack in packs]
    if extents.total_bytes >= size:
        assert all(size <= each < 2 * size for each in sizes)
    else:
        assert len(packs) == 1


@given(st.lists(st.tuples(ranges, offset), max_size=5))
def test_later_layers_hide_earlier_ones(layers: list[tuple[Extents, int]]) -> None:
    shown: dict[int, str] = {}
    overlay = Overlay(60)
    least = 60
    for number, (extents, below) in enumerate(layers):
        key = str(number)
        overlay = overlay.with_layer(below, [Range(*cut, Parked(key, "", 0, 0)) for cut in extents])
        least = min(least, below)
        shown = {at: by for at, by in shown.items() if at < below}
        shown.update((at, key) for start, stop in extents for at in range(start, stop))
    assert overlay.below_bytes == least
    found = {
        at: parked.key
        for start, stop, parked in overlay.pieces(0, 100)
        if parked is not None
        for at in range(start, stop)
    }
    assert found == shown
    assert overlay.objects() == set(shown.values())
    cuts = list(overlay.pieces(0, 100))
    assert [start for start, _, _ in cuts[1:]] == [stop for _, stop, _ in cuts[:-1]]
    assert (cuts[0][0], cuts[-1][1]) == (0, 100)
    middle = [(max(start, 20), min(stop, 33), parked) for start, stop, parked in cuts if start < 33 and stop > 20]
    assert list(overlay.pieces(20, 33)) == middle


def test_a_streamed_file_is_copied_part_by_part() -> None:
    mib = 1 << 20
    pieces = [
        Piece(PARKED, at, at + 8 * mib, Parked(str(at), "etag", 8 * mib, at)) for at in range(0, 400 * mib, 8 * mib)
    ]
    pieces.append(Piece(0, 400 * mib, 407 * mib))
    plan = plan_upload(pieces, 407 * mib, Limits())
    assert isinstance(plan, Multipart)
    assert plan.parts[:-1] == tuple(CopyPart(*piece[1:]) for piece in pieces[:-1])
    assert plan.parts[-1] == SendPart(400 * mib, 407 * mib)
