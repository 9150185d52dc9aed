"""Programs that run on a mount while its process is killed, and the same on a local directory to compare with.

`python -m tests.keeper.programs NAME ROOT SEED ROUNDS STOP` works in rounds below ROOT and prints a line for each that
tells everything it has seen; it ends after ROUNDS, or after a round when the file STOP is there. Any error of any call
ends it with a traceback.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

KIB = 1 << 10


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def tree(root: Path) -> dict[str, list[object]]:
    """What is below a directory: kind and permissions, and what files and symlinks hold."""
    found: dict[str, list[object]] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder, name)
            status = path.lstat()
            entry: list[object] = [stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode)]
            if stat.S_ISREG(status.st_mode):
                data = path.read_bytes()
                entry += [status.st_size, digest(data)]
                assert len(data) == status.st_size, path
            elif stat.S_ISLNK(status.st_mode):
                entry.append(os.readlink(path))
            found[str(path.relative_to(root))] = entry
    return found


def forget_pages(descriptor: int) -> None:
    """Has the next read of a file ask the mount again."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def syncing(root: Path, rng: random.Random) -> object:
    """Writes and overwrites one file, with fsync after every few, and reads it back."""
    path = root / f"f{rng.randrange(3)}"
    data = bytearray(path.read_bytes() if path.exists() else b"")
    with path.open("r+b" if path.exists() else "w+b", 0) as file:
        for _ in range(12):
            start = rng.randrange(len(data) + 1)
            block = rng.randbytes(rng.choice([100, 4 * KIB, 70 * KIB]))
            data[start : start + len(block)] = block
            file.seek(start)
            assert file.write(block) == len(block)
            if rng.random() < 0.3:
                os.fsync(file.fileno())
        if rng.random() < 0.3:
            file.truncate(len(data) // 2)
            del data[len(data) // 2 :]
        forget_pages(file.fileno())
        file.seek(0)
        assert file.read(len(data) + 1) == data
    assert path.stat().st_size == len(data)
    return digest(bytes(data))


def mapping(root: Path, rng: random.Random) -> object:
    """Reads pages of a file here and there through a mapping, and changes some."""
    path = root / "mapped"
    if not path.exists():
        path.write_bytes(rng.randbytes(512 * KIB))
    seen = hashlib.sha256()
    with path.open("r+b") as file:
        forget_pages(file.fileno())
        with mmap.mmap(file.fileno(), 0) as pages:
            for _ in range(60):
                at = rng.randrange(len(pages) - 100)
                seen.update(pages[at : at + 100])
                if rng.random() < 0.1:
                    pages[at : at + 100] = rng.randbytes(100)
            pages.flush()
    return seen.hexdigest()[:16]


def reading(root: Path, rng: random.Random) -> object:
    """Reads a larger file from one end to the other through one handle that stays open for several passes."""
    path = root / "long"
    if not path.exists():
        path.write_bytes(random.Random(7).randbytes(3 << 20))
    found = []
    with path.open("rb", 0) as file:
        for _ in range(2):
            forget_pages(file.fileno())
            file.seek(0)
            seen = hashlib.sha256()
            while block := file.read(100_000):
                seen.update(block)
            found.append(seen.hexdigest()[:16])
    return found


def naming(root: Path, rng: random.Random) -> object:
    """Makes, renames and removes all kinds of names."""
    top = root / "tree"
    top.mkdir(exist_ok=True)
    for _ in range(12):
        names = sorted(os.listdir(top))
        what = rng.randrange(8)
        new = top / f"n{rng.randrange(40)}"
        old = top / rng.choice(names) if names else None
        if what <= 1 and not os.path.lexists(new):
            with new.open("xb") as file:
                file.write(rng.randbytes(rng.choice([0, 10, 5 * KIB])))
        elif what == 2 and not os.path.lexists(new):
            new.mkdir()
            (new / "in it").write_bytes(b"x")
        elif what == 3 and not os.path.lexists(new):
            os.symlink(f"to/{new.name}", new)
        elif what == 4 and old is not None:
            if old.is_dir() and not old.is_symlink():
                (old / "in it").unlink()
                old.rmdir()
            else:
                old.unlink()
        elif what == 5 and old is not None and not os.path.lexists(new):
            old.rename(new)
        elif what == 6 and old is not None and old.is_file() and not old.is_symlink():
            old.chmod(0o640)
            os.setxattr(old, "user.a", rng.randbytes(8))
        elif what == 7 and not os.path.lexists(new):
            os.mkfifo(new)
        assert (old is None) or what not in (4,) or not os.path.lexists(old)
    return sorted(tree(top).items()) if rng.random() < 0.2 else sorted(os.listdir(top))


def replacing(root: Path, rng: random.Random) -> object:
    """Replaces a file as editors do: a new one under another name, fsync, rename over it."""
    path = root / "edited"
    text = rng.randbytes(3000)
    part = path.with_suffix(".new")
    with part.open("xb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    assert path.read_bytes() == text
    assert not part.exists()
    return digest(text)


def unlinking(root: Path, rng: random.Random) -> object:
    """Works with files that have no name any more, one of them over several rounds."""
    data = rng.randbytes(30 * KIB)
    with (root / f"t{rng.randrange(5)}").open("x+b", 0) as file:
        file.write(data)
        os.unlink(file.name)
        file.seek(10 * KIB)
        file.write(b"changed")
        forget_pages(file.fileno())
        os.fchmod(file.fileno(), 0o600)
        status = os.fstat(file.fileno())
        file.seek(0)
        found = file.read()
    assert found == data[: 10 * KIB] + b"changed" + data[10 * KIB + 7 :]
    return [status.st_size, stat.S_IMODE(status.st_mode), digest(found)]


def listing(root: Path, rng: random.Random) -> object:
    """Lists a directory with many entries as `ls -l` does."""
    top = root / "many"
    if not top.exists():
        top.mkdir()
        for number in range(300):
            (top / f"{number:04d} with a rather long name").write_bytes(b"x" * number)
    with os.scandir(top) as entries:
        return digest(json.dumps(sorted((e.name, e.stat().st_size) for e in entries)).encode())


def appending(root: Path, rng: random.Random) -> object:
    """Appends lines to a log that stays open, and looks at them from its other end."""
    path = root / "log"
    with path.open("ab", 0) as log:
        for number in range(40):
            log.write(b"%d line %d\n" % (rng.randrange(1000), number))
    data = path.read_bytes()
    assert data.count(b"\n") % 40 == 0
    return digest(data)


def database(root: Path, rng: random.Random) -> object:
    """Transactions of SQLite, each with its fsyncs."""
    with sqlite3.connect(root / "data.sqlite", timeout=60) as db:
        db.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, x BLOB)")
    db.execute("PRAGMA cache_size=10")
    for _ in range(3):
        with db:
            db.executemany("INSERT INTO t (x) VALUES (?)", [(rng.randbytes(700),) for _ in range(20)])
            db.execute("DELETE FROM t WHERE n % 7 = ?", (rng.randrange(7),))
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    rows = db.execute("SELECT n, x FROM t ORDER BY n").fetchall()
    db.close()
    return [len(rows), digest(repr(rows).encode())]


def unpacking(root: Path, rng: random.Random) -> object:
    """Has tar unpack an archive, compares, and removes it all."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for number in range(40):
            entry = tarfile.TarInfo(f"top/d{number % 4}/f{number}")
            body = rng.randbytes(rng.choice([0, 900, 9000]))
            entry.size, entry.mode, entry.mtime = len(body), 0o644, 1_600_000_000 + number
            archive.addfile(entry, io.BytesIO(body))
    top = root / "unpacked"
    top.mkdir()
    subprocess.run(["tar", "x", "-C", str(top)], input=packed.getvalue(), check=True, capture_output=True)
    found = {name: entry for name, entry in tree(top).items() if entry[0] == stat.S_IFREG}
    shutil.rmtree(top)
    assert not top.exists()
    return digest(json.dumps(found, sort_keys=True).encode())


def cloning(root: Path, rng: random.Random) -> object:
    """Has git clone a repository (made below the working directory), commit to the clone, and check it."""
    source, clone = Path("source.git").absolute(), root / "clone"
    git = ["git", "-c", "safe.directory=*", "-c", "user.name=n", "-c", "user.email=e", "-c", "gc.auto=0"]

    def run(*words: str, where: Path = clone) -> str:
        done = subprocess.run([*git, *words], cwd=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    if not source.exists():
        source.mkdir()
        run("init", "-q", "-b", "main", where=source)
        for number in range(30):
            (source / f"f{number}").write_bytes(random.Random(number).randbytes(2000))
        run("add", "-A", where=source)
        run("commit", "-q", "-m", "first", where=source)
    run("clone", "-q", "--no-local", str(source), str(clone), where=root)
    (clone / "f1").write_bytes(rng.randbytes(100))
    (clone / "new").write_bytes(rng.randbytes(100))
    run("add", "-A")
    run("commit", "-q", "-m", "second")
    run("fsck", "--strict")
    found = [run("ls-tree", "-r", "HEAD"), run("status", "--porcelain")]
    shutil.rmtree(clone)
    return digest("".join(found).encode())


PROGRAMS: dict[str, Callable[[Path, random.Random], object]] = {
    program.__name__: program
    for program in (
        syncing,
        mapping,
        reading,
        naming,
        replacing,
        unlinking,
        listing,
        appending,
        database,
        unpacking,
        cloning,
    )
}


def main() -> None:
    name, root, seed, rounds, stop = sys.argv[1:]
    rng = random.Random(f"{name} {seed}")
    top = Path(root)
    for _ in range(int(rounds)):
        print(json.dumps(PROGRAMS[name](top, rng)), flush=True)
        if os.path.exists(stop):
            break


if __name__ == "__main__":
    main()
