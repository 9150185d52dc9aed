"""A sampling profile of the daemon while a workload runs, kept as a flame graph."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench import processes
from bench.systems import Broken

if TYPE_CHECKING:
    from collections.abc import Iterator

_SAMPLES_PER_S = 500


@contextmanager
def profiled(mark: str, target: Path) -> Iterator[None]:
    """Has py-spy watch the largest process of this mark, and write an SVG when the block ends. Raises Broken."""
    target.parent.mkdir(parents=True, exist_ok=True)
    pid = max(processes.marked(mark), key=lambda pid: processes.peak_bytes([pid]))
    command = [
        str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(pid), "--output", str(target),
        "--rate", str(_SAMPLES_PER_S), "--nonblocking", "--threads",
    ]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as spy:
        try:
            # A workload may be over before py-spy has found its way into the process.
            _wait_for_first_sample(spy)
            yield
        finally:
            if spy.poll() is None:
                spy.send_signal(signal.SIGINT)
            said = spy.communicate(timeout=60)[0].decode(errors="replace")
    if not target.exists():
        raise Broken(f"py-spy made no profile: {said.strip()[-200:]}")


def _wait_for_first_sample(spy: subprocess.Popen[bytes]) -> None:
    assert spy.stdout is not None
    for line in spy.stdout:
        if b"Sampling process" in line:
            return
    raise Broken("py-spy does not get into the daemon; it must be root")
