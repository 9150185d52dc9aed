"""What the ledger counts is what the disk, or memory, holds: compared with `st_blocks` after any history."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from s3fuse.staging.slab import SLOT_BYTES
from s3fuse.writing.dirty import DirtyFile
from s3fuse.writing.ephemeral import MemoryJournal, MemoryStaging
from s3fuse.writing.journal import Journal
from s3fuse.writing.parking import Temporary
from s3fuse.writing.rows import NodeRow
from s3fuse.writing.staging import Staging

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB = 1 << 10
FILES = 3


@contextmanager
def small_disk(directory: Path, *options: str) -> Iterator[Path]:
    """A disk in memory, which takes blocks exactly for what is written."""
    directory.mkdir(exist_ok=True)
    choice = ",".join(("size=64m", *options))
    subprocess.run(["mount", "-t", "tmpfs", "-o", choice, "none", directory], check=True, timeout=30)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True, timeout=30)


class Place:
    """Staged bytes of a few files, on disk or in memory, and what they must read as."""

    def __init__(self, directory: Path, *, is_ephemeral: bool) -> None:
        self.directory = directory
        self.is_ephemeral = is_ephemeral
        self._open()
        self.files = [self._new(number) for number in range(1, FILES + 1)]
        self.expected = [bytearray() for _ in self.files]
        self.sent: list[bytes | None] = [None] * FILES

    def _open(self) -> None:
        self.journal: Journal
        self.staging: Staging
        if self.is_ephemeral:
            self.journal = MemoryJournal("store")
            self.staging = MemoryStaging(self.journal)
        else:
            self.journal = Journal(self.directory, "store")
            self.staging = Staging(self.directory / "staging", self.journal)

    def _new(self, number: int) -> DirtyFile:
        zeros = (0,) * 8
        self.journal.put_node(NodeRow(number, f"f{number}", 0o100644, *zeros[:6], "{}", None, 0, "", *(None,) * 6))
        return DirtyFile(self.staging, number, 0)

    def held_bytes(self) -> int:
        """What the disk says."""
        if isinstance(self.staging, MemoryStaging):
            files = [os.fstat(self.staging.slab.descriptor), os.fstat(self.staging._large)]
        else:
            files = [entry.stat() for entry in os.scandir(self.staging.directory)]
        return sum(found.st_blocks * 512 for found in files)

    def close(self) -> None:
        for data in self.files:
            data.close()
        self.staging.close()
        self.journal.close()

    # -- what may happen to file `at`

    def write(self, at: int, offset: int, length: int, fill: int) -> None:
        data = bytes([fill]) * length
        self.files[at].write(offset, data)
        expected = self.expected[at]
        expected.extend(bytes(max(0, offset + length - len(expected))))
        expected[offset : offset + length] = data

    def fail(self, at: int, offset: int, length: int) -> None:
        """A write of which the disk takes only the first bytes."""
        whole = os.pwrite
        calls = 0

        def half(descriptor: int, data: bytes, where: int) -> int:
            nonlocal calls
            calls += 1
            if calls > 1 or len(data) < 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return whole(descriptor, data[: len(data) // 2], where)

        overwrites = offset < len(self.expected[at])
        if overwrites:  # what is there would be in doubt
            return
        with mock.patch("os.pwrite", half), pytest.raises(OSError, match="No space"):
            self.files[at].write(offset, b"x" * length)

    def truncate(self, at: int, size: int) -> None:
        self.files[at].truncate(size)
        self.expected[at][:] = self.expected[at][:size].ljust(size, b"\0")

    def freeze(self, at: int) -> None:
        if self.files[at].layers and not self.files[at].frozen:
            self.files[at].freeze()
            self.sent[at] = bytes(self.expected[at])

    def commit(self, at: int) -> None:
        sent = self.sent[at]
        if sent is not None:
            with self.journal.transaction():
                self.files[at].commit(len(sent))
            self.sent[at] = None

    def park(self, at: int) -> None:
        data = self.files[at]
        if data.layers and not data.frozen and data.layers[0].extents.total_bytes:
            for pack in data.park(32 * KIB, lambda: Temporary(f"t{data.staging.new_token()}", "t")):
                pack.into.etag, pack.into.size_bytes = "e", pack.size_bytes
            with self.journal.transaction():
                data.parked_oldest()

    def sync(self, at: int) -> None:
        if not self.is_ephemeral:
            trio.run(self.files[at].sync)

    def discard(self, at: int) -> None:
        self.files[at].discard()
        self.files[at].close()
        self.files[at] = self._new(at + 1)
        self.files[at].base_bytes = 0
        self.expected[at], self.sent[at] = bytearray(), None

    def remove(self, at: int) -> None:
        """Somebody removes everything; what is open is put back."""
        if self.is_ephemeral:
            return
        for data in self.files:
            for layer in data.layers:
                data._places.at(layer.generation)
        for entry in os.scandir(self.staging.directory):
            os.unlink(entry.path)
        self.staging.mend()

    def restart(self, at: int) -> None:
        if self.is_ephemeral or any(data.parked.overlay is not None for data in self.files):
            return
        bases = [data.base_bytes for data in self.files]
        self.close()
        self._open()
        layers = self.journal.layers()
        self.staging.begin((number, staged) for number, of_file in layers.items() for staged in of_file)
        self.files = [
            DirtyFile.recovered(self.staging, number, base, layers.get(number, []))
            for number, base in enumerate(bases, 1)
        ]
        for at, data in enumerate(self.files):
            data.check_lengths()
            assert not data.damaged
            if data.frozen and self.sent[at] is None:
                self.sent[at] = bytes(data.layers[0].size_bytes)

    def give_back(self, at: int) -> None:
        trio.run(self.staging.give_back)
        assert self.staging.ledger.idle_bytes == 0


OFFSETS = st.sampled_from([0, 100, 4095, 4096, 30_000, SLOT_BYTES - 10, SLOT_BYTES, 200_000, 1 << 22])
FILE = st.integers(0, FILES - 1)
WRITES = st.tuples(
    st.just("write"), FILE, OFFSETS, st.sampled_from([1, 100, 4096, 10_000, 140_000]), st.integers(1, 255)
)
FAILURES = st.tuples(st.just("fail"), FILE, OFFSETS, st.sampled_from([2, 5000, 100_000]))
CUTS = st.tuples(st.just("truncate"), FILE, st.sampled_from([0, 50, 4096, 5000, 20_000, SLOT_BYTES, 210_000]))
OTHERS = st.tuples(
    st.sampled_from(["freeze", "commit", "park", "sync", "discard", "remove", "restart", "give_back", "give_back"]),
    FILE,
)


def _check(place: Place, history: list[tuple[Any, ...]]) -> None:
    for what, *arguments in history:
        getattr(place, what)(*arguments)
        assert place.staging.ledger.held_bytes == place.held_bytes(), what
        assert place.staging.staged_bytes == sum(data.staged_bytes for data in place.files)
    for data in place.files:
        data.discard()
    place.give_back(0)
    assert place.staging.ledger.held_bytes == place.held_bytes() == 0
    assert place.staging.slab.used == 0
    assert not place.staging.surplus


@pytest.mark.parametrize("is_ephemeral", [False, True])
def test_what_is_counted_is_what_is_held(tmp_path: Path, is_ephemeral: bool) -> None:
    with small_disk(tmp_path / "disk") as disk:

        @given(st.lists(WRITES | WRITES | CUTS | FAILURES | OTHERS, max_size=25))
        @settings(max_examples=150, deadline=None)
        def run(history: list[tuple[Any, ...]]) -> None:
            with (
                tempfile.TemporaryDirectory(dir=disk) as folder,
                closing(Place(Path(folder), is_ephemeral=is_ephemeral)) as place,
            ):
                _check(place, history)

        run()


def test_a_recovered_slab_is_counted_and_its_free_slots_are_given_back(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        place = Place(disk / "cache", is_ephemeral=False)
        for at in (0, 1, 2):
            place.write(at, 0, 50_000, at + 1)
        place.discard(1)
        place.truncate(2, 10)
        place.restart(0)
        # The slot between lost its blocks; what a used one has more than it needs is counted.
        assert place.staging.ledger.held_bytes == place.held_bytes() == 2 * 13 * 4096
        place.close()


def test_a_disk_that_takes_nothing_back_is_counted_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(descriptor: int, mode: int, start: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr("s3fuse.staging.sparse.fallocate", cannot)
    with small_disk(tmp_path / "disk") as disk:
        place = Place(disk / "cache", is_ephemeral=False)
        for at in (0, 1, 2):
            place.write(at, 0, 50_000, at + 1)
        place.discard(0)
        trio.run(place.staging.give_back)
        assert place.staging.ledger.held_bytes == place.held_bytes() == 3 * 13 * 4096
        assert place.staging.ledger.idle_bytes == 13 * 4096
        place.discard(2)
        trio.run(place.staging.give_back)  # the end of the file can always be cut off
        assert place.staging.ledger.held_bytes == place.held_bytes() == 2 * 13 * 4096
        place.write(2, 0, 50_000, 1)  # in the slot that has blocks
        assert place.staging.ledger.held_bytes == place.held_bytes() == 2 * 13 * 4096
        place.close()


def test_fsynced_bytes_that_were_cut_go_when_the_journal_says_so_on_the_disk(tmp_path: Path) -> None:
    """After a power failure the journal may not know of the cut: until then it names these bytes."""
    with small_disk(tmp_path / "disk") as disk:
        place = Place(disk / "cache", is_ephemeral=False)
        place.write(0, 0, 1 << 20, 1)
        place.sync(0)
        place.truncate(0, 5)
        assert place.staging.ledger.held_bytes == place.held_bytes() == 1 << 20
        with mock.patch.object(Journal, "sync", autospec=True) as synced:
            place.give_back(0)
        assert synced.called
        assert place.staging.ledger.held_bytes == place.held_bytes() == 4096
        place.close()
