"""What was acknowledged is in the bucket in the end: after SIGKILL and a new mount, after SIGTERM, after any umount.

A server under SIGSTOP takes connections and answers nothing, so what is written stays pending until it goes on. What
the mount knows of the bucket is made to stay fresh meanwhile: a name can only be made where it is known to be free.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from s3fuse import kernel
from tests.fuse.harness import S3FUSE, run, wait_for
from tests.servers import minio, seaweedfs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fuse.harness import Bucket, Gate, Mount, Mounts
    from tests.servers import Server

pytestmark = pytest.mark.timeout(120)
FRESH = ("--attr-ttl", "1h")


@pytest.fixture(scope="module", params=["minio", "seaweedfs"])
def own_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that tests may stop: nobody else uses it."""
    start = {"minio": minio, "seaweedfs": seaweedfs}[request.param]
    with start(tmp_path_factory.mktemp(request.param)) as server:
        yield server


@contextmanager
def silent(mount: Mount) -> Iterator[Callable[[], None]]:
    """The server answers nothing until the block ends or the function is called; the whole tree is known before."""
    server = mount.server
    run("ls", "-lR", mount.path)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield lambda: os.kill(server.pid, signal.SIGCONT)
    finally:
        os.kill(server.pid, signal.SIGCONT)


def crash(mount: Mount) -> None:
    """SIGKILL while something is pending: else the test would prove nothing."""
    pending = mount.status()["pending"]
    assert pending["files"] > 0
    mount.kill()
    assert mount.pending_rows() > 0
    assert mount.mounted  # dead, and replaced by the next mount
    with pytest.raises(OSError, match="Transport endpoint is not connected"):
        os.statvfs(mount.path)


def settled(mount: Mount) -> None:
    """All is in the bucket, and nothing is kept for it any more."""
    mount.flush()
    status = mount.status()
    assert status["pending"]["files"] == 0
    assert status["pending"]["bytes"] == 0
    assert mount.pending_rows() == 0
    assert mount.journal("SELECT * FROM layer") == []
    assert mount.journal("SELECT * FROM staged") == []


@pytest.mark.parametrize("size_bytes", [0, 1, 100_000, 20 << 20])
def test_new_file(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket], size_bytes: int) -> None:
    body = random.Random(4).randbytes(size_bytes)
    mount = mounts.new(own_server, *FRESH)
    with silent(mount):
        (mount.path / "file").write_bytes(body)
        crash(mount)
    mount.start()
    assert (mount.path / "file").read_bytes() == body
    settled(mount)
    bucket = buckets(own_server, mount.bucket)
    assert bucket.digest("file") == hashlib.sha256(body).hexdigest()
    mount.remount(empty_cache=True)
    assert (mount.path / "file").read_bytes() == body


def test_write_without_close(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """What fsync-less write(2)s gave to the daemon survives it, though the file was never closed."""
    mount = mounts.new(own_server, *FRESH)
    with silent(mount):
        file = os.open(mount.path / "file", os.O_CREAT | os.O_WRONLY)
        os.write(file, b"x" * 1000)
        # The kernel's writeback cache holds it until it is told; the server is needed for the upload alone.
        kernel.write_back(mount.path)
        crash(mount)
        with suppress(OSError):
            os.close(file)
    mount.start()
    settled(mount)
    assert buckets(own_server, mount.bucket).get("file") == b"x" * 1000


def test_change_of_an_old_file(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Writes in the middle, an append, a cut: the rest comes from the object that is there."""
    bucket = buckets(own_server)
    bodies = {name: bytearray(random.Random(name).randbytes(200_000)) for name in ("middle", "append", "cut", "whole")}
    for name, body in bodies.items():
        bucket.put(name, bytes(body))
    mount = mounts.new(own_server, *FRESH, bucket=bucket.name)
    for name in bodies:
        (mount.path / name).read_bytes()
    with silent(mount):
        with (mount.path / "middle").open("r+b") as file:
            file.seek(99_999)
            file.write(b"changed")
        bodies["middle"][99_999:100_006] = b"changed"
        with (mount.path / "append").open("ab") as file:
            file.write(b"more")
        bodies["append"] += b"more"
        os.truncate(mount.path / "cut", 10)
        del bodies["cut"][10:]
        (mount.path / "whole").write_bytes(b"new")
        bodies["whole"] = bytearray(b"new")
        crash(mount)
    mount.start()
    settled(mount)
    assert {name: bucket.get(name) for name in bodies} == bodies
    assert bucket.keys() == set(bodies)


def test_names_and_attributes(server: Server, mounts: Mounts, buckets: Callable[..., Bucket], gate: Gate) -> None:
    mount = mounts.new(gate.server, *FRESH, bucket=buckets(server).name)
    for name in ("renamed", "unlinked", "changed", "over", "target"):
        (mount.path / name).write_text(name)
    for name in ("emptied", "tree", "tree/sub", "gone"):
        (mount.path / name).mkdir()
    for number in range(5):
        (mount.path / "tree/sub" / str(number)).write_text(str(number))
    (mount.path / "emptied/last").write_text("")
    mount.flush()
    gate.hold()
    try:
        (mount.path / "made").mkdir()
        (mount.path / "made/in").mkdir()
        (mount.path / "made/in/file").write_text("in")
        (mount.path / "link").symlink_to("made/in/file")
        os.mkfifo(mount.path / "fifo", 0o620)
        (mount.path / "renamed").rename(mount.path / "made/renamed")
        (mount.path / "unlinked").unlink()
        os.chown(mount.path / "changed", 12, 34)
        (mount.path / "changed").chmod(0o4750)
        os.utime(mount.path / "changed", ns=(10**18 + 1, 10**18 + 2))
        os.setxattr(mount.path / "changed", "user.name", b"value\0")
        (mount.path / "over").rename(mount.path / "target")
        (mount.path / "tree").rename(mount.path / "made/tree")
        (mount.path / "emptied/last").unlink()
        (mount.path / "gone").rmdir()
        crash(mount)
    finally:
        gate.open()
    mount.start()

    def check() -> None:
        found = sorted(
            os.path.relpath(os.path.join(top, n), mount.path) for top, d, f in os.walk(mount.path) for n in d + f
        )
        assert found == sorted(
            ["made", "made/in", "made/in/file", "made/renamed", "made/tree", "made/tree/sub", "link", "fifo", "changed",
             "target", "emptied", *(f"made/tree/sub/{n}" for n in range(5))]
        )  # fmt: skip
        status = os.stat(mount.path / "changed")
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o4750, 12, 34)
        assert (status.st_atime_ns, status.st_mtime_ns) == (10**18 + 1, 10**18 + 2)
        assert os.getxattr(mount.path / "changed", "user.name") == b"value\0"
        assert (mount.path / "target").read_text() == "over"
        assert (mount.path / "made/renamed").read_text() == "renamed"
        assert (mount.path / "link").read_text() == "in"
        assert (mount.path / "fifo").is_fifo()
        assert os.stat(mount.path / "fifo").st_mode & 0o777 == 0o620 & ~UMASK
        assert [(mount.path / f"made/tree/sub/{n}").read_text() for n in range(5)] == list("01234")

    check()
    settled(mount)
    assert buckets(server, mount.bucket).keys() == {
        "made/", "made/in/", "made/in/file", "made/renamed", "made/tree/", "made/tree/sub/", "link", "fifo", "changed",
        "target", "emptied/", *(f"made/tree/sub/{n}" for n in range(5)),
    }  # fmt: skip
    mount.remount(empty_cache=True)
    check()


UMASK = os.umask(0)
os.umask(UMASK)


def test_two_crashes(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """What one crash left is still there after another that came before it was uploaded."""
    mount = mounts.new(own_server, *FRESH)
    with silent(mount) as go_on:
        (mount.path / "first").write_bytes(b"1" * 50_000)
        crash(mount)
        go_on()
        mount.start()
        with silent(mount):
            with (mount.path / "second").open("wb") as file:
                file.write(b"2" * 50_000)
            crash(mount)
    mount.start()
    settled(mount)
    bucket = buckets(own_server, mount.bucket)
    assert (bucket.get("first"), bucket.get("second")) == (b"1" * 50_000, b"2" * 50_000)


#: Says that a file is written once close(2) has succeeded; a shell's echo ignores what close says.
CAREFUL_WRITER = """
import sys
for n in range(1, 401):
    with open(f"{sys.argv[1]}/{sys.argv[2]}.{n}", "w") as file:
        file.write(f"{sys.argv[2]} {n}\\n")
    print(n, flush=True)
"""


def test_crash_in_the_middle_of_uploads(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Killed at a random moment while the server works: no file is lost, half, or left twice."""
    mount = mounts.new(own_server, *FRESH)
    expected = {}
    for turn in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", CAREFUL_WRITER, str(mount.path), str(turn)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert writer.stdout
        for _ in range(40 + 40 * turn):
            writer.stdout.readline()
        mount.kill()
        done = 40 + 40 * turn + len(writer.communicate(timeout=30)[0].split())
        expected |= {f"{turn}.{n}": f"{turn} {n}\n" for n in range(1, done + 1)}
        assert mount.pending_rows() > 0
        mount.start()
    settled(mount)
    bucket = buckets(own_server, mount.bucket)
    keys = bucket.keys()
    assert set(expected) <= keys
    # One more name can be there in each turn: made, and killed before the shell heard of it.
    assert len(keys - set(expected)) <= 4
    names = sorted(expected)
    assert dict(zip(names, bucket.each(lambda key: bucket.get(key).decode(), names), strict=True)) == expected


def test_remote_change_while_the_daemon_was_dead(
    own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """Both versions survive."""
    bucket = buckets(own_server)
    bucket.put("file", b"base")
    mount = mounts.new(own_server, *FRESH, bucket=bucket.name)
    assert (mount.path / "file").read_bytes() == b"base"
    with silent(mount):
        (mount.path / "file").write_bytes(b"ours")
        crash(mount)
    bucket.put("file", b"theirs")
    mount.allowed.append("file was changed by somebody else")
    mount.start()
    wait_for(lambda: len(bucket.keys()) == 2)
    assert bucket.get("file") == b"theirs"
    (other,) = bucket.keys() - {"file"}
    assert other.startswith("file.conflict-")
    assert bucket.get(other) == b"ours"


def write_some(mount: Mount) -> dict[str, bytes]:
    bodies = {f"d{n % 3}/file{n}": random.Random(n).randbytes(n * 1000) for n in range(60)}
    for key, body in bodies.items():
        (mount.path / key).parent.mkdir(exist_ok=True)
        (mount.path / key).write_bytes(body)
    return bodies


def check_drained(mount: Mount, bucket: Bucket, bodies: dict[str, bytes]) -> None:
    mount.wait_for_end()
    mount.check_ended()
    assert mount.pending_rows() == 0
    assert bucket.keys() == {"d0/", "d1/", "d2/", *bodies}
    assert all(bucket.each(lambda key: bucket.get(key) == bodies[key], list(bodies)))


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "umount", "fusermount3", "s3fuse"])
def test_every_end_drains(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket], how: str) -> None:
    mount = mounts.new(own_server, *FRESH)
    with silent(mount):
        bodies = write_some(mount)
        assert mount.status()["pending"]["files"] >= len(bodies)
    if how.startswith("SIG"):
        os.kill(mount.pid, getattr(signal, how))
    else:
        command = {"umount": ["umount"], "fusermount3": ["fusermount3", "-u"], "s3fuse": [S3FUSE, "umount"]}[how]
        run(*command, mount.path)
        if how == "s3fuse":  # returns only when all is in the bucket
            assert mount.pending_rows() == 0
    check_drained(mount, buckets(own_server, mount.bucket), bodies)


def test_sigterm_with_open_files(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """What was written is uploaded; later writes fail and do not hang."""
    mount = mounts.new(own_server, *FRESH)
    mount.allowed.append("are still open; what their programs write from now on fails")
    file = os.open(mount.path / "open", os.O_CREAT | os.O_WRONLY)
    os.write(file, b"before")
    os.kill(mount.pid, signal.SIGTERM)
    mount.wait_for_end()
    with pytest.raises(OSError, match=r"not connected|aborted"):
        os.fsync(file) if os.write(file, b"after") else None
    with suppress(OSError):
        os.close(file)
    mount.check_ended()
    assert buckets(own_server, mount.bucket).get("open") == b"before"


def test_drain_timeout(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """The rest stays in the journal, the exit code and the text say so, and the next mount uploads it."""
    mount = mounts.new(own_server, *FRESH)
    mount.allowed.append("not in the bucket yet: late ")
    with silent(mount):
        (mount.path / "late").write_bytes(b"late")
        start = time.monotonic()
        done = run(S3FUSE, "umount", "--drain-timeout", "1s", mount.path, check=False)
        assert time.monotonic() - start < 10
        assert done.returncode == 3
        assert "late" in done.stderr
        mount.wait_for_end()
    mount.check_ended()
    assert mount.pending_rows() == 1
    mount.start()
    settled(mount)
    assert buckets(own_server, mount.bucket).get("late") == b"late"


def test_umount_of_a_dead_mount(own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(own_server, *FRESH)
    with silent(mount):
        (mount.path / "file").write_bytes(b"body")
        crash(mount)
    done = run(S3FUSE, "umount", mount.path, check=False)
    assert done.returncode == 3
    assert f"this waits in {mount.cache}" in done.stderr
    assert "file (4 bytes)" in done.stderr
    assert not mount.mounted
    mount.start()
    settled(mount)
    assert buckets(own_server, mount.bucket).get("file") == b"body"


def test_umount_of_a_dead_mount_that_had_uploaded_everything(minio_server: Server, mounts: Mounts) -> None:
    mount = mounts.new(minio_server, *FRESH)
    (mount.path / "file").write_bytes(b"body")
    mount.flush()
    settled(mount)
    mount.kill()
    done = run(S3FUSE, "umount", mount.path, check=False)
    assert done.returncode == 1
    assert "nothing that it had taken waits" in done.stderr
    assert not mount.mounted


def test_flush_while_the_server_is_away(own_server: Server, mounts: Mounts) -> None:
    """flush says what is missing with exit code 1; cached data can be read meanwhile, and writes are taken."""
    mount = mounts.new(own_server, *FRESH)
    (mount.path / "cached").write_bytes(b"cached")
    with silent(mount):
        (mount.path / "new").write_bytes(b"new")
        assert (mount.path / "new").read_bytes() == b"new"
        assert (mount.path / "cached").read_bytes() == b"cached"
    mount.flush()


def test_staging_that_was_lost_is_not_uploaded_as_zeros(
    own_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """Damage is told, never hidden: no wrong byte reaches the bucket."""
    mount = mounts.new(own_server, *FRESH)
    with silent(mount):
        (mount.path / "file").write_bytes(os.urandom(3 << 20))
        crash(mount)
    staging: Path = mount.cache / "staging"
    assert any(path.is_file() for path in staging.rglob("*"))
    shutil.rmtree(staging)
    mount.allowed += ["file: staged data is damaged", "not in the bucket yet: file "]
    mount.start()
    done = run(S3FUSE, "flush", mount.path, check=False)
    assert done.returncode == 1
    assert "file" in done.stderr
    with pytest.raises(OSError, match="Input/output error"):
        (mount.path / "file").read_bytes()
    assert buckets(own_server, mount.bucket).keys() == set()
    done = run(S3FUSE, "umount", "--drain-timeout", "1s", mount.path, check=False)
    assert done.returncode == 3
    mount.wait_for_end()
