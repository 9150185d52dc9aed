"""The mount against a local directory: the same operations, the same answers, the same tree, also after a remount.

Where s3fuse differs by design the model is told here: a directory's own times and link count are not compared (its
marker is not rewritten for each entry), and hard links do not exist.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from s3fuse import control

if TYPE_CHECKING:
    from tests.fuse.harness import Mount, Mounts
    from tests.servers import Server

#: HYPOTHESIS_PROFILE=long: an hour or so; the usual run: some hundred steps.
LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
EXAMPLES, STEPS = (200, 200) if LONG else (10, 80)
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
_libc = ctypes.CDLL(None, use_errno=True)

names = st.sampled_from(["a", "b", "ü %+"])
#: Few, so that most operations meet something.
paths = st.one_of(names, st.lists(names, min_size=1, max_size=3).map("/".join))
offsets = st.one_of(st.integers(0, 20_000), st.sampled_from([0, 4095, 4096, 131_072, 1 << 20]))
blobs = st.builds(
    lambda seed, size: bytes((seed * 7 + n * (seed | 1)) % 251 + 1 for n in range(min(size, 251))) * (size // 251 + 1),
    st.integers(0, 255),
    st.one_of(st.integers(0, 600), st.sampled_from([4096, 5000, 140_000])),
)
modes = st.sampled_from([0o600, 0o644, 0o755, 0o4755, 0o2711, 0o1777, 0o000, 0o777])
times = st.sampled_from([0, 1, 10**9 - 1, 1_234_567_890_123_456_789, 2**32 * 10**9 + 5, -1, -1_500_000_000])
flag_sets = st.sampled_from(
    [
        os.O_RDWR | os.O_CREAT,
        os.O_WRONLY | os.O_CREAT | os.O_EXCL,
        os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
        os.O_WRONLY | os.O_APPEND | os.O_CREAT,
        os.O_RDWR,
        os.O_RDONLY,
        os.O_RDWR | os.O_APPEND,
        os.O_WRONLY | os.O_TRUNC,
        os.O_RDONLY | os.O_DIRECTORY,
        os.O_RDONLY | os.O_NOFOLLOW,
        os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_EXCL,
    ]
)


def renameat2(source: str, target: str, flags: int) -> None:
    if _libc.renameat2(-100, os.fsencode(source), -100, os.fsencode(target), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Side:
    """One of the two directories, with its open files; every method gives what can be compared."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[int, int] = {}

    def at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def close_all(self) -> None:
        for file in self.files.values():
            with suppress(OSError):
                os.close(file)
        self.files.clear()

    # -- open files

    def open(self, handle: int, path: str, flags: int, mode: int) -> bool:
        self.files[handle] = os.open(self.at(path), flags, mode)
        return True

    def close(self, handle: int) -> None:
        os.close(self.files.pop(handle))

    def pread(self, handle: int, size: int, offset: int) -> bytes:
        return os.pread(self.files[handle], size, offset)

    def pwrite(self, handle: int, data: bytes, offset: int) -> int:
        return os.pwrite(self.files[handle], data, offset)

    def write(self, handle: int, data: bytes) -> int:
        return os.write(self.files[handle], data)

    def ftruncate(self, handle: int, size: int) -> None:
        os.ftruncate(self.files[handle], size)

    def fsync(self, handle: int) -> None:
        os.fsync(self.files[handle])

    def fstat(self, handle: int) -> tuple[Any, ...]:
        return self._shown(os.fstat(self.files[handle]))

    def fchmod(self, handle: int, mode: int) -> None:
        os.fchmod(self.files[handle], mode)

    def seek_hole(self, handle: int, size: int) -> int:
        return os.lseek(self.files[handle], 0, os.SEEK_END) - size

    # -- names

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self.at(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self.at(path))

    def unlink(self, path: str) -> None:
        os.unlink(self.at(path))

    def rename(self, source: str, target: str) -> None:
        os.rename(self.at(source), self.at(target))

    def rename_noreplace(self, source: str, target: str) -> None:
        renameat2(self.at(source), self.at(target), RENAME_NOREPLACE)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self.at(path))

    def readlink(self, path: str) -> str:
        return os.readlink(self.at(path))

    def mkfifo(self, path: str, mode: int) -> None:
        os.mkfifo(self.at(path), mode)

    def mksocket(self, path: str, mode: int) -> None:
        os.mknod(self.at(path), stat.S_IFSOCK | mode)

    def mkdevice(self, path: str, mode: int) -> None:
        os.mknod(self.at(path), stat.S_IFCHR | mode, os.makedev(1, 3))

    def mkregular(self, path: str, mode: int) -> None:
        os.mknod(self.at(path), stat.S_IFREG | mode)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(self.at(path)))

    # -- attributes

    def stat(self, path: str) -> tuple[Any, ...]:
        return self._shown(os.lstat(self.at(path)))

    def stat_followed(self, path: str) -> tuple[Any, ...]:
        return self._shown(os.stat(self.at(path)))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self.at(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(self.at(path), uid, gid, follow_symlinks=False)

    def utime(self, path: str, atime_ns: int, mtime_ns: int) -> tuple[int, int]:
        os.utime(self.at(path), ns=(atime_ns, mtime_ns), follow_symlinks=False)
        status = os.lstat(self.at(path))
        return status.st_atime_ns, status.st_mtime_ns

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.at(path), size)

    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        os.setxattr(self.at(path), name, value, flags)

    def getxattr(self, path: str, name: str) -> bytes:
        return os.getxattr(self.at(path), name)

    def listxattr(self, path: str) -> list[str]:
        return sorted(name for name in os.listxattr(self.at(path)) if name.startswith("user."))

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(self.at(path), name)

    def read(self, path: str) -> bytes:
        if not stat.S_ISREG(os.stat(self.at(path)).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        with open(self.at(path), "rb") as file:
            return file.read()

    @staticmethod
    def _shown(status: os.stat_result) -> tuple[Any, ...]:
        kind = stat.S_IFMT(status.st_mode)
        size = None if kind == stat.S_IFDIR else status.st_size
        links = None if kind == stat.S_IFDIR else status.st_nlink
        rdev = status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
        return (oct(status.st_mode), status.st_uid, status.st_gid, size, links, rdev)

    def tree(self) -> dict[str, Any]:
        """Everything that can be seen below the root."""
        seen: dict[str, Any] = {}
        for folder, directories, others in os.walk(self.root):
            for name in directories + others:
                path = os.path.relpath(os.path.join(folder, name), self.root)
                kind = os.lstat(self.at(path)).st_mode
                content = self.readlink(path) if stat.S_ISLNK(kind) else self.read(path) if stat.S_ISREG(kind) else b""
                xattrs = (
                    {}
                    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))
                    else {n: self.getxattr(path, n) for n in self.listxattr(path)}
                )
                seen[path] = (self.stat(path), content, xattrs)
        return seen


class Comparison(RuleBasedStateMachine):
    """Each rule is done on both sides; results and errnos must be equal."""

    #: One mount serves all examples, each in a directory of its own.
    mount: ClassVar[Mount]
    folder: ClassVar[Path]
    count: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).count += 1
        name = f"example{self.count}"
        self.local, self.remote = Side(self.folder / name), Side(self.mount.path / name)
        for side in (self.local, self.remote):
            side.root.mkdir()
        self.next = 0

    @initialize()
    def begin(self) -> None:
        self.both("mkdir", "a", 0o755)
        self.both("open", self._new(), "a/b", os.O_RDWR | os.O_CREAT, 0o644)

    def teardown(self) -> None:
        self.local.close_all()
        self.remote.close_all()
        self.compare()
        self.remount()
        self.compare()

    def remount(self) -> None:
        assert control.request(self.mount.mountpoint, "umount", timeout_s=60) == {"pending": []}
        self.mount.wait_for_end()
        self.mount.check_ended()
        shutil.rmtree(self.mount.cache)
        self.mount.start()

    def _new(self) -> int:
        self.next += 1
        return self.next

    def both(self, operation: str, *arguments: Any) -> Any:
        answers = []
        for side in (self.local, self.remote):
            try:
                answers.append(("gives", getattr(side, operation)(*arguments)))
            except OSError as error:
                answers.append(("raises", errno.errorcode.get(error.errno or 0, error.errno)))
        assert answers[0] == answers[1], (
            f"{operation}{arguments!r:.300}: local {answers[0]!r:.300}, mount {answers[1]!r:.300}"
        )
        return answers[0]

    def compare(self) -> None:
        local, remote = self.local.tree(), self.remote.tree()
        assert sorted(local) == sorted(remote)
        for path, seen in local.items():
            assert seen == remote[path], f"{path}: local {seen!r:.500}, mount {remote[path]!r:.500}"

    def handle(self, number: int) -> int | None:
        opened = sorted(self.local.files)
        return opened[number % len(opened)] if opened else None

    # -- open files

    @rule(path=paths, flags=flag_sets, mode=modes)
    def open(self, path: str, flags: int, mode: int) -> None:
        fifo = Path(self.local.at(path))
        with suppress(OSError):
            if fifo.is_fifo() or fifo.is_char_device():
                return  # it would wait for a reader
        if len(self.local.files) < 6:
            self.both("open", self._new(), path, flags, mode)

    @precondition(lambda self: self.local.files)
    @rule(number=st.integers(0, 5))
    def close(self, number: int) -> None:
        self.both("close", self.handle(number))

    @precondition(lambda self: self.local.files)
    @rule(number=st.integers(0, 5), offset=offsets, data=blobs)
    def pwrite(self, number: int, offset: int, data: bytes) -> None:
        self.both("pwrite", self.handle(number), data, offset)

    @precondition(lambda self: self.local.files)
    @rule(number=st.integers(0, 5), data=blobs)
    def write(self, number: int, data: bytes) -> None:
        self.both("write", self.handle(number), data)

    @precondition(lambda self: self.local.files)
    @rule(number=st.integers(0, 5), offset=offsets, size=st.sampled_from([0, 1, 100, 4096, 200_000]))
    def pread(self, number: int, offset: int, size: int) -> None:
        self.both("pread", self.handle(number), size, offset)

    @precondition(lambda self: self.local.files)
    @rule(number=st.integers(0, 5), size=offsets)
    def ftruncate(self, number: int, size: int) -> None:
        self.both("ftruncate", self.handle(number), size)

    @precondition(lambda self: self.local.files)
    @rule(number=st.integers(0, 5))
    def fstat(self, number: int) -> None:
        self.both("fstat", self.handle(number))

    @precondition(lambda self: self.local.files)
    @rule(number=st.integers(0, 5), mode=modes)
    def fchmod(self, number: int, mode: int) -> None:
        self.both("fchmod", self.handle(number), mode)

    @precondition(lambda self: self.local.files)
    @rule(number=st.integers(0, 5))
    def fsync(self, number: int) -> None:
        self.both("fsync", self.handle(number))

    # -- names

    @rule(path=paths, mode=modes.filter(lambda mode: mode & 0o700 == 0o700))
    def mkdir(self, path: str, mode: int) -> None:
        self.both("mkdir", path, mode)

    @rule(path=paths)
    def rmdir(self, path: str) -> None:
        self.both("rmdir", path)

    @rule(path=paths)
    def unlink(self, path: str) -> None:
        self.both("unlink", path)

    @rule(source=paths, new=paths)
    def rename(self, source: str, new: str) -> None:
        self.both("rename", source, new)

    @rule(source=paths, new=paths)
    def rename_noreplace(self, source: str, new: str) -> None:
        self.both("rename_noreplace", source, new)

    @rule(to=st.sampled_from(["a", "../a", "b/c", "nowhere", "ü", "x" * 600]), path=paths)
    def symlink(self, to: str, path: str) -> None:
        self.both("symlink", to, path)

    @rule(path=paths)
    def readlink(self, path: str) -> None:
        self.both("readlink", path)

    @rule(kind=st.sampled_from(["mkfifo", "mksocket", "mkdevice", "mkregular"]), path=paths, mode=modes)
    def mknod(self, kind: str, path: str, mode: int) -> None:
        self.both(kind, path, mode & 0o777)

    @rule(path=st.one_of(paths, st.just(".")))
    def listdir(self, path: str) -> None:
        self.both("listdir", path)

    # -- attributes

    @rule(path=paths)
    def stat(self, path: str) -> None:
        self.both("stat", path)
        self.both("stat_followed", path)

    @rule(path=paths, mode=modes)
    def chmod(self, path: str, mode: int) -> None:
        self.both("chmod", path, mode)

    @rule(path=paths, uid=st.sampled_from([-1, 0, 1000, 65_534]), gid=st.sampled_from([-1, 0, 100]))
    def chown(self, path: str, uid: int, gid: int) -> None:
        self.both("chown", path, uid, gid)

    @rule(path=paths, atime_ns=times, mtime_ns=times)
    def utime(self, path: str, atime_ns: int, mtime_ns: int) -> None:
        self.both("utime", path, atime_ns, mtime_ns)

    @rule(path=paths, size=offsets)
    def truncate(self, path: str, size: int) -> None:
        self.both("truncate", path, size)

    @rule(
        path=paths,
        name=st.sampled_from(["user.a", "user.b c", "user.ü"]),
        value=st.binary(max_size=40),
        flags=st.sampled_from([0, os.XATTR_CREATE, os.XATTR_REPLACE]),
    )
    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None:
        self.both("setxattr", path, name, value, flags)

    @rule(path=paths, name=st.sampled_from(["user.a", "user.b c", "user.none"]))
    def getxattr(self, path: str, name: str) -> None:
        self.both("getxattr", path, name)

    @rule(path=paths)
    def listxattr(self, path: str) -> None:
        self.both("listxattr", path)

    @rule(path=paths, name=st.sampled_from(["user.a", "user.b c"]))
    def removexattr(self, path: str, name: str) -> None:
        self.both("removexattr", path, name)

    # -- the whole

    @rule()
    def flush(self) -> None:
        assert control.request(self.mount.mountpoint, "flush", timeout_s=60) == {"failed": []}

    @rule()
    def compare_trees(self) -> None:
        self.compare()

    @rule(now=st.integers(0, 2))
    def close_all_and_remount_with_empty_cache(self, now: int) -> None:
        if now != 1:  # it takes longer than all other steps together
            return
        self.local.close_all()
        self.remote.close_all()
        self.remount()
        self.compare()


@pytest.mark.timeout(4 * 3600 if LONG else 200)
def test_mount_is_like_a_local_directory(server: Server, mounts: Mounts, tmp_path: Path) -> None:
    class Machine(Comparison):
        pass

    Machine.mount, Machine.folder = mounts.new(server), tmp_path / "local"
    Machine.folder.mkdir()
    old = os.umask(0o022)
    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                derandomize=not LONG,
                database=None,
                print_blob=True,
                # Shrinking takes many remounts: SHRINK=1 when there is something to shrink.
                phases=[Phase.generate, *([Phase.shrink] if LONG or os.environ.get("SHRINK") else [])],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
            ),
        )
    finally:
        os.umask(old)
