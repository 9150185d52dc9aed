"""A program that waits for a server that swallows everything ends at once for a signal, and nothing is lost by it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import wait_for
from tests.servers import minio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mount, Mounts
    from tests.servers import Server

pytestmark = pytest.mark.timeout(180)

#: What is called on a path: its name -> the statement. Python itself calls again where it gets EINTR without a signal.
CALLS = {
    "stat": "os.stat(path)",
    "ls": "os.listdir(path)",
    "read": "open(path, 'rb').read()",
    "write": "file = os.open(path, os.O_CREAT | os.O_WRONLY)\nwhile True: os.write(file, bytes(1 << 20))",
    "fsync": "file = os.open(path, os.O_CREAT | os.O_WRONLY); os.write(file, b'body'); os.fsync(file)",
    "O_SYNC": "os.write(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_SYNC), b'body')",
    "thread": "file = os.open(path, os.O_CREAT | os.O_WRONLY); os.write(file, b'body')\n"
    "threading.Thread(target=os.fsync, args=(file,)).start()",
    "mkdir and fsync": "os.mkdir(path); os.fsync(os.open(path, os.O_RDONLY))",
    "close": "file = os.open(path, os.O_CREAT | os.O_WRONLY); os.write(file, b'body'); os.close(file)",
}
SIGNALS = [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGKILL, False)]
#: What the daemon's log says where a request ended because the server did not answer in time.
GAVE_UP = re.compile(r"s3fuse\.fuse\.errno|put off|out of date")


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the tests stop."""
    with minio(tmp_path_factory.mktemp("minio")) as server:
        yield server
        os.kill(server.pid, signal.SIGCONT)


def interrupted(mount: Mount, call: str, path: Path, number: int, handled: bool) -> None:
    """Runs the call, signals it while it waits, and returns when the program has ended without an answer."""
    assert mount.status()["waiting_calls"] == 0
    # What runs the tests may have had them ignored, as a shell does in the background.
    disposition = "default_int_handler" if handled else "SIG_DFL"
    action = f"signal.signal({int(number)}, signal.{disposition});" if number != signal.SIGKILL else ""
    code = f"import os, signal, sys, threading; path = sys.argv[1]; {action} print(flush=True)\n{CALLS[call]}"
    child = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        wait_for(lambda: mount.status()["waiting_calls"], timeout_s=60)
        seen = len(mount.log_text())
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
    assert not GAVE_UP.search(mount.log_text()[seen:]), "it waited for the server, not for the signal"
    assert child.returncode == -number, (call, child.returncode, errors)
    if handled:
        assert "KeyboardInterrupt" in errors


def test_signals_while_the_server_swallows_everything(
    own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    mount = mounts.new(own_server, "--attr-ttl", "1h", start=False)
    bucket = buckets(own_server, mount.bucket)
    for n in range(8):
        bucket.put(f"d{n}/file", bytes(300_000))
        bucket.put(f"known{n}", bytes(300_000))
    mount.start()
    strict = mounts.new(own_server, "--attr-ttl", "1h", "--close", "upload", bucket=mount.bucket)
    for one in (mount, strict):
        os.listdir(one.path)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        made = []
        for n, (number, handled) in enumerate(SIGNALS):
            interrupted(mount, "stat", mount.path / f"d{n}/file", number, handled)
            interrupted(mount, "ls", mount.path / f"d{n + 4}", number, handled)
            for call in ("fsync", "O_SYNC", "close", "mkdir and fsync", "thread"):
                if call != "thread" or not handled:  # there a thread that waits for nothing takes a handled signal
                    made.append(f"{call}{n}")
                    one = strict if call == "close" else mount
                    interrupted(one, call, one.path / made[-1], number, handled)
        # The kernel itself ends these; the daemon does not know, and waits on.
        interrupted(mount, "read", mount.path / "known1", signal.SIGINT, handled=False)
        interrupted(strict, "read", strict.path / "known2", signal.SIGKILL, handled=False)
        statistics = os.statvfs(mount.path)
        assert statistics.f_bavail
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    for one in (mount, strict):
        one.flush()
    for name in made:
        if name.startswith("mkdir"):
            assert bucket.get(f"{name}/") == b""
        else:
            assert bucket.get(name) == b"body", name
    assert (mount.path / "d7/file").read_bytes() == bytes(300_000)


def test_signals_while_there_is_no_room(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """A writer above the dirty limit ends at once; what the kernel took of it before is taken and uploaded."""
    # A mount each: what the kernel still holds of a program that has ended waits for room.
    made = [mounts.new(own_server, "--attr-ttl", "1h", "--dirty-size", "1MiB") for _ in SIGNALS]
    for mount in made:
        os.listdir(mount.path)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        for mount, (number, handled) in zip(made, SIGNALS, strict=True):
            (mount.path / "full").write_bytes(bytes(1 << 20))
            interrupted(mount, "write", mount.path / "file", number, handled)
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    for mount in made:
        mount.flush()
        bucket = buckets(own_server, mount.bucket)
        assert bucket.get("full") == bytes(1 << 20)
        body = bucket.get("file")
        assert body == bytes(len(body))
        assert len(body) > 0
