"""How to upload one version of a file: what is sent, what the server copies from the version before."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from s3fuse.store.base import (
    MAX_COPY_BYTES,
    MAX_OBJECT_BYTES,
    MAX_PART_BYTES,
    MAX_PARTS,
    MAX_PUT_BYTES,
    MIN_PART_BYTES,
)
from s3fuse.writing.layers import BASE, PARKED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from s3fuse.writing.layers import Piece
    from s3fuse.writing.overlay import Parked


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server allows, and the sizes we aim at within that. Raises ValueError where they contradict.

    `single_put_bytes`: up to here a file is one PUT. `part_bytes`: sent parts, larger in files that would have too
    many. `min_copy_bytes`: a shorter run of the base is sent rather than copied. `copy_part_bytes`: copied parts.
    `send_copy_bytes`: an object up to here gets another key by sending its bytes (`copying`).
    """

    single_put_bytes: int = 16 << 20
    part_bytes: int = 8 << 20
    min_copy_bytes: int = 8 << 20
    copy_part_bytes: int = 1 << 30
    send_copy_bytes: int = 256 << 10
    min_part_bytes: int = MIN_PART_BYTES
    max_part_bytes: int = MAX_PART_BYTES
    max_parts: int = MAX_PARTS
    max_copy_bytes: int = MAX_COPY_BYTES
    max_put_bytes: int = MAX_PUT_BYTES
    max_object_bytes: int = MAX_OBJECT_BYTES

    def __post_init__(self) -> None:
        if not (
            0 < self.min_part_bytes <= self.part_bytes <= self.max_part_bytes - self.min_part_bytes
            and self.min_part_bytes <= self.min_copy_bytes
            and self.min_part_bytes <= self.copy_part_bytes <= self.max_copy_bytes - self.min_part_bytes
            and 0 <= self.single_put_bytes <= self.max_put_bytes
        ):
            raise ValueError(f"contradictory upload limits: {self}")


@dataclass(frozen=True, slots=True)
class SinglePut:
    """Send the whole file in one request."""


@dataclass(frozen=True, slots=True)
class CopyPart:
    """The server copies [start, stop) of the base, or what is parked of it, to the same offsets."""

    start: int
    stop: int
    parked: Parked | None = None


@dataclass(frozen=True, slots=True)
class SendPart:
    """We send [start, stop) of the new version."""

    start: int
    stop: int


Part: TypeAlias = CopyPart | SendPart


@dataclass(frozen=True, slots=True)
class Multipart:
    """Make the file of parts that follow each other without a gap; at least one."""

    parts: tuple[Part, ...]


Plan: TypeAlias = SinglePut | Multipart
Run: TypeAlias = "tuple[int, int, Parked | None]"

DEFAULT_LIMITS = Limits()


def plan_upload(pieces: Sequence[Piece], size: int, limits: Limits = DEFAULT_LIMITS, *, copy_base: bool = True) -> Plan:
    """How to upload `size` bytes made of `pieces` (`layers.resolve` over the whole file).

    What is parked is copied as the base is; `copy_base` says whether the server can still copy from the base object.
    Holes are sent. Each dirty run costs at most `min_copy_bytes + min_part_bytes` of base bytes sent with it, unless
    parts had to grow to fit `max_parts`.
    Raises OSError(EFBIG) where no plan fits the limits.
    """
    if size > limits.max_object_bytes:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    wanted = (BASE, PARKED) if copy_base else (PARKED,)
    runs = [(piece.start, piece.stop, piece.parked) for piece in pieces if piece.source in wanted]
    if size <= limits.single_put_bytes:
        copies = list(_copies(runs, limits.min_part_bytes, limits.min_copy_bytes))
        # Three requests more than one PUT: worth it where they spare half the bytes.
        if not copies or 2 * sum(stop - start for start, stop, _ in copies) < size:
            return SinglePut()
    changed = size - sum(stop - start for start, stop, _ in runs)
    for part_bytes in _part_sizes(changed, limits):
        parts = _parts(runs, size, limits, part_bytes)
        if len(parts) <= limits.max_parts:
            return Multipart(tuple(parts))
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def _part_sizes(changed_bytes: int, limits: Limits) -> Iterator[int]:
    """Sizes of sent parts to try, smallest first. A split may add `min_part_bytes` to the last part of a range."""
    largest = limits.max_part_bytes - limits.min_part_bytes
    part_bytes = max(limits.part_bytes, -(-changed_bytes // limits.max_parts))
    while part_bytes < largest:
        yield part_bytes
        part_bytes *= 2
    yield largest


def _parts(runs: Sequence[Run], size: int, limits: Limits, part_bytes: int) -> list[Part]:
    smallest = limits.min_part_bytes
    # Parts that had to grow leave no room for many small copies either.
    scale = -(-part_bytes // limits.part_bytes)
    copy_bytes = min(max(limits.copy_part_bytes, part_bytes), limits.max_copy_bytes - smallest)
    parts: list[Part] = []
    done = 0
    for start, stop, parked in [*_copies(runs, smallest, limits.min_copy_bytes * scale), (size, size, None)]:
        parts += [SendPart(*cut) for cut in _split(done, start, part_bytes, smallest if start < size else 0)]
        parts += [CopyPart(*cut, parked) for cut in _split(start, stop, copy_bytes, smallest if stop < size else 0)]
        done = stop
    return parts


def _copies(runs: Sequence[Run], min_part_bytes: int, min_copy_bytes: int) -> Iterator[Run]:
    """The runs to copy; one that follows a range too short for a part of its own gives it its first bytes."""
    done = 0
    for start, stop, parked in runs:
        first = start if start == done else max(start, done + min_part_bytes)
        if stop - first >= min_copy_bytes:
            yield first, stop, parked
            done = stop


def _split(start: int, stop: int, step: int, min_last_bytes: int) -> Iterator[tuple[int, int]]:
    """Cuts [start, stop) every `step` bytes; a last cut shorter than `min_last_bytes` joins the one before."""
    while stop - start > step and stop - start - step >= min_last_bytes:
        yield start, start + step
        start += step
    if start < stop:
        yield start, stop
