"""One node: a mount with a cache directory of its own, and a thread that works on it at random."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.fuse.harness import S3FUSE, run
from tests.nodes.content import NOBODY, Id, Mixed, ids_in, parse, record
from tests.nodes.history import Event, Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.fuse.harness import Mount
    from tests.nodes.history import History

#: What is in the name of every conflict file.
CONFLICT = ".conflict-"
FOLDERS = ("d0", "d1", "d2")
NAMES = ("a", "b", "c")
SIZES = (0, 1, 900, 5000, 70_000, 300_000)
#: Above what goes in one piece.
BIG_BYTES = 20 << 20
FLUSH_S = 120.0
#: A call that takes longer hangs: nothing here takes the server away.
STUCK_S = 60.0
WEIGHTS = {
    "write": 30,
    "append": 18,
    "create": 24,
    "rename": 10,
    "unlink": 8,
    "chmod": 6,
    "show": 10,
    "mkdir": 3,
    "rmdir": 1,
    "rename_folder": 2,
    "flush": 4,
    "kill": 1,
    "crash": 0.4,
}


@dataclass(frozen=True)
class Plan:
    """How long each node works (`seconds`, or that many operations), and on what. `big` is the share of big files."""

    seed: int
    seconds: float = float("inf")
    operations: float = float("inf")
    weights: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)
    big: float = 0.01


@dataclass
class Node:
    """A node's hands. `history` and `findings` are shared by all nodes."""

    number: int
    mount: Mount
    history: History
    findings: list[Finding]
    plan: Plan
    doing: Event | None = None
    writes: int = 0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.plan.seed * 100 + self.number)

    def work(self) -> None:
        """Does one operation after the other as long as the plan says."""
        verbs, shares = list(self.plan.weights), list(self.plan.weights.values())
        end = time.monotonic() + self.plan.seconds
        done = itertools.count()
        try:
            while next(done) < self.plan.operations and time.monotonic() < end:
                getattr(self, f"_{self._random.choices(verbs, shares)[0]}")()
        except Exception as error:
            self.findings.append(Finding("stuck", f"node {self.number} cannot go on: {error!r}"))

    # -- the operations

    def _write(self) -> None:
        """A whole rewrite at one handle: what was read there is what is replaced."""
        with self._event("write", self._file()) as event, self._opened(event, os.O_RDWR) as handle:
            event.seen = self._read(handle, event)
            self._put(handle, event, NOBODY)

    def _create(self) -> None:
        with (
            self._event("write", self._file()) as event,
            self._opened(event, os.O_RDWR | os.O_CREAT | os.O_EXCL) as handle,
        ):
            self._put(handle, event, NOBODY)

    def _append(self) -> None:
        with self._event("append", self._file()) as event, self._opened(event, os.O_RDWR | os.O_APPEND) as handle:
            event.seen = self._read(handle, event)
            self._put(handle, event, event.seen[-1] if event.seen else NOBODY)

    def _put(self, handle: int, event: Event, base: Id) -> None:
        self.writes += 1
        event.id = Id(self.number, self.writes)
        length = BIG_BYTES if self._random.random() < self.plan.big else self._random.choice(SIZES)
        data = memoryview(record(event.id, base, length))
        if event.verb == "write":
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
        while data:
            data = data[os.write(handle, data) :]
        if self._random.random() < 0.3:
            os.fsync(handle)
            event.acknowledged = True

    def _read(self, handle: int, event: Event) -> tuple[Id, ...]:
        """What is in the file. Raises OSError; bytes that nobody wrote so are a finding and ENODATA."""
        data = bytearray()
        while part := os.pread(handle, 1 << 20, len(data)):
            data += part
        try:
            return tuple(one.id for one in parse(bytes(data)))
        except Mixed as error:
            if CONFLICT in event.path:  # where a base is gone, zeros are in its place, as README says
                return tuple(ids_in(bytes(data)))
            self.findings.append(Finding("mixed", f"node {self.number} reads {event.path}: {error}"))
            raise OSError(errno.ENODATA, "mixed") from None

    def _rename(self) -> None:
        # Conflict files stay: under another name nobody would know that a part of them may be zeros.
        source, target = self._file(conflicts=False), self._file(conflicts=False)
        with self._event("rename", source) as event:
            event.target = target
            event.seen = self._look(target)
            os.rename(self._at(source), self._at(target))
        # What moved is not replaced: where it is afterwards, the bucket or a later event tells.

    def _unlink(self) -> None:
        with self._event("unlink", self._file()) as event:
            event.seen = self._look(event.path)
            os.unlink(self._at(event.path))

    def _look(self, path: str) -> tuple[Id, ...]:
        """What is in a file now; a version that is replaced while it is read is read again."""
        for _ in range(3):
            with suppress(OSError):
                look = Event(self.number, "look", path)
                with self._opened(look, os.O_RDONLY) as handle:
                    return self._read(handle, look)
        return ()

    def _chmod(self) -> None:
        with self._event("chmod", self._file()) as event:
            os.chmod(self._at(event.path), self._random.choice((0o600, 0o644, 0o755)))

    def _show(self) -> None:
        with self._event("read", self._file()) as event, self._opened(event, os.O_RDONLY) as handle:
            self._read(handle, event)

    def _mkdir(self) -> None:
        with self._event("mkdir", self._random.choice(FOLDERS)) as event:
            os.mkdir(self._at(event.path))

    def _rmdir(self) -> None:
        with self._event("rmdir", self._random.choice(FOLDERS)) as event:
            os.rmdir(self._at(event.path))

    def _rename_folder(self) -> None:
        with self._event("rename", self._random.choice(FOLDERS)) as event:
            event.target = self._random.choice(FOLDERS)
            os.rename(self._at(event.path), self._at(event.target))

    def _flush(self) -> None:
        self.flush()

    def flush(self) -> bool:
        """Whether all that this node had written is in the bucket now."""
        began = time.monotonic()
        with self._event("flush") as event:
            done = run(S3FUSE, "flush", self.mount.mountpoint, timeout_s=FLUSH_S, check=False)
            if done.returncode:
                self.findings.append(Finding("flush", f"node {self.number}: {done.stderr.strip()}"))
                raise OSError(errno.EIO, done.stderr)
        if not event.errno:
            self.history.acknowledge(self.number, began)
        return not event.errno

    def _kill(self) -> None:
        """SIGKILL for the worker in the middle of what comes next; another one goes on."""
        with self._event("kill"):
            timer = threading.Timer(self._random.random() / 2, self._kill_worker, (self.mount.worker_pid,))
            timer.daemon = True
            timer.start()

    @staticmethod
    def _kill_worker(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)

    def _crash(self) -> None:
        """SIGKILL for keeper and worker, then a mount on the same cache directory."""
        with self._event("crash"):
            self.mount.kill()
            self.mount.start()

    # -- parts

    def _file(self, *, conflicts: bool = True) -> str:
        folder = self._random.choice(FOLDERS)
        name = self._random.choice(NAMES)
        if conflicts and self._random.random() < 0.1:
            with suppress(OSError):
                name = self._random.choice(os.listdir(self._at(folder)) or [name])
        return f"{folder}/{name}"

    def _at(self, path: str) -> Path:
        return self.mount.mountpoint / path

    @contextmanager
    def _opened(self, event: Event, flags: int) -> Iterator[int]:
        """The file open; closing it is a part of the event, and may fail it."""
        handle = os.open(self._at(event.path), flags, 0o644)
        try:
            yield handle
        except BaseException:
            with suppress(OSError):
                os.close(handle)
            raise
        os.close(handle)

    @contextmanager
    def _event(self, verb: str, path: str = "") -> Iterator[Event]:
        """Notes an operation, how long it took, and the error with which it ended."""
        event = self.doing = Event(self.number, verb, path, began=time.monotonic())
        self.history.events.append(event)
        try:
            yield event
        except OSError as error:
            event.errno = error.errno or errno.EIO
            event.acknowledged = False
        finally:
            event.ended = time.monotonic()
            self.doing = None
