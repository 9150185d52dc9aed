"""However a mount ends, what was written is in the bucket when it has ended, or in the journal and said so."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import S3FUSE, free_environment, run, wait_for
from tests.servers import minio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fuse.harness import Bucket, Mount, Mounts
    from tests.servers import Server

pytestmark = pytest.mark.timeout(180)
DONE, FAILED, PENDING = 0, 1, 3
FRESH = ("--attr-ttl", "1h")
WAYS = {"s3fuse": [S3FUSE, "umount"], "umount": ["umount"], "fusermount3": ["fusermount3", "-u"]}


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the tests stop."""
    with minio(tmp_path_factory.mktemp("minio")) as server:
        yield server
        os.kill(server.pid, signal.SIGCONT)


@contextmanager
def silent(server: Server) -> Iterator[Callable[[], None]]:
    """The server answers nothing until the block ends or the function is called."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield lambda: os.kill(server.pid, signal.SIGCONT)
    finally:
        os.kill(server.pid, signal.SIGCONT)


@contextmanager
def foreground(mount: Mount) -> Iterator[subprocess.Popen[str]]:
    """The mount as a child of the test, which learns its exit code."""
    mount.cache.mkdir(exist_ok=True)
    with subprocess.Popen(
        mount.command("-f"), env=free_environment(**mount.server.environment), stderr=subprocess.PIPE, text=True
    ) as child:
        mount.pid = child.pid
        try:
            wait_for(lambda: mount.mounted and "mounted" in mount.log_text(), timeout_s=60)
            yield child
        finally:
            child.kill()


@contextmanager
def mounting(mount: Mount, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The mount command, while it may wait."""
    with subprocess.Popen(
        mount.command(*more),
        env=free_environment(**mount.server.environment),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def drains(mount: Mount) -> bool:
    return bool(mount.status()["state"] == "unmounting")


@pytest.mark.parametrize(
    ("kind", "how"),
    [*(("minio", how) for how in ("SIGTERM", "SIGINT", *WAYS)), ("seaweedfs", "SIGTERM"), ("seaweedfs", "s3fuse")],
)
def test_end_right_after_writing(
    request: pytest.FixtureRequest, mounts: Mounts, buckets: Callable[..., Bucket], kind: str, how: str
) -> None:
    """T07: 200 files and a large one. Who does not wait for the uploads is waited for by the next mount."""
    server: Server = request.getfixturevalue(f"{kind}_server")
    mount = mounts.new(server)
    bodies = {f"file{n}": random.Random(n).randbytes(n * 50) for n in range(200)} | {"large": os.urandom(12 << 20)}
    for name, body in bodies.items():
        (mount.path / name).write_bytes(body)
    if how.startswith("SIG"):
        os.kill(mount.pid, getattr(signal, how))
        mount.wait_for_end(60)
    else:
        run(*WAYS[how], mount.path)
        if how != "s3fuse":
            with mounting(mount) as child:
                _, errors = child.communicate(timeout=60)
                assert child.returncode == DONE, errors
                assert not errors or "still uploads" in errors
    bucket = buckets(server, mount.bucket)
    assert bucket.keys() == set(bodies)
    assert all(bucket.each(lambda key: bucket.get(key) == bodies[key], list(bodies)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket], number: int) -> None:
    """The first one begins to wait for the server, the second one ends that."""
    mount = mounts.new(own_server, *FRESH, start=False)
    mount.allowed.append("not in the bucket yet: late ")
    with foreground(mount) as daemon:
        os.listdir(mount.path)
        with silent(own_server):
            (mount.path / "late").write_bytes(b"late")
            daemon.send_signal(number)
            wait_for(lambda: drains(mount), timeout_s=60)
            daemon.send_signal(number)
            assert daemon.wait(60) == PENDING
    mount.check_ended()
    assert mount.pending_rows() == 1
    mount.start()
    mount.flush()
    assert buckets(own_server, mount.bucket).get("late") == b"late"


def test_mount_waits_for_the_daemon_that_drains(
    own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    mount = mounts.new(own_server, *FRESH)
    first = mount.pid
    os.listdir(mount.path)
    with silent(own_server) as answer:
        (mount.path / "file").write_bytes(b"body")
        run("umount", mount.path)
        wait_for(lambda: drains(mount), timeout_s=60)
        assert mount.status()["pending"]["files"] == 1
        with mounting(mount, "--drain-timeout", "0s") as child:
            _, errors = child.communicate(timeout=60)
        assert child.returncode == FAILED
        assert f"pid {first}" in errors
        assert "1 files" in errors
        with mounting(mount) as child:
            assert child.stderr is not None
            line = child.stderr.readline()
            assert f"pid {first}" in line
            assert str(mount.cache) in line
            answer()
            assert child.wait(60) == DONE
    assert mount.pending_rows() == 0
    assert buckets(own_server, mount.bucket).get("file") == b"body"
    assert (mount.path / "file").read_bytes() == b"body"


def test_verbs_while_it_drains(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(own_server, *FRESH)
    mount.allowed.append("not in the bucket yet: ")
    os.listdir(mount.path)
    with silent(own_server) as answer:
        (mount.path / "one").write_bytes(b"one")
        run("umount", mount.path)
        wait_for(lambda: drains(mount), timeout_s=60)
        assert "one" in run(S3FUSE, "status", "--json", mount.path).stdout
        with subprocess.Popen([S3FUSE, "flush", mount.path], stderr=subprocess.PIPE, text=True) as flush:
            answer()
            _, errors = flush.communicate(timeout=60)
        assert flush.returncode == DONE or "not mounted" in errors  # the daemon may have been faster
    mount.wait_for_end()
    assert buckets(own_server, mount.bucket).get("one") == b"one"
    mount.start()
    os.listdir(mount.path)
    with silent(own_server):
        (mount.path / "two").write_bytes(b"two")
        run("umount", mount.path)
        wait_for(lambda: drains(mount), timeout_s=60)
        done = run(S3FUSE, "umount", "--drain-timeout", "0s", mount.path, check=False)
        assert done.returncode == PENDING
        assert "two" in done.stderr
        mount.wait_for_end()
    mount.start()
    mount.flush()
    assert buckets(own_server, mount.bucket).get("two") == b"two"


def test_end_while_a_writer_waits_for_room(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """What the kernel holds of it is taken above the limit: nothing waits for a server that is away."""
    mount = mounts.new(own_server, *FRESH, "--dirty-size", "1MiB", "--drain-timeout", "1s", start=False)
    mount.allowed += ["not in the bucket yet: ", "are still open"]
    code = "import sys\nwith open(sys.argv[1], 'wb') as file:\n    while True: file.write(bytes(1 << 20))"
    with foreground(mount) as daemon:
        os.listdir(mount.path)
        with silent(own_server):
            (mount.path / "full").write_bytes(bytes(1 << 20))
            with subprocess.Popen(
                [sys.executable, "-c", code, mount.path / "more"], stderr=subprocess.DEVNULL
            ) as writer:
                wait_for(lambda: mount.status()["waiting_calls"], timeout_s=60)
                daemon.terminate()
                assert daemon.wait(60) == PENDING
                writer.kill()
    mount.check_ended()
    mount.start()
    mount.flush()
    bucket = buckets(own_server, mount.bucket)
    assert bucket.get("full") == bytes(1 << 20)
    assert set(bucket.get("more")) == {0}
