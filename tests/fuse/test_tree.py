"""A real tree goes in and comes out of an empty cache as it was."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import stat
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import run, sha256
from tests.servers import minio

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

STDLIB = Path(sysconfig.get_path("stdlib"))
#: A few thousand entries are enough; what pip put there is not the library.
LEFT_OUT = ("__pycache__", "site-packages", "dist-packages", "test", "config-*", "ensurepip", "idlelib")
ODD_NAMES = (
    *("a b", "a+b", "100%", "%41", "ä ö", "日本語", "new\nline", "tab\t", "-dash", "quote'\"", "#hash?", "é", "~"),
    *("&amp;", "back\\slash", "$(x)", "x" * 255),
)


def make_tree(root: Path, *, backslash: bool = True) -> None:
    """The standard library, and everything else that a tree can hold."""
    odd_names = [name for name in ODD_NAMES if backslash or "\\" not in name]
    shutil.copytree(STDLIB, root, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    odd = root / "odd"
    odd.mkdir()
    (odd / "empty dir").mkdir()
    (odd / "deep").mkdir()
    (odd / "deep/er").mkdir()
    (odd / "deep/er/est").mkdir()
    for number, name in enumerate(odd_names):
        (odd / name).write_bytes(name.encode() * number)
        os.utime(odd / name, ns=(1_600_000_000_123_456_789 + number, 1_500_000_000_987_654_321 - number))
    (odd / "names").mkdir()
    for name in odd_names[:-1]:
        (odd / "names" / f"{name}.d").mkdir()
        (odd / "names" / f"{name}.d" / name).write_text(name)
        (odd / "names" / f"{name}.l").symlink_to(name)
    for mode in (0o4755, 0o2755, 0o1777, 0o600, 0o000, 0o777, 0o444):
        path = odd / f"mode {mode:o}"
        path.write_bytes(b"#!/bin/sh\n")
        path.chmod(mode)
        directory = odd / f"dir mode {mode:o}"
        directory.mkdir()
        directory.chmod(mode)
    (odd / "relative").symlink_to("deep/er")
    (odd / "absolute").symlink_to("/etc/passwd")
    (odd / "dangling").symlink_to("no such file")
    (odd / "long").symlink_to("x" * 1000)
    (odd / "odd target").symlink_to("ü %41 \n+")
    os.mkfifo(odd / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(odd)
        listener.bind("socket")
        os.chdir(here)
    if os.geteuid() == 0:
        os.mknod(odd / "device", stat.S_IFCHR | 0o620, os.makedev(1, 3))
        os.chown(odd / "mode 600", 1234, 4321)
        os.chown(odd / "dangling", 77, 78, follow_symlinks=False)
    os.utime(odd / "dangling", ns=(1, 1_000_000_007), follow_symlinks=False)
    (odd / "before 1970").write_bytes(b"old")
    os.utime(odd / "before 1970", ns=(-1_500_000_000, -1_500_000_001))
    (odd / "sparse").write_bytes(b"")
    os.truncate(odd / "sparse", 3_000_000)
    os.utime(odd / "deep", ns=(5, 1_234_567_890_111_222_333))


def differences(source: Path, copy: Path) -> str:
    """What rsync and diff list; nothing for equal trees."""
    rsync = run("rsync", "-aniAX", "--checksum", "--delete", f"{source}/", f"{copy}/").stdout
    # diff cannot compare sockets and would open devices; rsync has compared those.
    left_out = [word for name in ("fifo", "socket", "device") for word in ("-x", name)]
    diff = run("diff", "-r", "--no-dereference", *left_out, source, copy, check=False).stdout
    return rsync + diff


@pytest.mark.timeout(240)
def test_cp_a_of_a_real_tree(server: Server, mounts: Mounts, buckets: Callable[..., Bucket], tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source, backslash=server.kind != "seaweedfs")  # it takes one for a slash
    mount = mounts.new(server)
    run("cp", "-a", source, mount.path / "tree", timeout_s=100)
    assert differences(source, mount.path / "tree") == ""
    mount.remount(empty_cache=True)
    assert differences(source, mount.path / "tree") == ""
    found = {(path.lstat().st_mtime_ns, path.name) for path in (mount.path / "tree").rglob("*")}
    assert found == {(path.lstat().st_mtime_ns, path.name) for path in source.rglob("*")}

    bucket = buckets(server, mount.bucket)
    modes = {path: path.lstat().st_mode for path in source.rglob("*")}
    keys = {path: f"tree/{path.relative_to(source)}{'/' * stat.S_ISDIR(mode)}" for path, mode in modes.items()}
    files = {keys[path]: path for path, mode in modes.items() if stat.S_ISREG(mode)}
    assert bucket.keys() == {"tree/", *keys.values()}
    wrong = [
        key
        for key, same in bucket.each(lambda key: (key, bucket.digest(key) == sha256(files[key])), list(files))
        if not same
    ]
    assert wrong == []


@pytest.mark.timeout(120)
def test_objects_without_directory_markers(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """1,000 objects put through S3 are found, with every prefix as a directory."""
    bucket = buckets(server)
    bodies = {f"a{n % 7}/b {n % 5}/ü{n % 3}/file+{n}%": os.urandom(n * 7) for n in range(1000)}
    bucket.each(lambda key: bucket.put(key, bodies[key]), list(bodies))
    mount = mounts.new(server, bucket=bucket.name)
    found = {}
    for folder, _, names in os.walk(mount.path):
        for name in names:
            path = Path(folder, name)
            found[str(path.relative_to(mount.path))] = sha256(path)
    assert found == {key: hashlib.sha256(body).hexdigest() for key, body in bodies.items()}
    assert bucket.keys() == set(bodies)  # looking makes no markers


def test_the_folder_of_a_deleted_object_on_the_servers_disk_is_no_directory(
    tmp_path: Path, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """MinIO lists it as a prefix for ever, with nothing below."""
    (tmp_path / "server").mkdir()
    with minio(tmp_path / "server") as server:
        bucket = buckets(server)
        bucket.put("d/f", bytes(300_000))
        (folder,) = (tmp_path / "server").rglob("d/f")
        for path in [folder / "xl.meta", *folder.rglob("part.*")]:
            path.unlink()
        bucket.put("d/real/x", b"")
        assert {item.object_name for item in bucket.client.list_objects(bucket.name, prefix="d/")} == {
            "d/f/",
            "d/real/",
        }
        mount = mounts.new(server, bucket=bucket.name)
        assert os.listdir(mount.path / "d") == ["real"]
        (mount.path / "d/f").write_bytes(b"again")
        mount.flush()
        assert bucket.get("d/f") == b"again"
        mount.stop()
