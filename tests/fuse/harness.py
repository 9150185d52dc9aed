"""A mount of the real command line on a real server, with what each test must hold at its end.

`Mount.stop` fails where the exit code is not 0, the log has a warning that the test did not expect, or something
stays mounted or running. A test that hangs in a system call on the mount is freed by `Mounts.watch`: the connection
is aborted through /sys/fs/fuse, so that the call fails and pytest goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import urllib3
from minio import Minio

from s3fuse import control, kernel
from s3fuse.coherence.leases import is_lease

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from minio.datatypes import Object

    from tests.servers import Server

S3FUSE = str(Path(sys.executable).parent / "s3fuse")
T = TypeVar("T")
R = TypeVar("R")

_WARNING = re.compile(r"^\S+ \S+ (?:WARNING|ERROR|CRITICAL) |^Traceback ")


def run(
    *command: str | Path, timeout_s: float = 60, check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end. Fails with its whole output where `check` and the exit code is not 0."""
    done = subprocess.run(
        [os.fspath(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=timeout_s,
        **options,
    )
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def wait_for(look: Callable[[], T], *, timeout_s: float = 15.0, every_s: float = 0.02) -> T:
    """The first true value of `look`; fails after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (value := look()):
        assert time.monotonic() < end, f"{look} did not come true within {timeout_s} s"
        time.sleep(every_s)
    return value


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_environment(**changes: str) -> dict[str, str]:
    """The environment without anything that names a server or keys."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MINIO_", "MC_"))}
    return kept | {"MC_CONFIG_DIR": "/nonexistent"} | changes


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Bucket:
    """A bucket seen through the S3 API, beside s3fuse's own client."""

    server: Server
    name: str
    client: Minio

    def put(self, key: str, data: bytes, metadata: dict[str, str | list[str] | tuple[str]] | None = None) -> None:
        import io

        self.client.put_object(self.name, key, io.BytesIO(data), len(data), metadata=metadata)

    def get(self, key: str) -> bytes:
        response = self.client.get_object(self.name, key)
        try:
            return bytes(response.read())
        finally:
            response.close()
            response.release_conn()

    def digest(self, key: str) -> str:
        response = self.client.get_object(self.name, key)
        try:
            digest = hashlib.sha256()
            for chunk in response.stream(1 << 20):
                digest.update(chunk)
            return digest.hexdigest()
        finally:
            response.close()
            response.release_conn()

    def head(self, key: str) -> Object:
        return self.client.stat_object(self.name, key)

    def metadata(self, key: str) -> dict[str, str]:
        """User metadata without its prefix."""
        headers = self.head(key).metadata or {}
        return {k.lower().removeprefix("x-amz-meta-"): v for k, v in headers.items() if "x-amz-meta-" in k.lower()}

    def delete(self, key: str) -> None:
        self.client.remove_object(self.name, key)

    def keys(self, prefix: str = "") -> set[str]:
        """All keys but the leases of mounts; on SeaweedFS without what s3fuse keeps of directories.

        Their markers have no metadata there.
        """
        hidden = ".s3fuse/directories/" if self.server.kind == "seaweedfs" else "\0"
        return {key for key in self.every_key(prefix) if not key.startswith(hidden) and not is_lease(key)}

    def every_key(self, prefix: str = "") -> set[str]:
        """All keys."""
        found = self.client.list_objects(self.name, prefix=prefix, recursive=True)
        return {item.object_name for item in found if item.object_name}

    def temporaries(self) -> set[str]:
        """The keys of objects that s3fuse keeps for a while only: parked bytes, and what was set aside."""
        kept = (".s3fuse/directories/", ".s3fuse/root")
        return {key for key in self.keys(".s3fuse/") if not key.startswith(kept)}

    def leases(self, prefix: str = "") -> set[str]:
        """The keys of leases."""
        return {key for key in self.every_key(prefix) if is_lease(key)}

    def each(self, work: Callable[[T], R], items: Sequence[T], threads: int = 8) -> list[R]:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(work, items))


@contextmanager
def s3_client(server: Server) -> Iterator[Minio]:
    pool = urllib3.PoolManager(maxsize=16, timeout=urllib3.Timeout(30), retries=urllib3.Retry(2))
    try:
        yield Minio(
            server.endpoint.removeprefix("http://"),
            access_key=server.access_key,
            secret_key=server.secret_key,
            secure=False,
            http_client=pool,
        )
    finally:
        pool.clear()


class Gate:
    """A way to a server on which changes (PUT, POST, DELETE) can be held back while reads pass.

    A request that is held stays with the client: its connection is read no further until `open`.
    """

    def __init__(self, server: Server) -> None:
        self._to = ("127.0.0.1", int(server.endpoint.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = threading.Event()
        self._open.set()
        self._what = re.compile(b"")
        #: How many requests are held.
        self.waiting = 0
        self._sockets: list[socket.socket] = []
        self.server = dataclasses.replace(server, endpoint=f"http://127.0.0.1:{self._listener.getsockname()[1]}")
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self, what: bytes = b"PUT|POST|DELETE") -> None:
        """Holds requests whose head begins with that pattern."""
        self._what = re.compile(what)
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self.open()
        for one in (self._listener, *self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._to)
                self._sockets += (client, server)
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answers, args=(client, server), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError, ValueError), client.makefile("rb") as requests:
            while line := requests.readline():
                head = line
                while (line := requests.readline()) not in (b"\r\n", b""):
                    head += line
                if self._what.match(head):
                    self.waiting += 1
                    self._open.wait()
                    self.waiting -= 1
                server.sendall(head + line)
                length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
                left = int(length[1]) if length else 0
                while left and (data := requests.read(min(left, 1 << 16))):
                    server.sendall(data)
                    left -= len(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@dataclass
class Mount:
    """One bucket, one mountpoint, one cache directory; mounted and unmounted any number of times."""

    server: Server
    bucket: str
    mountpoint: Path
    cache: Path
    log: Path
    options: tuple[str, ...] = ()
    #: Regular expressions of warnings that this test expects.
    allowed: list[str] = field(default_factory=list)
    pid: int = 0
    _seen: int = 0

    @property
    def path(self) -> Path:
        return self.mountpoint

    def command(self, *more: str) -> list[str]:
        where = [] if "--ephemeral" in self.options else ["--cache-dir", str(self.cache)]
        where += ["--log-file", str(self.log)]
        return [S3FUSE, "mount", *where, *self.options, *more, self.bucket, str(self.mountpoint)]

    def start(self, *more: str, timeout_s: float = 30) -> Mount:
        done = run(
            *self.command(*more), env=free_environment(**self.server.environment), timeout_s=timeout_s, check=False
        )
        assert done.returncode == 0, f"mount: exit code {done.returncode}\n{done.stderr}{self.log_text()}"
        assert not done.stderr, done.stderr
        self.pid = int(json.loads(control.socket_path(self.mountpoint).with_suffix(".json").read_text())["pid"])
        assert self.mounted
        return self

    @property
    def mounted(self) -> bool:
        return kernel.mount_entry(self.mountpoint) is not None

    @property
    def running(self) -> bool:
        return bool(self.pid) and is_alive(self.pid)

    def wait_for_end(self, timeout_s: float = 30) -> None:
        """Returns when the daemon has ended."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            ready, _, _ = select.select([descriptor], [], [], timeout_s)
        finally:
            os.close(descriptor)
        assert ready, f"the daemon still runs after {timeout_s} s"

    def stop(self, timeout_s: float = 60) -> None:
        """Unmounts with `s3fuse umount` and checks what must hold at the end."""
        done = run(S3FUSE, "umount", self.mountpoint, timeout_s=timeout_s, check=False)
        assert done.returncode == 0, f"umount: exit code {done.returncode}\n{done.stderr}{self.log_text()}"
        self.wait_for_end()
        self.check_ended()

    def check_ended(self) -> None:
        assert not self.mounted
        assert not self.running
        assert not control.socket_path(self.mountpoint).exists()
        self.check_log()

    def remount(self, *more: str, empty_cache: bool = True) -> Mount:
        self.stop()
        if empty_cache:
            shutil.rmtree(self.cache)
        return self.start(*more)

    @property
    def worker_pid(self) -> int:
        """The process that serves the mount now; `pid` is its keeper."""
        return int(control.last_said(self.mountpoint)["worker_pid"])

    def kill(self) -> None:
        """SIGKILL to keeper and worker, as a crash of the whole; the dead mount stays."""
        worker = self.worker_pid
        os.kill(self.pid, signal.SIGSTOP)  # it shall not see the worker die, nor the worker it
        for pid in (worker, self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait_for_end()
        # Its first thread may be gone while others still have the connection.
        assert control.wait_for_end(worker, 60), "the worker does not die"

    def status(self) -> dict[str, Any]:
        return control.request(self.mountpoint, "status")

    def requests(self) -> dict[str, int]:
        return dict(self.status()["requests"])

    def flush(self) -> None:
        run(S3FUSE, "flush", self.mountpoint)

    def journal(self, query: str) -> list[tuple[Any, ...]]:
        """Rows of the journal, also of a daemon that was killed."""
        with suppress(sqlite3.OperationalError):
            db = sqlite3.connect(f"file:{self.cache / 'journal.sqlite'}?mode=ro", uri=True)
            try:
                return list(db.execute(query))
            finally:
                db.close()
        return []

    def pending_rows(self) -> int:
        return int(self.journal("SELECT count(*) FROM node")[0][0])

    def memory_peak_bytes(self) -> int:
        """The most memory that the daemon had resident so far."""
        text = Path(f"/proc/{self.worker_pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", text)
        assert found
        return int(found[1]) * 1024

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def check_log(self) -> None:
        """Fails on a warning that came since the last check and that `allowed` does not have."""
        text = self.log_text()
        new, self._seen = text[self._seen :], len(text)
        bad = [
            line
            for line in new.splitlines()
            if _WARNING.search(line) and not any(re.search(pattern, line) for pattern in self.allowed)
        ]
        assert not bad, "unexpected in the daemon's log:\n" + "\n".join(bad) + "\n--- log:\n" + new[-4000:]

    def abort(self) -> None:
        """Frees whoever hangs on this mount, and leaves nothing of it."""
        entry = kernel.mount_entry(self.mountpoint)
        if entry is not None:
            with suppress(OSError):
                Path(f"/sys/fs/fuse/connections/{entry.device.partition(':')[2]}/abort").write_text("1")
            with suppress(OSError):
                kernel.unmount(self.mountpoint, lazy=True)
        if self.running:
            with suppress(KeyError):
                self.kill()
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Mounts:
    """Makes the mounts of one test, and ends them with it."""

    def __init__(self, folder: Path, bucket: Callable[[Server], str]) -> None:
        self.folder = folder
        self.bucket = bucket
        self.made: list[Mount] = []

    def new(
        self, server: Server, *options: str, name: str = "", bucket: str | None = None, start: bool = True
    ) -> Mount:
        """A mount of a bucket of its own (or of `bucket`), already mounted unless `start` is False."""
        name = name or f"m{len(self.made)}"
        mountpoint = self.folder / f"{name}.mnt"
        mountpoint.mkdir()
        mount = Mount(
            server,
            bucket or self.bucket(server),
            mountpoint,
            self.folder / f"{name}.cache",
            self.folder / f"{name}.log",
            options,
        )
        self.made.append(mount)
        return mount.start() if start else mount

    @contextmanager
    def watch(self, timeout_s: float) -> Iterator[None]:
        """Aborts all mounts after `timeout_s`."""
        timer = threading.Timer(timeout_s, self.abort)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def abort(self) -> None:
        for mount in self.made:
            mount.abort()

    def end(self) -> None:
        """Unmounts what is mounted; whatever happens, nothing stays."""
        try:
            for mount in self.made:
                if mount.mounted or mount.running:
                    mount.stop()
                else:
                    mount.check_log()
        finally:
            self.abort()
