"""Staged bytes: slots and files, layers, and what a restart finds of them."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from s3fuse.writing.dirty import DirtyFile
from s3fuse.writing.journal import Journal
from s3fuse.writing.layers import BASE
from s3fuse.writing.rows import NodeRow
from s3fuse.writing.staging import SLOT_BYTES, Staging

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.engine.rig import Bench

NUMBER = 5


def node(number: int) -> NodeRow:
    zeros = (0,) * 8
    return NodeRow(number, f"f{number}", 0o100644, *zeros[:6], "{}", None, 0, "", *(None,) * 6)


def own_file(staging: Path, number: int = NUMBER) -> Path:
    """The staging file of a file whose bytes are not in the slab."""
    (path,) = staging.glob(f"{number}.*")
    return path


class Place:
    """A cache directory with one staging on it at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open()

    def _open(self) -> None:
        self.journal = Journal(self.directory, "store")
        self.staging = Staging(self.directory / "staging", self.journal)

    def close(self) -> None:
        self.staging.close()
        self.journal.close()

    def restart(self, *numbers: int, base_bytes: int = 0) -> list[DirtyFile]:
        """Opens it anew and gives the files with these numbers as recovery finds them."""
        self.close()
        self._open()
        layers = self.journal.layers()
        self.staging.begin((number, staged) for number, of_file in layers.items() for staged in of_file)
        return [DirtyFile.recovered(self.staging, n, base_bytes, layers.get(n, [])) for n in numbers]

    def file(self, number: int = NUMBER, base_bytes: int = 0) -> DirtyFile:
        self.journal.put_node(node(number))
        return DirtyFile(self.staging, number, base_bytes)

    def names(self) -> set[str]:
        return set(os.listdir(self.staging.directory))


@contextmanager
def place_in(directory: Path) -> Iterator[Place]:
    place = Place(directory)
    try:
        yield place
    finally:
        place.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with place_in(tmp_path) as place:
        yield place


def content(data: DirtyFile, base: bytes = b"") -> bytes:
    """All bytes of the file, those of the base from `base`."""
    pieces = data.pieces(0, data.size)
    return b"".join(base[p.start : p.stop] if p.source == BASE else data.read_piece(p) for p in pieces)


def test_small_file_is_in_the_slab(place: Place) -> None:
    data = place.file()
    data.write(0, b"hello")
    data.write(5, b" world")
    assert content(data) == b"hello world"
    assert place.names() == {"slab"}
    assert place.staging.staged_bytes == data.staged_bytes == 11
    [again] = place.restart(NUMBER)
    assert content(again) == b"hello world"
    assert place.staging.staged_bytes == 11


@pytest.mark.parametrize("first", [0, 1, SLOT_BYTES - 3])
def test_growing_beyond_the_slot_moves_to_a_file(place: Place, first: int) -> None:
    data = place.file()
    data.write(first, b"abc")
    assert place.names() == {"slab"}
    data.write(SLOT_BYTES - 1, b"de")
    assert place.names() == {"slab", own_file(place.staging.directory).name}
    expected = (bytes(first) + b"abc").ljust(SLOT_BYTES - 1, b"\0")[: SLOT_BYTES - 1] + b"de"
    assert content(data) == expected
    assert place.staging.slab.used == 0
    [again] = place.restart(NUMBER)
    assert content(again) == expected
    again.close()


def test_first_write_beyond_the_slot(place: Place) -> None:
    data = place.file()
    data.write(SLOT_BYTES, b"x")
    [again] = place.restart(NUMBER)
    assert content(again) == bytes(SLOT_BYTES) + b"x"
    data.close()
    again.close()


def test_write_to_the_last_byte_of_the_slot_stays(place: Place) -> None:
    data = place.file()
    data.write(0, b"x" * SLOT_BYTES)
    assert place.names() == {"slab"}
    data.write(SLOT_BYTES, b"y")
    assert place.names() == {"slab", own_file(place.staging.directory).name}
    assert content(data) == b"x" * SLOT_BYTES + b"y"
    data.close()


def test_reused_slot_shows_nothing_of_the_file_before(place: Place) -> None:
    secret = place.file(5)
    secret.write(0, b"S" * SLOT_BYTES)
    secret.discard()
    data = place.file(6)
    data.write(100, b"x")
    data.truncate(300)
    assert list(data._places._slots.values()) == [0]
    assert content(data) == bytes(100) + b"x" + bytes(199)
    data.write(SLOT_BYTES + 1, b"y")  # the spill takes only what was written
    assert content(data) == bytes(100) + b"x" + bytes(SLOT_BYTES - 100) + b"y"
    [again] = place.restart(6)
    assert content(again) == bytes(100) + b"x" + bytes(SLOT_BYTES - 100) + b"y"
    data.close()
    again.close()


def test_slots_in_use_are_not_given_again_after_a_restart(place: Place) -> None:
    for number in (5, 6, 7):
        place.file(number).write(0, b"%d" % number)
    one, two, three = place.restart(5, 6, 7)
    two.discard()
    new = place.file(8)
    new.write(0, b"8")
    assert [content(f) for f in (one, three, new)] == [b"5", b"7", b"8"]
    one, three, new = place.restart(5, 7, 8)
    assert [content(f) for f in (one, three, new)] == [b"5", b"7", b"8"]


def test_slab_shrinks_when_nothing_is_in_it(place: Place) -> None:
    data = place.file()
    data.write(0, b"x" * 1000)
    data.discard()
    place.restart()
    assert (place.staging.directory / "slab").stat().st_size == 0


def test_files_that_no_row_names_are_removed(place: Place) -> None:
    data = place.file()
    data.write(0, b"x" * (SLOT_BYTES + 1))
    data.close()
    (place.staging.directory / "77.0").write_bytes(b"never acknowledged")
    place.restart()
    assert place.names() == {"slab", own_file(place.staging.directory).name}


def test_overwriting_is_counted_once(place: Place) -> None:
    data = place.file()
    for _ in range(3):
        data.write(0, b"12345")
    data.write(3, b"6789")
    assert place.staging.staged_bytes == 7
    data.truncate(2)
    assert place.staging.staged_bytes == 2
    data.discard()
    assert place.staging.staged_bytes == 0
    assert place.journal.layers() == {}


def test_truncating_and_growing_shows_zeros(place: Place) -> None:
    data = place.file(base_bytes=100)
    base = b"b" * 100
    data.truncate(10)
    data.truncate(20)
    data.write(30, b"x")
    expected = b"b" * 10 + bytes(20) + b"x"
    assert content(data, base) == expected
    [again] = place.restart(NUMBER, base_bytes=100)
    assert content(again, base) == expected


def test_frozen_layer_does_not_change(place: Place) -> None:
    data = place.file()
    data.write(0, b"first version")
    token = data.tokens[0]
    data.freeze()
    data.write(6, b"VERSION")
    data.truncate(20)
    sent = b"".join(data.read_piece(p) for p in data.pieces(0, data.layers[0].size_bytes, layers=1))
    assert sent == b"first version"
    assert content(data) == b"first VERSION" + bytes(7)
    assert data.tokens[0] == token != data.tokens[1]
    with place.journal.transaction():
        data.commit(13)
    assert content(data, b"first version") == b"first VERSION" + bytes(7)
    [again] = place.restart(NUMBER, base_bytes=13)
    assert content(again, b"first version") == b"first VERSION" + bytes(7)


def test_recovered_layer_takes_no_more_bytes(place: Place) -> None:
    """It may be in the bucket already, with its token."""
    data = place.file()
    data.write(0, b"sent?")
    token = data.tokens[0]
    [again] = place.restart(NUMBER)
    assert again.tokens == [token]
    again.write(0, b"S")
    again.truncate(4)
    assert b"".join(again.read_piece(p) for p in again.pieces(0, 5, layers=1)) == b"sent?"
    assert content(again) == b"Sent"
    [again] = place.restart(NUMBER)
    assert content(again) == b"Sent"


def test_tokens_are_never_given_twice(place: Place) -> None:
    tokens = {place.staging.new_token() for _ in range(100)}
    place.restart()
    tokens |= {place.staging.new_token() for _ in range(100)}
    assert len(tokens) == 200


def test_full_disk_acknowledges_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    data = place.file()
    data.write(0, b"kept")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            data.write(4, b"lost")
        with pytest.raises(OSError, match="No space"):
            data.write(SLOT_BYTES, b"lost")
    assert content(data) == b"kept"
    [again] = place.restart(NUMBER)
    assert content(again) == b"kept"
    data.close()


def test_first_write_that_fails_leaves_a_usable_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    data = place.file(base_bytes=4)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space"):
            data.write(0, b"lost")
    assert content(data, b"base") == b"base"
    data.write(1, b"x")
    data.write(2, b"y")
    assert content(data, b"base") == b"bxye"
    [again] = place.restart(NUMBER, base_bytes=4)
    assert content(again, b"base") == b"bxye"


WRITE = st.tuples(
    st.just("write"),
    st.sampled_from([0, 1, 100, SLOT_BYTES - 10, SLOT_BYTES - 1, SLOT_BYTES, 2 * SLOT_BYTES]) | st.integers(0, 300),
    st.integers(1, 300),
)
CUT = st.tuples(st.just("truncate"), st.sampled_from([0, 50, 150, SLOT_BYTES, 3 * SLOT_BYTES]), st.just(0))
OTHER = st.tuples(st.sampled_from(["freeze", "commit", "restart"]), st.just(0), st.just(0))


@given(st.lists(WRITE | CUT | OTHER, max_size=20), st.sampled_from([0, 100, SLOT_BYTES + 5]))
@settings(max_examples=60, deadline=None)
def test_any_history(history: list[tuple[str, int, int]], base_bytes: int) -> None:
    """The file reads as a plain bytearray does, whatever is uploaded and restarted between."""
    base = bytes(index % 251 for index in range(base_bytes))
    expected = bytearray(base)
    sent: bytes | None = None
    with tempfile.TemporaryDirectory() as folder, place_in(Path(folder)) as place:
        data = place.file(base_bytes=base_bytes)
        for count, (what, offset, length) in enumerate(history):
            match what:
                case "write":
                    piece = bytes([count + 1]) * length
                    expected.extend(bytes(max(0, offset - len(expected))))
                    expected[offset : offset + length] = piece
                    data.write(offset, piece)
                case "truncate":
                    expected[:] = expected[:offset].ljust(offset, b"\0")
                    data.truncate(offset)
                case "freeze" if data.layers and not data.frozen:
                    data.freeze()
                    sent = content(data, base)
                case "commit" if data.frozen and sent is not None:
                    with place.journal.transaction():
                        data.commit(len(sent))
                    base, sent = sent, None
                case "restart":
                    was_frozen = data.frozen
                    data.close()
                    [data] = place.restart(NUMBER, base_bytes=len(base))
                    if data.frozen and not was_frozen:
                        sent = b"".join(
                            base[p.start : p.stop] if p.source == BASE else data.read_piece(p)
                            for p in data.pieces(0, data.layers[0].size_bytes, layers=1)
                        )
            assert content(data, base) == bytes(expected)
            assert place.staging.staged_bytes == data.staged_bytes
        data.discard()
        assert place.staging.staged_bytes == 0
        assert place.names() == {"slab"}
        data.close()


def test_layer_that_began_empty_is_changed_after_a_restart(place: Place) -> None:
    """Its row in the journal has no segment, so that the first one is no other's row."""
    data = place.file()
    data.truncate(0)
    data.write(0, b"x" * 51)
    [again] = place.restart(NUMBER)
    again.frozen = False
    again.truncate(50)
    again.write(10, b"yy")
    [again] = place.restart(NUMBER)
    assert content(again) == b"x" * 10 + b"yy" + b"x" * 38


def test_slot_beyond_the_end_of_the_slab_has_all_of_nothing(place: Place) -> None:
    for number in (5, 6):
        place.file(number).truncate(100)
    for data in place.restart(5, 6):
        data.check_lengths()
        assert not data.damaged


# -- damage, seen through a mount


async def test_cut_staging_file_is_an_error_that_stays_listed(bench: Bench, expected_log: list[str]) -> None:
    expected_log.append(r"big: staged data is damaged: .*/staging/\d+\.\d+ has 10 bytes of 100000")
    rig = await bench.rig()
    inode = await rig.put("big", b"x" * 100_000)
    await rig.put("other", b"fine")
    await rig.crash()
    os.truncate(own_file(rig.cache / "staging", inode.number), 10)
    rig.paused = True
    await rig.start()
    handle = await rig.open("big")
    with pytest.raises(OSError, match="staged data is damaged") as caught:
        await rig.pread(handle)
    assert caught.value.errno == 5
    rig.close(handle)
    rig.paused = False
    await rig.restart()
    failed = await rig.drain(rounds=2)
    assert [inode.name for inode in failed] == ["big"]
    assert failed[0].error
    assert bench.contents() == {"other": b"fine"}
    await rig.restart()
    assert await rig.ls() == ["big", "other"]
    assert [entry.key for entry in rig.journal.nodes()] == ["big"]
    assert (own_file(rig.cache / "staging", inode.number)).exists()


async def test_missing_staging_file(bench: Bench, expected_log: list[str]) -> None:
    expected_log.append(r"has 0 bytes of 100000")
    rig = await bench.rig()
    inode = await rig.put("big", b"x" * 100_000)
    await rig.crash()
    os.unlink(own_file(rig.cache / "staging", inode.number))
    await rig.start()
    assert len(await rig.drain()) == 1
    assert bench.listed() == []
    await rig.unlink("big")  # the user gives it up
    await rig.drained()
    rig.check_clean()


async def test_cut_slab(bench: Bench, expected_log: list[str]) -> None:
    expected_log.append(r"^(a|b|inode \d+): staged data is damaged")
    rig = await bench.rig()
    for name in ("a", "b"):
        await rig.put(name, b"x" * 100)
    await rig.crash()
    os.truncate(rig.cache / "staging" / "slab", 50)
    await rig.start()
    assert {inode.name for inode in await rig.drain()} == {"a", "b"}
    assert bench.listed() == []


async def test_drain_ends_where_staging_is_damaged(bench: Bench, expected_log: list[str]) -> None:
    """A drain that retries what may come right must not wait for what never will."""
    expected_log.append("is damaged")
    rig = await bench.rig()
    inode = await rig.put("big", b"x" * 100_000)
    await rig.crash()
    os.truncate(own_file(rig.cache / "staging", inode.number), 10)
    await rig.start()
    with trio.fail_after(3):
        failed = await rig.core.syncer.arrivals.drain()
    assert [inode.name for inode in failed] == ["big"]


def test_an_empty_layer_in_a_slot_that_the_slab_does_not_reach_is_whole(place: Place) -> None:
    first, second = place.file(5), place.file(6)
    first.truncate(10)
    second.truncate(10)
    [_, again] = place.restart(5, 6)
    again.check_lengths()
    assert again.damaged == ""
