"""What a mount gives nobody: root's rights by set-uid files and file capabilities, devices of the host (T92); what is
in its cache directory and log."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from s3fuse import attrs, kernel
from s3fuse.errors import ExitCode
from tests.fuse.harness import S3FUSE, free_environment, run, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Mount, Mounts
    from tests.servers import Server

NOBODY = 65534
#: `cap_dac_read_search=ep`, as setcap(8) writes it.
MAY_READ_ALL = bytes.fromhex("0100000204000000000000000000000000000000")


def plant(bucket: Bucket) -> None:
    """What somebody may upload who has the right to write objects, and nothing else."""
    at_ns = 10**18

    def put(name: str, mode: int, data: bytes = b"", *, rdev: int = 0, xattrs: dict[str, bytes] | None = None) -> None:
        attributes = attrs.Attributes(mode, 0, 0, at_ns, at_ns, at_ns, rdev, xattrs or {}, None)
        bucket.put(name, data, dict(attrs.encode(attributes, {})))

    put("su", stat.S_IFREG | 0o4755, Path("/usr/bin/id").read_bytes())
    put("reads", stat.S_IFREG | 0o755, Path("/bin/cat").read_bytes(), xattrs={"security.capability": MAY_READ_ALL})
    put("full", stat.S_IFCHR | 0o666, rdev=os.makedev(1, 7))


class Given:
    """What nobody gets from the mount."""

    def __init__(self, mount: Mount, secret: Path) -> None:
        self.flags = set(run("findmnt", "-no", "OPTIONS", mount.path).stdout.strip().split(","))
        self.root = self._run(mount, "./su", "-u") == "0"
        self.secret = self._run(mount, "./reads", str(secret)) == "secret"
        self.device = self._opens(mount.path / "full")

    def _run(self, mount: Mount, *words: str) -> str | None:
        """None where it may not be run."""
        try:
            done = subprocess.run(
                words, cwd=mount.path, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True
            )
        except PermissionError:
            return None
        return done.stdout.strip()

    def _opens(self, path: Path) -> bool:
        try:
            os.close(os.open(path, os.O_RDONLY))
        except PermissionError:
            return False
        return True

    @property
    def all(self) -> tuple[bool, bool, bool]:
        return self.root, self.secret, self.device


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("secret\n")
    path.chmod(0o600)
    return path


NONE = (False, False, False)
FROM_FSTAB = "nosuid,nodev,noexec,noatime,nouser,_netdev,nofail,x-systemd.automount,x-systemd.requires=a.service"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("options", "given", "flags"),
    [
        ((), NONE, {"nosuid", "nodev", "relatime"}),
        (("-o", FROM_FSTAB), NONE, {"nosuid", "nodev", "noexec", "noatime"}),
        (("-o", "suid,dev,relatime,user"), NONE, {"nosuid", "nodev", "noexec", "relatime"}),
        (("--suid",), (True, True, False), {"nodev", "relatime"}),
        (("--dev", "--read-only"), (False, False, True), {"ro", "nosuid", "relatime"}),
        (("-o", "user,exec,dev,suid"), (True, True, True), {"relatime"}),
    ],
)
def test_root_is_given_by_name_only(
    minio_server: Server,
    mounts: Mounts,
    buckets: Callable[..., Bucket],
    secret: Path,
    options: tuple[str, ...],
    given: tuple[bool, bool, bool],
    flags: set[str],
) -> None:
    bucket = buckets(minio_server)
    plant(bucket)
    found = Given(mounts.new(minio_server, *options, bucket=bucket.name), secret)
    assert found.all == given
    known = {"ro", "nosuid", "nodev", "noexec", "noatime", "relatime"}
    assert found.flags & known == flags


@pytest.mark.timeout(120)
def test_it_stays_so_in_other_processes_of_the_mount(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket], secret: Path
) -> None:
    """After a kill, a restart, and a restart of a mount that a version has made which did not know better."""
    bucket = buckets(minio_server)
    plant(bucket)
    mount = mounts.new(minio_server, bucket=bucket.name)

    def restart() -> None:
        run(S3FUSE, "restart", mount.path, env=free_environment())

    mount.allowed.append("the worker died: killed by SIGKILL")
    os.kill(mount.worker_pid, signal.SIGKILL)
    assert Given(mount, secret).all == NONE
    restart()
    assert Given(mount, secret).all == NONE

    run("mount", "-o", "remount,bind,suid,dev,noexec,noatime", mount.path)
    assert Given(mount, secret).flags.isdisjoint({"nosuid", "nodev"})
    mount.allowed.append("are no longer honoured, as an earlier version did")
    restart()
    found = Given(mount, secret)
    assert found.all == NONE
    assert {"nosuid", "nodev", "noexec", "noatime"} <= found.flags, "what it had stays"
    assert mount.log_text().count("no longer honoured") == 1
    restart()
    assert mount.log_text().count("no longer honoured") == 1


def test_flags_are_of_the_mount_that_is_meant(tmp_path: Path) -> None:
    """Another one that covers it is left alone."""
    descriptor = kernel.mount(tmp_path, source="s3fuse#test", allow_other=False, flags=())
    try:
        entry = kernel.mount_entry(tmp_path)
        assert entry is not None
        run("mount", "-t", "tmpfs", "-o", "suid", "tmpfs", tmp_path)
        assert not kernel.restrict(tmp_path, entry.device, kernel.SAFE_FLAGS)
        run("umount", tmp_path)
        assert kernel.restrict(tmp_path, entry.device, kernel.SAFE_FLAGS)
        assert not kernel.restrict(tmp_path, entry.device, kernel.SAFE_FLAGS)
        now = kernel.mount_entry(tmp_path)
        assert now is not None
        assert set(kernel.SAFE_FLAGS) <= set(now.flags)
    finally:
        os.close(descriptor)
        while kernel.mount_entry(tmp_path) is not None:
            kernel.unmount(tmp_path, lazy=True)


def readable(*places: Path) -> list[str]:
    """What others have any right to."""
    paths = [path for place in places for path in (place, *place.rglob("*"))]
    return [f"{path} {path.stat().st_mode:o}" for path in paths if path.stat().st_mode & 0o077]


@pytest.mark.timeout(120)
def test_nobody_else_reads_what_is_staged_cached_and_logged(minio_server: Server, mounts: Mounts) -> None:
    """Whatever the umask is, and in a directory that was made by hand, or by a version that left it open."""
    mount = mounts.new(minio_server, start=False)
    mount.cache.mkdir(mode=0o755)
    mount.log.touch(0o644)
    mask = os.umask(0)
    try:
        mount.start()
    finally:
        os.umask(mask)
    (mount.path / "large").write_bytes(os.urandom(3 << 20))
    with (mount.path / "open").open("wb", 0) as file:
        file.write(b"x" * 200_000)
        mount.flush()
        assert (mount.cache / "staging").is_dir()
        assert readable(mount.cache, mount.log) == []
        file.write(b"and more")
        run(S3FUSE, "restart", mount.path, env=free_environment())
        assert readable(mount.cache, mount.log) == []

        mount.allowed.append("was damaged .journal.sqlite was removed.; it is written anew")
        (mount.cache / "journal.sqlite").unlink()
        (mount.path / "more").write_bytes(b"x" * 100)
        wait_for((mount.cache / "journal.sqlite").exists)
        assert readable(mount.cache, mount.log) == []
    mount.stop()

    def leave_open() -> None:
        for path in (mount.log, mount.cache, *mount.cache.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)

    leave_open()
    mount.start()
    assert len((mount.path / "large").read_bytes()) == 3 << 20
    assert readable(mount.cache, mount.log) == []
    leave_open()
    run(S3FUSE, "restart", mount.path, env=free_environment())
    assert readable(mount.cache, mount.log) == []


def test_a_cache_directory_of_all_is_refused(minio_server: Server, mounts: Mounts) -> None:
    mount = mounts.new(minio_server, start=False)
    mount.cache.mkdir()
    mount.cache.chmod(0o1777)
    done = run(*mount.command(), env=free_environment(**minio_server.environment), check=False)
    assert done.returncode == ExitCode.FAILED
    assert f"others may write to cache directory {mount.cache} (mode 1777)" in done.stderr
    assert f"chmod 700 {mount.cache}; or choose another with --cache-dir" in done.stderr
    assert list(mount.cache.iterdir()) == []
    assert not mount.mounted


@pytest.mark.timeout(120)
def test_keys_in_places_where_they_do_not_belong(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket], tmp_path: Path
) -> None:
    """A key file that others can read, and one that is replaced by nonsense; the log shows nothing of either."""
    mount = mounts.new(minio_server, "--attr-ttl", "0s", start=False)
    secret = minio_server.secret_key
    good = f'{{"accessKey": "{minio_server.access_key}", "secretKey": "{secret}"}}'
    keys = tmp_path / "keys"
    environment = free_environment(MINIO_ENDPOINT=minio_server.endpoint)

    def start() -> tuple[int, str]:
        command = mount.command("--credentials-file", str(keys))
        done = run(*command, env=environment, check=False)
        assert secret not in done.stderr
        return done.returncode, done.stderr

    for text, problem in (
        (f"\ufeff{good}", "it begins with a byte order mark (UTF-8)"),
        (good.replace(secret, f"{secret}ä"), f"character {len(secret) + 1} of the secret key is not ASCII"),
        (good[:-20], "it is no whole JSON, as where it is written only by half"),
        ("", "it is empty"),
        (good.replace("}", ', "sessionToken": "t\u00f6ken"}'), "character 2 of the session token is not ASCII"),
    ):
        keys.write_text(text)
        keys.chmod(0o600)
        code, errors = start()
        assert code == ExitCode.USAGE
        assert f"credentials file {keys} holds no keys" in errors
        assert problem in errors
        assert errors.count("\n") == 1

    keys.write_text(good)
    keys.chmod(0o644)
    warning = f"others can read the keys in {keys} (mode 0644); make it private: chmod 600 {keys}"
    assert start() == (0, f"s3fuse: {warning}\n")
    assert warning in mount.log_text()
    mount.allowed += ["others can read the keys in", "the keys that were there before are used"]

    keys.write_text(f"\ufeff{good}")
    buckets(minio_server, mount.bucket).put("new", b"data")
    wait_for(lambda: (mount.path / "new").exists() and "are used" in mount.log_text(), timeout_s=60, every_s=0.5)
    assert (mount.path / "new").read_bytes() == b"data"
    assert "begins with a byte order mark" in mount.log_text()
    assert secret not in mount.log_text()
    run(S3FUSE, "umount", mount.path)
