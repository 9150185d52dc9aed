"""`s3fuse server` as a command: its settings file is right and whole, and it ends cleanly."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import urllib3
from minio import Minio

from s3fuse.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = (sys.executable, "-m", "s3fuse", "server", "--data-dir", "data")


@contextmanager
def running(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, with a data directory relative to where it runs, once it has said where it answers."""
    with subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("S3 server at http://127.0.0.1:"), process.communicate()
            assert line.endswith(f"; its address and keys: . {folder}/data/server.env\n")
            yield process
        finally:
            process.kill()


def settings(folder: Path) -> dict[str, str]:
    """What a shell that sources the file has."""
    command = "set -eu; . data/server.env; env -0"
    found = subprocess.check_output(["sh", "-c", command], cwd=folder, env={"PATH": os.environ["PATH"]}, text=True)
    return dict(line.split("=", 1) for line in found.split("\0") if line.startswith("MINIO_"))


def buckets(found: dict[str, str]) -> list[str]:
    with urllib3.PoolManager(timeout=10, retries=False) as pool:
        client = Minio(
            endpoint=found["MINIO_ENDPOINT"].removeprefix("http://"),
            access_key=found["MINIO_ACCESS_KEY"],
            secret_key=found["MINIO_SECRET_KEY"],
            secure=False,
            http_client=pool,
        )
        if not client.bucket_exists(bucket_name="made-here"):
            client.make_bucket(bucket_name="made-here")
        return [bucket.name for bucket in client.list_buckets()]


def test_it_serves_by_its_settings_and_ends_on_sigterm(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        found = settings(tmp_path)
        assert sorted(found) == ["MINIO_ACCESS_KEY", "MINIO_ENDPOINT", "MINIO_SECRET_KEY"]
        assert stat.S_IMODE((tmp_path / "data/server.env").stat().st_mode) == 0o600
        assert buckets(found) == ["made-here"]
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=10)
    assert (process.returncode, output, errors) == (0, "", "")
    assert found["MINIO_SECRET_KEY"] not in output + errors
    assert not (tmp_path / "data/server.env").exists()
    host, port = found["MINIO_ENDPOINT"].removeprefix("http://").split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def test_it_says_when_the_server_ends_by_itself(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        os.kill(int(children[0]), signal.SIGKILL)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == ExitCode.FAILED
    assert errors == f"s3fuse: the S3 server ended by itself with code -9; see {tmp_path}/data/server.log\n"
    assert not (tmp_path / "data/server.env").exists()


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([*COMMAND, "--port", str(port)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (ExitCode.FAILED, "")
    assert re.match(rf"s3fuse: the S3 server on {tmp_path}/data did not start", done.stderr)
    assert f":{port}: bind: address already in use" in done.stderr
    assert not (tmp_path / "data/server.env").exists()
