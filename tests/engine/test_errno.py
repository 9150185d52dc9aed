"""Which errno a failure becomes, and that nothing but FUSEError reaches the kernel's loop."""

from __future__ import annotations

import errno
import logging

import pyfuse3
import pytest
import trio

from s3fuse import errors
from s3fuse.fuse.errno import ERRNO, answers


def store_errors() -> list[type[errors.StoreError]]:
    """Every class of `errors` that a store may raise."""
    found, todo = [], [errors.StoreError]
    while todo:
        kind = todo.pop()
        if kind.__module__ == errors.__name__:
            found.append(kind)
        todo.extend(kind.__subclasses__())
    return found


async def errno_of(error: BaseException) -> int:
    @answers
    async def operation(argument: str) -> str:
        await trio.lowlevel.checkpoint()
        raise error

    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operation("x")
    number: int = caught.value.errno
    return number


async def test_answer_passes() -> None:
    @answers
    async def operation(first: int, second: int) -> int:
        await trio.lowlevel.checkpoint()
        return first + second

    assert await operation(1, 2) == 3
    assert operation.__name__ == "operation"


@pytest.mark.parametrize("kind", store_errors())
async def test_every_store_error_has_an_errno(kind: type[errors.StoreError], caplog: pytest.LogCaptureFixture) -> None:
    assert kind in ERRNO
    with caplog.at_level(logging.INFO, "s3fuse"):
        assert await errno_of(kind("the reason", "key")) == ERRNO[kind]
    assert "the reason" in caplog.text  # the program sees only a number


def test_the_classes_are_found() -> None:
    assert {errors.NotFound, errors.Unavailable, errors.BadResponse, errors.StoreError} <= set(store_errors())


async def test_a_class_that_nobody_named_takes_its_parents_errno() -> None:
    class Throttled(errors.Unavailable):
        """A store's own."""

    assert await errno_of(Throttled("slow down")) == errno.ETIMEDOUT


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOTEMPTY, "x"), errno.ENOTEMPTY),
        (FileNotFoundError(errno.ENOENT, "x"), errno.ENOENT),
        (OSError("without a number"), errno.EIO),
        (pyfuse3.FUSEError(errno.EXDEV), errno.EXDEV),
    ],
)
async def test_errnos_pass(error: BaseException, number: int) -> None:
    assert await errno_of(error) == number


@pytest.mark.parametrize("error", [KeyError("what"), AssertionError("no"), RuntimeError("odd")])
async def test_unexpected_is_eio_with_a_traceback(
    error: Exception, caplog: pytest.LogCaptureFixture, expected_log: list[str]
) -> None:
    expected_log.append("operation failed in a way that nobody expected")
    assert await errno_of(error) == errno.EIO
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[1] is error


async def test_cancellation_is_no_failure() -> None:
    @answers
    async def operation() -> None:
        await trio.sleep_forever()

    with trio.move_on_after(0) as scope:
        await operation()
    assert scope.cancelled_caught
