"""Keeps all other processes from using a cache directory."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from s3fuse.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

NOTE = "lock"
_OPEN, _SHUT = b"open", b"shut"


class DirectoryLock:
    """The lock on a cache directory, which is made if it is missing.

    It is on the directory itself: a file in it can be removed, and others would lock the next one. The file `lock` says
    whether the directory is in use, which a process that is killed leaves so; it is locked, too, for earlier versions.
    """

    def __init__(self, directory: Path) -> None:
        """Raises UserError where another process has it, or it cannot be made."""
        self.directory = directory
        self._folder = self._take_folder()
        try:
            self._note = self._take_note()
        except BaseException:
            os.close(self._folder)
            raise

    def _take_folder(self) -> int:
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise self._unusable(error) from error
        return self._take(self.directory, os.O_RDONLY | os.O_DIRECTORY)

    def _take_note(self) -> int:
        return self._take(self.directory / NOTE, os.O_RDWR | os.O_CREAT)

    def _take(self, path: Path, flags: int) -> int:
        try:
            descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise self._unusable(error) from error
            raise UserError(
                f"cache directory {self.directory} is in use by another mount; unmount that one or choose another "
                "with --cache-dir"
            ) from None
        return descriptor

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"cache directory {self.directory} cannot be used: {error.strerror}; choose another with --cache-dir"
        )

    @property
    def was_open(self) -> bool:
        """Whether the note says that the directory is in use."""
        return os.pread(self._note, len(_OPEN), 0) == _OPEN

    def note(self, *, is_open: bool) -> None:
        """Notes whether the directory is in use. Raises OSError."""
        os.pwrite(self._note, _OPEN if is_open else _SHUT, 0)  # of one length: a full disk is no matter later

    def keep(self) -> bool:
        """Takes anew what somebody has removed, and notes that it is in use; gives whether that was necessary.

        Raises UserError where another process has the directory by now, OSError.
        """
        is_ours = _is_at(self._folder, self.directory)
        if is_ours and _is_at(self._note, self.directory / NOTE):
            return False
        if not is_ours:
            _replace(self._folder, self._take_folder())
        _replace(self._note, self._take_note())
        self.note(is_open=True)
        return True

    def close(self) -> None:
        os.close(self._note)
        os.close(self._folder)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _replace(descriptor: int, by: int) -> None:
    os.dup2(by, descriptor, inheritable=False)
    os.close(by)
