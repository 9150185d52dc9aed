"""Programs as people run them: git, sqlite, tar, editors, logs."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import free_environment, run, wait_for
from tests.fuse.test_tree import differences

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server


def git(*words: str | Path, cwd: Path) -> str:
    environment = free_environment(
        HOME="/nonexistent", GIT_CONFIG_NOSYSTEM="1", GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a@b",
        GIT_COMMITTER_NAME="a", GIT_COMMITTER_EMAIL="a@b",
    )  # fmt: skip
    return run("git", *words, cwd=cwd, env=environment, timeout_s=100).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A few hundred files, twenty commits."""
    path = tmp_path / "repository"
    path.mkdir()
    git("init", "-q", "-b", "main", cwd=path)
    source = random.Random(3)
    for commit in range(20):
        for number in range(15):
            file = path / f"d{commit % 4}" / f"e{number % 3}" / f"file{commit}-{number}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(str(source.random()) for _ in range(source.randrange(200))))
        (path / "changes").write_text(f"{commit}\n" * 100)
        git("add", "-A", cwd=path)
        git("commit", "-q", "-m", f"commit {commit}", cwd=path)
    (path / "link").symlink_to("changes")
    git("add", "-A", cwd=path)
    git("commit", "-q", "-m", "a link", cwd=path)
    return path


@pytest.mark.timeout(240)
def test_git(server: Server, mounts: Mounts, repository: Path) -> None:
    mount = mounts.new(server)
    clone = mount.path / "clone"
    git("clone", "-q", f"file://{repository}", clone, cwd=mount.path)
    assert git("status", "--porcelain", cwd=clone) == ""
    for number in range(5):
        (clone / f"new{number}").write_text(f"{number}\n" * 1000)
        (clone / "changes").write_text(f"changed {number}\n")
        git("add", "-A", cwd=clone)
        git("commit", "-q", "-m", f"more {number}", cwd=clone)
    git("checkout", "-q", "-b", "branch", "HEAD~3", cwd=clone)
    git("merge", "-q", "main", cwd=clone)
    git("gc", "-q", cwd=clone)
    git("fsck", "--full", "--strict", cwd=clone)
    mount.remount(empty_cache=True)
    git("fsck", "--full", "--strict", cwd=clone)
    assert git("status", "--porcelain", cwd=clone) == ""
    assert len(git("log", "--oneline", cwd=clone).splitlines()) == 26
    git("repack", "-q", "-a", "-d", "-f", cwd=clone)
    git("pull", "-q", "--no-rebase", "origin", "main", cwd=clone)
    git("push", "-q", "origin", "branch", cwd=clone)
    git("fsck", "--full", "--strict", cwd=repository)


@pytest.mark.parametrize("journal", ["delete", "wal", "truncate", "persist"])
def test_sqlite(server: Server, mounts: Mounts, journal: str) -> None:
    mount = mounts.new(server)
    database = mount.path / "data.sqlite"

    def fill() -> None:
        db = sqlite3.connect(database, timeout=30)
        assert db.execute(f"PRAGMA journal_mode={journal}").fetchone() == (journal,)
        db.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, text TEXT)")
        for number in range(10):
            with db:
                db.executemany("INSERT INTO t (text) VALUES (?)", [(f"{number} " * 50,)] * 100)
            with db:
                db.execute("DELETE FROM t WHERE n % 10 = ?", (number,))
        with pytest.raises(ZeroDivisionError), db:
            db.execute("DELETE FROM t")
            raise ZeroDivisionError
        db.execute("VACUUM")
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        db.close()

    fill()
    # A second process writes the same database while this one has it open.
    db = sqlite3.connect(database, timeout=30)
    script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], timeout=30); db.execute('DELETE FROM t WHERE n < 300'); db.commit()"  # noqa: E501 - a program's text
    run(sys.executable, "-c", script, database)
    (rows,) = db.execute("SELECT count(*) FROM t").fetchone()
    db.close()
    mount.remount(empty_cache=True)
    db = sqlite3.connect(database)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert db.execute("SELECT count(*) FROM t").fetchone() == (rows,)
    db.close()
    fill()


def test_tar(server: Server, mounts: Mounts, repository: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(repository, "source")
    mount = mounts.new(server)
    run("tar", "-xpf", archive, "-C", mount.path)
    assert differences(repository, mount.path / "source") == ""
    run("tar", "-cf", mount.path / "again.tar", "-C", mount.path, "source")
    mount.remount(empty_cache=True)
    run("tar", "-df", mount.path / "again.tar", "-C", mount.path)
    assert differences(repository, mount.path / "source") == ""


def test_rsync(server: Server, mounts: Mounts, repository: Path) -> None:
    """rsync writes beside and renames; the second run finds nothing to do."""
    mount = mounts.new(server)
    run("rsync", "-a", f"{repository}/", f"{mount.path}/copy/")
    assert run("rsync", "-ai", f"{repository}/", f"{mount.path}/copy/").stdout == ""
    mount.remount(empty_cache=True)
    assert run("rsync", "-ai", f"{repository}/", f"{mount.path}/copy/").stdout == ""


def test_vim(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """The editor itself, with its swap, backup and patch files."""
    bucket = buckets(minio_server)
    bucket.put("notes.txt", b"first\nsecond\n")
    mount = mounts.new(minio_server, bucket=bucket.name)
    for number in range(3):
        words = [
            "-Nu",
            "NONE",
            "-es",
            "-c",
            "set backup writebackup backupskip=",
            "-c",
            f"normal Goline {number}",
            "-c",
            "wq",
        ]
        run("vim", *words, mount.path / "notes.txt", env=free_environment(TERM="dumb", HOME=str(mount.path.parent)))
    expected = b"first\nsecond\nline 0\nline 1\nline 2\n"
    assert (mount.path / "notes.txt").read_bytes() == expected
    mount.stop()
    assert bucket.get("notes.txt") == expected
    assert bucket.keys() == {"notes.txt", "notes.txt~"}


def test_save_by_rename(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Write beside, fsync, rename over: readers see the old or the new one, nothing between, and no temporary stays."""
    mount = mounts.new(server)
    target = mount.path / "config.json"
    target.write_bytes(b"0" * 100)
    for number in range(1, 30):
        beside = mount.path / f".config.json.{number}"
        with beside.open("wb") as file:
            file.write(b"%d" % (number % 10) * (100 + number))
            file.flush()
            if number % 3 == 0:
                os.fsync(file.fileno())
        before = target.read_bytes()
        assert len(before) == 99 + number
        beside.rename(target)
        assert target.read_bytes() == b"%d" % (number % 10) * (100 + number)
    mount.stop()
    bucket = buckets(server, mount.bucket)
    assert bucket.keys() == {"config.json"}
    assert bucket.get("config.json") == b"9" * 129


def test_log_while_another_process_tails_it(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(server)
    log = mount.path / "log"
    log.touch()
    tail = subprocess.Popen(["tail", "-n", "+1", "-s", "0.05", "-f", log], stdout=subprocess.PIPE, text=True)
    try:
        assert tail.stdout
        script = "import sys, time\nfor n in range(50):\n  with open(sys.argv[1], 'a') as f: f.write(f'{sys.argv[2]} {n}\\n')\n  time.sleep(0.01)"  # noqa: E501 - a program's text
        writers = [subprocess.Popen([sys.executable, "-c", script, log, name]) for name in ("one", "two")]
        lines = [tail.stdout.readline() for _ in range(100)]
        assert [writer.wait(30) for writer in writers] == [0, 0]
    finally:
        tail.kill()
        tail.communicate()
    expected = [f"{name} {n}\n" for name in ("one", "two") for n in range(50)]
    assert sorted(lines) == sorted(expected)
    mount.stop()
    assert sorted(buckets(server, mount.bucket).get("log").decode().splitlines(keepends=True)) == sorted(expected)


def test_long_open_log_reaches_the_bucket_at_fsync(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    mount = mounts.new(server)
    bucket = buckets(server, mount.bucket)
    expected = b""
    with (mount.path / "log").open("ab", buffering=0) as log:
        for number in range(5):
            line = b"line %d\n" % number * 1000
            log.write(line)
            expected += line
            os.fsync(log.fileno())
            assert bucket.get("log") == expected


def test_tempfile(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(minio_server)
    with tempfile.TemporaryFile(dir=mount.path) as file:
        file.write(b"x" * 100_000)
        file.seek(50_000)
        assert file.read() == b"x" * 50_000
    with tempfile.NamedTemporaryFile(dir=mount.path) as named:
        named.write(b"named")
        named.flush()
        with open(named.name, "rb") as again:
            assert again.read() == b"named"
    with tempfile.TemporaryDirectory(dir=mount.path) as folder:
        for number in range(20):
            with open(f"{folder}/{number}", "w") as out:
                out.write(str(number))
    with tempfile.SpooledTemporaryFile(max_size=10, dir=mount.path) as spooled:
        spooled.write(b"y" * 1000)
        spooled.seek(0)
        assert spooled.read() == b"y" * 1000
    assert os.listdir(mount.path) == []
    mount.stop()
    assert buckets(minio_server, mount.bucket).keys() == set()


@pytest.mark.parametrize("uploaded", [False, True])
def test_unlink_while_open(server: Server, mounts: Mounts, buckets: Callable[..., Bucket], uploaded: bool) -> None:
    mount = mounts.new(server)
    bucket = buckets(server, mount.bucket)
    path = mount.path / "file"
    path.write_bytes(b"old bytes")
    if uploaded:
        mount.flush()
    with path.open("r+b", buffering=0) as file:
        path.unlink()
        assert not path.exists()
        assert file.read() == b"old bytes"
        file.seek(4)
        file.write(b"BYTES and more")
        file.seek(0)
        assert file.read() == b"old BYTES and more"
        assert os.fstat(file.fileno()).st_nlink == 0
        file.truncate(3)
        file.seek(0)
        assert file.read() == b"old"
        os.fchmod(file.fileno(), 0o600)
        path.write_bytes(b"another file of this name")
        mount.flush()
        assert bucket.get("file") == b"another file of this name"
        file.seek(0)
        assert file.read() == b"old"
        path.unlink()
    mount.stop()
    assert bucket.keys() == set()


@pytest.mark.parametrize("uploaded", [False, True])
def test_rename_over_an_open_file(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], uploaded: bool
) -> None:
    mount = mounts.new(server)
    bucket = buckets(server, mount.bucket)
    old, new = mount.path / "old", mount.path / "new"
    old.write_bytes(b"old" * 5000)
    new.write_bytes(b"new" * 5000)
    if uploaded:
        mount.remount(empty_cache=True)
    with old.open("rb", buffering=0) as file, new.open("ab", buffering=0) as renamed:
        new.rename(old)
        renamed.write(b"er")
        assert old.read_bytes() == b"new" * 5000 + b"er"
        if uploaded:
            # The bucket has the new version of the key while the old one is still read.
            os.fsync(renamed.fileno())
            assert bucket.get("old") == b"new" * 5000 + b"er"
        assert file.read() == b"old" * 5000
    mount.stop()
    assert bucket.keys() == {"old"}
    assert bucket.get("old") == b"new" * 5000 + b"er"


def test_parallel_writers(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """Eight processes make, fill and rename files in the same directories at once."""
    mount = mounts.new(server)
    script = """
import os, sys
root, me = sys.argv[1:]
for n in range(40):
    os.makedirs(f"{root}/shared/d{n % 5}", exist_ok=True)
    with open(f"{root}/shared/d{n % 5}/.{me}-{n}", "w") as f: f.write(f"{me} {n}" * n)
    os.rename(f"{root}/shared/d{n % 5}/.{me}-{n}", f"{root}/shared/d{n % 5}/{me}-{n}")
"""
    writers = [subprocess.Popen([sys.executable, "-c", script, mount.path, str(me)]) for me in range(8)]
    assert [writer.wait(60) for writer in writers] == [0] * 8
    mount.stop()
    bucket = buckets(server, mount.bucket)
    files = {f"shared/d{n % 5}/{me}-{n}": f"{me} {n}".encode() * n for me in range(8) for n in range(40)}
    assert bucket.keys() == {"shared/", *(f"shared/d{n}/" for n in range(5)), *files}
    assert all(bucket.each(lambda key: bucket.get(key) == files[key], list(files)))


def test_processes_wait_for_each_other(minio_server: Server, mounts: Mounts) -> None:
    """flock and lockf hold between processes of this machine."""
    mount = mounts.new(minio_server)
    path = mount.path / "lock"
    path.write_text("")
    for how in ("flock", "lockf"):
        script = f"import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.{how}(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"  # noqa: E501 - a program's text
        holder = subprocess.Popen(
            [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        import fcntl

        lock = getattr(fcntl, how)
        with path.open("r+") as file:
            assert holder.stdout
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(BlockingIOError):
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder.communicate("")

            def free(file=file, lock=lock) -> bool:
                try:
                    lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True

            wait_for(free)
