"""What a mount must look like: a POSIX tree in a dictionary, and its comparison with a mount and with a bucket."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from s3fuse import attrs
from s3fuse.store.s3markers import SIDECARS

if TYPE_CHECKING:
    from tests.engine.rig import Bench, Rig

DEFAULTS = attrs.Defaults(0, 0, 0o644, 0o755)


def fail(code: int, path: str) -> NoReturn:
    raise OSError(code, os.strerror(code), path)


@dataclass(eq=False)
class Node:
    """A file of any type. `mtime_ns` is known only after utimens."""

    mode: int
    data: bytes = b""
    mtime_ns: int | None = None
    xattrs: dict[str, bytes] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)


class Tree:
    """Paths and nodes; each operation raises what the kernel and a filesystem raise together."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {"": Node(stat.S_IFDIR | 0o755)}

    def at(self, path: str) -> Node:
        self._parent(path)
        return self.nodes[path] if path in self.nodes else fail(errno.ENOENT, path)

    def _parent(self, path: str) -> None:
        steps = path.split("/")[:-1]
        for count in range(1, len(steps) + 1):
            above = self.nodes.get("/".join(steps[:count]))
            if above is None:
                fail(errno.ENOENT, path)
            if not above.is_directory:
                fail(errno.ENOTDIR, path)

    def below(self, path: str) -> list[str]:
        return [other for other in self.nodes if other.startswith(f"{path}/" if path else "") and other != path]

    def make(self, path: str, node: Node) -> Node:
        self._parent(path)
        if path in self.nodes:
            fail(errno.EEXIST, path)
        self.nodes[path] = node
        return node

    def file(self, path: str) -> Node:
        node = self.at(path)
        if node.is_directory:
            fail(errno.EISDIR, path)
        return node

    def unlink(self, path: str) -> None:
        self.file(path)
        del self.nodes[path]

    def rmdir(self, path: str) -> None:
        if not self.at(path).is_directory:
            fail(errno.ENOTDIR, path)
        if self.below(path):
            fail(errno.ENOTEMPTY, path)
        del self.nodes[path]

    def rename(self, old: str, new: str) -> None:
        self._parent(old)
        self._parent(new)
        node = self.at(old)
        if node.is_directory and new.startswith(f"{old}/"):
            fail(errno.EINVAL, new)
        there = self.nodes.get(new)
        if there is node:
            return
        if there is not None:
            if there.is_directory != node.is_directory:
                fail(errno.EISDIR if there.is_directory else errno.ENOTDIR, new)
            if self.below(new):
                fail(errno.ENOTEMPTY, new)
        moved = {new + path[len(old) :]: self.nodes.pop(path) for path in [old, *self.below(old)]}
        self.nodes.update(moved)

    # -- comparison

    async def check_mount(self, rig: Rig) -> None:
        """The mount shows exactly this tree, with these bytes."""
        todo = [""]
        seen = {""}
        while todo:
            path = todo.pop()
            for name in await rig.ls(path):
                child = f"{path}/{name}".lstrip("/")
                assert child in self.nodes, f"{child} is there and should not be"
                seen.add(child)
                await self._check_node(rig, child, self.nodes[child])
                if self.nodes[child].is_directory:
                    todo.append(child)
        assert seen == set(self.nodes), f"{set(self.nodes) - seen} are missing"

    async def _check_node(self, rig: Rig, path: str, node: Node) -> None:
        inode = await rig.walk(path)
        await rig.attributes.getattr(inode)
        assert oct(inode.mode) == oct(node.mode), path
        assert node.mtime_ns is None or inode.mtime_ns == node.mtime_ns, path
        assert inode.xattrs == node.xattrs, path
        if node.is_regular:
            assert inode.size == len(node.data), path
            assert await rig.cat(path) == node.data, path
        elif stat.S_ISLNK(node.mode):
            assert await rig.attributes.readlink(inode) == node.data, path

    def check_bucket(self, bench: Bench) -> None:
        """The bucket holds exactly this tree; a directory that holds something may lack its marker."""
        found = dict(bench.store._objects)
        marker_metadata = {key: entry.metadata for key, entry in found.items()}
        for key in [key for key in found if key.startswith(SIDECARS)]:
            marker = key.removeprefix(SIDECARS) + "/"
            assert marker in found, f"{key} is left over in the bucket"
            marker_metadata[marker] = found.pop(key).metadata
        wanted = {f"{path}/" if node.is_directory else path: node for path, node in self.nodes.items() if path}
        optional = {key for key in wanted if key.endswith("/") and any(o.startswith(key) and o != key for o in wanted)}
        assert set(found) - set(wanted) == set(), "left over in the bucket"
        assert set(wanted) - set(found) <= optional, "missing in the bucket"
        for key, node in wanted.items():
            if key not in found:
                continue
            entry = found[key]
            assert entry.data == (b"" if node.is_directory else node.data), key
            decoded = attrs.decode(
                marker_metadata[key], is_directory=node.is_directory, modified_ns=0, defaults=DEFAULTS
            )
            assert oct(decoded.mode) == oct(node.mode), key
            assert dict(decoded.xattrs) == node.xattrs, key
            assert node.mtime_ns is None or decoded.mtime_ns == node.mtime_ns, key
