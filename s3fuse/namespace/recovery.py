"""Rebuilds the tree's dirty part from the journal when a cache directory is mounted again."""

from __future__ import annotations

import logging
import secrets
import sqlite3
import stat
import time
from typing import TYPE_CHECKING

from s3fuse import attrs, keys
from s3fuse.attrs import Attributes
from s3fuse.namespace.lateness import DELETE
from s3fuse.store.base import ObjectInfo
from s3fuse.writing.database import unreadable
from s3fuse.writing.dirty import DirtyFile
from s3fuse.writing.power import what_is_left
from s3fuse.writing.proof import UNPROVEN, list_lost, prove
from s3fuse.writing.rows import OF_NO_FILE, NodeRow, StagedLayer, decode_map, decode_xattrs
from s3fuse.writing.staging import reader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from s3fuse.namespace.changes import Changes
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.writing.journal import Journal
    from s3fuse.writing.leftovers import Uploads
    from s3fuse.writing.proof import Proof
    from s3fuse.writing.staging import Staging

log = logging.getLogger(__name__)

#: What folders begin with that hold staged bytes which a damaged journal may have forgotten.
LOST = "lost-"
#: What is known in such a folder of what the journal has wrong.
NAMES = "names"


def recover(inodes: Inodes, changes: Changes, staging: Staging, defaults: attrs.Defaults) -> int:
    """Puts every journaled inode back in its place, dirty and queued; gives how many there are.

    Inodes that are there already are those of a session that goes on. A file whose staging was damaged stays in the
    journal and fails with its reason, never silently.
    """
    kept = [inode for inode in inodes.table.values() if inode.opens and not inode.linked]
    try:
        proof = prove(changes.journal, staging.directory)
        folder = _keep_what_is_lost(changes.journal, proof)
        rows = changes.journal.nodes()
        changes.journal.drop_layers_without_node(inode.number for inode in kept)
        layers = changes.journal.layers()
        if changes.journal.rebooted:
            layers = after_power_failure(layers, staging.directory)
            _record(layers, changes.journal)
    except (sqlite3.DatabaseError, ValueError) as error:
        raise unreadable(changes.journal.directory, error) from error
    named = ((number, staged) for number, of_file in layers.items() for staged in of_file)
    staging.begin(named, folder)
    inodes.reserve(max((row.number for row in rows), default=0))
    late: list[tuple[str, int]] = []
    for row in rows:
        inode = _place(inodes, row, defaults)
        _restore(inode, row, staging, layers.get(row.number, []))
        if row.number in proof.unproven:
            _hold(inode, staging)
        inodes.displace_if_moved(inode)
        key = inodes.object_key(inode)
        inode.version += 1
        changes.dirty[inode.number] = inode
        if row.maybe_at is not None and (row.maybe_at != key or not inode.linked):
            inode.maybe_at = row.maybe_at
            changes.doubt(inode)
        if inode.linked and inode.maybe_at is None and (inode.remote is None or inode.remote.key != key):
            inode.maybe_at = key
        late += may_come(row, is_staged=row.number in layers)
        if not inode.writers:
            changes.queue(inode)
    for inode in kept:
        if inode.number not in changes.dirty:
            _restore_data(inode, staging, layers.get(inode.number, []))
    changes.journal.note_recovered()
    changes.late.expect(late)
    inodes.leave_what_is_not_there()
    if rows:
        log.info("the journal holds %d changes that are not in the bucket yet", len(rows))
    return len(rows)


def may_come(row: NodeRow, *, is_staged: bool) -> Iterator[tuple[str, int]]:
    """What a process that had this row in its journal may have sent and not heard of (see `Lateness.expect`).

    A write over the object that is there has a condition that a delete of that object breaks: only markers have none.
    """
    marker = stat.S_ISDIR(row.mode)
    if row.key is not None and (marker or row.key != row.remote_key):
        is_copy = row.remote_key is not None and not is_staged
        yield row.key, -row.number if marker or is_copy else row.number
    if row.maybe_at not in (None, row.key):
        yield row.maybe_at, -row.number
    if row.key is None and row.remote_key is not None:
        yield row.remote_key, DELETE
        if marker or not row.remote_etag:
            yield row.remote_key, -row.number


def after_power_failure(layers: Mapping[int, list[StagedLayer]], staging: Path) -> dict[int, list[StagedLayer]]:
    """What is left of the layers in a folder of staged bytes; a log line says where something is not."""
    left: dict[int, list[StagedLayer]] = {}
    for number, of_file in layers.items():
        left[number] = [what_is_left(staged, reader(staging, number, staged)) for staged in of_file]
        before, after = (sum(one.layer.extents.total_bytes for one in some) for some in (of_file, left[number]))
        if before != after:
            log.warning("%d bytes of inode %d were not synced and are lost since the boot", before - after, number)
    return left


def _record(layers: Mapping[int, list[StagedLayer]], journal: Journal) -> None:
    with journal.transaction():
        for number, of_file in layers.items():
            for at, staged in enumerate(of_file):
                of_file[at] = staged._replace(home=journal.replace_layer(staged, number))
        journal.note_boot()


def _keep_what_is_lost(journal: Journal, proof: Proof) -> Path | None:
    """Makes the folder for staged bytes that a damaged journal may have forgotten; None where it is whole.

    What is wrong in the journal goes from it, and what is known of that is in the folder. Objects that were parked are
    neither used nor deleted, unless a file that is known has them: nobody else may have their bytes.
    """
    if not proof.damage:
        return None
    folder = journal.directory / f"{LOST}{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(2)}"
    folder.mkdir(mode=0o700)
    log.error(
        "%s; what was staged and is not known any more is kept in %s, see s3fuse cache list", proof.damage, folder
    )
    wrong = {row.number for row in proof.wrong}
    needed = {key for number, found in journal.overlays().items() if number not in wrong for key in found.objects()}
    left = [(key, number) for key, number, _ in journal.temporaries() if key not in needed]
    text = list_lost(proof.wrong, journal.layers())
    text += "".join(f"object {key} has bytes of inode {number}\n" for key, number in left)
    (folder / NAMES).write_text(text)
    with journal.transaction():
        for row in proof.wrong:
            log.error("the change of %r is not carried out, since the journal was damaged", row.key or row.remote_key)
            journal.drop_node(row.number)
        for key, _ in left:
            journal.drop_temporary(key)
    return folder


def _hold(inode: Inode, staging: Staging) -> None:
    """Keeps a file that may be half written where it is, out of the bucket."""
    if inode.data is None:
        inode.data = DirtyFile(staging, inode.number, inode.remote.size_bytes if inode.remote is not None else 0)
    inode.data.hold(UNPROVEN)
    inode.error = inode.data.poisoned_text()
    log.error("%s: %s", inode.name or inode.number, inode.error)


def lost_folders(directory: Path) -> list[str]:
    """Where in a cache directory such bytes are kept."""
    return sorted(str(path) for path in directory.glob(f"{LOST}*"))


def rewrite(changes: Changes, uploads: Uploads) -> None:
    """Puts everything that `recover` would need into an empty journal."""
    for inode in changes.dirty.values():
        changes.put_row(inode)
        if inode.error is not None:
            changes.journal.put_refusal(inode.number, inode.error)
    for inode in changes.inodes.table.values():  # also what is unlinked and open
        if inode.data is not None:
            inode.data.journal_again()
    for upload in (*uploads.left.values(), *uploads.running.values()):
        changes.journal.put_upload(upload)
    for key, token in changes.temporaries.items():
        changes.journal.put_temporary(OF_NO_FILE, key, token)
    changes.late.journal_again()


def _place(inodes: Inodes, row: NodeRow, defaults: attrs.Defaults) -> Inode:
    attributes = Attributes(
        row.mode,
        row.uid,
        row.gid,
        row.atime_ns,
        row.mtime_ns,
        row.ctime_ns,
        row.rdev,
        decode_xattrs(row.xattrs),
        row.target,
    )
    there = inodes.table.get(row.number)
    if there is not None and there is not inodes.root:
        return _place_known(inodes, there, row, attributes, defaults)
    if row.key is None:
        return inodes.add_orphan(attributes, row.number)
    names = row.key[len(inodes.prefix) :].rstrip("/").split("/")
    if names == [""] or row.key == keys.ROOT_MARKER:
        inodes.root.learned(attributes)
        return inodes.root
    parent = _parent(inodes, names, defaults)
    there = parent.children.get(names[-1])
    if there is not None:  # made above as the parent of another row: this row knows its attributes
        inodes.unlink(there)
        inode = inodes.add(parent, names[-1], attributes, row.number)
        for child in list(there.children.values()):
            inodes.move(child, inode, child.name)
        inodes.drop_if_unused(there)
        return inode
    return inodes.add(parent, names[-1], attributes, row.number)


def _parent(inodes: Inodes, names: list[str], defaults: attrs.Defaults) -> Inode:
    parent = inodes.root
    for name in names[:-1]:
        parent = parent.children.get(name) or _unverified(inodes, parent, name, defaults)
    return parent


def _place_known(inodes: Inodes, inode: Inode, row: NodeRow, attributes: Attributes, defaults: attrs.Defaults) -> Inode:
    """Gives an inode of the session what the journal knows better."""
    inode.learned(attributes)
    if row.key is None:
        inodes.unlink(inode)
    elif not inode.linked or inodes.object_key(inode) != row.key:
        names = row.key[len(inodes.prefix) :].rstrip("/").split("/")
        parent = _parent(inodes, names, defaults)
        if names[-1] in parent.children:
            inodes.unlink(parent.children[names[-1]])
        inodes.move(inode, parent, names[-1])
    return inode


def _unverified(inodes: Inodes, parent: Inode, name: str, defaults: attrs.Defaults) -> Inode:
    attributes = attrs.decode(None, is_directory=True, modified_ns=time.time_ns(), defaults=defaults)
    inode = inodes.add(parent, name, attributes)
    inode.attributes_known = False
    return inode


def _restore(inode: Inode, row: NodeRow, staging: Staging, layers: list[StagedLayer]) -> None:
    inode.size, inode.token = row.size, row.token
    inode.remote = None
    if row.remote_key is not None and row.remote_etag is not None:
        inode.remote = ObjectInfo(
            row.remote_key,
            row.remote_size or 0,
            row.remote_etag,
            0,
            decode_map(row.remote_metadata),
            decode_map(row.remote_headers),
        )
        inode.doubtful = bool(row.remote_etag)
    _restore_data(inode, staging, layers)


def _restore_data(inode: Inode, staging: Staging, layers: list[StagedLayer]) -> None:
    if not layers or not inode.is_regular:
        return
    base_bytes = inode.remote.size_bytes if inode.remote is not None else 0
    inode.data = DirtyFile.recovered(staging, inode.number, base_bytes, layers)
    inode.size = inode.data.size
    inode.data.check_lengths()
    inode.data.close()
    if inode.data.damaged:
        inode.error = inode.data.damaged
        log.error("%s: %s; it stays in %s", inode.name or inode.number, inode.error, staging.directory)
