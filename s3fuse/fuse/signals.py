"""Whether a thread that waits for an answer of ours has a signal to act on, as /proc/PID/status tells (proc(5)).

Only those count that are meant to end what the program does: signals whose action is to end it, and HUP, INT, QUIT
and TERM where it handles them. Others must not make calls fail with EINTR: programs that handle SIGCHLD, profile by
SIGPROF or are written in Go (SIGURG) do not expect it of files.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress


def _mask(*signals: int) -> int:
    return sum(1 << (number - 1) for number in signals)


_MEANT = _mask(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
#: Signals that do nothing, or stop the process, where it does not handle them: signal(7).
_HARMLESS = _mask(
    signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH,
    signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU,
)  # fmt: skip
#: A process with more threads than these is looked at in its first ones only.
MOST_THREADS = 64


def _status(path: str) -> dict[str, str]:
    with open(path, encoding="ascii", errors="replace") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)


def _pending(status: dict[str, str]) -> bool:
    masks = {name: int(status[name], 16) for name in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")}
    waiting = (masks["SigPnd"] | masks["ShdPnd"]) & ~masks["SigBlk"] & ~masks["SigIgn"]
    return bool(waiting & ((_MEANT & masks["SigCgt"]) | ~(masks["SigCgt"] | _HARMLESS)))


def thread_is_signalled(thread: int) -> bool:
    """Whether this thread has such a signal pending. False where it is gone or not to be seen from here (pid 0)."""
    try:
        return thread > 0 and _pending(_status(f"/proc/{thread}/status"))
    except (OSError, ValueError, KeyError):
        return False


def process_threads(thread: int) -> list[int]:
    """The threads of the process of `thread`: the kernel does not tell which of them reads, writes or syncs."""
    with suppress(OSError):
        return [int(name) for name in os.listdir(f"/proc/{thread}/task")[:MOST_THREADS]]
    return []
