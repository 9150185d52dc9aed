"""`resolve` against byte arrays: every byte must come from where the model says it was last written."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from s3fuse.writing.extents import Extents
from s3fuse.writing.layers import BASE, ENDLESS, HOLE, POISONED, Layer, Piece, resolve
from s3fuse.writing.overlay import Overlay, Parked, Range, pack

SIZES = st.integers(0, 40)
STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "poison"]), SIZES, SIZES)
    | st.tuples(st.just("truncate"), SIZES, st.just(0))
    | st.tuples(st.sampled_from(["push", "commit", "park"]), st.just(0), st.just(0)),
    max_size=20,
)


def places(pieces: list[Piece]) -> list[tuple[int, int, int]]:
    return [(piece.source, piece.start, piece.stop) for piece in pieces]


@dataclass
class File:
    """A file as a program sees it, the stack that stands for it, and the bytes of base and staging files."""

    base: bytearray
    seen: bytearray = field(init=False)
    layers: list[Layer] = field(default_factory=list)
    staged: list[bytearray] = field(default_factory=list)
    stamp: int = 0
    overlay: Overlay | None = None
    parked: dict[str, bytes] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.seen = bytearray(self.base)
        self.push()

    def push(self) -> None:
        self.layers.append(Layer(len(self.layers), Extents(), len(self.seen), len(self.seen)))
        self.staged.append(bytearray())

    def write(self, start: int, stop: int) -> None:
        self.layers[-1].write(start, stop)
        if start >= stop:
            return
        self.stamp = self.stamp % 255 + 1
        for content in (self.seen, self.staged[-1]):
            content.extend(bytes(max(0, stop - len(content))))
            content[start:stop] = bytes([self.stamp]) * (stop - start)
        self.lost.difference_update(range(start, stop))

    def poison(self, start: int, stop: int) -> None:
        if start < stop:
            self.layers[-1].poison(start, stop)
            self.seen.extend(bytes(max(0, stop - len(self.seen))))
            self.lost.update(range(start, stop))

    def truncate(self, size: int) -> None:
        self.layers[-1].truncate(size)
        del self.seen[size:]
        self.seen.extend(bytes(size - len(self.seen)))
        self.lost = {at for at in self.lost if at < size}

    def commit(self) -> None:
        """What is below the newest layer is uploaded and becomes the base, unless it is poisoned."""
        below, top = self.layers[:-1], self.layers[-1]
        if not below or any(layer.poisoned for layer in below):
            return
        size = below[-1].size_bytes
        self.base = self.read(resolve(below, len(self.base), 0, size, self.overlay), set())
        self.overlay = None
        self.layers, self.staged = [top], self.staged[-1:]

    def park(self) -> None:
        """The bytes of the oldest layer go to objects of about ten bytes."""
        if len(self.layers) < 2 or self.layers[0].poisoned:
            return
        layer, staged = self.layers.pop(0), self.staged.pop(0)
        ranges = []
        for places in pack(layer.extents, layer.extents.total_bytes, 10):
            key = f"object {len(self.parked)}"
            data = b""
            for start, stop in places:
                ranges.append(Range(start, stop, Parked(key, "", 0, start - len(data))))
                data += staged[start:stop]
            self.parked[key] = data
        under = self.overlay or Overlay(layer.below_bytes)
        self.overlay = under.with_layer(layer.below_bytes, ranges)
        assert self.overlay.objects() <= set(self.parked)

    def read(self, pieces: list[Piece], lost: set[int]) -> bytearray:
        """What they show; exactly `lost` is poisoned of them."""
        content = bytearray()
        for source, start, stop, parked in pieces:
            if parked is not None:
                data = self.parked[parked.key]
                assert start - parked.shift >= 0
                assert stop - parked.shift <= len(data)
                content += data[start - parked.shift : stop - parked.shift]
                continue
            if source == POISONED:
                assert lost >= set(range(start, stop))
                content += self.seen[start:stop]
                continue
            assert lost.isdisjoint(range(start, stop))
            where = self.base if source == BASE else bytearray(stop) if source == HOLE else self.staged[source]
            content += where[start:stop]
        return content


@given(st.binary(min_size=0, max_size=30), STEPS, SIZES, SIZES)
def test_every_byte_is_the_last_one_written(
    base: bytes, steps: list[tuple[str, int, int]], start: int, stop: int
) -> None:
    file = File(bytearray(base))
    for step, first, second in steps:
        if step == "write":
            file.write(first, second)
        elif step == "poison":
            file.poison(first, second)
        elif step == "truncate":
            file.truncate(first)
        elif step == "push":
            file.push()
        elif step == "park":
            file.park()
        else:
            file.commit()
        size = file.layers[-1].size_bytes
        assert size == len(file.seen)
        for layer in file.layers:  # so much is in the journal
            assert layer.size_bytes == max(layer.floor_bytes, layer.extents.end, layer.poisoned.end)
        pieces = resolve(file.layers, len(file.base), 0, size, file.overlay)
        assert file.read(pieces, file.lost) == file.seen
        assert all(before[0::3] != after[0::3] for before, after in pairwise(pieces))
    part = resolve(file.layers, len(file.base), start, min(stop, len(file.seen)), file.overlay)
    assert file.read(part, file.lost) == file.seen[start:stop]


def test_without_layers_the_base_shows_and_nothing_beyond_it() -> None:
    assert places(resolve([], 10, 5, 15)) == [(BASE, 5, 10), (HOLE, 10, 15)]
    assert resolve([], 0, 3, 3) == []


def test_cut_and_grown_again_shows_zeros() -> None:
    layer = Layer(0, Extents(), 100, 100)
    layer.truncate(10)
    layer.truncate(100)
    layer.write(50, 60)
    assert places(resolve([layer], 100, 0, 100)) == [(BASE, 0, 10), (HOLE, 10, 50), (0, 50, 60), (HOLE, 60, 100)]


def test_a_layer_shows_no_more_of_the_one_below_than_there_was() -> None:
    lower = Layer(0, Extents([(0, 20)]), 0, 20)
    upper = Layer(1, Extents([(5, 8)]), 12, 30)
    assert places(resolve([lower, upper], 0, 0, 30)) == [(0, 0, 5), (1, 5, 8), (0, 8, 12), (HOLE, 12, 30)]


def test_poison_without_an_end_goes_when_the_file_is_cut() -> None:
    layer = Layer(0, Extents([(0, 10)]), 0, 10)
    layer.poison(0, ENDLESS)
    assert layer.size_bytes == 10
    assert places(resolve([layer], 0, 0, 10)) == [(POISONED, 0, 10)]
    layer.write(0, 10)
    assert layer.poisoned.end == ENDLESS  # the file may have been longer
    layer.truncate(10)
    assert not layer.poisoned
