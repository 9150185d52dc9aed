"""What the records of a session hold, as bytes. Each states how something is now, so that the last one counts."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

# Kinds of records; 0 is the end of a log.
NODE, COUNTS, OPENED, CLOSED, PLACE, STEP, STEP_END, STEP_UNDONE, VOID_STEP, VOID_OPEN, FACTS = range(1, 12)

# Bits of `Node.flags`.
LINKED, IN_BUCKET, INCOMPLETE = 1, 2, 4

_NODE = struct.Struct("<QQQIIIIBQqqqHHH")
_OPENED = struct.Struct("<QQIIB")
_PLACE = struct.Struct("<QQ")
_STEP = struct.Struct("<QBQQ")
_NUMBER = struct.Struct("<Q")
_COUNT = struct.Struct("<QQ")


class Node(NamedTuple):
    """An inode that the kernel knows. `key` is empty where its place in the tree says it.

    INCOMPLETE: there are attributes beyond these.
    """

    number: int
    parent: int
    lookups: int
    mode: int
    uid: int
    gid: int
    rdev: int
    flags: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    name: str
    etag: str
    key: str


class Opened(NamedTuple):
    """A handle: of which inode, the thread that opened it, with which flags of open(2), and whether it writes."""

    handle: int
    number: int
    pid: int
    flags: int
    writes: bool


class Step(NamedTuple):
    """A request that changes names or extended attributes: the `order`-th one of the session.

    `node` is the inode whose lock the kernel holds for it, `what` its other arguments, `number` the inode it makes.
    """

    order: int
    operation: int
    node: int
    number: int
    what: bytes


def encode_node(node: Node) -> bytes:
    return pack_node(*node)


def pack_node(
    number: int,
    parent: int,
    lookups: int,
    mode: int,
    uid: int,
    gid: int,
    rdev: int,
    flags: int,
    size: int,
    atime_ns: int,
    mtime_ns: int,
    ctime_ns: int,
    name: str,
    etag: str,
    key: str,
) -> bytes:
    """The content of a NODE from the fields of a `Node`: without making one, as each name that is looked up has one."""
    texts = (name + etag + key).encode("utf-8", "surrogateescape")
    if len(texts) == len(name) + len(etag) + len(key):
        lengths = len(name), len(etag), len(key)
    else:
        lengths = tuple(len(text.encode("utf-8", "surrogateescape")) for text in (name, etag, key))  # type: ignore[assignment]
    fixed = _NODE.pack(
        number, parent, lookups, mode, uid, gid, rdev, flags, size, atime_ns, mtime_ns, ctime_ns, *lengths
    )
    return fixed + texts


def decode_node(content: bytes) -> Node:
    fields: list[int]
    *fields, name, etag, _ = _NODE.unpack_from(content)
    texts = content[_NODE.size :].decode("utf-8", "surrogateescape")
    if texts.isascii():
        return Node._make((*fields, texts[:name], texts[name : name + etag], texts[name + etag :]))
    raw = content[_NODE.size :]
    parts = (raw[:name], raw[name : name + etag], raw[name + etag :])
    return Node._make((*fields, *(part.decode("utf-8", "surrogateescape") for part in parts)))


def encode_count(number: int, lookups: int) -> bytes:
    return _COUNT.pack(number, lookups)


def encode_counts(counts: Iterable[int]) -> bytes:
    """`counts` are inode number and lookup count in turn."""
    flat = list(counts)
    return struct.pack(f"<{len(flat)}Q", *flat)


def decode_counts(content: bytes) -> Iterable[tuple[int, int]]:
    return _COUNT.iter_unpack(content)


def encode_opened(opened: Opened) -> bytes:
    return _OPENED.pack(*opened)


def decode_opened(content: bytes) -> Opened:
    *fields, writes = _OPENED.unpack(content)
    return Opened._make((*fields, bool(writes)))


def encode_number(number: int) -> bytes:
    return _NUMBER.pack(number)


def decode_number(content: bytes) -> int:
    return int(_NUMBER.unpack(content)[0])


def encode_place(handle: int, cookie: int, name: str) -> bytes:
    """Entry `cookie` of the open directory is `name`."""
    return _PLACE.pack(handle, cookie) + name.encode("utf-8", "surrogateescape")


def decode_place(content: bytes) -> tuple[int, int, str]:
    handle, cookie = _PLACE.unpack_from(content)
    return handle, cookie, content[_PLACE.size :].decode("utf-8", "surrogateescape")


def encode_step(step: Step) -> bytes:
    return _STEP.pack(*step[:4]) + step.what


def decode_step(content: bytes) -> Step:
    return Step._make((*_STEP.unpack_from(content), content[_STEP.size :]))
