"""Somebody else changes the bucket: another mount, or another program through the S3 API."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import S3FUSE, run, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Gate, Mount, Mounts
    from tests.servers import Server

CHANGED = "was changed by somebody else"


def test_two_mounts_write_the_same_file(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Both versions survive, and both mounts come to see both."""
    bucket = buckets(server)
    bucket.put("d/file", b"base")
    one = mounts.new(server, bucket=bucket.name)
    two = mounts.new(server, bucket=bucket.name)
    two.allowed.append(CHANGED)
    with (one.path / "d/file").open("r+b") as first, (two.path / "d/file").open("r+b") as second:
        first.write(b"one ")
        second.write(b"two!")
        second.truncate(4)
        first.close()
        one.flush()
    wait_for(lambda: two.status()["pending"]["files"] == 0)
    two.flush()
    keys = bucket.keys("d/")
    assert len(keys) == 2
    (other,) = keys - {"d/file"}
    assert other.startswith("d/file.conflict-")
    assert bucket.get("d/file") == b"one "
    assert bucket.get(other) == b"two!"
    (conflict,) = two.status()["conflicts"]
    assert "d/file" in conflict
    assert os.path.basename(other) in conflict
    for mount in (one, two):
        wait_for(lambda mount=mount: sorted(os.listdir(mount.path / "d")) == ["file", os.path.basename(other)])
        wait_for(lambda mount=mount: (mount.path / "d/file").read_bytes() == b"one ")
        assert (mount.path / other).read_bytes() == b"two!"


def test_two_mounts_make_the_same_file(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    bucket = buckets(server)
    one, two = mounts.new(server, bucket=bucket.name), mounts.new(server, bucket=bucket.name)
    one.allowed.append(CHANGED)
    two.allowed.append(CHANGED)
    with (two.path / "file").open("xb") as second:
        (one.path / "file").write_bytes(b"one")
        one.flush()
        second.write(b"two")
    two.flush()
    one.flush()
    assert len(bucket.keys()) == 2
    assert {bucket.get(key) for key in bucket.keys()} == {b"one", b"two"}


def test_two_mounts_make_the_same_directory(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Directories are no conflict."""
    bucket = buckets(server)
    one, two = mounts.new(server, bucket=bucket.name), mounts.new(server, bucket=bucket.name)
    for mount in (one, two):
        os.listdir(mount.path)
    for mount, name in ((one, "one"), (two, "two")):
        (mount.path / "d").mkdir(exist_ok=True)
        (mount.path / "d" / name).write_text(name)
    one.flush()
    two.flush()
    assert bucket.keys() == {"d/", "d/one", "d/two"}
    for mount in (one, two):
        wait_for(lambda mount=mount: sorted(os.listdir(mount.path / "d")) == ["one", "two"])


def test_remote_change_is_seen_after_the_ttl(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    bucket = buckets(server)
    bucket.put("d/file", b"old")
    mount = mounts.new(server, bucket=bucket.name)
    assert (mount.path / "d/file").read_bytes() == b"old"
    for body in (b"new and longer", b"new", b"", b"same", b"SAME"):
        bucket.put("d/file", body)
        wait_for(lambda body=body: (mount.path / "d/file").read_bytes() == body, timeout_s=5)
        assert os.stat(mount.path / "d/file").st_size == len(body)


def test_new_and_deleted_objects_are_seen_after_the_ttl(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    bucket = buckets(server)
    mount = mounts.new(server, bucket=bucket.name)
    path = mount.path / "a/b/file"
    assert not path.exists()
    assert os.listdir(mount.path) == []
    bucket.put("a/b/file", b"body")
    wait_for(path.exists, timeout_s=5)
    assert path.read_bytes() == b"body"
    assert os.listdir(mount.path) == ["a"]
    bucket.put("a/b/second", b"")
    wait_for(lambda: sorted(os.listdir(mount.path / "a/b")) == ["file", "second"], timeout_s=5)
    bucket.delete("a/b/file")
    wait_for(lambda: not path.exists(), timeout_s=5)
    assert os.listdir(mount.path / "a/b") == ["second"]
    bucket.delete("a/b/second")
    if server.kind != "seaweedfs":  # it keeps the directories that a deleted object was in
        wait_for(lambda: os.listdir(mount.path) == [], timeout_s=5)


def test_file_becomes_a_directory_and_back(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    bucket = buckets(server)
    bucket.put("name", b"file")
    mount = mounts.new(server, bucket=bucket.name)
    assert (mount.path / "name").read_bytes() == b"file"
    bucket.delete("name")
    bucket.put("name/inside", b"inside")
    wait_for(lambda: (mount.path / "name").is_dir(), timeout_s=5)
    assert (mount.path / "name/inside").read_bytes() == b"inside"
    bucket.delete("name/inside")
    if server.kind == "seaweedfs":  # it keeps the directory that the object was in
        bucket.delete("name/")
    wait_for(lambda: not (mount.path / "name").exists(), timeout_s=5)
    bucket.put("name", b"file again")
    wait_for(lambda: (mount.path / "name").is_file(), timeout_s=5)
    assert (mount.path / "name").read_bytes() == b"file again"


def reads(mount: Mount, body: bytes) -> bool:
    """Whether a new open sees these bytes; within the TTL it can be of the old version, which is gone: ESTALE."""
    try:
        return (mount.path / "file").read_bytes() == body
    except OSError as error:
        assert error.errno == errno.ESTALE
        return False


def test_open_handle_of_a_replaced_object(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """It reads the version that it opened, or ESTALE: never bytes of both."""
    bucket = buckets(server)
    old, new = b"o" * (8 << 20), b"n" * (8 << 20)
    bucket.put("file", old)
    mount = mounts.new(server, bucket=bucket.name)
    file = os.open(mount.path / "file", os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(file, 4096, 0) == old[:4096]
        bucket.put("file", new)
        wait_for(lambda: reads(mount, new), timeout_s=5)
        seen = set()
        for offset in range(0, 8 << 20, 1 << 20):
            try:
                seen |= set(os.pread(file, 4096, offset))
            except OSError as error:
                assert error.errno == errno.ESTALE
        assert seen <= {ord("o")}
        assert os.fstat(file).st_size == len(old)
    finally:
        os.close(file)


def test_open_handle_of_a_deleted_object(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    bucket = buckets(server)
    bucket.put("file", b"o" * (4 << 20))
    mount = mounts.new(server, bucket=bucket.name)
    with (mount.path / "file").open("rb", buffering=0) as file:
        bucket.delete("file")
        wait_for(lambda: not (mount.path / "file").exists(), timeout_s=5)
        try:
            assert set(file.read(1 << 20)) <= {ord("o")}
        except OSError as error:
            assert error.errno == errno.ESTALE


def test_remote_change_under_a_local_one(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """A program with the file open writes, while another one replaces the object: both survive."""
    bucket = buckets(server)
    bucket.put("file", b"base")
    mount = mounts.new(server, bucket=bucket.name)
    mount.allowed.append(CHANGED)
    with (mount.path / "file").open("wb") as file:
        file.write(b"ours, as a whole")
        file.flush()
        bucket.put("file", b"theirs")
    mount.flush()
    assert {bucket.get(key) for key in bucket.keys()} == {b"ours, as a whole", b"theirs"}
    assert bucket.get("file") == b"theirs"
    wait_for(lambda: (mount.path / "file").read_bytes() == b"theirs", timeout_s=5)


def test_append_to_a_file_that_was_replaced(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Both versions survive whole: the base of the append is cached, since the kernel has read its last page."""
    bucket = buckets(server)
    bucket.put("file", b"o" * 100_000)
    mount = mounts.new(server, bucket=bucket.name)
    mount.allowed.append("was changed by somebody else")
    with (mount.path / "file").open("ab", buffering=0) as file:
        file.write(b"appended")
        bucket.put("file", b"n" * 200_000)
        with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is asserted
            os.fsync(file.fileno())
        assert caught.value.errno in (errno.EIO, errno.ESTALE)
    mount.flush()
    (conflict,) = bucket.keys() - {"file"}
    assert bucket.get("file") == b"n" * 200_000
    assert bucket.get(conflict) == b"o" * 100_000 + b"appended"
    status = mount.status()
    assert status["pending"]["files"] == 0
    assert conflict in status["conflicts"][0]
    mount.remount()
    (mount.path / "file").write_bytes(b"whole")
    mount.flush()
    assert bucket.get("file") == b"whole"
    mount.stop()


def test_a_name_after_a_conflict_is_the_file_that_keeps_it(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """The kernel looks the name up anew at once, however long it may believe names: what is written goes there."""
    bucket = buckets(server)
    bucket.put("f", b"o" * 10_000)
    ours = mounts.new(server, "--attr-ttl", "1h", bucket=bucket.name)
    ours.allowed.append("was changed by somebody else")
    with (ours.path / "f").open("ab", buffering=0) as file:
        file.write(b"ours")
        bucket.put("f", b"theirs" * 3000)
    run(S3FUSE, "flush", ours.path, check=False)
    wait_for(lambda: (ours.path / "f").read_bytes() == b"theirs" * 3000)
    (ours.path / "f").write_bytes(b"whole")
    ours.flush()
    (conflict,) = bucket.keys() - {"f"}
    assert bucket.get("f") == b"whole"
    assert bucket.get(conflict) == b"o" * 10_000 + b"ours"
    ours.stop()


def test_remote_change_under_chmod(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """The mode goes to the new version, whose bytes stay."""
    bucket = buckets(server)
    bucket.put("file", b"old")
    mount = mounts.new(server, "--attr-ttl", "1h", bucket=bucket.name)
    os.stat(mount.path / "file")
    bucket.put("file", b"new version")
    (mount.path / "file").chmod(0o640)
    mount.flush()
    assert bucket.get("file") == b"new version"
    assert int(bucket.metadata("file")["mode"]) & 0o777 == 0o640
    mount.remount()
    assert (mount.path / "file").read_bytes() == b"new version"
    assert os.stat(mount.path / "file").st_mode & 0o777 == 0o640


def test_rename_of_an_object_that_goes(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], gate: Gate
) -> None:
    """Renamed here, deleted there before the rename is sent: it is gone, and nothing waits for ever."""
    bucket = buckets(server)
    bucket.put("file", b"old")
    mount = mounts.new(gate.server, bucket=bucket.name)
    mount.allowed.append("was deleted by somebody else")
    gate.hold()
    (mount.path / "file").rename(mount.path / "moved")
    bucket.delete("file")
    gate.open()
    mount.flush()
    assert bucket.keys() == set()
    assert mount.status()["pending"]["files"] == 0
    wait_for(lambda: os.listdir(mount.path) == [], timeout_s=5)


@pytest.mark.parametrize("size", [10_000, 3_000_000])
def test_two_mounts_append_to_the_same_file(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], size: int
) -> None:
    """Of a small file all is cached where it was read; of a large one only what the append needed."""
    bucket = buckets(server)
    body = os.urandom(size)
    bucket.put("f", body)
    one, two = mounts.new(server, bucket=bucket.name), mounts.new(server, bucket=bucket.name)
    two.allowed.append(CHANGED)
    assert (two.path / "f").stat().st_size == size
    if size == 10_000:
        assert (two.path / "f").read_bytes() == body
    with (one.path / "f").open("ab") as first, (two.path / "f").open("ab") as second:
        for file, text in ((first, b"A\n"), (second, b"B\n")):
            file.write(text)
            file.flush()
        os.fsync(first.fileno())
    two.flush()
    (other,) = bucket.keys() - {"f"}
    assert bucket.get("f") == body + b"A\n"
    assert bucket.get(other) == body + b"B\n"
    (told,) = two.status()["conflicts"]
    assert told.startswith(f"f -> {other}")
    assert ("those of the other version" in told) == (size > 10_000)
    assert (two.path / other).read_bytes() == body + b"B\n"
    wait_for(lambda: (two.path / "f").read_bytes() == body + b"A\n")
    (two.path / "f").write_bytes(b"whole")
    two.flush()
    assert bucket.get("f") == b"whole"
    assert len(bucket.keys()) == 2
    two.stop()


def test_an_append_and_then_the_whole_file(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """The append was on its way when the whole file was written anew: nobody needs its base."""
    bucket = buckets(server)
    bucket.put("f", b"x" * 10_000)
    one = mounts.new(server, bucket=bucket.name)
    two = mounts.new(server, "--attr-ttl", "1h", bucket=bucket.name)
    two.allowed.append(CHANGED)
    assert (two.path / "f").read_bytes() == b"x" * 10_000
    with (one.path / "f").open("ab") as file:
        file.write(b"A")
    one.flush()
    with (two.path / "f").open("ab") as file:
        file.write(b"B")
    (two.path / "f").write_bytes(b"whole")
    two.flush()
    (other,) = bucket.keys() - {"f"}
    assert (bucket.get("f"), bucket.get(other)) == (b"x" * 10_000 + b"A", b"whole")
    two.stop()


def test_old_bytes_come_back_after_a_write_during_a_chmod(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], gate: Gate
) -> None:
    """What was written while the mode was on its way is in no cached block of the version that got the mode."""
    bucket = buckets(server)
    mount = mounts.new(gate.server, bucket=bucket.name)
    path = mount.path / "f"
    path.write_bytes(b"A" * 1000)
    mount.flush()
    assert path.read_bytes() == b"A" * 1000
    gate.hold()
    path.chmod(0o600)
    wait_for(lambda: mount.status()["pending"]["items"][0]["state"] == "uploading")
    with path.open("r+b") as file:
        file.write(b"B" * 1000)
        file.flush()
        gate.open()
    mount.flush()
    path.unlink()
    mount.flush()
    path.write_bytes(b"A" * 1000)
    mount.flush()
    with path.open("ab") as file:
        file.write(b"!")
    mount.flush()
    assert bucket.get("f") == b"A" * 1000 + b"!"
    mount.stop()


@pytest.mark.parametrize("then", ["rename", "unlink"])
def test_a_name_that_is_given_up_while_its_upload_meets_that_of_others(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], gate: Gate, then: str
) -> None:
    bucket = buckets(server)
    mount = mounts.new(gate.server, bucket=bucket.name)
    mount.allowed.append(CHANGED)
    gate.hold()
    (mount.path / "x").write_bytes(b"ours")
    wait_for(lambda: mount.status()["pending"]["items"][0]["state"] == "uploading")
    bucket.put("x", b"theirs")
    if then == "rename":
        os.rename(mount.path / "x", mount.path / "y")
    else:
        (mount.path / "x").unlink()
    gate.open()
    mount.flush()
    expected = {"x": b"theirs", "y": b"ours"} if then == "rename" else {"x": b"theirs"}
    assert {key: bucket.get(key) for key in bucket.keys()} == expected
    mount.stop()


def test_a_shorter_file_takes_the_place_of_one_that_is_open(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """MinIO refuses the range before it looks at the version."""
    bucket = buckets(server)
    bucket.put("f", os.urandom(3 << 20))
    mount = mounts.new(server, "--attr-ttl", "1h", bucket=bucket.name)
    file = os.open(mount.path / "f", os.O_RDONLY)
    try:
        assert len(os.pread(file, 10, 0)) == 10
        bucket.put("f", b"short")
        with pytest.raises(OSError, match="Stale"):
            os.pread(file, 4096, (3 << 20) - 5000)
    finally:
        os.close(file)
    mount.stop()
