"""What can go wrong between s3fuse and the outside, as types.

Stores raise only `StoreError`s; `fuse.errno` maps each class to one errno and `cli` maps `UserError` to
a message and an exit code. POSIX outcomes (ENOENT, EEXIST, ...) are plain `OSError`s raised by `vfs`.
"""

from __future__ import annotations

from enum import IntEnum

from s3fuse.printable import printable


class ExitCode(IntEnum):
    """Exit codes of every verb; documented in the README."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    PENDING = 3
    REFUSED = 4


class UserError(Exception):
    """A failure whose text is shown to the user as it is: it names the thing that is wrong and the remedy."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoreError(Exception):
    """A store could not do what it was asked; `key` names the object or is empty.

    The text may hold what a server said: it is made printable and short here, wherever it is shown later.
    """

    #: The same request may succeed later without anybody changing anything.
    transient = False
    #: What somebody has to give before it can succeed, for `status`.
    needs = ""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(printable(message))
        self.key = key


class NotFound(StoreError):
    """No object has this key."""


class NoSuchBucket(StoreError):
    """The bucket does not exist (or was deleted while mounted)."""

    needs = "the bucket"


class PreconditionFailed(StoreError):
    """The object is not the version the request was conditional on (412), or exists already."""


class AccessDenied(StoreError):
    """The server refused the permission (403)."""

    needs = "permission"


class NeedsCredentials(AccessDenied):
    """The server refused the keys themselves: unknown, wrong or expired; or there are none."""

    needs = "credentials"


class ClockSkew(StoreError):
    """The server refused the time of a request, also after the clock was set by its Date header."""

    transient = True
    needs = "the right time on this host and on the server"


class Refused(StoreError):
    """The server refused the request for good: repeating it unchanged cannot help (other 4xx)."""


class Unsupported(StoreError):
    """The server does not implement this operation (501, NotImplemented)."""


class Unavailable(StoreError):
    """No answer in time, no connection, or a 5xx or 429 after all retries."""

    transient = True


class BadResponse(StoreError):
    """The answer is not what was asked for: short body, wrong length or etag, XML where bytes were due."""

    transient = True


def described(error: BaseException) -> str:
    """What an error that nobody foresaw says of itself; never the text that a codec failed at, which may hold keys."""
    return f"{type(error).__name__}: {error}" if isinstance(error, UnicodeError) else repr(error)


def first(error: BaseException) -> BaseException:
    """The first exception of a group, whose nurseries may be nested; any other exception itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
