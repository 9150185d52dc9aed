"""The real servers that tests run against: started once per session on free loopback ports, killed with the session.

Everything here is synchronous, so that fixtures of any scope and subprocesses can use it.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from s3fuse.credentials import StaticProvider
from s3fuse.server import die_with_parent, prepare
from s3fuse.store.s3 import S3Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Server", "bucket_name", "minio", "minio_binary", "minio_server", "seaweedfs", "seaweedfs_server"]

_ROOT = Path(__file__).parents[1]
_START_S = 60.0
_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server of `kind` "minio" or "seaweedfs"."""

    kind: str
    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    pid: int

    @property
    def credentials(self) -> StaticProvider:
        return StaticProvider(self.access_key, self.secret_key)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find this server: variables that s3fuse and the AWS tools read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }

    def store(self, bucket: str, *, deadline_s: float = 30.0, max_requests: int = 32) -> S3Store:
        """A store of a bucket, which may not exist yet."""
        return S3Store(self.endpoint, bucket, self.credentials, deadline_s=deadline_s, max_requests=max_requests)


@contextmanager
def minio(directory: Path, *, port: int = 0) -> Iterator[Server]:
    """A MinIO server with its data in `directory`."""
    port = port or _free_port()
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    environment = {
        "MINIO_ROOT_USER": access_key,
        "MINIO_ROOT_PASSWORD": secret_key,
        "MINIO_BROWSER": "off",
        # Everything it would keep in the home directory.
        "HOME": str(directory),
    }
    command = [str(minio_binary()), "server", str(directory / "data"), "--address", f"127.0.0.1:{port}"]
    endpoint = f"http://127.0.0.1:{port}"
    # Not /minio/health/ready: a request just after that may be told to come again in 60 s (XMinioServerNotInitialized).
    with _running(command, directory, environment, f"{endpoint}/") as pid:
        yield Server("minio", endpoint, access_key, secret_key, pid)


@contextmanager
def seaweedfs(directory: Path, *, port: int = 0) -> Iterator[Server]:
    """A SeaweedFS server with its data in `directory`, started as `s3fuse server` starts it."""
    launch = prepare(directory, port=port)
    try:
        with _running(launch.command, directory, launch.options["env"], f"{launch.endpoint}/") as pid:
            yield Server("seaweedfs", launch.endpoint, launch.access_key, launch.secret_key, pid)
    finally:
        launch.clean_up()


@pytest.fixture(scope="session")
def minio_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The session's MinIO."""
    with minio(tmp_path_factory.mktemp("minio")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The session's SeaweedFS."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def bucket_name() -> str:
    """A bucket name that no other test uses; the bucket does not exist yet."""
    return f"test-{secrets.token_hex(6)}"


def minio_binary() -> Path:
    """Where make setup has put MinIO's server."""
    path = Path(os.environ.get("MINIO_BIN") or _ROOT / ".tools/bin/minio")
    if not os.access(path, os.X_OK):
        pytest.fail(f"MinIO's server is not at {path}: run make setup", pytrace=False)
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _running(command: Sequence[str], directory: Path, environment: dict[str, str], ready_url: str) -> Iterator[int]:
    log = directory / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=directory,
            env=os.environ | environment,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        _wait_until_ready(process, ready_url, log)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except urllib.error.HTTPError as exc:
            # An unsigned request is refused by a server that works.
            with exc:
                if exc.code == 403:
                    return
        except OSError:
            pass
        time.sleep(0.05)
    pytest.fail(f"{process.args!r} did not start:\n{log.read_bytes()[-2000:].decode(errors='replace')}", pytrace=False)
