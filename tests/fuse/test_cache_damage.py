"""The cache directory of a real mount is damaged, shared, or left behind."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from s3fuse import control, kernel
from tests.fuse.harness import S3FUSE, Gate, free_environment, run, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mount, Mounts
    from tests.servers import Server

pytestmark = pytest.mark.timeout(180)
BODIES = {"small": random.Random(1).randbytes(3000), "large": random.Random(2).randbytes(700_000)}


def flip(staging: Path, body: bytes) -> None:
    """Changes one bit in the middle of where this body is staged."""
    for path in staging.iterdir():
        at = path.read_bytes().find(body)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at + len(body) // 2)
                (byte,) = file.read(1)
                file.seek(at + len(body) // 2)
                file.write(bytes([byte ^ 1]))
            return
    raise AssertionError("it is not staged")


def check_told(mount: Mount, bucket: Bucket) -> None:
    """Both damaged files are named with their reason wherever one may look, and nothing of them is in the bucket."""
    done = run(S3FUSE, "flush", mount.path, check=False)
    assert done.returncode == 1
    items = {item["name"]: item["error"] for item in mount.status()["pending"]["items"]}
    listed = run(S3FUSE, "cache", "list", mount.cache).stdout
    for name in BODIES:
        assert f"{name} (" in done.stderr
        assert "staged data is damaged" in items[name]
        assert f"{name} (" in listed
    assert listed.count("staged data is damaged") == 2
    assert bucket.keys() == {"fine"}


def test_flipped_bits_in_dirty_data(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], tmp_path: Path
) -> None:
    """T59: damage of dirty data is told, by every way of asking, also after a crash; writing anew heals it."""
    bucket = buckets(server)
    mount = mounts.new(server, bucket=bucket.name)
    mount.allowed += ["staged data is damaged", "not in the bucket yet"]
    files = [(mount.path / name).open("wb", buffering=0) for name in BODIES]  # open, so that they are not sent yet
    for file, body in zip(files, BODIES.values(), strict=True):
        file.write(body)
    (mount.path / "fine").write_bytes(b"fine")
    kernel.write_back(mount.path)
    for body in BODIES.values():
        flip(mount.cache / "staging", body)
    for file in files:
        file.close()
    check_told(mount, bucket)
    mount.kill()
    listed = run(S3FUSE, "cache", "list", mount.cache).stdout
    assert listed.count("staged data is damaged") == 2
    done = run(S3FUSE, "cache", "recover", mount.cache, tmp_path / "out", check=False)
    assert done.returncode == 1
    mount.start()
    for name in BODIES:
        with pytest.raises(OSError, match="Input/output error"):
            (mount.path / name).read_bytes()
    check_told(mount, bucket)
    assert (mount.path / "fine").read_bytes() == b"fine"
    for name in BODIES:
        (mount.path / name).write_bytes(b"anew")
    mount.flush()
    assert {name: bucket.get(name) for name in bucket.keys()} == {"fine": b"fine", "small": b"anew", "large": b"anew"}


def test_removed_cache_files_while_mounted(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """T59: the journal and the slab are removed; a crash later nothing is lost."""
    bucket = buckets(server)
    mount = mounts.new(server, bucket=bucket.name)
    mount.allowed += ["it is put back", "it is written anew"]
    file = os.open(mount.path / "file", os.O_CREAT | os.O_WRONLY)
    os.write(file, BODIES["small"])
    kernel.write_back(mount.path)
    for name in ("journal.sqlite", "journal.sqlite-wal", "staging/slab"):
        (mount.cache / name).unlink()
    for text in mount.allowed:
        wait_for(lambda text=text: text in mount.log_text(), timeout_s=60)  # type: ignore[misc]
    mount.kill()
    with suppress(OSError):
        os.close(file)
    mount.start()
    assert (mount.path / "file").read_bytes() == BODIES["small"]
    mount.flush()
    assert bucket.get("file") == BODIES["small"]


def test_two_mounts_on_one_cache_directory(server: Server, mounts: Mounts) -> None:
    """T60: the second one is refused by name, whatever somebody removes there, and the first goes on."""
    first = mounts.new(server)
    first.allowed += ["is taken anew", "it is put back", "it is written anew"]
    second = mounts.new(server, bucket=first.bucket, start=False)
    second.cache = first.cache

    def check() -> None:
        done = run(*second.command(), env={**os.environ, **server.environment}, check=False)
        assert done.returncode == 1
        assert f"cache directory {first.cache} is in use by another mount" in done.stderr
        assert not second.mounted
        cleaned = run(S3FUSE, "cache", "clean", first.cache, check=False)
        assert cleaned.returncode == 1
        assert "it is in use" in cleaned.stderr

    check()
    (first.cache / "lock").unlink()
    check()
    wait_for(lambda: (first.cache / "lock").exists())
    check()
    shutil.rmtree(first.cache)
    wait_for(lambda: first.log_text().count("is taken anew") == 2 and "it is written anew" in first.log_text())
    check()
    (first.path / "file").write_bytes(b"still works")
    first.flush()
    first.remount(empty_cache=False)
    assert (first.path / "file").read_bytes() == b"still works"


#: Fsyncs every second file, and says which; a file's number is its content.
WRITER = """
import os, sys
for n in range(200):
    with open(f"{sys.argv[1]}/{n}", "wb") as file:
        file.write(b"%06d" % n * 3000)
        file.flush()
        if n % 2 == 0:
            os.fsync(file.fileno())
            print(n, flush=True)
"""


def test_fsynced_files_survive_kills(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """T08, with kill -9: what fsync confirmed is whole; everything else is absent, a beginning or whole."""
    bucket = buckets(server)
    mount = mounts.new(server, "--fsync", "local", bucket=bucket.name)
    for lines in (1, 7, 40):
        folder = mount.path / f"after{lines}"
        folder.mkdir()
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert writer.stdout
        synced = [int(writer.stdout.readline()) for _ in range(lines)]
        mount.kill()
        synced += [int(line) for line in writer.communicate(timeout=60)[0].split()]
        assert mount.pending_rows() > 0
        mount.start()
        for number in synced:
            assert (folder / str(number)).read_bytes() == b"%06d" % number * 3000
        for path in folder.iterdir():
            body = b"%06d" % int(path.name) * 3000
            assert body.startswith(path.read_bytes())
        mount.flush()
        assert {f"after{lines}/{number}" for number in synced} <= bucket.keys()


def start_on_damage(mount: Mount) -> None:
    """Mounts, which says on the terminal where bytes are that have no name any more."""
    done = run(*mount.command(), env=free_environment(**mount.server.environment))
    assert "staged bytes that the journal lost track of are in" in done.stderr
    mount.pid = control.last_said(mount.path)["pid"]


@pytest.mark.parametrize("frames", [1, 3])
def test_a_log_that_was_damaged_behind_the_record_of_a_truncate(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], frames: int
) -> None:
    """The object stays what it was, the staged bytes stay, and users are told how to get out of it."""
    old, new = random.Random(3).randbytes(100_000), random.Random(4).randbytes(150_000)
    gate = Gate(server)
    mount = mounts.new(gate.server)
    bucket = buckets(server, mount.bucket)
    bucket.put("f", old)
    gate.hold()
    assert (mount.path / "f").read_bytes() == old
    (mount.path / "f").write_bytes(new)
    mount.kill()
    log = mount.cache / "journal.sqlite-wal"
    with log.open("r+b") as file:
        file.seek(log.stat().st_size - frames * (4096 + 24) + 1000)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    gate.open()
    mount.allowed += ["pages are lost; what was staged", "does not prove that all of it is there"]
    assert "damaged" in run(S3FUSE, "cache", "list", mount.cache).stdout
    start_on_damage(mount)
    assert run(S3FUSE, "flush", mount.path, check=False).returncode == 1
    assert bucket.get("f") == old
    assert "damaged" in run(S3FUSE, "status", mount.path).stdout
    with pytest.raises(OSError, match="Input/output error"):
        (mount.path / "f").read_bytes()
    assert run(S3FUSE, "umount", mount.path, check=False).returncode == 3
    mount.wait_for_end()
    run(S3FUSE, "cache", "recover", mount.cache, mount.cache.with_suffix(".out"), check=False)
    assert any(new in path.read_bytes() for path in mount.cache.with_suffix(".out").rglob("*") if path.is_file())
    mount.allowed.append("not in the bucket yet")
    start_on_damage(mount)
    (mount.path / "f").write_bytes(b"anew")
    mount.flush()
    assert bucket.get("f") == b"anew"
    mount.stop()
    gate.close()
