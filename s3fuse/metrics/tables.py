"""How many entries each table of a mount has in memory: all that grows with what is done on it.

Each has an owner that empties it. When nothing is in a bucket and nobody has anything open, all are 0 after a while
(the root is not counted): `inodes` and `unused` a minute and the TTL after the last use, `deleted` and `leaving` after
5 minutes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from s3fuse.namespace.inodes import ROOT

if TYPE_CHECKING:
    from s3fuse.vfs.core import Core


def tables(core: Core) -> dict[str, int]:
    """Entries by table, without what is limited from the beginning (cached blocks, the records of the disk tier)."""
    inodes, changes, syncer, staging = core.inodes, core.changes, core.syncer, core.staging
    return {
        "inodes": len(inodes.table) - 1,
        "unused": len(inodes.unused),
        "claimed": len(inodes.claimed),
        "displaced": len(inodes.displaced),
        "leaving": inodes.displaced.leaving,
        "deleted": len(inodes.deleted_at),
        "left_out": len(core.directories.hidden) + len(core.directories.unreadable),
        "dirty": len(changes.dirty),
        "in_flight": len(changes.in_flight),
        "queued": changes.queued,
        "waiting": changes.waiting,
        "retries": len(changes.retries),
        "parking": len(syncer.parking.wanted),
        "uploads": len(syncer.uploads.running) + len(syncer.uploads.left),
        "upload_ids": syncer.uploads.known_ids,
        "handles": len(core.budget.handles),
        "open_staging": len(staging.open_files),
        "surplus": len(staging.surplus),
        "slots": staging.slab.used,
        "steps": len(core.known.steps) - (ROOT in core.known.steps),
        "session_handles": len(core.known.opened),
    }
