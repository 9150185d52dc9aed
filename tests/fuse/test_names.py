"""Names that change while somebody is about them: directories that are read or renamed, files that others replace."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tests.fuse.harness import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

#: More than one getdents(2) takes.
COUNT = 1500


def test_a_directory_that_changes_while_it_is_read(
    mounts: Mounts, server: Server, buckets: Callable[..., Bucket]
) -> None:
    mount = mounts.new(server, start=False)
    bucket = buckets(server, mount.bucket)
    names = [f"f{number:05}" for number in range(COUNT)]
    bucket.each(lambda name: bucket.put(f"d/{name}", b"x"), names)
    bucket.put("e/other", b"x")
    bucket.put("t", b"replacement")
    mount.start()
    with os.scandir(mount.path / "d") as entries:
        found = [next(entries).name]
        os.rename(mount.path / "d" / names[-2], mount.path / "e" / "y")
        os.rename(mount.path / "t", mount.path / "d" / names[-5])
        os.rename(mount.path / "d" / names[-9], mount.path / "d" / "z")
        found += [entry.name for entry in entries]
    assert len(found) == len(set(found))
    assert set(names) - {names[-2], names[-9]} == set(found) - {"z"}
    assert (mount.path / "d" / names[-5]).read_bytes() == b"replacement"


def test_a_directory_is_renamed_while_its_files_are_uploaded(
    mounts: Mounts, server: Server, buckets: Callable[..., Bucket]
) -> None:
    mount = mounts.new(server)
    where = "r"
    wanted = set()
    (mount.path / where).mkdir()
    for number in range(4):
        for name in [f"{number}-{index}" for index in range(25)]:
            (mount.path / where / name).write_text(name)
            wanted.add(name)
        # The first ones have arrived, the others are on their way.
        wait_for(lambda: mount.status()["pending"]["files"] < 18, every_s=0.005)
        os.rename(mount.path / where, mount.path / f"r{number}")
        where = f"r{number}"
        assert set(os.listdir(mount.path / where)) == wanted
    mount.flush()
    assert {key for key in buckets(server, mount.bucket).keys() if not key.endswith("/")} == {
        f"{where}/{name}" for name in wanted
    }
    for name in wanted:
        assert (mount.path / where / name).read_text() == name


def test_others_put_a_file_where_a_directory_is_in_use(
    mounts: Mounts, server: Server, buckets: Callable[..., Bucket]
) -> None:
    """What is written to stays where it is; what others made is seen when that has gone."""
    mount = mounts.new(server, "--attr-ttl", "0")
    bucket = buckets(server, mount.bucket)
    (mount.path / "d").mkdir()
    (mount.path / "d" / "x").write_text("x")
    mount.flush()
    worker = mount.worker_pid
    with (mount.path / "d" / "x").open("r+") as file:
        bucket.delete("d/x")
        bucket.delete("d/")
        bucket.put("d", b"of others")
        os.listdir(mount.path)
        file.write("mine")
        file.flush()
        assert (mount.path / "d" / "x").read_text() == "mine"
    os.unlink(mount.path / "d" / "x")
    os.listdir(mount.path)
    assert mount.worker_pid == worker
    mount.allowed.append("by somebody else|cannot be shown|is kept as")
