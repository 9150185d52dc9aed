"""Everything that a mount has in memory, journal, session and bucket, as values that can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s3fuse.namespace.inodes import Inode, Listing
from s3fuse.session.log import read
from s3fuse.session.state import replay

if TYPE_CHECKING:
    from s3fuse.namespace.changes import Changes
    from s3fuse.writing.dirty import DirtyFile
    from tests.engine.rig import Bench, Rig

TABLES = ("node", "layer", "segment", "upload", "overlay", "parked", "temporary", "late", "refusal", "step")
#: What is no value, or says only when and how often something was looked at.
_LEFT_OUT = {
    "children",
    "known",
    "parent",
    "data",
    "listing",
    "valid_until",
    "synced_at",
    "lookups",
    "outdated",
    "asked_at",
    "_remote",
}


def _data(data: DirtyFile | None) -> Any:
    if data is None or not data.layers:
        return None  # an empty one is the same as none
    layers = [(layer.generation, list(layer.extents), layer.below_bytes, layer.size_bytes) for layer in data.layers]
    segments = {generation: list(found) for generation, found in data._segments.items()}
    places = (dict(data._places._slots), dict(data._rows._homes), sorted(data._unchecked))
    return layers, segments, places, list(data.tokens), data.base_bytes, data.frozen


def _inode(inode: Inode) -> dict[str, Any]:
    found = {name: getattr(inode, name) for name in Inode.__slots__ if name not in _LEFT_OUT}
    found["parent"] = inode.parent.number if inode.parent is not None else None
    found["children"] = {name: child.number for name, child in inode.children.items()}
    found["data"] = _data(inode.data)
    found["remote"] = None if inode.remote is None else (inode.remote.key, inode.remote.etag, inode.remote.size_bytes)
    if inode.listing is not None:
        found["listing"] = {name: getattr(inode.listing, name) for name in Listing.__slots__ if name != "valid_until"}
        found["listing"]["absent"] = dict(inode.listing.absent)
    return found


def _numbers(inodes: dict[str, Inode]) -> dict[str, int]:
    return {key: inode.number for key, inode in inodes.items()}


def _queue(changes: Changes) -> set[int]:
    """The inodes whose time will come."""
    entries = [*changes._settling, *((due, order, inode) for due, order, inode in changes._timed)]
    return {inode.number for _, order, inode in entries if changes._entry.get(inode.number, (-1, 0.0))[0] == order}


def memory(rig: Rig) -> dict[str, Any]:
    core = rig.core
    displaced, staging, ledger = core.inodes.displaced, core.staging, core.staging.ledger
    return {
        "inodes": {number: _inode(inode) for number, inode in core.inodes.table.items()},
        "displaced": _numbers(displaced),
        "others": {key: [inode.number for inode in some] for key, some in displaced._others.items() if some},
        "below": dict(+displaced._below),
        "left": set(displaced._left),
        "dirty": set(core.changes.dirty),
        "queue": _queue(core.changes),
        "steps": dict(core.known.steps),
        "handles": {number: handle.inode.number for number, handle in rig.files.handles.items()},
        "staged": (staging.staged_bytes, ledger.held_bytes - ledger.idle_bytes, staging.slab.used, rig.staged()),
    }


def journal(rig: Rig) -> dict[str, list[Any]]:
    return {table: rig.journal._db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in TABLES}


def session(rig: Rig) -> dict[str, Any]:
    log = rig.core.known._log
    assert log is not None
    found = replay(read(log.path), rig.journal.step())
    assert found.open_end is None, [kind for kind, _ in read(log.path)][-8:]
    nodes = {number: node._replace(lookups=0) for number, node in found.nodes.items()}
    return {"nodes": nodes, "opened": found.opened, "steps": found.steps}


def everything(rig: Rig, bench: Bench) -> dict[str, Any]:
    return {
        "memory": memory(rig),
        "journal": journal(rig),
        "session": session(rig),
        "bucket": {key: (found.data, found.metadata) for key, found in bench.store._objects.items()},
    }


def outcome(rig: Rig) -> dict[str, Any]:
    """What of it does not depend on when it came about: names with what they stand for, in each of the three."""
    core, log = rig.core, rig.core.known._log
    assert log is not None
    tree = {core.inodes.key(inode): inode for inode in core.inodes.walk(core.inodes.root)}
    nodes = replay(read(log.path), rig.journal.step()).nodes
    return {
        "tree": {key: (inode.mode, inode.size, inode.uid, dict(inode.xattrs)) for key, inode in tree.items()},
        "unlinked": sorted(inode.opens for inode in core.inodes.table.values() if not inode.linked),
        "journal": sorted((str(row.key), row.mode, row.size, row.xattrs, row.uid) for row in rig.journal.nodes()),
        "session": sorted((node.name, node.mode, node.size, node.uid, node.flags) for node in nodes.values()),
    }


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Where two states differ, for people."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: list[str] = []
        for key in sorted(before.keys() | after.keys(), key=str):
            found += differences(before.get(key, "nothing"), after.get(key, "nothing"), f"{where}/{key}")
        return found
    return [] if before == after else [f"{where}: {before!r} is now {after!r}"]
