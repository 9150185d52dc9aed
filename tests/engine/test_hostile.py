"""The whole engine against a server that says impossible things: neighbours live, no error is an empty directory."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree as ET

import pytest
import trio

from s3fuse.errors import BadResponse
from s3fuse.store.memory import MemoryStore
from tests.engine.hostile import Hostile, Reply, Request, connected, fill
from tests.engine.rig import Clock, Rig, fails

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


@pytest.fixture
def server() -> Hostile:
    """A bucket with `FILES`, and a directory marker with metadata."""
    return Hostile(MemoryStore())


@pytest.fixture
async def rig(
    server: Hostile, tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> AsyncIterator[Rig]:
    """A mount of it; what is known is old at once."""
    await fill(server.store)
    with connected(server, monkeypatch) as store:
        rig = Rig(cast("MemoryStore", store), tmp_path / "cache", nursery, ttl_s=0.0)
        await rig.start()
        yield rig
        await rig.crash()


def entry(key: str, field: str, text: str) -> Callable[[Request, Reply], Reply | None]:
    """Replaces one field of one entry of each listing."""

    def damage(request: Request, reply: Reply) -> Reply | None:
        if request.operation != "list" or reply.status != 200:
            return None
        root = ET.fromstring(reply.body)
        for contents in root.findall("{*}Contents"):
            if contents.findtext("{*}Key") == key:
                found = contents.find(f"{{*}}{field}")
                assert found is not None
                found.text = text
        return Reply(200, reply.headers, ET.tostring(root))

    return damage


# -- listings

BAD = [("Size", "-5"), ("Size", "1" + "0" * 23), ("Size", "xyz"), ("Size", ""), ("LastModified", "yesterday")]
BAD += [("ETag", ""), ("ETag", "a\r\nHost: b"), ("ETag", "\u00fc")]


@pytest.mark.parametrize("alone", [False, True])
async def test_nothing_is_made_in_the_place_of_a_bad_entry(
    rig: Rig, server: Hostile, alone: bool, expected_log: list[str]
) -> None:
    expected_log.append("entries below 'd/' are left out")
    server.damage = entry("d/b", "Size", "xyz")
    if not alone:
        await rig.core.directories.load(await rig.walk("d"))
    for make in (partial(rig.mkdir, "d/b"), partial(rig.put, "d/b"), partial(rig.rename, "d/a", "d/b")):
        with pytest.raises(BadResponse):
            await make()
    server.damage = lambda request, reply: None
    assert await rig.cat("d/b") == b"bb"


async def test_a_name_that_cannot_be_read_keeps_its_place_and_no_other(
    rig: Rig, server: Hostile, expected_log: list[str]
) -> None:
    expected_log.append("entries below 'd/' are left out")

    def damage(request: Request, reply: Reply) -> Reply | None:
        return Reply(200, reply.headers, reply.body.replace(b"<Prefix>d/e/</Prefix>", b"<Prefix>d/%ff/</Prefix>"))

    server.damage = damage
    assert await rig.ls("d") == ["a", "b", "c"]
    for make in (partial(rig.mkdir, "d/e"), partial(rig.put, "d/e")):
        with pytest.raises(BadResponse):
            await make()
    await rig.put("d/new", b"new")
    server.damage = lambda request, reply: None
    assert await rig.ls("d") == ["a", "b", "c", "e", "new"]
    assert await rig.cat("d/e/f") == b"deep"


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("field", "text"), BAD)
async def test_a_bad_entry_is_left_out_and_its_neighbours_live(
    rig: Rig, server: Hostile, field: str, text: str, known: bool, expected_log: list[str]
) -> None:
    expected_log.append("entries below 'd/' are left out")
    if known:
        assert await rig.ls("d") == ["a", "b", "c", "e"]
    server.damage = entry("d/b", field, text)
    assert await rig.ls("d") == (["a", "b", "c", "e"] if known else ["a", "c", "e"])
    assert await rig.cat("d/a") == b"aaa"
    assert await rig.cat("d/e/f") == b"deep"
    assert sum(rig.core.directories.unreadable.values()) == 1
    server.damage = lambda request, reply: None
    assert await rig.ls("d") == ["a", "b", "c", "e"]
    assert await rig.cat("d/b") == b"bb"
    assert not rig.core.directories.unreadable


async def test_a_directory_with_an_entry_that_cannot_be_read_is_not_moved(rig: Rig, server: Hostile) -> None:
    server.damage = entry("d/b", "Size", "-5")
    with pytest.raises(OSError, match="left behind"):
        await rig.rename("d", "moved")
    server.damage = lambda request, reply: None
    await rig.rename("d", "moved")
    await rig.drained()
    assert await rig.cat("moved/b") == b"bb"


@pytest.mark.parametrize("known", [False, True])
async def test_a_directory_of_one_entry_that_cannot_be_read_is_not_empty(
    rig: Rig, server: Hostile, known: bool, expected_log: list[str]
) -> None:
    expected_log.append("entries below 'd/e/' are left out")
    if known:
        await rig.ls("d/e")
    await rig.mkdir("empty")
    server.damage = entry("d/e/f", "Size", "-5")
    for remove in (partial(rig.rmdir, "d/e"), partial(rig.rename, "empty", "d/e")):
        with fails(errno.ENOTEMPTY):
            await remove()


async def test_a_directory_of_one_entry_that_cannot_be_read_is_there(rig: Rig, server: Hostile) -> None:
    assert await rig.ls("d/e") == ["f"]
    server.damage = entry("d/e/f", "Size", "-5")
    rig.forget()
    assert (await rig.walk("d/e")).is_directory
    server.damage = lambda request, reply: None
    assert await rig.cat("d/e/f") == b"deep"


NO_LISTINGS = [
    b"",
    b"<html><body>log in first</body></html>",
    b"<ListBucketResult/>",
    b"<ListBucketResult><Name>bucket</Name><KeyCount>7</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>",
    b"<ListBucketResult><Name>other</Name><Prefix>d/</Prefix><IsTruncated>false</IsTruncated></ListBucketResult>",
    b"<ListBucketResult>" + b"<a>" * 1_000_000,
]


@pytest.mark.parametrize("body", NO_LISTINGS, ids=range(len(NO_LISTINGS)))
async def test_a_page_of_something_else_is_no_empty_directory(rig: Rig, server: Hostile, body: bytes) -> None:
    assert await rig.ls("d") == ["a", "b", "c", "e"]
    other = Reply(200, [], body)
    server.damage = lambda request, reply: other if request.operation == "list" else None
    with pytest.raises(BadResponse):
        await rig.core.directories.load(rig.core.inodes.root)
    assert await rig.cat("d/a") == b"aaa"  # what is known stays
    server.damage = lambda request, reply: None
    assert await rig.ls("d") == ["a", "b", "c", "e"]
    assert await rig.ls() == ["d", "g"]


@pytest.mark.parametrize("whole", [False, True])
async def test_a_listing_that_never_ends_is_an_error(rig: Rig, server: Hostile, whole: bool) -> None:
    asked = 0

    def damage(request: Request, reply: Reply) -> Reply | None:
        nonlocal asked
        if request.operation != "list" or request.query.get("prefix") != "d/":
            return None
        asked += 1
        token = f"<NextContinuationToken>{asked % 3}</NextContinuationToken>".encode()
        body = reply.body.replace(b"<IsTruncated>false</IsTruncated>", b"<IsTruncated>true</IsTruncated>" + token)
        return Reply(200, reply.headers, body)

    directory = await rig.walk("d")
    server.damage = damage
    with pytest.raises(BadResponse), trio.fail_after(5):
        await (rig.core.directories.tree(directory) if whole else rig.core.directories.load(directory))
    assert asked < 20
    server.damage = lambda request, reply: None
    assert await rig.ls("d") == ["a", "b", "c", "e"]


# -- heads

HEADS = [("Content-Length", "x"), ("Content-Length", None), ("Last-Modified", "soon"), ("Last-Modified", None)]
HEADS += [("ETag", "\u00fc"), ("ETag", None), ("ETag", '""'), ("Last-Modified", "Fri, 31 Dec 99999 00:00:00 GMT")]


@pytest.mark.parametrize(("name", "text"), HEADS)
async def test_a_bad_head_is_an_error_of_one_file(rig: Rig, server: Hostile, name: str, text: str | None) -> None:
    def damage(request: Request, reply: Reply) -> Reply | None:
        if request.operation == "list":  # without metadata, so that heads are asked for
            return Reply(200, reply.headers, reply.body.replace(b"UserMetadata", b"Unknown"))
        if request.operation != "head" or request.key != "d/b":
            return None
        headers = [pair for pair in reply.headers if pair[0].lower() != name.lower()]
        headers += [(name, text)] if text is not None else []
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        return Reply(raw=f"HTTP/1.1 200 OK\r\n{lines}\r\n".encode())

    server.damage = damage
    rig.core.directories.lists_metadata = False
    cast("Any", rig.store)._objects.findings.list_metadata = False
    children = await rig.names.entries(await rig.walk("d"))
    await rig.core.directories.learn_all(children, leave_bad=True)
    assert [child.name for child in children if not child.attributes_known] == ["b"]
    assert await rig.cat("d/a") == b"aaa"
    server.damage = lambda request, reply: None
    assert await rig.cat("d/b") == b"bb"


async def test_a_head_of_another_size_is_corrected(rig: Rig, server: Hostile) -> None:
    def damage(request: Request, reply: Reply) -> Reply | None:
        if request.operation != "head" or request.key != "d/b":
            return None
        headers = [pair for pair in reply.headers if pair[0] != "Content-Length"]
        return Reply(200, [*headers, ("Content-Length", "0")], has_body=False)

    rig.core.directories.lists_metadata = False
    cast("Any", rig.store)._objects.findings.list_metadata = False
    server.damage = damage
    await rig.core.directories.learn_all(await rig.names.entries(await rig.walk("d")))
    server.damage = lambda request, reply: None
    await rig.ls("d")
    assert await rig.cat("d/b") == b"bb"
