"""The session's log: it counts what is whole, refuses what it does not know, and says the same after any end."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3fuse.errors import UserError
from s3fuse.session import log, operations, records
from s3fuse.session.log import Log, read
from s3fuse.session.records import Node, Opened, Step
from s3fuse.session.state import load, replay

if TYPE_CHECKING:
    from pathlib import Path

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
I64 = st.integers(-(2**63), 2**63 - 1)
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=60)
NODES = st.builds(Node, U64, U64, U64, U32, U32, U32, U32, st.integers(0, 255), U64, I64, I64, I64, NAMES, NAMES, NAMES)


def node(
    number: int, parent: int = 1, lookups: int = 1, *, name: str = "n", linked: bool = True, key: str = ""
) -> Node:
    flags = records.LINKED if linked else 0
    return Node(number, parent, 1, 0o100644, 0, 0, 0, flags, 0, 0, 0, 0, name, "", "")


def noted(found: Node) -> tuple[int, bytes]:
    return records.NODE, records.encode_node(found)


def opened(handle: int, number: int, pid: int = 7) -> tuple[int, bytes]:
    return records.OPENED, records.encode_opened(Opened(handle, number, pid, 0, True))


def step(order: int, what: bytes = b"x") -> tuple[int, bytes]:
    return records.STEP, records.encode_step(Step(order, operations.MKDIR, 1, 9, what))


END = (records.STEP_END, b"")


# -- the log


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    written = Log(tmp_path / "log", new=True)
    content = [(1 + number % 9, os.urandom(number * 37)) for number in range(400)]
    for kind, data in content:
        written.append(kind, data)
    assert list(read(tmp_path / "log")) == content, "also while it is open, as after SIGKILL"
    written.close()
    again = Log(tmp_path / "log", new=False)
    again.append(5, b"more")
    again.close()
    assert list(read(tmp_path / "log")) == [*content, (5, b"more")]


@given(cut=st.integers(0, 40))
def test_a_record_that_was_not_finished_does_not_count(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    written = Log(path, new=True)
    written.append(3, b"whole")
    at = written.used_bytes
    # The kind comes last, so that this is what a kill within a record leaves.
    written._map[at + 1 : at + 1 + cut] = (b"\x20\0\0\0" + b"half" * 10)[:cut]
    assert list(read(path)) == [(3, b"whole")]
    written.close()
    again = Log(path, new=False)
    again.append(4, b"")
    again.close()
    assert list(read(path)) == [(3, b"whole"), (4, b"")]


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Log(tmp_path / "log", new=True).close()
    monkeypatch.setattr(log, "VERSION", log.VERSION + 1)
    with pytest.raises(UserError, match=r"is of another version \(1, this s3fuse knows 2\)"):
        list(read(tmp_path / "log"))


def test_what_could_not_be_kept_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written = Log(tmp_path / "log", new=True)
    monkeypatch.setattr(os, "posix_fallocate", full)
    written.append(1, bytes(2 << 20))
    assert written.broken
    written.append(1, b"too late")
    with pytest.raises(UserError, match="its disk was full"):
        list(read(tmp_path / "log"))
    written.close()


def test_no_session_at_all(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"short")
    with pytest.raises(UserError, match="is not whole"):
        list(read(tmp_path / "log"))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none", 0)


# -- records


@given(NODES)
def test_a_node_comes_back(found: Node) -> None:
    assert records.decode_node(records.encode_node(found)) == found


def test_a_name_that_is_no_text_comes_back() -> None:
    found = node(2, name="\udcff\udc80é")
    assert records.decode_node(records.encode_node(found)) == found


@given(U64, st.integers(0, 2**63), U32, U32, st.booleans())
def test_a_handle_comes_back(handle: int, number: int, pid: int, flags: int, writes: bool) -> None:
    found = Opened(handle, number, pid, flags, writes)
    assert records.decode_opened(records.encode_opened(found)) == found


@given(U64, st.integers(0, 255), U64, U64, st.binary(max_size=300))
def test_a_step_comes_back(order: int, operation: int, at: int, number: int, what: bytes) -> None:
    found = Step(order, operation, at, number, what)
    assert records.decode_step(records.encode_step(found)) == found


@given(U64, U64, NAMES)
def test_a_place_comes_back(handle: int, cookie: int, name: str) -> None:
    assert records.decode_place(records.encode_place(handle, cookie, name)) == (handle, cookie, name)


# -- what they come to


def test_what_the_kernel_forgot_is_not_known_any_more() -> None:
    state = replay(
        [noted(node(2)), noted(node(3)), noted(node(4)), (records.COUNTS, records.encode_counts([2, 0, 3, 5]))], 0
    )
    assert state.known().keys() == {3, 4}
    assert (state.lookups[3], state.lookups[4], state.highest_number) == (5, 1, 4)


def test_what_is_open_and_what_it_is_in_stays() -> None:
    counts = records.encode_counts([2, 0, 3, 0, 4, 0])
    state = replay(
        [
            noted(node(2, name="d")),
            noted(node(3, 2)),
            noted(node(4, 2, linked=False)),
            noted(node(5, 4, linked=False)),
            opened(1, 3),
            opened(2, 5),
            (records.COUNTS, counts),
        ],
        0,
    )
    assert state.known().keys() == {2, 3, 5}


@pytest.mark.parametrize(("is_done", "expected"), [(0, {2: "before"}), (1, {2: "after"}), (2, {2: "after"})])
def test_a_step_without_an_end_counts_if_the_journal_has_it(is_done: int, expected: dict[int, str]) -> None:
    state = replay([noted(node(2, name="before")), step(1), noted(node(2, name="after"))], is_done)
    assert {number: found.name for number, found in state.nodes.items()} == expected
    assert bool(state.steps) == bool(is_done)
    assert state.open_end == (records.STEP_END if is_done else records.STEP_UNDONE)


def test_what_comes_after_an_unfinished_step_counts() -> None:
    undone = [step(1), noted(node(2, name="undone")), (records.STEP_UNDONE, b"")]
    state = replay([*undone, noted(node(3)), step(2, b"y"), END], 2)
    assert state.nodes.keys() == {3}
    assert state.steps[1].what == b"y"
    assert (state.order, state.open_end) == (2, None)


def test_a_repeated_request_takes_away_what_was_recorded_of_the_last_one() -> None:
    state = replay([step(1), END, (records.VOID_STEP, records.encode_number(1))], 1)
    assert state.steps == {}
    state = replay([opened(5, 2), (records.VOID_OPEN, records.encode_number(7))], 0)
    assert state.last_open == {}
    assert state.opened.keys() == {5}


def test_a_handle_that_is_closed_is_gone_with_its_places() -> None:
    places = [(records.PLACE, records.encode_place(5, cookie, f"n{cookie}")) for cookie in (10, 20, 30)]
    state = replay([opened(5, 2), *places], 0)
    assert state.places == {5: [(20, "n20"), (30, "n30")]}
    state = replay([opened(5, 2), *places, (records.CLOSED, records.encode_number(5))], 0)
    assert (state.opened, state.places, state.last_open) == ({}, {}, {})


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(2, 6), st.integers(0, 3)), max_size=20), st.integers(0, 20))
def test_the_last_word_counts(counts: list[tuple[int, int]], at: int) -> None:
    content = [noted(node(number)) for number in range(2, 7)]
    content += [(records.COUNTS, records.encode_count(*pair)) for pair in counts]
    assert replay(content, 0).lookups == {**dict.fromkeys(range(2, 7), 1), **dict(counts)}
