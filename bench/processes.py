"""What a mounted filesystem's processes use: they are found by a variable that they inherited, however they detach."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

#: The environment variable that marks the processes of one mount.
MARK = "BENCH_MOUNT"
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def marked(mark: str) -> list[int]:
    """The pids of the living processes of this mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0") and _state(entry) != "Z":
                    found.append(int(entry.name))
    return found


def cpu_s(pids: list[int]) -> float:
    """CPU seconds these processes and their ended children have used so far."""
    return sum(sum(map(int, _stat(Path("/proc", str(pid)))[11:15])) * _TICK_S for pid in pids)


def reset_peak(pids: list[int]) -> None:
    """Peak memory is counted anew from here."""
    for pid in pids:
        with suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pids: list[int]) -> int:
    """The sum of the processes' peak resident memory."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += int(line.split()[1]) << 10
    return total


def wait_for_end(mark: str, timeout_s: float) -> bool:
    """Whether every process of the mark ended in time."""
    end = time.monotonic() + timeout_s
    while marked(mark):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _stat(process: Path) -> list[str]:
    """The fields of /proc/PID/stat after the name (proc(5) counts them from 3), zeros if it has ended."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X"] + ["0"] * 40


def _state(process: Path) -> str:
    return _stat(process)[0]
