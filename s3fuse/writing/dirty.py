"""The staged bytes of one dirty file: its layers, oldest first, each in a slot of the slab or in a file of its own.

A write is a pwrite and then a journal row, both before it is acknowledged: bytes that no row names are never read.
The rows have checksums (see `checks`), and nothing is read that does not fit them.
While an upload reads the oldest layer it is frozen and writes go to a second one on top, so an upload sends one
version, whatever programs write meanwhile.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from s3fuse.journal.seals import of_file, of_layer
from s3fuse.staging.ledger import Arrived
from s3fuse.staging.slab import SLOT_BYTES
from s3fuse.writing import poison
from s3fuse.writing.checks import Damage, Segments
from s3fuse.writing.durable import sync_files, sync_names
from s3fuse.writing.extents import Extents
from s3fuse.writing.layerrows import LayerRows
from s3fuse.writing.layers import ENDLESS, HOLE, POISONED, Layer, Piece, is_held, resolve
from s3fuse.writing.overlay import pack
from s3fuse.writing.parking import Pack, ParkedFile
from s3fuse.writing.places import Places
from s3fuse.writing.rows import StagedLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from s3fuse.writing.parking import Temporary
    from s3fuse.writing.staging import Staging

log = logging.getLogger(__name__)

#: What says which layers a file has.
_CONTAINERS: Final = ("layers", "tokens", "outdated_tokens", "_segments", "_unchecked")


class DirtyFile:
    """What one regular file has on top of its object: layers, oldest first. Sizes and offsets in bytes."""

    __slots__ = (
        "_places",
        "_rows",
        "_segments",
        "_syncing",
        "_unchecked",
        "arrived",
        "base_bytes",
        "damaged",
        "frozen",
        "layers",
        "number",
        "outdated_tokens",
        "parked",
        "poison_reason",
        "staging",
        "tokens",
    )

    def __init__(self, staging: Staging, number: int, base_bytes: int) -> None:
        self.staging = staging
        self.number = number
        self.base_bytes = base_bytes
        self.layers: list[Layer] = []
        self.tokens: list[str] = []
        self.damaged = ""  # what was found to be wrong with staged bytes
        self.poison_reason = ""  # why bytes could not be staged last
        self.outdated_tokens: list[str] = []  # of layers that were given up; the bucket may have them all the same
        self.arrived = Arrived()  # of layers[0]
        self.frozen = False  # layers[0] is being uploaded or parked and must not change
        self.parked = ParkedFile(number, staging)
        self._places = Places(staging, number)
        self._syncing: trio.Lock | None = None
        self._segments: dict[int, Segments] = {}  # generation -> checksums of what is staged
        self._unchecked: set[int] = set()  # generations that an earlier process staged, and nobody has read since
        self._rows = LayerRows(staging.journal, number, self._staged)

    @classmethod
    def recovered(cls, staging: Staging, number: int, base_bytes: int, layers: Sequence[StagedLayer]) -> DirtyFile:
        """A file as the journal knows it."""
        self = cls(staging, number, base_bytes)
        for staged in layers:
            generation = staged.layer.generation
            self.layers.append(staged.layer)
            self.tokens.append(staged.token)
            self._rows.found(staged)
            self._segments[generation] = Segments(staged.segments)
            self._unchecked.add(generation)
            self.poison_reason = staged.reason or self.poison_reason
            self._places.recovered(generation, staged.slot)
            staging.ledger.staged_bytes += staged.layer.extents.total_bytes
        # The oldest layer may be in the bucket already, unknown to the journal: what is written now must not join it.
        # One with poisoned bytes was never sent, and what heals it must; one that is held may have been.
        self.frozen = bool(layers) and (not layers[0].layer.poisoned or is_held(layers[0].layer))
        return self

    def check_lengths(self) -> None:
        """Notes in `damaged` what the staging files lack of what the journal says they hold."""
        for layer in self.layers:
            fd, offset = self._places.at(layer.generation)
            length = max(0, os.fstat(fd).st_size - offset)
            if length < layer.extents.end:
                path = self._places.path(layer.generation)
                self.damaged = f"staged data is damaged: {path} has {length} bytes of {layer.extents.end}"

    @property
    def unchecked(self) -> bool:
        """Whether the oldest layer must be looked at before it is uploaded."""
        return bool(self.damaged or (self.layers and self.layers[0].generation in self._unchecked))

    def check(self) -> Iterator[None]:
        """Reads every staged byte of the oldest layer, a block a step. Raises OSError(EIO), `damaged` says why."""
        generation = self.layers[0].generation
        for segment in list(self._segments[generation]):
            if not segment.fits(self._places.read(generation, segment.start, segment.stop)):
                raise self._found(Damage(segment.start, segment.stop), generation)
            yield
        self.damaged = ""
        self._unchecked.discard(generation)

    def _found(self, damage: Damage, generation: int) -> OSError:
        where = "the slab" if self._places.slot(generation) is not None else self._places.path(generation)
        text = f"staged data is damaged: bytes {damage.start} to {damage.stop} in {where} are not what was written"
        if not self.damaged:
            log.error("inode %d: %s", self.number, text)
        self.damaged = text
        return OSError(errno.EIO, text)

    def give_up_oldest(self) -> bool:
        """Drops a damaged oldest layer where nothing of it is seen any more; gives whether it did."""
        if len(self.layers) < 2 or self.is_held:
            return False
        seen = self.pieces(0, self.size)
        if any(piece.source == POISONED for piece in seen):  # what is hidden by that may be all there is
            return False
        without = resolve(self.layers[1:], self.base_bytes, 0, self.size, self.parked.overlay)
        if seen != [piece._replace(source=piece.source + 1) if piece.source >= 0 else piece for piece in without]:
            return False
        with self.staging.journal.transaction():
            self._keep()
            self.outdated_tokens.append(self.tokens[0])
            self.parked.packs = []
            self._discard(self._pop_oldest())
        self.damaged = ""
        return True

    def give_up_hidden(self) -> None:
        """Drops poisoned layers of which nothing is seen any more."""
        while self.layers[0].poisoned and self.give_up_oldest():
            pass

    @property
    def size(self) -> int:
        return self.layers[-1].size_bytes if self.layers else self.base_bytes

    @property
    def staged_bytes(self) -> int:
        return sum(layer.extents.total_bytes for layer in self.layers)

    def _keep(self) -> None:
        """Has a transaction that fails put back which layers there are. What one holds is for `_keep_layer`."""
        undo = self.staging.journal.undo
        if undo.is_on:
            undo.attributes(self.staging.ledger, ("staged_bytes",))
            undo.attributes(self, ("base_bytes", "damaged", "frozen"))
            undo.call(self._places.keep())
            undo.call(partial(self._put_back, [copy(getattr(self, name)) for name in _CONTAINERS]))
            self.parked.keep(undo)
            self._rows.keep()

    def _put_back(self, containers: list[Any]) -> None:
        for name, container in zip(_CONTAINERS, containers, strict=True):
            setattr(self, name, container)

    def _keep_layer(self, layer: Layer) -> None:
        """Has a transaction that fails put back what a layer holds."""
        undo = self.staging.journal.undo
        if undo.is_on:
            before = replace(layer, extents=Extents(layer.extents), poisoned=Extents(layer.poisoned))
            undo.call(partial(self._put_layer_back, layer, before, Segments(self._segments[layer.generation])))

    def _put_layer_back(self, layer: Layer, before: Layer, segments: Segments) -> None:
        layer.extents, layer.below_bytes, layer.size_bytes = before.extents, before.below_bytes, before.size_bytes
        layer.poisoned, layer.floor_bytes = before.poisoned, before.floor_bytes
        self._segments[layer.generation] = segments

    def _top(self) -> Layer:
        """The layer that takes changes: a new one where there was none, or the only one is frozen."""
        if self.layers and not (self.frozen and len(self.layers) == 1):
            return self.layers[-1]
        return self._push()

    def _push(self) -> Layer:
        self._keep()
        layer = Layer(self.staging.new_generation(), Extents(), self.size, self.size)
        self.layers.append(layer)
        self.tokens.append(self.staging.new_token())
        if self._places.new(layer.generation):
            self._note_surplus(layer.generation, is_promised=False)
        self._segments[layer.generation] = Segments()
        return layer

    def write(self, offset: int, data: bytes) -> None:
        """Stages and journals one write. Raises OSError of the local disk; then nothing is acknowledged."""
        self._write(self._top(), offset, data)

    def fill_base(self, offset: int, data: bytes) -> None:
        """Stages what the oldest layer shows of its base: it no longer needs it there. Raises as `write` does."""
        self._write(self.layers[0], offset, data)

    def _write(self, layer: Layer, offset: int, data: bytes) -> None:
        generation = layer.generation
        stop = offset + len(data)
        if stop > SLOT_BYTES and self._places.slot(generation) is not None:
            self._spill(layer)
        segments = self._segments[generation]
        steps = segments.write(offset, data, partial(self._places.read, generation))
        if self._places.slot(generation) is not None and segments.has_synced(offset, stop):
            self._spill(layer)  # bytes that a power failure must not take are overwritten only where nobody else's were
        self._rows.doubt(generation, segments, steps)
        try:
            self._places.write(generation, offset, data)
        except OSError:
            with suppress(OSError):
                self._places.give_back(generation, layer.extents)
            raise
        before = layer.extents.total_bytes
        healed = (offset, stop) if layer.poisoned.overlaps(offset, stop) else None
        layer.write(offset, stop)
        self.staging.ledger.staged_bytes += layer.extents.total_bytes - before
        for step in steps:
            segments.apply(step)
        self._rows.written(layer, steps, healed)

    def poison(self, start: int, stop: int, reason: str) -> None:
        """Bytes [start, stop) could not be staged and are lost (see `poison`). Raises OSError, sqlite3.DatabaseError.

        Then they are poisoned all the same, and only the journal does not know.
        """
        layer, self.poison_reason = self._top(), reason
        layer.poison(start, stop)
        self._rows.poisoned(layer, start, stop, reason)

    def hold(self, reason: str) -> None:
        """What the journal has of the file may be half of it: it is kept, and neither read nor uploaded.

        Until it is cut to nothing, that is: what is written then is in a layer, and under a token, of its own.
        """
        with self.staging.journal.transaction():
            self._push()
            self.frozen, self.poison_reason = True, reason
            for layer in self.layers:
                layer.poison(0, ENDLESS)
                self._rows.poisoned(layer, 0, ENDLESS, reason)

    @property
    def is_held(self) -> bool:
        """Whether it is not known if what is staged is whole (see `hold`)."""
        return bool(self.layers) and is_held(self.layers[-1])

    def seal(self) -> int:
        """The seal of the file as it is now (see `seals`)."""
        overlay = self.parked.overlay
        layers = [
            of_layer(
                layer.generation,
                layer.size_bytes,
                layer.below_bytes,
                token,
                layer.poisoned,
                self._segments[layer.generation].sealed,
            )
            for layer, token in zip(self.layers, self.tokens, strict=True)
        ]
        return of_file(layers, None if overlay is None else overlay.checksum(self.number))

    def poisoned_text(self) -> str:
        """What a user is told of poisoned bytes; "" where there are none."""
        return poison.text(self.layers, self.poison_reason)

    def truncate(self, size: int) -> None:
        """Cuts or grows the file. Raises OSError of the local disk; then it is as before."""
        with self.staging.journal.transaction():
            self._truncate(self._top(), size)

    def _truncate(self, layer: Layer, size: int) -> None:
        self._keep_layer(layer)
        self._keep()
        generation = layer.generation
        before, was_poisoned = layer.extents.total_bytes, bool(layer.poisoned)
        is_promised = self._segments[generation].has_synced(size)
        if is_promised and self._places.slot(generation) is not None:
            self._spill(layer)  # as in `write`
        cut = self._segments[generation].clip(size, partial(self._places.read, generation))
        layer.truncate(size)
        self.staging.ledger.staged_bytes += layer.extents.total_bytes - before
        if layer.extents.total_bytes < before:
            self._was_cut(generation, is_promised=is_promised)
        self._rows.cut(layer, cut, healed=was_poisoned)

    def _was_cut(self, generation: int, *, is_promised: bool) -> None:
        """Has the disk take back what a layer no longer needs, or notes that it may.

        What was promised to survive a power failure goes once the journal says on the disk that it is not needed. A
        slot keeps its blocks for what is written next.
        """
        if is_promised or self._places.slot(generation) is not None:
            self._note_surplus(generation, is_promised=is_promised)
        else:
            self.staging.journal.after_commit(partial(self.give_back, generation))

    def _note_surplus(self, generation: int, *, is_promised: bool) -> None:
        surplus = self.staging.surplus
        surplus[self, generation] = is_promised or surplus.get((self, generation), False)

    def give_back(self, generation: int) -> None:
        """Has the disk take back what the place of a layer has beyond what is staged, as far as it does."""
        for layer in self.layers:
            if layer.generation == generation:
                self._places.give_back(generation, layer.extents)

    def _staged(self, layer: Layer) -> StagedLayer:
        token = self.tokens[self.layers.index(layer)]
        generation = layer.generation
        slot, segments = self._places.slot(generation), list(self._segments[generation])
        return StagedLayer(layer, token, slot, segments, reason=self.poison_reason)

    def journal_again(self) -> None:
        """Records every layer in a journal that knows nothing of the file."""
        self._keep()
        self._rows.put_again(self.layers)
        self.parked.journal_again()

    def _spill(self, layer: Layer) -> None:
        """Moves a layer from its slot to a file of its own. Where that fails it stays where it was.

        Where bytes in it were synced they are in the new place, too, before others may take the slot (blocks).
        """
        generation = layer.generation
        fd, slot = self._places.leave_slot(generation, layer.extents)
        try:
            is_synced = self._segments[generation].has_synced(0)
            if is_synced:
                sync_files([os.dup(fd)])
                sync_names(self.staging.directory)
            self._rows.keep()
            self._rows.moved(layer)
        except BaseException:
            self._places.back_to_slot(generation, slot)
            raise
        self.staging.journal.undo.call(partial(self._places.back_to_slot, generation, slot))
        self.staging.journal.after_commit(partial(self._leave_slot, slot, is_synced))

    def _leave_slot(self, slot: int, is_synced: bool) -> None:
        if is_synced:
            self.staging.journal.sync()
        self.staging.slab.give(slot)

    def pieces(self, start: int, stop: int, layers: int | None = None) -> list[Piece]:
        """Where bytes [start, stop) are: `Piece.source` is an index of `layers`, BASE or HOLE."""
        return resolve(self.layers[:layers], self.base_bytes, start, stop, self.parked.overlay)

    def read_piece(self, piece: Piece) -> bytes:
        """The bytes of a local piece. Raises OSError(EIO) where they are not what was written, or lost."""
        if piece.source == HOLE:
            return bytes(piece.stop - piece.start)
        if piece.source == POISONED:
            raise OSError(errno.EIO, self.poisoned_text())
        generation = self.layers[piece.source].generation
        try:
            return self._segments[generation].read(piece.start, piece.stop, partial(self._places.read, generation))
        except Damage as damage:
            raise self._found(damage, generation) from None

    def freeze(self) -> None:
        """Fixes the oldest layer for an upload."""
        self.frozen = True
        self.arrived.begin()

    def set_base(self, size: int) -> None:
        """Another object of so many bytes is below the layers. Call inside a journal transaction."""
        self._keep()
        self.base_bytes = size

    def commit(self, size: int) -> None:
        """The frozen layer is in the bucket as `size` bytes: it becomes the base. Call inside a journal transaction."""
        self._keep()
        self.base_bytes = size
        self.parked.clear()
        self._discard(self._pop_oldest())

    def _pop_oldest(self) -> Layer:
        self.tokens.pop(0)
        self.frozen = False
        self.arrived = Arrived()
        return self.layers.pop(0)

    def park(self, pack_bytes: int, new: Callable[[], Temporary]) -> list[Pack]:
        """Freezes the oldest layer and gives what is to be sent of it; the same again until `parked_oldest`."""
        if not self.parked.packs:
            self.freeze()
            if len(self.layers) == 1:  # a changed file always has one: its token is that of the next upload
                self._rows.put(self._top())
            extents = self.layers[0].extents
            self.parked.begin([Pack(ranges, new()) for ranges in pack(extents, extents.total_bytes, pack_bytes)])
        return self.parked.packs

    def parked_oldest(self) -> None:
        """All of it is in the bucket: the staged bytes go. Call inside a journal transaction."""
        self._keep()
        layer = self._pop_oldest()
        self.parked.done(layer)
        self._discard(layer)

    def discard(self) -> None:
        """Drops every layer: the file is gone."""
        self._keep()
        for layer in self.layers:
            self._discard(layer)
        self.layers.clear()
        self.tokens.clear()
        self.parked.clear()

    def _discard(self, layer: Layer) -> None:
        self._rows.drop(layer)
        self._unchecked.discard(layer.generation)
        self._segments.pop(layer.generation, None)
        self.staging.ledger.staged_bytes -= layer.extents.total_bytes
        self.staging.ledger.left()
        self.staging.surplus.pop((self, layer.generation), None)
        self.staging.journal.after_commit(self._places.drop(layer.generation))

    async def sync(self) -> None:
        """Returns when every byte staged before is on the disk and marked so in the journal.

        Raises OSError, also EIO where bytes are poisoned. The mark itself is on the disk after the next `Journal.sync`.
        """
        self._syncing = self._syncing or trio.Lock()
        async with self._syncing:
            begun = {layer.generation: self._segments[layer.generation].syncing() for layer in self.layers}
            await self._sync_files()
            for generation, segments in begun.items():
                if generation in self._segments and segments:
                    self._rows.synced(generation, self._segments[generation].synced(segments))
        if text := self.poisoned_text():
            raise OSError(errno.EIO, text)

    async def _sync_files(self) -> None:
        while True:
            moves = self._places.moves
            # Of their own: the file may be written, uploaded and closed meanwhile.
            descriptors = [os.dup(self._places.at(layer.generation)[0]) for layer in self.layers if layer.extents.end]
            await trio.to_thread.run_sync(sync_files, descriptors)
            if not self._places.are_slots:
                await trio.to_thread.run_sync(sync_names, self.staging.directory)
            if moves == self._places.moves:  # else bytes have gone to a file that was not there to be synced
                return

    def close(self) -> None:
        """Closes the file's own staging files until they are needed again."""
        self._places.close()
