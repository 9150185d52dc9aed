"""The database of a journal while it is open: transactions, room on its disk, damage to its files."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING

from s3fuse.journal.undo import Undo
from s3fuse.writing import database, room, wal
from s3fuse.writing.durable import sync_names, sync_new_directory
from s3fuse.writing.lock import DirectoryLock
from s3fuse.writing.wal import FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

PART = "journal.part"
FAILED = "a statement failed"
FULL = "a change was not recorded, the disk was full"
#: What `leave` keeps open.
_left: list[ExitStack] = []


class Transactions:
    """The database in one cache directory, locked against a second process while open.

    `lost` says what it has lost since it was last open, as a text ("": nothing); with `is_mixed` what is left is of
    different moments. `suspect` why it may not have what it
    was given since then.
    """

    def __init__(self, directory: Path, store: str) -> None:
        """Opens or makes it for the bucket that `store` names.

        Raises UserError where another process has it, it belongs to another bucket, its format is unknown, it cannot
        be read, or the disk is full.
        """
        self.directory = directory
        self.store = store
        self.suspect = ""
        self.undo = Undo()
        self._after: list[Callable[[], None]] = []
        self._deferred: dict[int, tuple[str, tuple[object, ...]]] = {}
        with ExitStack() as stack:
            self._lock = stack.enter_context(closing(DirectoryLock(directory)))
            before = wal.Before(directory, self._lock)
            before.note()
            self._opened = stack.enter_context(ExitStack())  # outlives the database, which would lose its locks
            self._db = database.connect(directory / FILE, directory, store)
            stack.callback(lambda: self._db.close())
            try:
                self._open_files()
                self._lock.note(is_open=True)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise database.full_disk(directory) from error
            self.lost, self.is_mixed = before.lost(self._index), before.is_mixed(self._index)
            if self.lost:
                before.note(self.lost)
            else:
                self.note_recovered()
            stack.callback(self._lock.note, is_open=False)
            sync_new_directory(directory)
            self._held = stack.pop_all()

    def note_recovered(self) -> None:
        """What was lost is seen to: another process need not know it."""
        (self.directory / wal.NOTE).unlink(missing_ok=True)

    def _open_files(self) -> None:
        """Opens what looks after the files of the open database."""
        self._index = self._opened.enter_context(closing(wal.LogIndex(self.directory)))
        self._files = wal.Files(self.directory, self._index)
        self._room = self._opened.enter_context(closing(room.Room(self.directory, self._index)))

    def _execute(self, statement: str, values: Iterable[object] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)  # type: ignore[arg-type]
        except sqlite3.DatabaseError as error:
            if database.is_full(error):
                self.suspect = FULL
                raise room.full(self.directory) from error
            self.suspect = FAILED
            raise

    def check_room(self, rows: int = 1) -> None:
        """Raises OSError(ENOSPC) where a change of so many rows might not be recorded; ask before memory changes."""
        self._check_room(room.SPARE_BYTES, rows)

    def check_room_to_send(self, rows: int = 1) -> None:
        """The same for what brings changes to the bucket, which still goes on when there is no room for more."""
        self._check_room(room.LEAST_BYTES, rows)

    def _check_room(self, least_bytes: int, rows: int) -> None:
        if self.suspect == FULL:  # memory has what it lacks: nothing more before it was written anew
            raise room.full(self.directory)
        self._room.check(least_bytes + rows * room.ROW_BYTES)

    def keep_room(self) -> None:
        """Reserves space for what comes, as far as the disk has it."""
        self._room.keep()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements inside become visible together or not at all; one inside another is part of it. No awaits.

        Where it raises, memory is put back as far as `undo` was told of what changed.
        """
        if self.undo.is_on:
            yield
            return
        self._after.clear()
        try:
            self.undo.begin()
            self._execute("BEGIN IMMEDIATE")
            yield
            for statement, values in self._deferred.values():
                self._execute(statement, values)
            self._execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # the failure may have ended it already
                self._db.execute("ROLLBACK")
            self.undo.run()
            raise
        self._deferred.clear()
        self.undo.forget()
        self._committed()

    def _committed(self) -> None:
        """Runs what waited for the commit: only cleaning up, and nothing that can make the change fail any more."""
        calls, self._after = self._after, []
        for call in calls:
            try:
                call()
            except Exception:
                log.exception("something is left behind in %s", self.directory)

    def defer(self, key: int, statement: str, values: tuple[object, ...]) -> None:
        """Has a statement executed with the next transaction, instead of an earlier one with this key.

        For what may be recorded a little later, since a commit of its own takes longer than the statement.
        """
        self._deferred[key] = (statement, values)

    def record_deferred(self) -> None:
        """Executes now what is deferred."""
        if self._deferred:
            with self.transaction():
                pass

    def after_commit(self, call: Callable[[], None]) -> None:
        """Runs it once what was recorded before is committed: at once where there is no transaction.

        For what a crash must not see before the record: bytes that the journal still names are not to go.
        """
        if self.undo.is_on:
            self._after.append(call)
        else:
            call()

    def checkpoint(self) -> None:
        """Moves what the WAL holds into the database and syncs it (blocks; call it in a thread)."""
        with closing(sqlite3.connect(self.directory / FILE)) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        self._room.moved()

    def is_long(self, log_bytes: int) -> bool:
        """Whether a `checkpoint` is due: more than so much of the log is in use, or the disk gives it no more room."""
        return self._room.used_bytes > log_bytes or self._room.is_short

    def keep_directory(self) -> bool:
        """Takes the directory anew where it or its lock was removed; gives whether that was necessary.

        Raises UserError where another process has it by now, OSError.
        """
        return self._lock.keep()

    def damage(self) -> str:
        """What its files lack of what it was given, as a text ("": nothing)."""
        return self.suspect or self._files.damage()

    def make_anew(self, fill: Callable[[], None]) -> None:
        """Makes the database anew; `fill` puts everything into it.

        Raises what `fill`, SQLite or the disk raises; the one before then stays in use.
        """
        old, part = self._db, self.directory / PART
        self._remove_part()
        try:
            self._db = database.connect(part, self.directory, self.store)
            with self.transaction():
                fill()
            self._db.close()
        except BaseException:
            if self._db is not old:
                self._db.close()
            self._db = old
            self._remove_part()
            raise
        with suppress(sqlite3.DatabaseError):
            old.close()
        for suffix in wal.SUFFIXES:  # with them SQLite would repair the new database
            (self.directory / (FILE + suffix)).unlink(missing_ok=True)
        part.replace(self.directory / FILE)
        sync_names(self.directory)
        self._db = database.connect(self.directory / FILE, self.directory, self.store)
        self._opened.close()
        self._open_files()
        self.suspect = ""

    def _remove_part(self) -> None:
        for name in (PART, *(PART + suffix for suffix in wal.SUFFIXES)):
            (self.directory / name).unlink(missing_ok=True)

    def sync(self) -> None:
        """Returns when everything recorded so far is on the disk (blocks; call it in a thread).

        The WAL holds every commit since the last checkpoint, and a checkpoint syncs what it moves.
        """
        log = os.open(self.directory / (FILE + wal.LOG), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(log)
        finally:
            os.close(log)

    def leave(self) -> None:
        """Makes `close` leave the files as they are, open until this process ends (by `os._exit`) and the next begins.

        SQLite removes its log where it is closed last, and others may take the space that was reserved in it.
        """
        _left.append(self._held.pop_all())

    def close(self) -> None:
        with suppress(sqlite3.Error, OSError):
            self.record_deferred()
        self._held.close()
