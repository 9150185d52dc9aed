"""When there is CPU time to spare for work that nobody waits for."""

from __future__ import annotations

import time

import trio

#: How long is looked, and how long one waits at most.
LOOK_S = 0.1
PATIENCE_S = 1.0
#: What is spare: so much of one CPU, while this thread needs no more than so much of its time.
SPARE_CPUS = 0.5
BUSY = 0.6


def _idle_s() -> float:
    """Seconds that CPUs were idle so far, summed over all of them; 0 where nobody says."""
    try:
        with open("/proc/uptime", "rb", buffering=0) as file:  # /proc/stat takes ten times as long
            return float(file.read(64).split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0


async def until_calm() -> None:
    """Returns when there are CPUs to spare and this thread is not busy; after `PATIENCE_S` in any case."""
    end = time.monotonic() + PATIENCE_S
    while True:
        at, used, idle = time.monotonic(), time.thread_time(), _idle_s()
        await trio.sleep(LOOK_S)
        spent = time.monotonic() - at
        if time.thread_time() - used < BUSY * spent and _idle_s() - idle >= SPARE_CPUS * spent:
            return
        if time.monotonic() >= end:
            return
