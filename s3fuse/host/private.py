"""What belongs to this user alone on a host with others: directories, logs, the other end of a socket.

Whoever uses such a thing looks at it first, through a descriptor and without following links, so that nobody can put
another in its place meanwhile. Standard library only: the keeper opens its log here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import shlex
import socket
import stat
import struct
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

_OTHERS = 0o077
#: More than any file here has that is read at once.
_MOST_BYTES = 1 << 20
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class NotPrivate(Exception):
    """Something is not this user's alone. The text names it, what is wrong, and what mends it."""


def who(uid: int) -> str:
    """A user for people."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return f"user {uid}"


class _Connected(Protocol):
    def getsockopt(self, level: int, option: int, buflen: int, /) -> bytes: ...


def peer_uid(end: _Connected) -> int:
    """The user who has the other end of a connected unix socket. Raises OSError."""
    return int(_CREDENTIALS.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1])


def _directory_problem(path: str, status: os.stat_result) -> tuple[str, str]:
    """What is wrong with a directory that is to be this user's alone, and the command that mends it; ("", "")."""
    quoted = shlex.quote(path)
    aside = f"mv {quoted} {shlex.quote(path + '.old')}" if os.geteuid() in (0, status.st_uid) else ""
    if stat.S_ISLNK(status.st_mode):
        return "is a symbolic link", aside
    if not stat.S_ISDIR(status.st_mode):
        return "is no directory", aside
    if status.st_uid != os.geteuid():
        return f"belongs to {who(status.st_uid)}", aside
    if status.st_mode & _OTHERS:
        return f"is open to others (mode {stat.S_IMODE(status.st_mode):04o})", f"chmod 700 {quoted}"
    return "", ""


class PrivateDirectory:
    """A directory of this user's with mode 0700, open: what is in it is reached through `fd`, not by its path.

    What others have put there while it was theirs, or open to them, is not looked at and never removed.
    """

    def __init__(self, path: Path, otherwise: str = "") -> None:
        """Raises FileNotFoundError where it is missing; NotPrivate where it is not this user's alone, with `otherwise`
        as the advice for who may not mend that."""
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._refused(error, otherwise) from None
        problem, command = _directory_problem(str(path), os.fstat(self.fd))
        if problem:
            os.close(self.fd)
            raise _not_private(path, problem, command, otherwise)

    def _refused(self, error: OSError, otherwise: str) -> NotPrivate:
        problem, command = "", ""
        with suppress(OSError):
            problem, command = _directory_problem(str(self.path), os.lstat(self.path))
        return _not_private(self.path, problem or f"cannot be opened ({error.strerror})", command, otherwise)

    def __enter__(self) -> PrivateDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self.fd)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process that asks for this has the directory meanwhile; waits for that (blocks)."""
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.fd, fcntl.LOCK_UN)

    def at(self, name: str) -> str:
        """A path to an entry that leads through the descriptor, of any length, for calls that know no descriptors."""
        return f"/proc/self/fd/{self.fd}/{name}"

    def stat(self, name: str) -> os.stat_result | None:
        """A file or socket of this user's; None for anything else, and links."""
        try:
            status = os.lstat(name, dir_fd=self.fd)
        except FileNotFoundError:
            return None
        is_ours = status.st_uid == os.geteuid() and (stat.S_ISREG(status.st_mode) or stat.S_ISSOCK(status.st_mode))
        return status if is_ours else None

    def names(self, end: str) -> list[str]:
        """The names of this user's files and sockets with this end, in order."""
        return sorted(name for name in os.listdir(self.fd) if name.endswith(end) and self.stat(name) is not None)

    def remove(self, name: str) -> None:
        """Removes a file or socket of this user's; anything else stays."""
        if self.stat(name) is not None:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.fd)

    def read(self, name: str) -> bytes:
        """The content of a small file of this user's. Raises FileNotFoundError where there is none, OSError."""
        status = self.stat(name)
        if status is None or not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self.fd)
        with open(descriptor, "rb") as file:
            return file.read(_MOST_BYTES)

    def write(self, name: str, content: bytes) -> None:
        """Gives a file this content: whole, or not at all. Raises OSError."""
        part = f"{name}.part"
        self.remove(part)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(part, flags, 0o600, dir_fd=self.fd), "wb") as file:
            file.write(content)
        os.replace(part, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)


def _not_private(path: Path, problem: str, command: str, otherwise: str) -> NotPrivate:
    advice = f"; see what it is, then: {command}" if command else f"; {otherwise}" if otherwise else ""
    return NotPrivate(f"{path} {problem}, and s3fuse takes only what is its user's alone{advice}")


def open_private_file(path: Path | str, flags: int) -> int:
    """A descriptor of a file of this user's, new ones with mode 0600. Raises NotPrivate, OSError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)  # a fifo would wait
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        return descriptor
    os.close(descriptor)
    raise NotPrivate(f"{path} belongs to {who(status.st_uid)} or is no file, and s3fuse takes only its user's own")


def open_log(path: str, *, is_new_mount: bool = True) -> int:
    """A descriptor that appends to a log, which nobody else can read: where it is this user's, it is made so.

    What is no regular file, as /dev/stderr, is taken as it is. A process that goes on with a mount takes a log that is
    not this user's, too: that is no reason to lose the mount. Raises NotPrivate, OSError.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        owner = os.lstat(path).st_uid
        if is_new_mount and owner not in (0, os.geteuid()):
            raise NotPrivate(f"{path} is a symbolic link of {who(owner)}; remove it, or choose another path") from None
        descriptor = os.open(path, flags, 0o600)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return descriptor
    if status.st_uid == os.geteuid():
        if status.st_mode & _OTHERS:
            os.fchmod(descriptor, 0o600)
    elif is_new_mount:
        os.close(descriptor)
        command = f"chown {os.geteuid()} {shlex.quote(path)}"
        raise NotPrivate(f"{path} belongs to {who(status.st_uid)}, who could read it: {command}")
    return descriptor


def remove_new_log(path: Path | str | None, *, is_new: bool) -> None:
    """A mount that failed leaves nothing behind: its log goes where it `is_new` and nothing is in it.

    One that was there before stays, and so does what is no file: /dev/null is empty, too.
    """
    if path is None or not is_new:
        return
    with suppress(OSError):
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_size:
            os.unlink(path)
