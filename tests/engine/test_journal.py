"""The journal: what is recorded comes back, for the same bucket and one process at a time."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3fuse.errors import UserError
from s3fuse.writing import checks, database, wal
from s3fuse.writing.checks import Segment, Segments
from s3fuse.writing.ephemeral import MemoryJournal
from s3fuse.writing.extents import Extents
from s3fuse.writing.journal import Journal
from s3fuse.writing.layers import Layer
from s3fuse.writing.rows import (
    HOMELESS,
    BegunUpload,
    NodeRow,
    StagedLayer,
    decode_map,
    decode_xattrs,
    encode_map,
    encode_xattrs,
)
from tests.engine.old_journals import FORMAT_2, FORMAT_3

if TYPE_CHECKING:
    from collections.abc import Iterator

STORE = "http://server/bucket/prefix/"


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path, STORE)
    yield journal
    journal.close()


def reopened(journal: Journal) -> Journal:
    """The journal as another process finds it after a crash: everything was committed."""
    journal.close()
    journal.__init__(journal.directory, STORE)  # type: ignore[misc]
    return journal


def row(number: int, key: str | None, **changes: object) -> NodeRow:
    values: dict[str, object] = dict.fromkeys(NodeRow._fields, 0)
    values |= {
        "number": number,
        "key": key,
        "xattrs": "{}",
        "target": None,
        "token": f"token-{number}",
        "maybe_at": None,
    }
    values |= {name: None for name in NodeRow._fields if name.startswith("remote_")}
    return NodeRow(**(values | changes))  # type: ignore[arg-type]


def staged(
    generation: int = 0,
    ranges: tuple[tuple[int, int], ...] = (),
    below: int = 0,
    size: int = 0,
    token: str = "t",
    slot: int | None = None,
) -> StagedLayer:
    segments = [Segment(start, stop, 100 + start) for start, stop in ranges]
    extents = Extents(ranges)
    layer = Layer(generation, extents, below, max(size, extents.end))
    return StagedLayer(layer, token, slot, segments, ranges[0][0] if ranges else -1)


def test_rows_come_back(journal: Journal) -> None:
    rows = [
        row(9, None, remote_key="gone", remote_etag="e", remote_size=3, remote_metadata='{"a": "b"}'),
        row(2, "d/", mode=0o40755, mtime_ns=-(2**63), atime_ns=2**63 - 1),
        row(3, "d/ä\n'\"", xattrs=encode_xattrs({"user.x": b"\0\xff"}), size=5 << 40),
        row(4, "d/link", target=b"to/\xff\0"),
    ]
    for entry in reversed(rows):
        journal.put_node(entry)
    assert reopened(journal).nodes() == [rows[0], rows[1], rows[3], rows[2]]
    journal.put_node(rows[2]._replace(size=1))
    journal.drop_node(4)
    assert reopened(journal).nodes() == [rows[0], rows[1], rows[2]._replace(size=1)]


def test_parents_come_before_what_is_in_them(journal: Journal) -> None:
    keys = ["d/s/x", "d-e/x", "d/s/", "d!", "d/", "d-e/", "d/s!"]
    for number, key in enumerate(keys, 2):
        journal.put_node(row(number, key))
    found = [entry.key for entry in journal.nodes()]
    assert sorted(filter(None, found)) == sorted(keys)
    for key in keys:
        for above in keys:
            if above.endswith("/") and key.startswith(above) and key != above:
                assert found.index(above) < found.index(key)


def test_layers_come_back(journal: Journal) -> None:
    one = staged(0, ((0, 10), (20, 30), (40, 41)), below=15, size=50, token="t-1", slot=7)
    two = staged(1, ((5, 6),), below=50, size=50, token="t-2")
    empty = staged(0, below=3, size=3, token="t-3", slot=0)
    assert journal.replace_layer(two, 5) == 5
    assert journal.replace_layer(one, 5) == 0
    assert journal.replace_layer(empty, 6) == HOMELESS
    assert reopened(journal).layers() == {5: [one, two], 6: [empty]}
    shorter = staged(0, ((0, 1),), token="t-1", slot=7)
    journal.replace_layer(shorter, 5)
    assert journal.layers()[5][0] == shorter
    journal.drop_layer(5, 0)
    assert reopened(journal).layers() == {5: [two], 6: [empty]}


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(("write", "write", "cut", "sync")), st.integers(0, 300), st.integers(1, 50)),
        max_size=30,
    )
)
def test_any_sequence_of_writes_cuts_and_syncs(changes: list[tuple[str, int, int]]) -> None:
    """What is recorded change by change is what is in memory."""
    segments, home, size = Segments(), None, 0
    layer = Layer(0, Extents(), 0, 0)
    content = bytearray(400)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "BLOCK_BYTES", 64)
        journal = Journal(Path(folder), STORE)

        def read(start: int, stop: int) -> bytes:
            return bytes(content[start:stop])

        try:
            for what, start, length in changes:
                if what == "write":
                    data = os.urandom(length)
                    steps = segments.write(start, data, read)
                    if home is not None:
                        journal.doubt_segments(5, 0, home, steps)
                    content[start : start + length] = data
                    for step in steps:
                        segments.apply(step)
                    layer.write(start, start + length)
                    size = max(size, start + length)
                    if home is None:
                        home = journal.put_layer(StagedLayer(layer, "t", 0, list(segments)), 5)
                    else:
                        home = journal.change_segments(5, 0, home, steps)
                elif what == "sync" and home is not None:
                    journal.note_synced(5, 0, home, segments.synced(segments.syncing()))
                elif home is not None:
                    cut = segments.clip(start, read)
                    layer.truncate(start)
                    home = journal.cut_layer(StagedLayer(layer, "t", 0, []), 5, home, cut)
                    size = start
            if home is None:
                return
            (found,) = reopened(journal).layers()[5]
            assert sorted(found.segments) == list(segments)
            assert found.home == home
            assert found.layer == layer
            assert all(segment.fits(read(segment.start, segment.stop)) for segment in segments)
            assert {segment.synced for segment in segments} <= {0, checks.SYNCED}
            assert found.layer.size_bytes == size
        finally:
            journal.close()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(("poison", "heal", "heal to the end")), st.integers(0, 60), st.integers(1, 30)),
        max_size=20,
    )
)
def test_poisoned_ranges_come_back(changes: list[tuple[str, int, int]]) -> None:
    journal = MemoryJournal(STORE)
    journal.put_layer(staged(1), 5)
    wanted = Extents()
    for kind, start, length in changes:
        if kind == "poison":
            wanted.add(start, start + length)
            journal.poison(5, 1, start, start + length, "no room")
        elif kind == "heal":
            wanted.remove(start, start + length)
            journal.heal(5, 1, start, start + length)
        else:
            wanted.clip(start)
            journal.heal(5, 1, start)
        (found,) = journal.layers()[5]
        assert found.layer.poisoned == wanted
        assert found.layer.size_bytes == wanted.end
        assert found.reason == ("no room" if wanted else "")
    journal.close()


def test_uploads_come_back(journal: Journal) -> None:
    begun = BegunUpload(1, "key", None, 10)
    journal.put_upload(begun)
    journal.put_upload(BegunUpload(2, "key", "id", 11))
    journal.put_upload(begun._replace(upload_id="other"))
    journal.drop_upload(2)
    assert reopened(journal).uploads() == [BegunUpload(1, "key", "other", 10)]


def test_layers_of_files_without_a_row_are_forgotten(journal: Journal) -> None:
    journal.put_node(row(5, "f"))
    for number in (5, 6):
        journal.replace_layer(staged(0, ((0, 1), (5, 6)), slot=number), number)
    journal.drop_layers_without_node()
    assert set(reopened(journal).layers()) == {5}


def _two_rows_of_which_one_is_wrong(journal: Journal) -> None:
    journal.put_node(row(2, "a"))
    journal.put_node(row(3, "b", mode=None))


def test_transaction_is_all_or_nothing(journal: Journal) -> None:
    with pytest.raises(sqlite3.IntegrityError), journal.transaction():
        _two_rows_of_which_one_is_wrong(journal)
    assert journal.nodes() == []
    with journal.transaction():
        journal.put_node(row(2, "a"))
        journal.put_node(row(3, "b"))
    assert len(reopened(journal).nodes()) == 2


def test_killed_process_loses_nothing_that_it_recorded(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from tests.engine.test_journal import STORE, row
from s3fuse.writing.journal import Journal
journal = Journal(Path(sys.argv[1]), STORE)
for number in range(100):
    journal.put_node(row(number, f"key-{number:03}"))
with journal.transaction():
    journal.put_node(row(1000, "not committed"))
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == -9
    journal = Journal(tmp_path, STORE)
    assert [entry.key for entry in journal.nodes()] == [f"key-{number:03}" for number in range(100)]
    journal.close()


def test_checkpoint_empties_the_wal(journal: Journal) -> None:
    for number in range(300):
        journal.put_node(row(number, "x" * 100 + str(number)))
    journal.sync()
    assert journal.is_long(100_000)
    journal.checkpoint()
    for number in range(10):
        journal.put_node(row(number, "y"))
    assert not journal.is_long(100_000)  # the WAL is written from its beginning again
    assert len(reopened(journal).nodes()) == 300


@pytest.mark.parametrize(
    ("suffix", "start", "length"),
    [
        ("", 0x40000002, 510),  # where a shared lock is: https://sqlite.org/fileformat2.html#the_lock_byte_page
        (
            "-shm",
            128,
            1,
        ),  # the lock of those who have the index open, behind the 8 of https://sqlite.org/walformat.html
    ],
)
def test_what_looks_after_its_files_leaves_sqlite_its_locks(
    journal: Journal, suffix: str, start: int, length: int
) -> None:
    """Closing any descriptor of a file ends the process's locks on it: then another one could take the log away."""
    journal.put_node(row(1, "x"))
    journal.checkpoint()
    journal.keep_room()
    journal.check_room()
    assert not journal.damage()
    code = f"import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB, {length}, {start})"
    command = [sys.executable, "-c", code, str(journal.directory / f"journal.sqlite{suffix}")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "BlockingIOError" in done.stderr


def test_second_process_is_refused(journal: Journal) -> None:
    code = "import sys, pathlib; from s3fuse.writing.journal import Journal; Journal(pathlib.Path(sys.argv[1]), 'x')"
    command = [sys.executable, "-c", code, str(journal.directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "UserError" in done.stderr
    assert "in use by another mount" in done.stderr
    journal.put_node(row(2, "still works"))


def test_lock_ends_with_close(tmp_path: Path) -> None:
    Journal(tmp_path, STORE).close()
    Journal(tmp_path, STORE).close()


def test_other_bucket_is_refused_and_named(tmp_path: Path) -> None:
    Journal(tmp_path, STORE).close()
    with pytest.raises(UserError, match="belongs to http://server/bucket/prefix/, not to http://server/other/"):
        Journal(tmp_path, "http://server/other/")
    Journal(tmp_path, STORE).close()  # the refusal left no lock behind


def test_other_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path, STORE).close()
    monkeypatch.setattr(database, "FORMAT", database.FORMAT + 1)
    with pytest.raises(UserError, match="journal format"):
        Journal(tmp_path, STORE)
    monkeypatch.undo()
    Journal(tmp_path, STORE).close()


def test_older_format_with_other_columns_is_refused_as_such(tmp_path: Path) -> None:
    """The format is looked at before anything that depends on it."""
    Journal(tmp_path, STORE).close()
    database = sqlite3.connect(tmp_path / "journal.sqlite")
    database.executescript("DROP TABLE node; CREATE TABLE node (number INTEGER); UPDATE identity SET format = 0")
    database.close()
    with pytest.raises(UserError, match="journal format 0"):
        Journal(tmp_path, STORE)


def test_file_that_is_no_journal_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"not a database, but 16 bytes and more" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        Journal(tmp_path, STORE)
    assert (tmp_path / "journal.sqlite").read_bytes().startswith(b"not a database")


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used"):
        Journal(tmp_path / "file" / "cache", STORE)


def test_directory_is_private(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        Journal(tmp_path / "a" / "cache", STORE).close()
    finally:
        os.umask(mask)
    assert (tmp_path / "a" / "cache").stat().st_mode & 0o777 == 0o700


@given(st.dictionaries(st.text(), st.text()) | st.none())
def test_maps(values: dict[str, str] | None) -> None:
    assert decode_map(encode_map(values)) == values


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.binary()))
def test_xattrs(xattrs: dict[str, bytes]) -> None:
    assert decode_xattrs(encode_xattrs(xattrs)) == xattrs


@pytest.mark.parametrize("number", [2, 3])
def test_an_earlier_format_becomes_the_next(tmp_path: Path, number: int) -> None:
    more = ", 0" if number == 3 else ""
    with closing(sqlite3.connect(tmp_path / wal.FILE)) as db:
        db.executescript(FORMAT_3 if number == 3 else FORMAT_2)
        db.execute("INSERT INTO identity (format, store) VALUES (?, ?)", (number, STORE))
        db.execute(f"INSERT INTO layer VALUES (5, 1, 10, 0, 't', NULL, 0, 10, 7{more})")
        db.execute(f"INSERT INTO segment VALUES (5, 1, 20, 30, 8{more})")
        db.commit()
    for _ in range(2):
        journal = Journal(tmp_path, STORE)
        (found,) = journal.layers()[5]
        assert found.segments == [Segment(0, 10, 7, 0), Segment(20, 30, 8, 0)]
        assert not journal.rebooted
        journal.note_boot()
        journal.close()


def test_a_boot_is_noticed_where_something_was_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, STORE)
    journal.close()
    for boot, expected in (("next", False), ("another", True), ("another", False)):
        monkeypatch.setattr("s3fuse.writing.journal.boot_id", lambda boot=boot: boot)
        journal = Journal(tmp_path, STORE)
        assert journal.rebooted is expected
        journal.note_boot()
        journal.close()
