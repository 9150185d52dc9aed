"""Lets a call that waits long end for the sake of a signal.

The kernel tells libfuse that the caller of a request was sent a signal, but pyfuse3 does not pass that on, and until
the request is answered not even SIGKILL ends the caller. So the adapter notes whose request it is, what may wait long
is marked with `interruptible`, and while anything is in such a block `watch` looks from time to time whether a
caller has to act on a signal. Then the block is cancelled. Requests that wait for nothing pay for one context variable.

What is inside a block may be given up at any await: work that others rely on goes on in tasks of its own, and what a
request changes it changes after its last wait.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeAlias

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Caller: TypeAlias = tuple[Callable[..., Iterable[int]], tuple[Any, ...]]

#: A signal is looked for in waits that last longer than one of these, and must be there for two looks.
LOOK_S = 0.1

#: Whose request this task serves: a function and its arguments that give the threads to look at; None: nobody's.
caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


class Interrupted(OSError):
    """The caller has a signal to act on (EINTR)."""

    def __init__(self) -> None:
        super().__init__(errno.EINTR, os.strerror(errno.EINTR))


class _Wait:
    __slots__ = ("caller", "for_room", "looks", "scope")

    def __init__(self, whose: Caller, for_room: bool) -> None:
        self.caller = whose
        self.for_room = for_room
        self.looks = 0  # looks in a row that found a signal
        self.scope = trio.CancelScope()


_waiting: set[_Wait] = set()
_some = trio.Event()


@contextmanager
def interruptible(*, for_room: bool = False) -> Iterator[None]:
    """Raises Interrupted, at an await inside, once the caller of the request has a signal to act on.

    `for_room`: a write that waits until less is dirty.
    """
    whose = caller.get()
    if whose is None:
        yield
        return
    wait = _Wait(whose, for_room)
    _waiting.add(wait)
    _some.set()
    try:
        with wait.scope:
            yield
    finally:
        _waiting.discard(wait)
    if wait.scope.cancelled_caught:
        raise Interrupted


def waiting() -> int:
    """How many requests are in such a block now."""
    return len(_waiting)


def give_up(*, for_room: bool = False) -> None:
    """Ends all waits, or those of writes `for_room`, as a signal would: the mount is about to end."""
    for wait in _waiting:
        if wait.for_room or not for_room:
            wait.scope.cancel()


async def watch(signalled: Callable[[int], bool]) -> None:
    """Cancels waits whose caller is `signalled`; runs until cancelled.

    Two looks must find it: a signal that a thread is free to take is pending for a moment too.
    """
    global _some
    while True:
        await _some.wait()
        _some = trio.Event()
        while _waiting:
            waiting = list(_waiting)
            await trio.sleep(LOOK_S)
            for wait in waiting:
                if wait in _waiting:
                    threads, arguments = wait.caller
                    wait.looks = wait.looks + 1 if any(map(signalled, threads(*arguments))) else 0
                    if wait.looks == 2:
                        wait.scope.cancel()
