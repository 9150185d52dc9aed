"""What an operation costs in requests, as `s3fuse status --json` counts them."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.fuse.harness import S3FUSE, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.fuse.harness import Bucket, Mount, Mounts
    from tests.servers import Server

#: Nothing that was looked up grows old within a test.
LONG = ("--attr-ttl", "1h")


@contextmanager
def counted(mount: Mount) -> Iterator[Counter[str]]:
    """Which requests the block made, without those that come by themselves (the listener for changes)."""
    before = Counter(mount.requests())
    made: Counter[str] = Counter()
    yield made
    made.update(Counter(mount.requests()) - before)
    made.pop("listen", None)


def test_status_shows_requests(minio_server: Server, mounts: Mounts) -> None:
    mount = mounts.new(minio_server)
    (shown,) = json.loads(run(S3FUSE, "status", "--json", mount.path).stdout)
    assert shown["requests"] == mount.requests()
    assert shown["mountpoint"] == str(mount.path)
    assert shown["pending"]["files"] == 0


def test_temporary_file_that_goes_before_its_upload(server: Server, mounts: Mounts) -> None:
    """Created, renamed, deleted: the server never hears of it, but for the listing that says the name is free."""
    mount = mounts.new(server, *LONG)
    assert os.listdir(mount.path) == []
    with counted(mount) as made:
        for number in range(20):
            path = mount.path / f"temporary{number}"
            path.write_text("x" * 1000)
            os.utime(path)
            path = path.rename(mount.path / f"renamed{number}")
            path.chmod(0o600)
            path.unlink()
        mount.flush()
    assert made == {}


def test_save_by_rename_is_one_put(server: Server, mounts: Mounts) -> None:
    mount = mounts.new(server, *LONG)
    os.listdir(mount.path)
    (mount.path / "file").write_text("old")
    mount.flush()
    with counted(mount) as made:
        (mount.path / "file.tmp").write_text("new")
        (mount.path / "file.tmp").rename(mount.path / "file")
        mount.flush()
    assert made == {"put": 1}


def test_small_files_are_one_put_each(server: Server, mounts: Mounts) -> None:
    mount = mounts.new(server, *LONG)
    (mount.path / "d").mkdir()
    mount.flush()
    with counted(mount) as made:
        for number in range(50):
            path = mount.path / "d" / str(number)
            path.write_text(str(number))
            path.chmod(0o640)
            os.utime(path, ns=(number, number))
        mount.flush()
    assert made["put"] == 50
    assert set(made) <= {"put", "list"}
    assert made["list"] <= 1


def test_empty_directory_tree(minio_server: Server, mounts: Mounts) -> None:
    """mkdir -p of ten levels: one marker each and nothing else."""
    mount = mounts.new(minio_server, *LONG)
    os.listdir(mount.path)
    with counted(mount) as made:
        os.makedirs(mount.path / "/".join("abcdefghij"))
        mount.flush()
    assert made == {"put": 10}


def test_stat_of_a_deep_path(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Ten levels that nobody has looked at: a listing for each, and its marker; nothing the second time."""
    bucket = buckets(server)
    key = "/".join("abcdefghij") + "/file"
    bucket.put(key, b"body")
    mount = mounts.new(server, *LONG, bucket=bucket.name)
    with counted(mount) as made:
        assert os.stat(mount.path / key).st_size == 4
    # SeaweedFS does not say what is missing when a HEAD finds nothing (here: metadata kept apart); a listing does.
    assert made["list"] <= {"minio": 22, "seaweedfs": 21}[server.kind]
    assert sum(made.values()) <= {"minio": 22, "seaweedfs": 43}[server.kind]
    with counted(mount) as made:
        assert os.stat(mount.path / key).st_size == 4
    assert made == {}
    with counted(mount) as made:
        assert not os.path.exists(mount.path / key.replace("file", "none"))
        assert not os.path.exists(mount.path / key.replace("file", "none"))
    assert sum(made.values()) <= 1


def test_long_listing(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """ls -l of 100 files: two listings where they have metadata (and a look for the marker), else a HEAD each."""
    bucket = buckets(server)
    bucket.each(lambda n: bucket.put(f"d/file{n}", b"x" * n, {"mode": "33152"}), range(100))
    mount = mounts.new(server, *LONG, bucket=bucket.name)
    with counted(mount) as made:
        lines = run("ls", "-l", mount.path / "d").stdout.splitlines()
    assert len(lines) == 101
    assert all(line.startswith("-rw-------") for line in lines[1:])
    assert made["list"] <= 3
    assert made["head"] <= {"minio": 0, "seaweedfs": 102}[server.kind]
    assert set(made) <= {"list", "head"}
    with counted(mount) as made:
        run("ls", "-lR", mount.path / "d")
    assert made == {}


def test_names_alone(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Hundreds of names are two listings and a look for the marker on any server, when nobody asks for more."""
    bucket = buckets(server)
    bucket.each(lambda n: bucket.put(f"d/file{n}", b""), range(300))
    mount = mounts.new(server, *LONG, bucket=bucket.name)
    with counted(mount) as made:
        assert len(run("ls", "-U", "--color=never", mount.path / "d").stdout.split()) == 300
    assert made["list"] <= 3  # see the deep path
    assert made["head"] <= {"minio": 0, "seaweedfs": 302}[server.kind]  # the kernel asks for attributes, too


def test_delete_of_a_tree(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """rm -rf of 100 files: deleted by the hundred."""
    bucket = buckets(server)
    bucket.each(lambda n: bucket.put(f"d/e{n % 3}/file{n}", b"x"), range(100))
    mount = mounts.new(server, *LONG, bucket=bucket.name)
    run("ls", "-lR", mount.path)
    with counted(mount) as made:
        run("rm", "-rf", mount.path / "d")
        mount.flush()
    assert made["delete_many"] + made["delete"] <= 10
    assert made["copy"] == 0
    assert bucket.keys() == set()


def test_hot_file(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Read again within the TTL: nothing is asked, by this or another process."""
    bucket = buckets(server)
    bucket.put("file", os.urandom(3 << 20))
    mount = mounts.new(server, *LONG, bucket=bucket.name)
    first = (mount.path / "file").read_bytes()
    with counted(mount) as made:
        for _ in range(5):
            assert (mount.path / "file").read_bytes() == first
            assert subprocess.run(["cat", mount.path / "file"], capture_output=True).stdout == first
    assert made == {}


def test_own_files_are_not_fetched(server: Server, mounts: Mounts) -> None:
    """What was written here is read here, before and after the upload, from the page cache or staging."""
    mount = mounts.new(server, *LONG)
    body = os.urandom(1 << 20)
    (mount.path / "file").write_bytes(body)
    with counted(mount) as made:
        assert (mount.path / "file").read_bytes() == body
        mount.flush()
        assert (mount.path / "file").read_bytes() == body
    assert made["get"] == 0
    assert made["put"] <= 1


def test_attributes_are_one_write(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """chmod, chown and utimens together cost one write, for which a small file's bytes are sent again."""
    bucket = buckets(server)
    bucket.put("file", b"body")
    mount = mounts.new(server, *LONG, bucket=bucket.name)
    os.stat(mount.path / "file")
    with counted(mount) as made:
        (mount.path / "file").chmod(0o600)
        os.chown(mount.path / "file", 1, 2)
        os.utime(mount.path / "file", ns=(1, 2))
        mount.flush()
    assert made["put"] == 1
    assert made["get"] <= 1
    assert made["copy"] == 0
    assert sum(made.values()) <= 3


def test_statfs_asks_nobody(server: Server, mounts: Mounts) -> None:
    mount = mounts.new(server, *LONG)  # df looks at the root, too
    with counted(mount) as made:
        os.statvfs(mount.path)
        run("df", mount.path)
    assert made["get"] == made["head"] == 0


def test_random_reads_fetch_little(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """4 KiB here and there in a big file: 128 KiB at most for each."""
    bucket = buckets(server)
    bucket.put("file", bytes(30 << 20))
    mount = mounts.new(server, *LONG, bucket=bucket.name)
    file = os.open(mount.path / "file", os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        for number in (200, 13, 90, 170, 51, 5, 220, 130):
            assert os.pread(file, 4096, (number << 17) + 4096) == bytes(4096)
    finally:
        os.close(file)
    assert mount.status()["cache"]["memory_bytes"] <= 8 * (128 << 10)
