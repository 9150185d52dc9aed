"""Files of times that no 64 bits of ns hold: nothing fails by that, least of all what comes after it."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import run

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

YEAR_2300 = 10413792000
LATEST_S, EARLIEST_S = (1 << 63) // 10**9, -(1 << 63) // 10**9
SECONDS = [YEAR_2300, -YEAR_2300, LATEST_S, LATEST_S + 1, EARLIEST_S, EARLIEST_S - 1, (1 << 62), -(1 << 62)]


def kept(seconds: int) -> int:
    """The second that comes back from the bucket."""
    return max(EARLIEST_S, min(LATEST_S, seconds))


def test_a_file_of_a_far_time_is_renamed(mounts: Mounts, server: Server, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(server, "--attr-ttl", "0")
    bucket = buckets(server, mount.bucket)
    folders = {mount.path / str(number): seconds for number, seconds in enumerate(SECONDS)}
    for folder in folders:
        folder.mkdir()
        for name in ("f", "over", "dirty"):
            (folder / name).write_text(name)
    mount.flush()
    for folder, seconds in folders.items():
        for name in ("f", "dirty"):
            (folder / name).write_text(f"new {name}")
            os.utime(folder / name, ns=(seconds * 10**9, seconds * 10**9))
        (folder / "new").mkdir()
        os.rename(folder / "f", folder / "f2")
        os.rename(folder / "dirty", folder / "over")
        os.utime(folder / "new", (seconds, seconds))
        os.rename(folder / "new", folder / "d")
    mount.flush()
    for folder in folders:
        assert (bucket.get(f"{folder.name}/f2"), bucket.get(f"{folder.name}/over")) == (b"new f", b"new dirty")
    mount.remount()
    for folder, seconds in folders.items():
        for name in ("f2", "over", "d"):
            assert (folder / name).stat().st_mtime_ns // 10**9 == kept(seconds), (folder.name, name)
        os.rename(folder / "f2", folder / "d" / "f3")
        os.unlink(folder / "over")
    mount.flush()
    for folder in folders:
        assert bucket.get(f"{folder.name}/d/f3") == b"new f"
        assert sorted(os.listdir(folder)) == ["d"]


@pytest.mark.skipif(not shutil.which("rsync"), reason="no rsync")
def test_rsync_of_a_file_of_the_year_2300_over_another(
    mounts: Mounts, server: Server, buckets: Callable[..., Bucket]
) -> None:
    mount = mounts.new(server)
    source = mount.path.parent / "source"
    source.mkdir()
    (source / "f").write_text("new")
    os.utime(source / "f", (YEAR_2300, YEAR_2300))
    (mount.path / "f").write_text("old")
    mount.flush()
    run("rsync", "-a", f"{source}/", mount.path)
    mount.flush()
    assert buckets(server, mount.bucket).get("f") == b"new"
    assert (mount.path / "f").read_text() == "new"


def test_objects_with_times_of_others(mounts: Mounts, server: Server, buckets: Callable[..., Bucket]) -> None:
    """What another tool has written is read, renamed and changed like any file."""
    mount = mounts.new(server, start=False)
    bucket = buckets(server, mount.bucket)
    values = [str(YEAR_2300), str(1 << 62), str(-(1 << 63)), "9999-12-31T23:59:59Z", "9" * 30, "1e400"]
    for number, value in enumerate(values):
        bucket.put(f"f{number}", b"data", {"mtime": value, "ctime": value, "atime": value, "rdev": str(1 << 62)})
    mount.start()
    for number in range(len(values)):
        (mount.path / f"f{number}").stat()
        os.rename(mount.path / f"f{number}", mount.path / f"g{number}")
        os.chmod(mount.path / f"g{number}", 0o600)
        assert (mount.path / f"g{number}").read_bytes() == b"data"
    mount.flush()
    assert bucket.keys() == {f"g{number}" for number in range(len(values))}
