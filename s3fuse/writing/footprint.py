"""What one staging file takes on its disk: the blocks that its bytes are in, and those that bytes were in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s3fuse.writing.extents import Extents

if TYPE_CHECKING:
    from collections.abc import Iterable

    from s3fuse.staging.ledger import Ledger


class Footprint:
    """Blocks of one file; the ledger has them, too. Offsets are those in the file."""

    __slots__ = ("_block_bytes", "_blocks", "_ledger")

    def __init__(self, ledger: Ledger, block_bytes: int) -> None:
        self._ledger = ledger
        self._block_bytes = block_bytes
        self._blocks = Extents()

    def hold(self, start: int, stop: int) -> None:
        """Bytes [start, stop) are about to be written."""
        size, blocks = self._block_bytes, self._blocks
        before = blocks.total_bytes
        blocks.add(start // size * size, -(-stop // size) * size)
        self._ledger.hold(blocks.total_bytes - before)

    def beyond(self, stop: int) -> tuple[int, int]:
        """Where blocks begin and end that are beyond the byte `stop`; an empty range where there are none."""
        first = -(-stop // self._block_bytes) * self._block_bytes
        return first, max(first, self._blocks.end)

    def cut(self, stop: int) -> None:
        """The disk has all blocks beyond the byte `stop` back."""
        before = self._blocks.total_bytes
        self._blocks.clip(self.beyond(stop)[0])
        self._ledger.release(before - self._blocks.total_bytes)

    def surplus(self, staged: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Ranges of blocks that no staged byte is in."""
        needed = self._around(staged)
        return [
            (first, last)
            for start, stop in self._blocks
            for first, last, inside in needed.pieces(start, stop)
            if not inside
        ]

    def keep(self, staged: Iterable[tuple[int, int]]) -> None:
        """The disk has all other blocks back."""
        before = self._blocks.total_bytes
        self._blocks = self._around(staged)
        self._ledger.release(before - self._blocks.total_bytes)

    def _around(self, staged: Iterable[tuple[int, int]]) -> Extents:
        size = self._block_bytes
        return Extents((start // size * size, -(-stop // size) * size) for start, stop in staged)
