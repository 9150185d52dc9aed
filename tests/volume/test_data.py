"""What is in a volume: what copy-up brings, who may use it, where it goes, and what nobody may see of its keys."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from s3fuse import kernel
from tests.fuse.harness import wait_for
from tests.volume.harness import WAIT_S, Plugin, Refused, container

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket
    from tests.servers import Server

    Plugins = Callable[..., Plugin]

SECOND_NS = 10**9


def image(folder: Path, files: int) -> None:
    """A directory of an image, with all that copy-up has to bring; many small files in it."""
    (folder / "many").mkdir(parents=True)
    for number in range(files):
        (folder / "many" / f"{number:04}").write_bytes(b"x" * (number % 5000))
    (folder / "empty").mkdir()
    (folder / "private").mkdir(mode=0o700)
    (folder / "private" / "data").write_text("secret\n")
    (folder / "suid").write_text("#!/bin/sh\n")
    (folder / "link").symlink_to("private/data")
    os.link(folder / "suid", folder / "twin")
    (folder / "dangling").symlink_to("/nowhere/at all")
    os.mkfifo(folder / "fifo", 0o620)
    os.mknod(folder / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (folder / "ünï cödé").write_text("x")
    os.setxattr(folder / "suid", "user.note", b"hello")
    os.setxattr(folder / "suid", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, 33, 33, follow_symlinks=False)
        if not path.is_symlink():
            os.utime(path, ns=(10**18 + 123_456_789, 10**18 + 987_654_321))
    os.chmod(folder / "suid", 0o4755)
    os.chmod(folder, 0o1770)
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    os.setxattr(folder / "suid", "security.capability", capability)  # chown takes it away


def copy_up(source: Path, target: Path) -> None:
    """Copies a tree in the order that Docker does: parents first, for each its content, owner, mode, times, xattrs."""
    seen: dict[int, Path] = {}
    for path in [source, *sorted(source.rglob("*"))]:
        to = target / path.relative_to(source)
        status = path.lstat()
        if status.st_ino in seen:
            os.link(seen[status.st_ino], to)
            continue
        if not path.is_dir() and status.st_nlink > 1:
            seen[status.st_ino] = to
        if path.is_symlink():
            to.symlink_to(path.readlink())
        elif path.is_dir():
            to.mkdir(exist_ok=True)
        elif path.is_file():
            shutil.copyfile(path, to)
        elif stat.S_ISFIFO(status.st_mode):
            os.mkfifo(to)
        else:
            os.mknod(to, status.st_mode, status.st_rdev)
        os.chown(to, status.st_uid, status.st_gid, follow_symlinks=False)
        if not path.is_symlink():
            os.chmod(to, stat.S_IMODE(status.st_mode))
            os.utime(to, ns=(status.st_atime_ns, status.st_mtime_ns))
        for name in os.listxattr(path, follow_symlinks=False):
            os.setxattr(to, name, os.getxattr(path, name, follow_symlinks=False), follow_symlinks=False)


def facts(folder: Path) -> dict[str, tuple[object, ...]]:
    """All that must be equal. Times of directories change with their entries, but not the root's, which came last."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = path.read_bytes()
        names = sorted(os.listxattr(path, follow_symlinks=False))
        found[str(path.relative_to(folder))] = (
            oct(status.st_mode),
            status.st_uid,
            status.st_gid,
            status.st_rdev,
            status.st_mtime_ns if path.is_file() and not path.is_symlink() else None,
            content,
            [(name, os.getxattr(path, name, follow_symlinks=False)) for name in names],
        )
    return found


@pytest.mark.timeout(240)
def test_copy_up(plugins: Plugins, server: Server, buckets: Callable[..., Bucket], tmp_path: Path) -> None:
    """The tree of an image, root directory included, on another node with an empty cache."""
    bucket = buckets(server)
    image(tmp_path / "image", 300)
    wanted = facts(tmp_path / "image")
    first = plugins(server)
    first.create("vol", bucket=bucket.name)
    path = first.mount("vol", "copy-up")
    assert os.listdir(path) == [], "nothing of ours is in an empty volume"
    copy_up(tmp_path / "image", path)
    first.unmount("vol", "copy-up")
    assert facts(first.mount("vol", "run")) == wanted
    first.unmount("vol", "run")

    second = plugins(server)
    second.create("vol", bucket=bucket.name)
    path = second.mount("vol", "run")
    os.listdir(path / "many")
    assert facts(path) == wanted
    second.unmount("vol", "run")


@pytest.mark.parametrize("place", ["bucket", "prefix"])
def test_attributes_of_the_root_persist(
    plugins: Plugins, server: Server, buckets: Callable[..., Bucket], place: str
) -> None:
    bucket = buckets(server)
    options = {"bucket": bucket.name, **({"prefix": "a/b"} if place == "prefix" else {})}
    first, second = plugins(server), plugins(server)
    first.create("vol", **options)
    path = first.mount("vol")
    os.chown(path, 1000, 1001)
    os.chmod(path, 0o2750)
    os.utime(path, ns=(10**18, 10**18 + 5))
    first.unmount("vol")
    second.create("vol", **options)
    status = second.mount("vol").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, 1001, 0o2750)
    assert status.st_mtime_ns == 10**18 + 5
    second.unmount("vol")


def test_users_who_are_not_root(plugins: Plugins, bucket: Bucket) -> None:
    """A new volume is for everybody, as there is nobody yet whose it could be; what they make is theirs."""
    bucket.put("from-outside", b"by mc\n")
    bucket.put("also-from-outside", b"by mc\n")
    plugin = plugins(bucket.server)
    plugin.create("vol", bucket=bucket.name)
    plugin.create("owned", bucket=bucket.name, uid="1000", gid="1000", umask="077")
    with container(plugin.mount("vol"), plugin.folder / "data") as box:
        user = "setpriv --reuid={0} --regid={0} --clear-groups sh -ec"
        box.run(f"{user.format(1000)} 'echo one >mine; echo two >>mine; mkdir dir; echo x >dir/x; rm dir/x'")
        box.run(f"{user.format(1000)} 'echo and more >>from-outside'")
        box.run(f"{user.format(2000)} 'cat mine; echo x >theirs'")
        with pytest.raises(subprocess.CalledProcessError):
            box.run(f"{user.format(2000)} 'echo no >>mine'")
        assert box.run("stat -c %u mine theirs").split() == ["1000", "2000"]
    plugin.unmount("vol")
    status = (plugin.mount("owned") / "also-from-outside").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1000, 1000, 0o600)
    plugin.unmount("owned")


def test_a_volume_makes_nobody_root(plugins: Plugins, bucket: Bucket) -> None:
    """By default; the container of an image with set-uid programs is given it by name."""
    plugin = plugins(bucket.server)
    plugin.create("vol", bucket=bucket.name)
    plugin.create("trusted", bucket=bucket.name, suid="true", dev="true", exec="false")
    user = "setpriv --reuid=1000 --regid=1000 --clear-groups"
    for name, flags in (("vol", {"nosuid", "nodev"}), ("trusted", {"noexec"})):
        path = plugin.mount(name)
        entry = kernel.mount_entry(path)
        assert entry is not None
        assert {"nosuid", "nodev", "noexec"} & set(entry.flags) == flags
        if name == "vol":
            shutil.copy("/usr/bin/id", path / "id")
            (path / "id").chmod(0o4755)
            with container(path, plugin.folder / "data") as box:
                assert box.run(f"{user} ./id -u").split() == ["1000"]
        plugin.unmount(name)


def test_a_name_leads_to_the_same_data_on_every_node(plugins: Plugins, bucket: Bucket) -> None:
    rule = f"--name-rule={bucket.name}/volumes/{{name}}"
    first, second = plugins(bucket.server, rule), plugins(bucket.server, rule)
    first.create("My_data")
    (first.mount("My_data") / "file").write_text("x")
    first.unmount("My_data")
    assert bucket.keys() == {"volumes/My_data/file"}
    second.create("My_data")
    assert (second.mount("My_data") / "file").read_text() == "x"
    second.unmount("My_data")
    third = plugins(bucket.server)
    third.allowed.append("cannot be mounted: bucket 'my-data' does not exist")
    with pytest.raises(Refused, match="volume My_data names no bucket"):
        third.create("My_data")
    third.create("my-data")
    with pytest.raises(Refused, match="bucket 'my-data' does not exist"):
        third.mount("my-data")


def test_ephemeral(plugins: Plugins, bucket: Bucket) -> None:
    """Nothing of it is on this host's disk."""
    plugin = plugins(bucket.server)
    plugin.create("vol", bucket=bucket.name, ephemeral="true")
    path = plugin.mount("vol")
    (path / "file").write_text("SECRET-CONTENT")
    plugin.unmount("vol")
    assert bucket.get("file") == b"SECRET-CONTENT"
    assert (path / "file").read_text() == "SECRET-CONTENT"
    assert not (plugin.folder / "cache").exists()
    plugin.until_gone("vol")


# -- keys


def test_keys_are_named_and_seen_nowhere(plugins: Plugins, bucket: Bucket) -> None:
    server = bucket.server
    plugin = plugins(server, f"--endpoint={server.endpoint}", start=False)
    plugin.keys = False
    (plugin.folder / "keys").mkdir()
    keys = plugin.folder / "keys" / "prod"
    keys.write_text(f"{server.access_key}:{server.secret_key}\n")
    plugin.start()
    with pytest.raises(Refused, match="others can read"):
        plugin.create("vol", bucket=bucket.name, credentials="prod")
    keys.chmod(0o600)
    plugin.create("vol", bucket=bucket.name, credentials="prod")
    plugin.create("none", bucket=bucket.name)
    with pytest.raises(Refused, match="no keys were found"):
        plugin.mount("none")
    plugin.allowed.append("volume none cannot be mounted")
    path = plugin.mount("vol")
    (path / "file").write_text("x")

    def seen() -> str:
        texts = [str(plugin.get("vol")), plugin.log_text(), Path(plugin.status("vol")["log"]).read_text()]
        texts += [file.read_text() for file in plugin.state.iterdir()]
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                texts.append(process.read_text(errors="replace"))
            except OSError:
                continue
        return "\n".join(texts)

    assert "prod" in seen()
    assert server.secret_key not in seen()

    # Rotated while mounted: wrong ones are noticed, right ones are used by the next request.
    keys.write_text(f"{server.access_key}:wrong-{server.secret_key}\n")

    def refused() -> bool:
        (path / "file2").write_text("waits")
        return plugin.status("vol")["last_error"] is not None

    wait_for(refused, timeout_s=WAIT_S, every_s=0.3)
    keys.write_text(f"{server.access_key}:{server.secret_key}\n")
    plugin.unmount("vol")
    wait_for(lambda: "file2" in bucket.keys(), timeout_s=WAIT_S)  # noqa: SIM118 - it is no mapping
    assert server.secret_key not in seen()
    plugin.until_gone("vol")
