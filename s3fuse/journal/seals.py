"""Checksums of the journal's rows, and seals: what proves that the journal has all of a file.

SQLite looks at the structure of a database, not at what is in its cells: each row has a checksum of its own. Rows that
are right may still be those of a moment when a file was half written, or of an earlier state, where the journal has
lost its end. So a file is sealed when it is closed or synced: the seal is a checksum over all its rows but the one it
is in. Where the journal is damaged, only a file whose seal fits is known to be whole. Pure.
"""

from __future__ import annotations

from itertools import chain
from struct import Struct, pack
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Iterable

_SEGMENT = Struct("<qqq")
_SUMS = 1 << 63
#: Instead of a number that is not there.
_NONE = -(1 << 63)


def of_row(numbers: Iterable[int | None], texts: Iterable[str | bytes | None] = ()) -> int:
    """The checksum of a row: its numbers, of 64 bits with sign, and its texts."""
    known = [_NONE if number is None else number for number in numbers]
    text = repr(texts).encode("utf-8", "surrogatepass") if texts else b""
    return crc32(text, crc32(pack(f"<{len(known)}q", *known)))


def of_segment(start: int, stop: int, crc: int) -> int:
    """The part of a segment in a sum over all of a layer. It does not depend on their order."""
    return crc32(_SEGMENT.pack(start, stop, crc))


def total(parts: Iterable[int]) -> int:
    """The sum of parts, to be added to and taken from."""
    return sum(parts) % _SUMS


def of_layer(
    generation: int, size_bytes: int, below_bytes: int, token: str, poisoned: Iterable[tuple[int, int]], segments: int
) -> int:
    """The part of a layer in a seal; `segments` is the `total` of its segments. Not its place: that changes nothing."""
    return of_row([generation, size_bytes, below_bytes, segments, *chain(*poisoned)], [token])


def of_file(layers: list[int], overlay: int | None) -> int:
    """The seal of a file: the parts of its layers, oldest first, and the checksum of its overlay, where it has one."""
    return of_row([*layers, overlay])
