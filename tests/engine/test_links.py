"""link(2) as a copy: whole under its new name, a file of its own from then on, or refused."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from typing import TYPE_CHECKING

import pytest

from s3fuse.vfs.links import AT_ONCE_BYTES, Links

if TYPE_CHECKING:
    from s3fuse.namespace.inodes import Inode
    from tests.engine.rig import Bench, Rig


async def link(rig: Rig, old: str, new: str, way: str = "copy") -> Inode:
    rig.core.config = dataclasses.replace(rig.core.config, hard_links="copy" if way == "copy" else "refuse")
    links = Links(rig.core, rig.names, rig.files, rig.attributes)
    parent, name = await rig._at(new)
    inode = await links.link(await rig.walk(old), parent, name)
    inode.lookups += 1
    return inode


async def test_a_copy_has_all_and_goes_its_own_way(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.mkdir("dir")
    source = await rig.put("file", b"content")
    await rig.attributes.setxattr(source, b"user.a", b"b")
    await rig.chmod("file", 0o4750)
    await rig.utimens("file", 10**18 + 7)
    copy = await link(rig, "file", "dir/copy")
    assert copy.number != source.number
    assert (copy.mode, copy.uid, copy.gid, copy.mtime_ns, copy.xattrs) == (
        stat.S_IFREG | 0o4750,
        7,
        8,
        10**18 + 7,
        {"user.a": b"b"},
    )
    await rig.write("file", b"C")
    assert await rig.cat("dir/copy") == b"content"
    await rig.unlink("file")
    await rig.drained()
    rig.check_clean()
    again = await rig.restart()
    assert await again.cat("dir/copy") == b"content"
    assert await again.ls() == ["dir"]


async def test_a_file_of_the_bucket_and_a_large_one(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.put("small", b"x" * 5000)
    await rig.put("empty")
    large = os.urandom(1 << 16) * (AT_ONCE_BYTES >> 16) + b"tail"
    await rig.put("large", large)
    await rig.drained()
    rig.forget()
    for name, content in (("small", b"x" * 5000), ("empty", b""), ("large", large)):
        await link(rig, name, f"{name}-copy")
        assert await rig.cat(f"{name}-copy") == content
    await rig.drained()
    rig.check_clean()


async def test_symlinks_and_special_files(bench: Bench) -> None:
    rig = await bench.rig()
    await rig.symlink("link", b"/else/where")
    await rig.mkfifo("fifo")
    assert await rig.attributes.readlink(await link(rig, "link", "link2")) == b"/else/where"
    assert stat.S_ISFIFO((await link(rig, "fifo", "fifo2")).mode)
    await rig.drained()


@pytest.mark.parametrize(
    ("old", "new", "way", "code"),
    [
        ("file", "new", "refuse", errno.EPERM),
        ("dir", "new", "copy", errno.EPERM),
        ("file", "dir", "copy", errno.EEXIST),
        ("file", "file", "copy", errno.EEXIST),
        ("open", "new", "copy", errno.EPERM),
    ],
)
async def test_refusals(bench: Bench, old: str, new: str, way: str, code: int) -> None:
    rig = await bench.rig()
    await rig.put("file", b"x")
    await rig.mkdir("dir")
    handle = await rig.create("open")
    with pytest.raises((PermissionError, FileExistsError)) as raised:
        await link(rig, old, new, way)
    assert raised.value.errno == code
    assert sorted(await rig.ls()) == ["dir", "file", "open"]
    rig.close(handle)


async def test_a_write_that_comes_between_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await bench.rig()
    await rig.put("file", b"x" * 100)
    read = rig.files.read

    async def read_and_write(number: int, offset: int, size: int) -> bytes | memoryview:
        found = await read(number, offset, size)
        await rig.write("file", b"y")
        return found

    monkeypatch.setattr(rig.files, "read", read_and_write)
    with pytest.raises(PermissionError):
        await link(rig, "file", "copy")
    assert await rig.ls() == ["file"]
    await rig.drained()
    rig.check_clean()
