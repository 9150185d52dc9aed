"""Mixed load on a real mount through a proxy that fails a tenth of all requests in every way it knows.

Each worker has a directory of its own and knows what must be in it. A call may fail while there are faults; it then
did nothing, as all that the mount answers from the network comes before the change. In the end, with the faults off,
the mount, the bucket as S3 shows it, and what the workers know must be equal. `make soak MINUTES=30` runs it long.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fuse.harness import S3FUSE, Bucket, Mount, Mounts, run, s3_client
from tests.proxy import proxied
from tests.servers import minio, seaweedfs

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.proxy import Proxy

#: What a call may end with while the server misbehaves.
FAULT_ERRNOS = frozenset({errno.EIO, errno.ETIMEDOUT, errno.EACCES})
NAMES = ("a", "b", "c", "ü %+", "log")
FOLDERS = ("one", "two")
SIZES = (0, 1, 700, 4096, 70_000, 300_000)
BIG_BYTES = 12 << 20
FLUSH_S = 300
#: The mount remembers for 5 minutes what it has deleted, and for a minute and the TTL what nobody uses.
FORGET_S = 420.0


@dataclass
class Report:
    """What the workers did and met."""

    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest_s: dict[str, float] = field(default_factory=dict)
    #: Whatever must not be: wrong bytes, wrong names, calls that fail as no fault explains.
    losses: list[str] = field(default_factory=list)
    #: No loss, but not right: MinIO lists an object that it is writing or deleting as a prefix for a moment, so that a
    #: name may be seen again, as a directory, until the TTL is over.
    seen_again: list[str] = field(default_factory=list)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        kinds: Counter[str] = Counter()
        operations: Counter[str] = Counter()
        for (kind, operation), count in self.faults.items():
            kinds[kind] += count
            operations[operation] += count
        return json.dumps(
            {
                "calls": dict(self.done.most_common()),
                "failed calls": {f"{name} {code}": count for (name, code), count in self.failed.most_common()},
                "slowest call, s": {name: round(took, 1) for name, took in sorted(self.slowest_s.items())},
                "requests": self.requests.total(),
                "faults": self.faults.total(),
                "faults by kind": dict(kinds.most_common()),
                "faults by operation": dict(operations.most_common()),
                "seen again": self.seen_again,
                "losses": self.losses,
            },
            indent=1,
            ensure_ascii=False,
        )


class Worker:
    """One program on the mount, and what it knows: path below its directory -> content."""

    def __init__(self, root: Path, number: int, seed: int, report: Report, big: float) -> None:
        self.root = root / f"worker{number}"
        self.report = report
        self.files: dict[str, bytes] = {}
        self.folders = {"", *FOLDERS}
        self._random = random.Random(f"{seed}.{number}")
        self._big = big
        self._operations: list[Callable[[], None]] = [
            *[self.overwrite, self.append, self.read] * 4,
            *[self.rename, self.delete, self.list, self.truncate, self.patch] * 2,
            self.rename_folder,
            self.chmod,
        ]

    def prepare(self) -> None:
        for folder in ("", *FOLDERS):
            (self.root / folder).mkdir()

    def step(self) -> None:
        """One operation; an error that faults explain is counted, any other is a loss."""
        operation = self._random.choice(self._operations)
        name = operation.__name__
        began = time.monotonic()
        try:
            operation()
            self.report.done[name] += 1
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, str(error.errno))
            self.report.failed[name, code] += 1
            if error.errno in (errno.EEXIST, errno.EISDIR, errno.ESTALE, errno.ENOTEMPTY):
                self.report.seen_again.append(f"{self.root.name}: {name}: {error}")
            elif error.errno not in FAULT_ERRNOS:
                self.lose(f"{name}: {error}")
        took_s = time.monotonic() - began
        self.report.slowest_s[name] = max(took_s, self.report.slowest_s.get(name, 0.0))

    def lose(self, text: str) -> None:
        self.report.losses.append(f"{time.strftime('%H:%M:%S')} {self.root.name}: {text}")

    # -- choosing

    def _bytes(self) -> bytes:
        size = BIG_BYTES if self._random.random() < self._big else self._random.choice(SIZES)
        return self._random.randbytes(size)

    def _path(self) -> str:
        folder = self._random.choice(sorted(self.folders))
        name = self._random.choice(NAMES)
        return f"{folder}/{name}" if folder else name

    def _known(self) -> str | None:
        return self._random.choice(sorted(self.files)) if self.files else None

    # -- operations

    def _write(self, path: str, flags: int, data: bytes, offset: int) -> None:
        """Opens, writes, perhaps syncs, closes; each step that succeeds is known to have happened."""
        file = os.open(self.root / path, flags, 0o644)
        try:
            if flags & os.O_TRUNC or path not in self.files:
                self.files[path] = b""
            while data:
                count = os.pwrite(file, data[: 1 << 20], offset)
                before = self.files[path]
                self.files[path] = before[:offset].ljust(offset, b"\0") + data[:count] + before[offset + count :]
                data, offset = data[count:], offset + count
            if self._random.random() < 0.2:
                os.fsync(file)
        finally:
            os.close(file)

    def overwrite(self) -> None:
        self._write(self._path(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, self._bytes(), 0)

    def append(self) -> None:
        path = self._path()
        size = len(self.files.get(path, b""))
        self._write(path, os.O_WRONLY | os.O_CREAT, self._random.randbytes(200), size)

    def patch(self) -> None:
        """Bytes in the middle of a file that is there."""
        path = self._known()
        if path is not None:
            offset = self._random.randrange(len(self.files[path]) + 1)
            self._write(path, os.O_WRONLY, self._random.randbytes(5000), offset)

    def truncate(self) -> None:
        path = self._known()
        if path is not None:
            size = self._random.randrange(len(self.files[path]) + 1000)
            os.truncate(self.root / path, size)
            self.files[path] = self.files[path][:size].ljust(size, b"\0")

    def rename(self) -> None:
        source, target = self._known(), self._path()
        if source is not None:
            os.rename(self.root / source, self.root / target)
            self.files[target] = self.files.pop(source)

    def rename_folder(self) -> None:
        source = self._random.choice(sorted(self.folders - {""}))
        target = self._random.choice(["one", "two", "three"])
        if target in self.folders:
            return
        os.rename(self.root / source, self.root / target)
        self.folders = self.folders - {source} | {target}
        for path in [path for path in self.files if path.startswith(f"{source}/")]:
            self.files[target + path[len(source) :]] = self.files.pop(path)

    def delete(self) -> None:
        path = self._known()
        if path is not None:
            os.unlink(self.root / path)
            del self.files[path]

    def chmod(self) -> None:
        path = self._known()
        if path is not None:
            os.chmod(self.root / path, self._random.choice([0o600, 0o644]))

    def read(self) -> None:
        path = self._path()
        expected = self.files.get(path)
        try:
            file = os.open(self.root / path, os.O_RDONLY)
        except FileNotFoundError:
            if expected is not None:
                self.lose(f"{path} is said not to be there")
            return
        try:
            if self._random.random() < 0.7:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            with os.fdopen(file, "rb", closefd=False) as content:
                if expected is None:
                    self.report.seen_again.append(f"{self.root.name}: {path}")
                else:
                    self.compare(path, content.read(), expected)
        finally:
            os.close(file)

    def compare(self, path: str, found: bytes | None, expected: bytes | None) -> None:
        if found != expected:
            sizes = [None if data is None else len(data) for data in (found, expected)]
            first = next(
                (n for n, pair in enumerate(zip(found or b"", expected or b"", strict=False)) if pair[0] != pair[1]),
                None,
            )
            self.lose(f"{path} has {sizes[0]} bytes instead of {sizes[1]}, the first that differs is {first}")

    def list(self) -> None:
        folder = self._random.choice(sorted(self.folders))
        found = set(os.listdir(self.root / folder))
        expected = self.names(folder)
        if found > expected:
            self.report.seen_again.append(f"{self.root.name}: {folder}: {sorted(found - expected)}")
        elif found != expected:
            self.lose(f"{folder or '.'} shows {sorted(found)} instead of {sorted(expected)}")

    def names(self, folder: str) -> set[str]:
        prefix = f"{folder}/" if folder else ""
        names = {path[len(prefix) :] for path in self.files if path.startswith(prefix)}
        here = {name for name in names if "/" not in name}
        return here | (set() if folder else self.folders - {""})

    # -- the end

    def check(self, bucket: Bucket) -> None:
        """Compares the mount and the bucket with what is known."""
        for folder in self.folders:
            found = set(os.listdir(self.root / folder))
            if found != self.names(folder):
                self.lose(f"in the end {folder or '.'} shows {sorted(found)} instead of {sorted(self.names(folder))}")
        prefix = f"{self.root.name}/"
        keys = {key[len(prefix) :] for key in bucket.keys(prefix)}
        expected = set(self.files) | {f"{folder}/" if folder else "" for folder in self.folders}
        if keys != expected:
            self.lose(f"the bucket has {sorted(keys - expected)} too many and {sorted(expected - keys)} too few")
        for path, content in self.files.items():
            try:
                self.compare(f"mount: {path}", (self.root / path).read_bytes(), content)
            except OSError as error:
                self.lose(f"in the end: {error}")
            if path in keys:
                self.compare(f"bucket: {path}", bucket.get(prefix + path), content)


def soak(
    mount: Mount,
    bucket: Bucket,
    proxy: Proxy,
    *,
    seconds: float,
    rate: float,
    seed: int,
    workers: int,
    big: float,
    forget_s: float = FORGET_S,
) -> Report:
    """Runs the load, then flushes without faults and compares; nothing of it is left in the end, nor in memory.

    The mount is up and stays so. `forget_s`: how long it may remember what is gone.
    """
    report = Report()
    crew = [Worker(mount.path, number, seed, report, big) for number in range(workers)]
    for worker in crew:
        worker.prepare()
    proxy.rate = rate
    end = time.monotonic() + seconds

    def work(worker: Worker) -> None:
        while time.monotonic() < end:
            try:
                worker.step()
            except Exception as error:
                worker.lose(f"the worker itself failed: {error!r}")
                raise

    threads = [threading.Thread(target=work, args=(worker,)) for worker in crew]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.heal()
    flushed = run("timeout", str(FLUSH_S), S3FUSE, "flush", mount.path, timeout_s=2 * FLUSH_S, check=False)
    if flushed.returncode:
        report.losses.append(f"flush without faults: {flushed.returncode} {flushed.stderr} {mount.status()['pending']}")
    for worker in crew:
        worker.check(bucket)
    status = mount.status()
    if status["conflicts"]:
        report.losses.append(f"conflicts that nobody made: {status['conflicts']}")
    if leftovers := bucket.temporaries():
        report.losses.append(f"left in the bucket: {sorted(leftovers)}")
    report.faults, report.requests = proxy.counts, proxy.requests
    report.losses += _what_stays(mount, crew, forget_s)
    return report


def _what_stays(mount: Mount, crew: list[Worker], forget_s: float) -> list[str]:
    """Removes everything; says what the mount still keeps in memory of it after `forget_s`."""
    for worker in crew:
        shutil.rmtree(worker.root)
    mount.flush()
    end = time.monotonic() + forget_s
    while True:
        kept = {name: count for name, count in mount.status()["tables"].items() if count}
        if forget_s < FORGET_S:  # it did not wait for these
            kept = {name: count for name, count in kept.items() if name not in ("deleted", "leaving")}
        if not kept:
            return []
        if time.monotonic() > end:
            return [f"kept in memory though nothing is left: {kept}"]
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="of the faults and the load; default: a new one")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--server", choices=["minio", "seaweedfs"], default="minio")
    options = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    print(f"{options.server}, {options.minutes:g} minutes, seed {seed}", flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s3fuse-soak-")))
        (folder / "server").mkdir()
        start = minio if options.server == "minio" else seaweedfs
        server = stack.enter_context(start(folder / "server"))
        proxy = stack.enter_context(proxied(server, seed=seed))
        proxy.stall_s = 20.0
        client = stack.enter_context(s3_client(server))
        client.make_bucket("soak")
        mounts = Mounts(folder, lambda _: "soak")
        stack.callback(mounts.abort)
        mount = mounts.new(proxy.server, "--memory", "32MiB")
        mount.allowed += ALLOWED
        try:
            report = soak(
                mount,
                Bucket(server, "soak", client),
                proxy,
                seconds=options.minutes * 60,
                rate=options.rate,
                seed=seed,
                workers=4,
                big=0.01,
            )
            print(report.text(), flush=True)
            mount.stop(timeout_s=120)
        finally:
            print(f"last lines of the daemon's log:\n{mount.log_text()[-3000:]}", flush=True)
    return 1 if report.losses else 0


#: Warnings that faults explain.
ALLOWED = ["unfinished upload of .* stays in the bucket"]

if __name__ == "__main__":
    sys.exit(main())
