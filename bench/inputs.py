"""What the workloads work on: sizes, and files that are made once per session. All sizes are bytes or counts."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_SEED = 20260213
#: Packages of Python's library that make a tree of real source files.
_PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "ctypes",
    "email",
    "encodings",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "sqlite3",
    "tkinter",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "idlelib",
    "lib2to3",
    "distutils",
    "test",
)


@dataclass(frozen=True)
class Size:
    """How much each workload does."""

    big_bytes: int
    #: Four of them are read and written at once.
    parallel_bytes: int
    random_reads: int
    overwritten_bytes: int
    overwrites: int
    appends: int
    tree_files: int
    names: int
    many_names: int
    small_files: int
    renamed: int
    inserts: int
    processes: int
    #: Operations of each of the `processes`.
    operations: int


SIZES = {
    "smoke": Size(
        big_bytes=6 << 20,
        parallel_bytes=1 << 20,
        random_reads=8,
        overwritten_bytes=1 << 20,
        overwrites=3,
        appends=3,
        tree_files=20,
        names=30,
        many_names=60,
        small_files=20,
        renamed=10,
        inserts=3,
        processes=2,
        operations=10,
    ),
    "default": Size(
        big_bytes=256 << 20,
        parallel_bytes=64 << 20,
        random_reads=400,
        overwritten_bytes=64 << 20,
        overwrites=100,
        appends=100,
        tree_files=1000,
        names=5000,
        many_names=100_000,
        small_files=1000,
        renamed=1000,
        inserts=100,
        processes=16,
        operations=60,
    ),
}


class Inputs:
    """The files of one session, made when first asked for, below `folder`."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder = folder
        self.size = size

    @cached_property
    def big(self) -> Path:
        """A file of `big_bytes` that no server can make smaller."""
        return self._noise("big", self.size.big_bytes)

    @cached_property
    def big_digest(self) -> str:
        return sha256(self.big)

    @cached_property
    def parallel(self) -> Path:
        return self._noise("parallel", self.size.parallel_bytes)

    @cached_property
    def overwritten(self) -> Path:
        return self._noise("overwritten", self.size.overwritten_bytes)

    @cached_property
    def tree(self) -> Path:
        """A directory of `tree_files` source files of Python's library, in their folders."""
        library = Path(sysconfig.get_path("stdlib"))
        target = self.folder / "tree"
        left = self.size.tree_files
        for package in _PACKAGES:
            for source in sorted((library / package).rglob("*")):
                if left and source.is_file() and "__pycache__" not in source.parts and source.stat().st_size:
                    copy = target / source.relative_to(library)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source, copy)
                    left -= 1
        return target

    @cached_property
    def archive(self) -> Path:
        """The tree as a tar file."""
        path = self.folder / "tree.tar"
        subprocess.run(["tar", "-cf", path, "-C", self.tree, "."], check=True)
        return path

    @cached_property
    def repository(self) -> Path:
        """A git repository with the tree in one commit."""
        path = self.folder / "repository"
        shutil.copytree(self.tree, path)
        who = ("-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "commit.gpgsign=false")
        for command in (("init", "-q", "-b", "main"), ("add", "-A"), (*who, "commit", "-q", "-m", "tree")):
            subprocess.run(["git", "-C", path, *command], check=True)
        return path

    @cached_property
    def small(self) -> dict[str, bytes]:
        """Names and contents of `small_files` files, a few KiB each, of real text, in ten folders."""
        sources = [path.read_bytes() for path in files_of(self.tree)]
        return {
            f"part{index % 10}/file{index:04}.py": sources[index % len(sources)][: 1000 + 7 * index % 6000]
            for index in range(self.size.small_files)
        }

    def _noise(self, name: str, size_bytes: int) -> Path:
        path = self.folder / name
        noise = random.Random(f"{_SEED}-{name}")
        with path.open("wb") as file:
            for offset in range(0, size_bytes, 1 << 20):
                file.write(noise.randbytes(min(1 << 20, size_bytes - offset)))
        return path


def files_of(folder: Path) -> list[Path]:
    """All regular files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
