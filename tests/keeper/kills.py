"""A campaign of kills of a mount's process while programs work on it, which are to see nothing but a pause."""

from __future__ import annotations

import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from s3fuse import control
from tests.fuse.harness import S3FUSE, run
from tests.keeper.programs import PROGRAMS, tree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.fuse.harness import Mount

REPOSITORY = Path(__file__).resolve().parents[2]
#: The longest that anything may take before it counts as hung.
PATIENCE_S = 120.0
DIED = "the worker died: killed by SIGKILL"
#: What a killed process has sent may take the place of what another one was to delete. What is left is compared.
LATE = "was changed by somebody else before it could be deleted"


@dataclass
class Report:
    """What came of it. Pauses in seconds, as a program sees them that asks the mount at that moment."""

    kills: int = 0
    restarts: int = 0
    kill_pauses_s: list[float] = field(default_factory=list)
    restart_pauses_s: list[float] = field(default_factory=list)
    rounds: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.kills} kills, {self.restarts} restarts"]
        for what, pauses in (("kill", self.kill_pauses_s), ("restart", self.restart_pauses_s)):
            if pauses:
                ordered = sorted(pauses)
                last = ordered[math.ceil(0.99 * len(ordered)) - 1]
                lines.append(f"pause at a {what}: median {statistics.median(ordered):.2f} s, p99 {last:.2f} s")
        lines.append("rounds: " + ", ".join(f"{name} {count}" for name, count in self.rounds.items()))
        return "\n".join(lines + self.problems)


class Campaign:
    """Programs on one mount. Everything else is kept in `folder`."""

    def __init__(self, mount: Mount, folder: Path, names: list[str], seed: int) -> None:
        self.mount = mount
        self.folder = folder
        self.names = names
        self.seed = seed
        self.random = random.Random(seed)
        self.report = Report()
        mount.allowed += [DIED, LATE]

    @contextmanager
    def _program(self, name: str, root: Path, rounds: int = 1 << 30) -> Iterator[subprocess.Popen[str]]:
        root.mkdir(exist_ok=True)
        work = self.folder / f"{root.parent.name}-{name}"
        work.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.keeper.programs", name, str(root), str(self.seed), str(rounds)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        with (
            (work / "out").open("w") as out,
            (work / "errors").open("w") as errors,
            subprocess.Popen(
                [*command, str(self.folder / "stop")], cwd=work, stdout=out, stderr=errors, text=True, env=environment
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def _said(self, name: str, place: str, file: str = "out") -> str:
        return (self.folder / f"{place}-{name}" / file).read_text()

    def run(self, kills: int, restarts: int = 0) -> Report:
        """Kills the mount's process so often, and has it replaced so often, in between each other."""
        place = self.mount.path.name
        with ExitStack() as stack:
            running = {name: stack.enter_context(self._program(name, self.mount.path / name)) for name in self.names}
            turns = [self._kill] * kills + [self._restart] * restarts
            self.random.shuffle(turns)
            for turn in turns:
                turn()
                dead = [name for name, process in running.items() if process.poll() is not None]
                if dead:
                    break
            (self.folder / "stop").touch()
            for name, process in running.items():
                try:
                    process.wait(PATIENCE_S)
                except subprocess.TimeoutExpired:
                    self.report.problems.append(f"{name} hangs")
                    continue
                if process.returncode:
                    self.report.problems.append(
                        f"{name} ended with {process.returncode}: {self._said(name, place, 'errors')[-3000:]}"
                    )
        if not self.report.problems:
            self._compare(place)
        return self.report

    def _serving(self) -> int:
        """The pid of the process that serves now."""
        status = control.request(self.mount.mountpoint, "status", timeout_s=PATIENCE_S)
        return int(status["worker_pid"])

    def _kill(self) -> None:
        worker = self._serving()
        # The moment of the kill, not a wait for something. What a killed process may have sent is waited for up to 5 s
        # before something else is written there, so now and then there is time for more than that.
        time.sleep(self.random.uniform(0.0, 0.8) if self.random.random() < 0.85 else self.random.uniform(4.0, 10.0))
        os.kill(worker, signal.SIGKILL)
        began = time.monotonic()
        os.statvfs(self.mount.path)
        self.report.kill_pauses_s.append(time.monotonic() - began)
        self.report.kills += 1

    def _restart(self) -> None:
        before = self._serving()
        run(S3FUSE, "restart", self.mount.path, timeout_s=PATIENCE_S)
        status = control.request(self.mount.mountpoint, "status", timeout_s=PATIENCE_S)
        assert status["worker_pid"] != before
        self.report.restart_pauses_s.append(status["process"]["last_pause_s"])
        self.report.restarts += 1

    def _compare(self, place: str) -> None:
        """The same programs on a local directory have to see and to leave the same."""
        local = self.folder / "local"
        local.mkdir()
        (self.folder / "stop").unlink()
        for name in self.names:
            ours = self._said(name, place).splitlines()
            self.report.rounds[name] = len(ours)
            with self._program(name, local / name, len(ours)) as process:
                process.wait(PATIENCE_S)
                assert process.returncode == 0, self._said(name, "local", "errors")
            theirs = self._said(name, "local").splitlines()
            for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
                if one != other:
                    self.report.problems.append(f"{name}, round {number}: {one[:500]} and not {other[:500]}")
                    break
        self.differences(self.mount.path, local)

    def differences(self, root: Path, local: Path) -> None:
        """Notes where what is on the mount is not what is in the local directory."""
        for name in self.names:
            if name == "database":
                continue  # pages of deleted rows hold what was there by chance
            found, wanted = tree(root / name), tree(local / name)
            for path in sorted(found.keys() | wanted.keys()):
                if found.get(path) != wanted.get(path):
                    self.report.problems.append(f"{name}/{path}: {found.get(path)} and not {wanted.get(path)}")


ALL = list(PROGRAMS)
