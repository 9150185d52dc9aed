"""Puts the inodes of a session back, before the journal puts those on top that are not in the bucket yet.

Nothing is asked for here: an inode keeps its number, its name and the version that it was, and what else there is to
know of it the bucket tells when somebody wants it.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from s3fuse.attrs import Attributes
from s3fuse.namespace.inodes import ROOT
from s3fuse.session.records import IN_BUCKET, INCOMPLETE, LINKED
from s3fuse.store.base import ObjectInfo

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode, Inodes
    from s3fuse.namespace.known import Known
    from s3fuse.session.records import Node
    from s3fuse.session.state import State


def revive(inodes: Inodes, known: Known, state: State) -> None:
    """Makes every inode of the session that is still in use. `recover` comes next."""
    inodes.reserve(state.highest_number)
    nodes = state.known()
    keys: dict[int, str] = {ROOT: inodes.prefix}
    if ROOT in nodes:
        inodes.root.lookups = state.lookups[ROOT]
    for node in nodes.values():
        missing = []
        step: Node | None = node
        while step is not None and step.number not in inodes.table:
            missing.append(step)
            step = nodes.get(step.parent) if step.flags & LINKED else None
        for found in reversed(missing):
            inode = _revive(inodes, found, keys)
            inode.lookups = state.lookups[found.number]
            inode.known = known
    inodes.root.known = known if ROOT in nodes else None
    for opened in state.opened.values():
        inode = inodes.table[opened.number]
        inode.opens += 1
        inode.writers += opened.writes


def _revive(inodes: Inodes, node: Node, keys: dict[int, str]) -> Inode:
    attributes = Attributes(
        node.mode, node.uid, node.gid, node.atime_ns, node.mtime_ns, node.ctime_ns, node.rdev, {}, None
    )
    parent = inodes.table.get(node.parent)
    if node.flags & LINKED and parent is not None and parent.linked and parent.is_directory:
        if node.name in parent.children:
            inodes.unlink(parent.children[node.name])
        inode = inodes.add(parent, node.name, attributes, node.number)
        key = keys[parent.number] + node.name if parent.number in keys else inodes.key(inode)
        if stat.S_ISDIR(node.mode):
            key = inodes.key(inode)
            keys[node.number] = key
    else:
        inode = inodes.add_orphan(attributes, node.number)
        inode.name, key = node.name, node.key
    inode.size = node.size
    inode.attributes_known = not node.flags & INCOMPLETE
    inode.outdated = inode.linked
    if node.flags & IN_BUCKET and key:
        inode.remote = ObjectInfo(key, node.size, node.etag, 0)
    return inode
