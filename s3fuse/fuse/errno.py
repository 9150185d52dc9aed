"""The one place that says which errno a failure becomes."""

from __future__ import annotations

import errno
import functools
import inspect
import logging
from typing import TYPE_CHECKING, Any, TypeVar

import pyfuse3

from s3fuse import errors, waits

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

log = logging.getLogger(__name__)

ERRNO: dict[type[errors.StoreError], int] = {
    errors.NotFound: errno.ENOENT,
    errors.NoSuchBucket: errno.EIO,
    errors.PreconditionFailed: errno.ESTALE,
    errors.AccessDenied: errno.EACCES,
    errors.NeedsCredentials: errno.EACCES,
    errors.ClockSkew: errno.EIO,
    errors.Refused: errno.EIO,
    errors.Unsupported: errno.EOPNOTSUPP,
    errors.Unavailable: errno.ETIMEDOUT,
    errors.BadResponse: errno.EIO,
    errors.StoreError: errno.EIO,
}

Answer = TypeVar("Answer")


def errno_of(error: errors.StoreError) -> int:
    """The errno of the nearest class that `ERRNO` names; stores may have classes of their own below those."""
    return next(ERRNO[kind] for kind in type(error).__mro__ if kind in ERRNO)


def _threads_of_context(*args: Any) -> Iterable[int]:
    return (args[-1].pid,)


def _threads_of_handle(*args: Any) -> Iterable[int]:
    threads: Iterable[int] = args[0].threads(args[1])
    return threads


def answers(operation: Callable[..., Coroutine[Any, Any, Answer]]) -> Callable[..., Coroutine[Any, Any, Answer]]:
    """Makes an operation raise only `pyfuse3.FUSEError`: anything else would end the mount.

    It also notes whose request it is: that of the thread in its `ctx`, or where pyfuse3 gives none (its last argument
    is something else), that of a thread which `threads` of the operations knows of for the handle.

    OSErrors keep their errno. Store errors follow `ERRNO` and are logged, since the program sees only a number. What
    nobody expected is EIO with a traceback in the log.
    """

    whose = _threads_of_context if "ctx" in inspect.signature(operation).parameters else _threads_of_handle

    @functools.wraps(operation)
    async def wrapped(*args: Any) -> Answer:
        waits.caller.set((whose, args))
        try:
            return await operation(*args)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except errors.StoreError as error:
            log.info("%s: %s", operation.__name__, error)
            raise pyfuse3.FUSEError(errno_of(error)) from None
        except pyfuse3.FUSEError:
            raise
        except Exception:
            log.exception("%s failed in a way that nobody expected; the program gets EIO", operation.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return wrapped
