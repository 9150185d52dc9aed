"""The first figures: s3fuse beside a do-nothing filesystem, and beside s3fs, on one MinIO. python -m bench.first

Prints medians of interleaved runs and their ratios; a bare time means nothing on another machine.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minio import Minio
from rich.console import Console
from rich.table import Table

from tests.servers import Server, minio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

FILES = 2000
NAMES = 5000
BIG_BYTES = 1 << 30
RUNS = 3
S3FUSE = str(Path(sys.executable).with_name("s3fuse"))
Seconds = dict[str, float]


def timed(work: Callable[[], object]) -> float:
    """How long the work takes, in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run(*command: str, env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **(env or {})}, timeout=900)


@contextmanager
def null_mount(mountpoint: Path) -> Iterator[None]:
    daemon = subprocess.Popen([sys.executable, "-m", "bench.nullfs", str(mountpoint)])
    try:
        while not os.path.ismount(mountpoint):
            time.sleep(0.02)
        yield
    finally:
        run("umount", str(mountpoint))
        daemon.wait(10)


@contextmanager
def s3fuse_mount(server: Server, bucket: str, mountpoint: Path, cache: Path, *options: str) -> Iterator[None]:
    """Unmounting it waits until everything is in the bucket."""
    place = (bucket, str(mountpoint), "--create-bucket", "--cache-dir", str(cache))
    run(S3FUSE, "mount", *place, *options, env=server.environment)
    try:
        yield
    finally:
        run(S3FUSE, "umount", str(mountpoint))


def flush(mountpoint: Path) -> None:
    run(S3FUSE, "flush", str(mountpoint))


@contextmanager
def fresh_s3fuse(server: Server, bucket: str, mountpoint: Path) -> Iterator[None]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-cache-") as cache,
        s3fuse_mount(server, bucket, mountpoint, Path(cache)),
    ):
        yield


@contextmanager
def s3fs_mount(server: Server, bucket: str, mountpoint: Path) -> Iterator[None]:
    """s3fs uploads before close(2) returns, and caches no data without use_cache."""
    keys = mountpoint.with_suffix(".passwd")
    keys.write_text(f"{server.access_key}:{server.secret_key}")
    keys.chmod(0o600)
    run("s3fs", bucket, str(mountpoint), "-o", f"url={server.endpoint},use_path_request_style,passwd_file={keys}")
    try:
        while not os.path.ismount(mountpoint):
            time.sleep(0.02)
        yield
    finally:
        run("umount", str(mountpoint))


def small_files(folder: Path) -> None:
    data = bytes(4096)
    for index in range(FILES):
        descriptor = os.open(folder / f"f{index}", os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(descriptor, data)
        os.close(descriptor)


def list_long(folder: Path) -> None:
    for entry in os.scandir(folder):
        os.lstat(entry.path)


def request_cost(mountpoint: Path, settle: Callable[[], None] = lambda: None) -> Seconds:
    """Seconds of: create, write 4 KiB and close `FILES` files; `ls -l` of `NAMES` names that are known.

    `settle` waits until the mount has nothing to do.
    """
    folder = mountpoint / f"small-{time.time_ns()}"
    folder.mkdir()
    create = timed(lambda: small_files(folder))
    listed = mountpoint / f"names-{time.time_ns()}"
    listed.mkdir()
    for index in range(NAMES):
        (listed / f"n{index}").touch()
    settle()
    list_long(listed)
    return {
        f"create + write 4 KiB + close of {FILES} files": create,
        f"ls -l of {NAMES} known names": timed(lambda: list_long(listed)),
    }


def copies(mount: Callable[[Path], AbstractContextManager[None]], tree: Path, big: Path) -> Seconds:
    """Seconds of: a tree and a big file in until unmounted, and out through an empty cache; `ls -lR`."""
    found: Seconds = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        mountpoint = Path(scratch, "mnt")
        mountpoint.mkdir()

        def tree_in() -> None:
            with mount(mountpoint):
                run("cp", "-a", str(tree), f"{mountpoint}/tree")

        def big_in() -> None:
            with mount(mountpoint):
                run("cp", str(big), f"{mountpoint}/big")

        found["tree in, until unmounted"] = timed(tree_in)
        found["1 GiB in, until unmounted"] = timed(big_in)
        with mount(mountpoint):
            found["ls -lR, cold"] = timed(lambda: run("ls", "-lR", f"{mountpoint}/tree"))
            found["1 GiB out, cold"] = timed(lambda: run("cat", f"{mountpoint}/big"))
            run("cmp", str(big), f"{mountpoint}/big")
        return found


def median(runs: list[Seconds]) -> Seconds:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def show(title: str, other: str, ours: Seconds, theirs: Seconds) -> None:
    table = Table("", "s3fuse", other, f"s3fuse / {other}", title=title)
    for name, seconds in ours.items():
        table.add_row(name, f"{seconds:.3f} s", f"{theirs[name]:.3f} s", f"{seconds / theirs[name]:.2f}")
    Console().print(table)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch, minio(Path(scratch)) as server:
        base = Path(scratch)
        tree, big = base / "tree", base / "big"
        library = Path(sysconfig.get_path("stdlib"))
        tree.mkdir()
        for name in ("asyncio", "ctypes", "distutils", "email", "json", "lib2to3", "test"):
            if (library / name).is_dir():
                shutil.copytree(library / name, tree / name, symlinks=True)
        run("dd", "if=/dev/urandom", f"of={big}", "bs=1M", f"count={BIG_BYTES >> 20}", "status=none")
        cost: dict[str, list[Seconds]] = {"ours": [], "null": []}
        peer: dict[str, list[Seconds]] = {"ours": [], "s3fs": []}
        client = Minio(server.endpoint.split("//")[1], server.access_key, server.secret_key, secure=False)
        for number in range(RUNS):
            (base / f"m{number}").mkdir()
            with null_mount(base / f"m{number}"):
                cost["null"].append(request_cost(base / f"m{number}"))
            options = ("--attr-ttl", "60")  # the do-nothing filesystem's answers are good for a minute too
            with s3fuse_mount(server, f"cost-{number}", base / f"m{number}", base / f"cost-{number}", *options):
                cost["ours"].append(request_cost(base / f"m{number}", partial(flush, base / f"m{number}")))

            client.make_bucket(f"s3fs-{number}")
            peer["ours"].append(copies(partial(fresh_s3fuse, server, f"ours-{number}"), tree, big))
            peer["s3fs"].append(copies(partial(s3fs_mount, server, f"s3fs-{number}"), tree, big))
        entries = sum(1 for _ in tree.rglob("*"))
        show("What one request costs", "do-nothing", median(cost["ours"]), median(cost["null"]))
        show(f"A tree of {entries} entries and a file of 1 GiB", "s3fs", median(peer["ours"]), median(peer["s3fs"]))


if __name__ == "__main__":
    main()
