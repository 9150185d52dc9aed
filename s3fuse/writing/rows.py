"""What the journal's tables hold, row by row, and how maps become text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from s3fuse.journal.seals import of_row

if TYPE_CHECKING:
    from collections.abc import Mapping

    from s3fuse.writing.checks import Segment
    from s3fuse.writing.layers import Layer

#: `home` of a layer whose row has no segment.
HOMELESS = -1
#: The inode number of temporary objects that hold nothing of a file yet.
OF_NO_FILE = 0


class NodeRow(NamedTuple):
    """One row of `node`; the order of fields is the order of columns."""

    number: int
    key: str | None
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    rdev: int
    xattrs: str
    target: bytes | None
    size: int
    token: str
    remote_key: str | None
    remote_etag: str | None
    remote_size: int | None
    remote_metadata: str | None
    remote_headers: str | None
    maybe_at: str | None

    def checksum(self) -> int:
        """The checksum of all of it."""
        numbers = (*self[0:1], *self[2:9], self.size, self.remote_size)
        texts = (self.key, *self[9:11], *self[12:15], *self[16:])
        return of_row(numbers, texts)


class FoundNode(NamedTuple):
    """A row of `node` as it was read; `is_right`: it is the one that was recorded. `seal`: see `seals`."""

    row: NodeRow
    is_right: bool
    seal: int | None


class StagedLayer(NamedTuple):
    """A layer, the token of its upload, its slot in the slab (None: a staging file of its own), its segments.

    `home` is where the segment starts that the layer's own row has, HOMELESS for none. `reason` says why bytes of
    it are poisoned. `is_right`: its row is the one that was recorded, as far as its checksum says.
    """

    layer: Layer
    token: str
    slot: int | None
    segments: list[Segment]
    home: int = HOMELESS
    reason: str = ""
    is_right: bool = True


class BegunUpload(NamedTuple):
    """A multipart upload of `key`; without an `upload_id` the server's answer had not come."""

    id: int
    key: str
    upload_id: str | None
    begun_ns: int


def encode_map(values: Mapping[str, str] | None) -> str | None:
    return None if values is None else json.dumps(dict(values)) if values else "{}"


def decode_map(text: str | None) -> dict[str, str] | None:
    return None if text is None else {str(k): str(v) for k, v in json.loads(text).items()}


def encode_xattrs(xattrs: Mapping[str, bytes]) -> str:
    return json.dumps({name: value.hex() for name, value in xattrs.items()}) if xattrs else "{}"


def decode_xattrs(text: str) -> dict[str, bytes]:
    return {str(name): bytes.fromhex(value) for name, value in json.loads(text).items()}
