"""Local bytes of dirty files: one sparse staging file a layer, at the same offsets as in the file itself.

`DirtyFile` owns the layers of one file. A write is a pwrite and then a journal row, both before it is acknowledged:
bytes that no row names are never read. While an upload reads the oldest layer it is frozen and writes go to a
second one on top, so an upload sends one version, whatever programs write meanwhile.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

from s3fuse.writing.extents import Extents
from s3fuse.writing.layers import HOLE, Layer, Piece, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from s3fuse.writing.journal import Journal


class Staging:
    """The folder of staging files of one mount, with how many bytes they hold."""

    def __init__(self, directory: Path, journal: Journal) -> None:
        self.directory = directory
        self.journal = journal
        self.staged_bytes = 0
        self.session = secrets.token_hex(6)
        self._tokens = 0
        directory.mkdir(exist_ok=True, mode=0o700)

    def path(self, number: int, generation: int) -> str:
        return os.path.join(self.directory, f"{number}.{generation}")

    def new_token(self) -> str:
        """A text that no other upload ever carries: a version in the bucket that has it is ours."""
        self._tokens += 1
        return f"{self.session}-{self._tokens}"

    def remove_strays(self, known: set[tuple[int, int]]) -> None:
        """Removes staging files that no journal row names: their writes were never acknowledged, or are uploaded."""
        for entry in os.scandir(self.directory):
            number, _, generation = entry.name.partition(".")
            if not (number.isdigit() and generation.isdigit() and (int(number), int(generation)) in known):
                os.unlink(entry.path)


class DirtyFile:
    """What one regular file has on top of its object: layers, oldest first. Sizes and offsets in bytes."""

    __slots__ = ("_fds", "_row", "_row_stop", "base_bytes", "frozen", "layers", "number", "staging", "tokens")

    def __init__(self, staging: Staging, number: int, base_bytes: int) -> None:
        self.staging = staging
        self.number = number
        self.base_bytes = base_bytes
        self.layers: list[Layer] = []
        self.tokens: list[str] = []
        self.frozen = False  # layers[0] is being uploaded and must not change
        self._fds: dict[int, int] = {}
        self._row, self._row_stop = 0, -1  # the journal row that the last write extended, and where it ends

    @classmethod
    def recovered(cls, staging: Staging, number: int, base_bytes: int, layers: Sequence[tuple[Layer, str]]) -> DirtyFile:
        """A file as the journal knows it; reading what `damage` reports raises EIO."""
        self = cls(staging, number, base_bytes)
        for layer, token in layers:
            self.layers.append(layer)
            self.tokens.append(token)
            staging.staged_bytes += layer.extents.total_bytes
        return self

    def damage(self) -> list[str]:
        """What the staging files lack of what the journal says they hold."""
        problems = []
        for layer in self.layers:
            path = self.staging.path(self.number, layer.generation)
            try:
                length = os.stat(path).st_size
            except FileNotFoundError:
                length = 0
            if length < layer.extents.end:
                problems.append(f"{path} has {length} bytes of {layer.extents.end}")
        return problems

    @property
    def size(self) -> int:
        return self.layers[-1].size_bytes if self.layers else self.base_bytes

    @property
    def staged_bytes(self) -> int:
        return sum(layer.extents.total_bytes for layer in self.layers)

    def _top(self) -> Layer:
        """The layer that takes changes; made when there is none or the only one is frozen."""
        if not self.layers or (self.frozen and len(self.layers) == 1):
            generation = self.layers[-1].generation + 1 if self.layers else 0
            layer = Layer(generation, Extents(), self.size, self.size)
            token = self.staging.new_token()
            self.staging.journal.put_layer(self.number, layer, token)
            self.layers.append(layer)
            self.tokens.append(token)
            self._row_stop = -1
        return self.layers[-1]

    def write(self, offset: int, data: bytes) -> None:
        """Stages and journals one write. Raises OSError (ENOSPC, EIO of the local disk); then nothing is acknowledged."""
        layer = self._top()
        stop = offset + len(data)
        fd = self._open(layer.generation)
        done = os.pwrite(fd, data, offset)
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)
        if layer.extents.covers(offset, stop):
            return
        journal = self.staging.journal
        if offset == self._row_stop:
            journal.extend_staged(self._row, stop)
        else:
            self._row = journal.add_staged(self.number, layer.generation, offset, stop)
        self._row_stop = stop
        before = layer.extents.total_bytes
        layer.write(offset, stop)
        self.staging.staged_bytes += layer.extents.total_bytes - before

    def truncate(self, size: int) -> None:
        layer = self._top()
        before = layer.extents.total_bytes
        layer.truncate(size)
        self.staging.journal.resize_layer(self.number, layer)
        self._row_stop = -1
        self.staging.staged_bytes += layer.extents.total_bytes - before

    def pieces(self, start: int, stop: int, layers: int | None = None) -> list[Piece]:
        """Where bytes [start, stop) are: `Piece.source` is an index of `layers`, BASE or HOLE."""
        return resolve(self.layers[:layers], self.base_bytes, start, stop)

    def read_piece(self, piece: Piece) -> bytes:
        """The bytes of a piece that is not in BASE. Raises OSError(EIO) where the staging file was cut."""
        length = piece.stop - piece.start
        if piece.source == HOLE:
            return bytes(length)
        data = os.pread(self._open(self.layers[piece.source].generation), length, piece.start)
        if len(data) != length:
            path = self.staging.path(self.number, self.layers[piece.source].generation)
            raise OSError(5, "staging file was cut short", path)
        return data

    def freeze(self) -> str:
        """Fixes the oldest layer for an upload and gives its token."""
        self.frozen = True
        return self.tokens[0]

    def commit(self, size: int) -> None:
        """The frozen layer is in the bucket as `size` bytes: it becomes the base. Call inside a journal transaction."""
        layer = self.layers.pop(0)
        self.tokens.pop(0)
        self.frozen = False
        self.base_bytes = size
        self.staging.journal.drop_layer(self.number, layer.generation)
        self._discard(layer)

    def discard(self) -> None:
        """Drops every layer: the file is gone."""
        for layer in self.layers:
            self.staging.journal.drop_layer(self.number, layer.generation)
            self._discard(layer)
        self.layers.clear()
        self.tokens.clear()

    def _discard(self, layer: Layer) -> None:
        self.staging.staged_bytes -= layer.extents.total_bytes
        if layer.extents.end or layer.generation in self._fds:
            fd = self._fds.pop(layer.generation, None)
            if fd is not None:
                os.close(fd)
            try:
                os.unlink(self.staging.path(self.number, layer.generation))
            except FileNotFoundError:
                pass

    def _open(self, generation: int) -> int:
        fd = self._fds.get(generation)
        if fd is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            fd = self._fds[generation] = os.open(self.staging.path(self.number, generation), flags, 0o600)
        return fd

    def sync(self) -> None:
        """Returns when every staged byte is on the disk (blocks; call it in a thread)."""
        for layer in list(self.layers):
            if layer.extents.end:
                os.fsync(self._open(layer.generation))

    def close(self) -> None:
        """Closes the staging files until they are needed again."""
        while self._fds:
            os.close(self._fds.popitem()[1])
