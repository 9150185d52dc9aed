"""What is left of staged bytes after a power failure, in the cache of a mount with `--fsync local`.

The journal's rows and the bytes they name reach the disk in any order, until a sync makes sure of both. So at the
first start after a boot:

* Bytes that were written and not synced since may not be there, although their row is: then they were never written,
  as on a disk.
* Bytes that were synced are there. Where their checksum does not fit they were being overwritten: page by page the
  old or the new ones, as on a disk. That holds only in a file of the layer's own, whose bytes are nobody else's.

With `--fsync upload` nothing was promised of staged bytes: there damage is told, whatever it comes from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from s3fuse.writing.checks import DAMAGED, IN_DOUBT, SYNCED
from s3fuse.writing.extents import Extents
from s3fuse.writing.layers import Layer
from s3fuse.writing.rows import HOMELESS

if TYPE_CHECKING:
    from s3fuse.writing.checks import Read, Segment
    from s3fuse.writing.rows import StagedLayer


def what_is_left(staged: StagedLayer, read: Read) -> StagedLayer:
    """A layer as it is after a power failure; the same one where nothing is missing."""
    kept: list[Segment] = []
    for segment in staged.segments:
        data = read(segment.start, segment.stop)
        if segment.crc == DAMAGED or segment.fits(data):
            kept.append(segment)
        elif segment.synced == SYNCED:
            is_there = staged.slot is None and len(data) == segment.stop - segment.start
            kept.append(segment._replace(crc=IN_DOUBT) if is_there else segment)  # else that is damage
    if kept == staged.segments:
        return staged
    before = staged.layer
    extents = Extents((segment.start, segment.stop) for segment in kept)
    size = max(before.floor_bytes, extents.end)
    layer = Layer(before.generation, extents, before.below_bytes, size, before.poisoned, before.floor_bytes)
    home = staged.home if any(segment.start == staged.home for segment in kept) else HOMELESS
    return staged._replace(layer=layer, segments=kept, home=home)
