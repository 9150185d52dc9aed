"""What the journal has of the layers of one file.

Memory is changed first, then the row: where that fails memory is ahead, and the next change records the layer as a
whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from s3fuse.writing.checks import Segment, Segments, Step
    from s3fuse.writing.journal import Journal
    from s3fuse.writing.layers import Layer
    from s3fuse.writing.rows import StagedLayer


class LayerRows:
    """The rows of file `number`; `staged` gives a layer with all that is to be recorded of it."""

    __slots__ = ("_behind", "_homes", "_journal", "_number", "_staged")

    def __init__(self, journal: Journal, number: int, staged: Callable[[Layer], StagedLayer]) -> None:
        self._journal = journal
        self._number = number
        self._staged = staged
        self._homes: dict[int, int] = {}  # generation -> `home` of its row, where it has one
        self._behind: set[int] = set()  # generations of which the journal may have less than memory

    def found(self, staged: StagedLayer) -> None:
        """A layer that an earlier process has recorded."""
        self._homes[staged.layer.generation] = staged.home

    def keep(self) -> None:
        """Has a transaction that fails put back what is known of the rows."""
        self._journal.undo.call(lambda before=dict(self._homes): self._put_back(before))  # type: ignore[misc]

    def _put_back(self, homes: dict[int, int]) -> None:
        self._homes = homes

    def home(self, generation: int) -> int | None:
        """The `home` of a layer's row; None where all of the layer is still to be recorded."""
        return None if generation in self._behind else self._homes.get(generation)

    def put(self, layer: Layer) -> None:
        """Records a layer as a whole."""
        generation = layer.generation
        if generation not in self._behind:
            self._homes[generation] = self._journal.put_layer(self._staged(layer), self._number)
            return
        staged = self._staged(layer)
        with self._journal.transaction():
            home = self._journal.replace_layer(staged, self._number)
            self._journal.heal(self._number, generation)
            for start, stop in layer.poisoned:
                self._journal.poison(self._number, generation, start, stop, staged.reason)
        self._homes[generation] = home
        self._behind.discard(generation)

    def put_again(self, layers: Iterable[Layer]) -> None:
        """Records layers in a journal that knows nothing of them."""
        for layer in layers:
            self._behind.add(layer.generation)
            self.put(layer)

    def doubt(self, generation: int, segments: Segments, steps: list[Step]) -> None:
        """Segments are about to be overwritten: a crash right then is no damage."""
        home = self.home(generation)
        if home is not None and any(step.overwrites for step in steps):
            self._journal.doubt_segments(self._number, generation, home, steps)
            segments.doubt(steps)

    def written(self, layer: Layer, steps: list[Step], healed: tuple[int, int] | None) -> None:
        """A write has changed segments; with `healed` it has made good poisoned bytes in that range."""
        generation, home = layer.generation, self.home(layer.generation)
        try:
            if home is None:
                self.put(layer)
            else:
                self._homes[generation] = self._journal.change_segments(self._number, generation, home, steps)
            if healed is not None:
                self._journal.heal(self._number, generation, *healed)
        except BaseException:
            self._behind.add(generation)
            raise

    def poisoned(self, layer: Layer, start: int, stop: int, reason: str) -> None:
        """Bytes of a layer are lost."""
        generation = layer.generation
        try:
            with self._journal.transaction():
                if self.home(generation) is None:
                    self.put(layer)
                self._journal.poison(self._number, generation, start, stop, reason)
        except BaseException:
            self._behind.add(generation)
            raise

    def cut(self, layer: Layer, cut: Segment | None, *, healed: bool) -> None:
        """A layer was truncated; with `healed` poisoned bytes may be beyond its end. Call inside a transaction."""
        home = self.home(layer.generation)
        if home is None:
            self.put(layer)
            return
        staged = self._staged(layer)
        self._homes[layer.generation] = self._journal.cut_layer(staged, self._number, home, cut)
        if healed:
            self._journal.heal(self._number, layer.generation, layer.size_bytes)

    def moved(self, layer: Layer) -> None:
        """A layer has another place; nothing to do where it has no row yet."""
        if self.home(layer.generation) is not None:
            self._homes[layer.generation] = self._journal.replace_layer(self._staged(layer), self._number)

    def synced(self, generation: int, segments: Iterable[Segment]) -> None:
        """Bytes of these segments are on the disk."""
        home = self.home(generation)
        if home is not None:
            self._journal.note_synced(self._number, generation, home, segments)

    def drop(self, layer: Layer) -> None:
        """A layer is gone."""
        with self._journal.transaction():
            self._journal.drop_layer(self._number, layer.generation)
            if layer.poisoned:
                self._journal.heal(self._number, layer.generation)
        self._homes.pop(layer.generation, None)
        self._behind.discard(layer.generation)
