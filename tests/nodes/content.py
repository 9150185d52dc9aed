"""What nodes write: records that carry their writer and number, so that every byte says where it is from; pure.

A file is one whole record and any number of appended ones. Each has a head of 64 bytes and a filler made of its id; an
appended one names the record that it came after, so that an append laid over another version is seen.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import NamedTuple

HEAD_BYTES = 64
_HEAD = re.compile(rb"([wa]) (\d{4}) (\d{10}) (\d{10}) (\d{4}) (\d{10}) +\n")


class Id(NamedTuple):
    """A write: the node that did it, and which of its writes that was."""

    node: int
    number: int

    def __str__(self) -> str:
        return f"{self.node}:{self.number}"


NOBODY = Id(0, 0)


@dataclass(frozen=True, slots=True)
class Record:
    """One write as it is in a file. `base` is the last record before it, NOBODY where it is whole."""

    id: Id
    base: Id
    length: int


class Mixed(Exception):
    """Bytes that nobody wrote so."""


def record(id: Id, base: Id, length: int) -> bytes:
    """The bytes of a write; appended unless `base` is NOBODY."""
    kind = b"w" if base == NOBODY else b"a"
    head = b"%b %04d %010d %010d %04d %010d" % (kind, id.node, id.number, length, base.node, base.number)
    return head.ljust(HEAD_BYTES - 1) + b"\n" + filler(id, length)


def filler(id: Id, length: int) -> bytes:
    block = hashlib.sha256(b"%d %d" % id).digest()
    return (block * (length // len(block) + 1))[:length]


def parse(data: bytes) -> list[Record]:
    """The records of a file, in order. Raises Mixed with the place and the reason where it is none."""
    records: list[Record] = []
    at = 0
    while at < len(data):
        match = _HEAD.fullmatch(data[at : at + HEAD_BYTES])
        if match is None:
            raise Mixed(f"no head at {at} of {len(data)} bytes, after {_last(records)}: {data[at : at + 24]!r}")
        kind, *numbers = match.groups()
        node, number, length, base_node, base_number = map(int, numbers)
        one = Record(Id(node, number), Id(base_node, base_number), length)
        if (kind == b"w") != (at == 0):
            raise Mixed(f"{one.id} at {at} is {'whole' if kind == b'w' else 'an append'}, after {_last(records)}")
        if records and one.base != records[-1].id:
            raise Mixed(f"{one.id} at {at} was appended to {one.base}, and is behind {_last(records)}")
        body = data[at + HEAD_BYTES : at + HEAD_BYTES + length]
        if body != filler(one.id, length):
            same = _common(body, filler(one.id, length))
            inside = ", ".join(map(str, sorted(ids_in(body)))) or "no head"
            zeros = body.count(0, same)
            told = f"{len(body) - same} others, {zeros} of them zero, with {inside}"
            raise Mixed(f"{one.id} at {at} of {len(data)} has {same} of {length} bytes as written, then {told}")
        records.append(one)
        at += HEAD_BYTES + length
    return records


def _common(one: bytes, other: bytes) -> int:
    return next((at for at, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), len(one))


def _last(records: list[Record]) -> str:
    return str(records[-1].id) if records else "nothing"


def ids_in(data: bytes) -> set[Id]:
    """The writes whose heads are anywhere in the bytes, also where these are mixed."""
    return {Id(int(found[2]), int(found[3])) for found in _HEAD.finditer(data)}
