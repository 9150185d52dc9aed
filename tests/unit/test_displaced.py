"""Which inode's object a key holds, where several have left one there."""

from __future__ import annotations

import stat

from hypothesis import given
from hypothesis import strategies as st

from s3fuse.attrs import Attributes
from s3fuse.namespace.displaced import Displaced
from s3fuse.namespace.inodes import Inode
from s3fuse.store.base import ObjectInfo

KEYS = ("f", "d/", "d/f", "d/e/g")
FILE = Attributes(stat.S_IFREG, 0, 0, 0, 0, 0)


def inode(number: int, key: str, etag: str) -> Inode:
    made = Inode(number, None, "", FILE)
    made.remote = ObjectInfo(key, 0, etag, 0)
    return made


def test_what_is_certain_counts_before_what_may_be() -> None:
    displaced = Displaced()
    first, maybe, last = inode(2, "f", "one"), inode(3, "f", ""), inode(4, "f", "two")
    for each in (first, maybe):
        displaced.add(each)
    assert displaced["f"] is first
    displaced.add(last)
    assert displaced["f"] is last
    assert set(displaced.all_at("f")) == {first, maybe, last}
    displaced.settle("f", maybe)
    displaced.settle("f", last)
    assert displaced.all_at("f") == [first]
    displaced.settle("f", first)
    assert displaced.all_at("f") == []


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(["", "one", "two"])), max_size=12), st.randoms())
def test_none_is_forgotten_before_it_settles(made: list[tuple[str, str]], random: object) -> None:
    displaced = Displaced()
    inodes = [inode(number, *where) for number, where in enumerate(made)]
    for each in inodes:
        displaced.add(each)
        displaced.add(each)
    displaced.leave("d/")
    random.shuffle(inodes)  # type: ignore[attr-defined]
    while inodes:
        there = {key: {each for each in inodes if each.remote and each.remote.key == key} for key in KEYS}
        assert {key: set(displaced.all_at(key)) for key in KEYS} == there
        assert displaced.keys() == {key for key in KEYS if there[key]}
        below = there["d/"] | there["d/f"] | there["d/e/g"]
        assert (displaced.left_at("d/") == float("inf")) == bool(below)
        if there["d/"]:
            assert displaced.with_more_below(["d/"]) == ({"d/"} if there["d/f"] or there["d/e/g"] else set())
        assert displaced.files_above("f/x") == (["f"] if there["f"] else [])
        each = inodes.pop()
        assert each.remote is not None
        displaced.settle(each.remote.key, each)
    assert displaced == {}
