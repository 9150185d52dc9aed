"""A changed file as a stack: the object it is based on, and above it layers of staged bytes, oldest first.

A layer hides what is below it where it was written and beyond `below_bytes`: truncating to 100 and growing again
to 200 must show zeros from 100 on, although the object below may be longer. While the oldest layer is uploaded,
writes go to a newer one; when the upload is done the layer is taken away and its result is the new base. What was
parked (see `overlay`) lies between the base and the oldest layer.

A write that could not be staged poisons its range: the kernel has told the program that it took the bytes, and they
are lost. What is there is neither the bytes before nor those after, so nobody reads it and the file is not uploaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from s3fuse.writing.extents import Extents

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s3fuse.writing.overlay import Overlay, Parked

#: `Piece.source` of bytes of the base object.
BASE: Final = -1
#: `Piece.source` of bytes that nobody wrote: zeros.
HOLE: Final = -2
#: `Piece.source` of bytes in a temporary object, which `Piece.parked` names.
PARKED: Final = -3
#: `Piece.source` of bytes that a program wrote and that are lost.
POISONED: Final = -4
#: Where a poisoned range stops that goes as far as the file ever may.
ENDLESS: Final = 1 << 62


class Piece(NamedTuple):
    """Bytes [start, stop) of a file and where they are: at the same offsets of a layer (its index) or BASE, or else."""

    source: int
    start: int
    stop: int
    parked: Parked | None = None

    @property
    def is_local(self) -> bool:
        """Whether no request is needed to read it."""
        return self.source >= 0 or self.source in (HOLE, POISONED)


@dataclass(slots=True)
class Layer:
    """What was written on top of something of at least `below_bytes` bytes.

    Bytes in `extents` are in the staging file of `generation`; others below `below_bytes` show what is below; the
    rest up to `size_bytes`, the size of the file as seen from here, is zeros. Bytes in `poisoned` are lost, whatever is
    there or below. `floor_bytes` is the size that the file has even where nothing is left of `extents`: what was cut or
    grown, not what was written.
    """

    generation: int
    extents: Extents
    below_bytes: int
    size_bytes: int
    poisoned: Extents = field(default_factory=Extents)
    floor_bytes: int = -1

    def __post_init__(self) -> None:
        if self.floor_bytes < 0:
            self.floor_bytes = self.size_bytes

    def write(self, start: int, stop: int) -> None:
        """Notes that [start, stop) is staged; the file grows to `stop` if it was shorter."""
        self.extents.add(start, stop)
        if self.poisoned:
            self.poisoned.remove(start, stop)
        if start < stop and stop > self.size_bytes:
            self.size_bytes = stop

    def poison(self, start: int, stop: int) -> None:
        """Notes that bytes [start, stop) are lost; the file grows to `stop` if it was shorter, but not to ENDLESS."""
        self.poisoned.add(start, stop)
        if stop < ENDLESS:
            self.size_bytes = max(self.size_bytes, stop)

    def truncate(self, size: int) -> None:
        """Makes the file `size` bytes long: cut, or grown by zeros."""
        is_grown = size > self.size_bytes
        self.extents.clip(size)
        # Where written bytes end at `size`, and they are lost, the cut has left nothing of them.
        self.floor_bytes = size if is_grown or self.extents.end < size else min(self.floor_bytes, size)
        self.poisoned.clip(size)
        self.below_bytes = min(self.below_bytes, size)
        self.size_bytes = size


def is_held(layer: Layer) -> bool:
    """Whether it is not known if the layer is whole."""
    return layer.poisoned.end == ENDLESS


def resolve(
    layers: Sequence[Layer], base_bytes: int, start: int, stop: int, overlay: Overlay | None = None
) -> list[Piece]:
    """Where the bytes [start, stop) of the file are, in order and with neighbours of one source merged.

    `layers` are oldest first, so the last one is what a program sees. What is beyond the end of the file is HOLE:
    the caller clips.
    """
    pieces: list[Piece] = []
    _descend(layers, len(layers) - 1, (base_bytes, overlay), start, stop, pieces)
    return pieces


def _descend(
    layers: Sequence[Layer],
    top: int,
    bottom: tuple[int, Overlay | None],
    start: int,
    stop: int,
    pieces: list[Piece],
) -> None:
    if top < 0:
        base_bytes, overlay = bottom
        if overlay is None:
            _base(pieces, base_bytes, start, stop)
            return
        for first, last, parked in overlay.pieces(start, stop):
            if parked is None:
                _base(pieces, min(base_bytes, overlay.below_bytes), first, last)
            else:
                _append(pieces, PARKED, first, last, parked)
        return
    layer = layers[top]
    if layer.poisoned:
        for first, last, is_lost in layer.poisoned.pieces(start, stop):
            if is_lost:
                _append(pieces, POISONED, first, last)
            else:
                _layer(layers, top, bottom, first, last, pieces)
    else:
        _layer(layers, top, bottom, start, stop, pieces)


def _layer(
    layers: Sequence[Layer],
    top: int,
    bottom: tuple[int, Overlay | None],
    start: int,
    stop: int,
    pieces: list[Piece],
) -> None:
    """What a layer shows where it is not poisoned."""
    layer = layers[top]
    for first, last, inside in layer.extents.pieces(start, stop):
        if inside:
            _append(pieces, top, first, last)
            continue
        shown = min(max(first, layer.below_bytes), last)
        if first < shown:
            _descend(layers, top - 1, bottom, first, shown, pieces)
        _append(pieces, HOLE, shown, last)


def _base(pieces: list[Piece], base_bytes: int, start: int, stop: int) -> None:
    shown = min(max(start, base_bytes), stop)
    _append(pieces, BASE, start, shown)
    _append(pieces, HOLE, shown, stop)


def _append(pieces: list[Piece], source: int, start: int, stop: int, parked: Parked | None = None) -> None:
    if start >= stop:
        return
    if pieces and pieces[-1].source == source and pieces[-1].parked == parked:
        start = pieces.pop().start
    pieces.append(Piece(source, start, stop, parked))
