"""What a journal that is damaged still proves of its files, and what it does not.

A row with another checksum than it was recorded with is wrong: even its name may be. Where any row is wrong, or the
journal has lost its end, a file is taken to be whole only if its seal fits (see `journal.seals`): else its rows may be
those of a moment when it was half written. Where a damaged log hides newer pages of the database only in part, rows
are of different moments: then a deletion is not proven either, since the file that took the place may be missing.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, NamedTuple

from s3fuse.journal.seals import of_file, of_layer, of_segment, total
from s3fuse.writing.layers import ENDLESS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from s3fuse.writing.journal import Journal
    from s3fuse.writing.overlay import Overlay
    from s3fuse.writing.rows import FoundNode, NodeRow, StagedLayer

#: Why a file is not proven to be whole.
UNPROVEN = "the journal was damaged and does not prove that all of it is there"


class Proof(NamedTuple):
    """`damage` says what is wrong with the journal, "" where nothing is known to be.

    `wrong` rows are not to be carried out. `unproven` has the numbers of files that must not be uploaded.
    """

    damage: str = ""
    wrong: Sequence[NodeRow] = ()
    unproven: frozenset[int] = frozenset()


def prove(journal: Journal, staging: Path) -> Proof:
    """What is to be thought of a journal. Raises sqlite3.DatabaseError, ValueError where it cannot be read."""
    nodes, layers, overlays = journal.found_nodes(), journal.layers(), journal.found_overlays()
    suspicious = {number for number, of_one in layers.items() if not all(staged.is_right for staged in of_one)}
    suspicious.update(number for number, (_, is_right) in overlays.items() if not is_right)
    suspicious.update(journal.strays())
    wrong = [found.row for found in nodes if not found.is_right]
    if not journal.lost and not wrong and not suspicious:
        return Proof()
    damage = journal.lost or "rows of the journal are not what was recorded"
    if not wrong and not suspicious and journal.rebooted:
        return Proof(damage)  # a power failure, where something was promised: see `power`
    right = [found for found in nodes if found.is_right]
    if wrong or suspicious or journal.is_mixed:
        unfounded = list(_unfounded(found.row for found in right))
        wrong += unfounded
        right = [found for found in right if found.row not in unfounded]
    unproven = {
        found.row.number
        for found in right
        if found.row.number in suspicious
        or not _is_whole(found, layers.get(found.row.number, ()), overlays.get(found.row.number), staging)
    }
    return Proof(damage, wrong, frozenset(unproven))


def _unfounded(rows: Iterable[NodeRow]) -> Iterable[NodeRow]:
    """Rows that are right each by itself, but depend on others: deletions, and the second one for a name."""
    seen: set[str] = set()
    for row in rows:
        if row.key is None or row.key in seen:
            yield row
        else:
            seen.add(row.key)


def _is_whole(
    found: FoundNode, layers: Sequence[StagedLayer], overlay: tuple[Overlay, bool] | None, staging: Path
) -> bool:
    row = found.row
    if row.key is None or not stat.S_ISREG(row.mode):
        return True
    sealed = of_file([_part(staged) for staged in layers], None if overlay is None else overlay[0].checksum(row.number))
    return found.seal == sealed and not any(_is_longer(row.number, staged, staging) for staged in layers)


def _part(staged: StagedLayer) -> int:
    layer = staged.layer
    segments = total(of_segment(segment.start, segment.stop, segment.crc) for segment in staged.segments)
    return of_layer(layer.generation, layer.size_bytes, layer.below_bytes, staged.token, layer.poisoned, segments)


def _is_longer(number: int, staged: StagedLayer, staging: Path) -> bool:
    """Whether there are staged bytes behind the last one that the journal knows of."""
    if staged.slot is not None:  # others use what is behind it
        return False
    try:
        return (staging / f"{number}.{staged.layer.generation}").stat().st_size > staged.layer.extents.end
    except FileNotFoundError:
        return False


def held(staged: StagedLayer) -> StagedLayer:
    """A layer of a file that is not proven to be whole."""
    staged.layer.poison(0, ENDLESS)
    return staged._replace(reason=UNPROVEN)


def list_lost(rows: Iterable[NodeRow], layers: Mapping[int, Sequence[StagedLayer]]) -> str:
    """What is known of wrong rows: one line for what it was to become, and one for each range of staged bytes."""
    lines = []
    for row in rows:
        what = f"deletion of {row.remote_key!r}" if row.key is None else repr(row.key)
        lines.append(f"{what}: {row.size} bytes")
        for staged in layers.get(row.number, ()):
            place = f"{row.number}.{staged.layer.generation}" if staged.slot is None else f"slab, slot {staged.slot}"
            lines += [f"  bytes {segment.start} to {segment.stop} in {place}" for segment in staged.segments]
    return "".join(f"{line}\n" for line in lines)
