"""Local bytes of dirty files, at the same offsets as in the file itself.

A small layer lives in a slot of one shared slab file, which costs no create and no unlink; one that outgrows its
slot gets a sparse staging file of its own. `DirtyFile` owns the layers of one file. A write is a pwrite and then a
journal row, both before it is acknowledged: bytes that no row names are never read, so a slot is used again as it is.
While an upload reads the oldest layer it is frozen and writes go to a second one on top, so an upload sends one
version, whatever programs write meanwhile.
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from s3fuse.writing.extents import Extents
from s3fuse.writing.journal import StagedLayer
from s3fuse.writing.layers import HOLE, Layer, Piece, resolve

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from s3fuse.writing.journal import Journal

SLOT_BYTES = 64 << 10
SLAB = "slab"


class Staging:
    """The folder of staged bytes of one mount, with how many there are."""

    def __init__(self, directory: Path, journal: Journal) -> None:
        self.directory = directory
        self.journal = journal
        self.staged_bytes = 0
        self._session = secrets.token_hex(6)
        self._tokens = 0
        directory.mkdir(exist_ok=True, mode=0o700)
        self.slab = os.open(directory / SLAB, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._free: list[int] = []
        self._slots = 0

    def path(self, number: int, generation: int) -> str:
        return os.path.join(self.directory, f"{number}.{generation}")

    def new_token(self) -> str:
        """A text that no other upload ever carries: a version in the bucket that has it is ours."""
        self._tokens += 1
        return f"{self._session}-{self._tokens}"

    def take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._slots += 1
        return self._slots - 1

    def give_slot(self, slot: int) -> None:
        self._free.append(slot)

    def begin(self, layers: Iterable[tuple[int, StagedLayer]]) -> None:
        """Keeps what the journal names and drops the rest: its writes were never acknowledged, or are uploaded."""
        used: set[int] = set()
        files: set[str] = {SLAB}
        for number, staged in layers:
            if staged.slot is None:
                files.add(f"{number}.{staged.layer.generation}")
            else:
                used.add(staged.slot)
        self._slots = max(used, default=-1) + 1
        self._free = [slot for slot in range(self._slots) if slot not in used]
        if not used:
            os.ftruncate(self.slab, 0)
        for entry in os.scandir(self.directory):
            if entry.name not in files:
                os.unlink(entry.path)

    def close(self) -> None:
        os.close(self.slab)


class DirtyFile:
    """What one regular file has on top of its object: layers, oldest first. Sizes and offsets in bytes."""

    __slots__ = (
        "_fds",
        "_journaled",
        "_row",
        "_run",
        "_slots",
        "base_bytes",
        "from_journal",
        "frozen",
        "layers",
        "number",
        "staging",
        "tokens",
    )

    def __init__(self, staging: Staging, number: int, base_bytes: int) -> None:
        self.staging = staging
        self.number = number
        self.base_bytes = base_bytes
        self.layers: list[Layer] = []
        self.tokens: list[str] = []
        self.from_journal = False  # an earlier process may have begun to upload it
        self.frozen = False  # layers[0] is being uploaded and must not change
        self._slots: dict[int, int] = {}  # generation -> slot
        self._fds: dict[int, int] = {}  # generation -> its own file
        self._journaled: set[int] = set()  # generations that have a row
        self._row, self._run = 0, (-1, -1)  # the journal row that the last write extended, and its range

    @classmethod
    def recovered(cls, staging: Staging, number: int, base_bytes: int, layers: Sequence[StagedLayer]) -> DirtyFile:
        """A file as the journal knows it; reading what `damage` reports raises EIO."""
        self = cls(staging, number, base_bytes)
        for staged in layers:
            self.layers.append(staged.layer)
            self.tokens.append(staged.token)
            self._journaled.add(staged.layer.generation)
            if staged.slot is not None:
                self._slots[staged.layer.generation] = staged.slot
            staging.staged_bytes += staged.layer.extents.total_bytes
        # The oldest layer may be in the bucket already, unknown to the journal: what is written now must not join it.
        self.frozen = self.from_journal = bool(layers)
        return self

    def damage(self) -> list[str]:
        """What the staging files lack of what the journal says they hold."""
        problems = []
        for layer in self.layers:
            fd, offset = self._place(layer.generation)
            length = os.fstat(fd).st_size - offset
            if length < layer.extents.end:
                path = self.staging.path(self.number, layer.generation)
                problems.append(f"{path} has {max(length, 0)} bytes of {layer.extents.end}")
        return problems

    @property
    def size(self) -> int:
        return self.layers[-1].size_bytes if self.layers else self.base_bytes

    @property
    def staged_bytes(self) -> int:
        return sum(layer.extents.total_bytes for layer in self.layers)

    def _top(self) -> Layer:
        """The layer that takes changes: a new one where there was none, or the only one is frozen."""
        if self.layers and not (self.frozen and len(self.layers) == 1):
            return self.layers[-1]
        layer = Layer(self.layers[-1].generation + 1 if self.layers else 0, Extents(), self.size, self.size)
        self.layers.append(layer)
        self.tokens.append(self.staging.new_token())
        self._slots[layer.generation] = self.staging.take_slot()
        self._run = (-1, -1)
        return layer

    def write(self, offset: int, data: bytes) -> None:
        """Stages and journals one write. Raises OSError of the local disk; then nothing is acknowledged."""
        layer = self._top()
        stop = offset + len(data)
        if stop > SLOT_BYTES and layer.generation in self._slots:
            self._spill(layer)
        fd, base = self._place(layer.generation)
        done = os.pwrite(fd, data, base + offset)
        while done < len(data):
            done += os.pwrite(fd, data[done:], base + offset + done)
        if layer.extents.covers(offset, stop):
            return
        before = layer.extents.total_bytes
        layer.write(offset, stop)
        self.staging.staged_bytes += layer.extents.total_bytes - before
        journal = self.staging.journal
        if layer.generation not in self._journaled:
            journal.put_layer(self._staged(layer), self.number, offset, stop)
            self._journaled.add(layer.generation)
            self._row, self._run = 0, (offset, stop)
        elif offset == self._run[1]:
            journal.extend(self.number, layer.generation, self._row, stop)
            self._run = (self._run[0], stop)
        else:
            self._row = journal.add_staged(self.number, layer.generation, offset, stop)
            self._run = (offset, stop)

    def truncate(self, size: int) -> None:
        layer = self._top()
        before = layer.extents.total_bytes
        layer.truncate(size)
        self._record(layer)
        self.staging.staged_bytes += layer.extents.total_bytes - before

    def _staged(self, layer: Layer) -> StagedLayer:
        token = self.tokens[self.layers.index(layer)]
        return StagedLayer(layer, token, self._slots.get(layer.generation))

    def _record(self, layer: Layer) -> None:
        """Journals the whole layer anew."""
        self.staging.journal.replace_layer(self._staged(layer), self.number)
        self._journaled.add(layer.generation)
        self._run = (-1, -1)

    def _spill(self, layer: Layer) -> None:
        """Moves a layer that outgrows its slot to a file of its own. Where that fails it stays where it was."""
        generation = layer.generation
        slot = self._slots.pop(generation)
        try:
            fd, _ = self._place(generation)
            for start, stop in layer.extents:
                data = os.pread(self.staging.slab, stop - start, slot * SLOT_BYTES + start)
                if os.pwrite(fd, data, start) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.staging.path(self.number, generation))
            if generation in self._journaled:
                self._record(layer)
        except BaseException:
            self._slots[generation] = slot
            if generation in self._fds:
                os.close(self._fds.pop(generation))
                os.unlink(self.staging.path(self.number, generation))
            raise
        self.staging.give_slot(slot)

    def pieces(self, start: int, stop: int, layers: int | None = None) -> list[Piece]:
        """Where bytes [start, stop) are: `Piece.source` is an index of `layers`, BASE or HOLE."""
        return resolve(self.layers[:layers], self.base_bytes, start, stop)

    def read_piece(self, piece: Piece) -> bytes:
        """The bytes of a piece that is not in BASE. Raises OSError(EIO) where the staging file was cut."""
        length = piece.stop - piece.start
        if piece.source == HOLE:
            return bytes(length)
        generation = self.layers[piece.source].generation
        fd, base = self._place(generation)
        data = os.pread(fd, length, base + piece.start)
        if len(data) != length:
            raise OSError(5, "staging file was cut short", self.staging.path(self.number, generation))
        return data

    def freeze(self) -> None:
        """Fixes the oldest layer for an upload."""
        self.frozen = True

    def commit(self, size: int) -> None:
        """The frozen layer is in the bucket as `size` bytes: it becomes the base. Call inside a journal transaction."""
        layer = self.layers.pop(0)
        self.tokens.pop(0)
        self.frozen = False
        self.base_bytes = size
        self._discard(layer)

    def discard(self) -> None:
        """Drops every layer: the file is gone."""
        for layer in self.layers:
            self._discard(layer)
        self.layers.clear()
        self.tokens.clear()

    def _discard(self, layer: Layer) -> None:
        self.staging.journal.drop_layer(self.number, layer.generation)
        self._journaled.discard(layer.generation)
        self.staging.staged_bytes -= layer.extents.total_bytes
        slot = self._slots.pop(layer.generation, None)
        if slot is not None:
            self.staging.give_slot(slot)
            return
        fd = self._fds.pop(layer.generation, None)
        if fd is not None:
            os.close(fd)
        with suppress(FileNotFoundError):
            os.unlink(self.staging.path(self.number, layer.generation))

    def _place(self, generation: int) -> tuple[int, int]:
        """The descriptor and the offset in it where the layer's bytes begin."""
        slot = self._slots.get(generation)
        if slot is not None:
            return self.staging.slab, slot * SLOT_BYTES
        fd = self._fds.get(generation)
        if fd is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            fd = self._fds[generation] = os.open(self.staging.path(self.number, generation), flags, 0o600)
        return fd, 0

    def sync(self) -> None:
        """Returns when every staged byte is on the disk (blocks; call it in a thread)."""
        for layer in list(self.layers):
            if layer.extents.end:
                os.fsync(self._place(layer.generation)[0])

    def close(self) -> None:
        """Closes the file's own staging files until they are needed again."""
        while self._fds:
            os.close(self._fds.popitem()[1])
