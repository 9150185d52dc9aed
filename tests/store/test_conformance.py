"""What every store does with single objects: results and numbers of requests."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

import pytest

from s3fuse.errors import BadResponse, NotFound, PreconditionFailed, Refused
from s3fuse.store.base import MAX_METADATA_BYTES, Bytes, Condition

if TYPE_CHECKING:
    from tests.store.conftest import Subject

ABSENT = Condition(absent=True)
OTHER = Condition(etag="0" * 32)
ODD_KEYS = [
    "a b",
    "a+b",
    "a%2Fb",
    "100%",
    "#1#",
    "@x",
    "\u00e9",
    "e\u0301",
    "😀",
    "\x01",
    "x\ny",
    "&<>\"'",
    "~t",
    "*(x)!",
    "a\\b",
    "?q=1&r",
    "n" * 255,
    "trailing ",
    "dir/sub dir/f",
]


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


async def test_put_head_get_round_trip(subject: Subject) -> None:
    before_ns = time.time_ns()
    etag = await subject.store.put(
        "d/f.html",
        Bytes(b"hello"),
        metadata={"mode": "33188", "mtime": "1.5"},
        headers={"content-type": "text/html", "cache-control": "no-cache"},
    )
    assert etag == md5(b"hello")
    info = await subject.store.head("d/f.html")
    assert (info.key, info.size_bytes, info.etag) == ("d/f.html", 5, etag)
    assert info.metadata == {"mode": "33188", "mtime": "1.5"}
    assert info.headers == {"content-type": "text/html", "cache-control": "no-cache"}
    assert info.modified_ns % 1_000_000_000 == 0
    assert abs(info.modified_ns - before_ns) < 5_000_000_000
    assert await subject.get(info) == b"hello"
    assert subject.counted() == {"put": 1, "head": 1, "get": 1}


async def test_content_type_has_a_default(subject: Subject) -> None:
    await subject.put("f", b"hello")
    assert (await subject.store.head("f")).headers == {"content-type": "application/octet-stream"}


async def test_empty_and_large_bodies(subject: Subject) -> None:
    for data in (b"", b"x" * 65_536, bytes(range(256)) * 40_000):
        etag = await subject.put("f", data)
        assert etag == md5(data)
        assert await subject.get(await subject.store.head("f")) == data


async def test_ranges_fill_buffers_one_after_the_other(subject: Subject) -> None:
    data = bytes(range(256)) * 1024
    etag = await subject.put("f", data)
    memory = bytearray(100_000)
    view = memoryview(memory)
    await subject.store.get_into("f", 1000, [view[:1], view[1:1], view[1:70_000], view[70_000:]], etag=etag)
    assert memory == data[1000:101_000]
    await subject.store.get_into("f", len(data) - 1, [view[:1]], etag=etag)
    assert memory[0] == 255
    assert subject.counted() == {"put": 1, "get": 2}
    await subject.store.get_into("f", 0, [], etag=etag)
    assert not subject.counted()


async def test_get_never_gives_another_version(subject: Subject) -> None:
    old = await subject.put("f", b"old")
    await subject.put("f", b"new")
    buffer = bytearray(3)
    with pytest.raises(PreconditionFailed):
        await subject.store.get_into("f", 0, [memoryview(buffer)], etag=old)
    await subject.store.delete("f")
    with pytest.raises(NotFound):
        await subject.store.get_into("f", 0, [memoryview(buffer)], etag=old)
    assert buffer == bytes(3)


async def test_get_of_a_version_that_a_shorter_one_replaced(subject: Subject) -> None:
    """Also where the server refuses the range before it looks at the version."""
    old = await subject.put("f", b"x" * 1000)
    await subject.put("f", b"short")
    for offset in (0, 3, 5, 900):
        with pytest.raises(PreconditionFailed):
            await subject.store.get_into("f", offset, [memoryview(bytearray(100))], etag=old, size_bytes=1000)


async def test_get_knows_a_version_by_its_size_too(subject: Subject) -> None:
    """One etag of two lengths was seen where a server's copy raced with a PUT."""
    etag = await subject.put("f", b"hello")
    buffer = memoryview(bytearray(5))
    await subject.store.get_into("f", 0, [buffer], etag=etag, size_bytes=5)
    assert buffer == b"hello"
    for size in (6, 500):
        with pytest.raises(PreconditionFailed):
            await subject.store.get_into("f", 0, [buffer], etag=etag, size_bytes=size)


async def test_get_beyond_the_end(subject: Subject) -> None:
    etag = await subject.put("f", b"hello")
    for offset in (3, 5, 9):
        with pytest.raises(BadResponse):
            await subject.store.get_into("f", offset, [memoryview(bytearray(5))], etag=etag)


async def test_missing_object(subject: Subject) -> None:
    with pytest.raises(NotFound) as caught:
        await subject.store.head("nothing")
    assert caught.value.key == "nothing"
    await subject.store.delete("nothing")
    assert subject.counted() == {"delete": 1} | subject.absent


@pytest.mark.parametrize("key", ODD_KEYS)
async def test_odd_keys(subject: Subject, key: str) -> None:
    if subject.kind == "seaweedfs" and "\\" in key:
        # It would be taken for "a/b".
        with pytest.raises(Refused):
            await subject.put(key)
        return
    etag = await subject.put(key, b"1", probe="x")
    info = await subject.store.head(key)
    assert (info.key, info.etag, info.metadata) == (key, etag, {"probe": "x"})
    assert await subject.get(info) == b"1"
    page = await subject.store.list_page(key.rpartition("/")[0], delimiter="")
    assert [entry.key for entry in page.objects] == [key]
    assert await subject.store.copy(key, "copy", source_etag=etag) == etag
    assert await subject.store.delete_many([key, "copy"]) == {}
    assert (await subject.store.list_page("", delimiter="")).objects == ()


@pytest.mark.parametrize("key", ["a//b", "/lead", "a/./b", "a/../b", "k" * 1025])
async def test_keys_that_would_name_another_object_are_refused(subject: Subject, key: str) -> None:
    with pytest.raises(Refused):
        await subject.put(key, b"1")


@pytest.mark.parametrize("value", ["é", "a\nb", " a", "a ", "\x7f"])
async def test_metadata_that_no_header_carries_is_refused(subject: Subject, value: str) -> None:
    with pytest.raises(Refused, match="uid"):
        await subject.put("f", uid=value)
    with pytest.raises(Refused, match="Upper"):
        await subject.put("f", Upper="1")
    assert not subject.counted()


async def test_metadata_size_limit(subject: Subject) -> None:
    # MinIO counts the prefix of the names, SeaweedFS counts nothing.
    fits = MAX_METADATA_BYTES - len("x-amz-meta-u")
    await subject.put("f", u="v" * fits)
    assert (await subject.store.head("f")).metadata == {"u": "v" * fits}
    if subject.kind != "seaweedfs":
        with pytest.raises(Refused):
            await subject.put("f", u="v" * (fits + 1))


async def test_conditional_put(subject: Subject) -> None:
    store = subject.store
    first = await store.put("f", Bytes(b"1"), metadata={}, headers={}, condition=ABSENT)
    with pytest.raises(PreconditionFailed):
        await store.put("f", Bytes(b"2"), metadata={}, headers={}, condition=ABSENT)
    with pytest.raises(PreconditionFailed):
        await store.put("f", Bytes(b"2"), metadata={}, headers={}, condition=OTHER)
    with pytest.raises(PreconditionFailed):
        await store.put("nothing", Bytes(b"2"), metadata={}, headers={}, condition=OTHER)
    second = await store.put("f", Bytes(b"2"), metadata={}, headers={}, condition=Condition(etag=first))
    assert (await store.head("f")).etag == second
    assert subject.counted() == {"put": 5, "head": 1}


async def test_conditional_put_of_large_bodies(subject: Subject) -> None:
    data = b"x" * (6 << 20)
    await subject.store.put("f", Bytes(data), metadata={}, headers={}, condition=ABSENT)
    with pytest.raises(PreconditionFailed):
        await subject.store.put("f", Bytes(data[::-1]), metadata={}, headers={}, condition=ABSENT)
    with pytest.raises(PreconditionFailed):
        await subject.store.put("f", Bytes(data + b"y"), metadata={}, headers={}, condition=OTHER)


async def test_copy_keeps_metadata_and_headers(subject: Subject) -> None:
    etag = await subject.store.put(
        "a", Bytes(b"1"), metadata={"mode": "1"}, headers={"content-type": "text/css", "content-language": "de"}
    )
    subject.counted()
    assert await subject.store.copy("a", "b", source_etag=etag) == etag
    assert subject.counted() == {"copy": 1}
    info = await subject.store.head("b")
    assert info.metadata == {"mode": "1"}
    assert info.headers == {"content-type": "text/css", "content-language": "de"}
    assert await subject.get(info) == b"1"


async def test_metadata_only_change_keeps_the_etag(subject: Subject) -> None:
    etag = await subject.put("a", b"1", mode="1", uid="2")
    subject.counted()
    changed = await subject.store.copy(
        "a", "a", source_etag=etag, metadata={"mode": "3"}, headers={"content-type": "text/css"}
    )
    assert changed == etag
    again = await subject.store.copy("a", "a", source_etag=etag, metadata={}, condition=Condition(etag=etag))
    assert again == etag
    assert subject.counted() == {"copy": 2}
    info = await subject.store.head("a")
    assert info.metadata == {}
    assert info.headers == {"content-type": "application/octet-stream"}


async def test_copy_of_the_wrong_version(subject: Subject) -> None:
    etag = await subject.put("a", b"1")
    with pytest.raises(PreconditionFailed):
        await subject.store.copy("a", "b", source_etag="0" * 32)
    with pytest.raises(NotFound):
        await subject.store.copy("nothing", "b", source_etag=etag)
    with pytest.raises(Refused):
        await subject.store.copy("a", "a", source_etag=etag)
    with pytest.raises(NotFound):
        await subject.store.head("b")


async def test_copy_onto_a_condition(subject: Subject) -> None:
    source = await subject.put("a", b"1")
    target = await subject.put("b", b"2")
    with pytest.raises(PreconditionFailed):
        await subject.store.copy("a", "b", source_etag=source, condition=ABSENT)
    with pytest.raises(PreconditionFailed):
        await subject.store.copy("a", "b", source_etag=source, condition=OTHER)
    assert (await subject.store.head("b")).etag == target
    subject.counted()
    await subject.store.copy("a", "b", source_etag=source, condition=Condition(etag=target))
    await subject.store.copy("a", "c", source_etag=source, condition=ABSENT)
    # MinIO ignores conditions on copies, so that they are looked up.
    assert subject.counted() == {"copy": 2, "head": 2} if subject.as_minio else {"copy": 2}
    assert (await subject.store.head("b")).etag == (await subject.store.head("c")).etag == source


async def test_delete_many(subject: Subject) -> None:
    keys = [f"k{number} é&" for number in range(5)]
    for key in keys:
        await subject.put(key)
    subject.counted()
    assert await subject.store.delete_many([*keys[1:], "nothing"]) == {}
    assert await subject.store.delete_many([]) == {}
    assert subject.counted() == {"delete_many": 1}
    assert [entry.key for entry in (await subject.store.list_page("")).objects] == keys[:1]


async def test_delete_of_one_version(subject: Subject) -> None:
    """A server that does not look deletes whatever is there: `conditional_delete` says so."""
    able = subject.capabilities
    for key, exact in (("one", able.conditional_delete), ("\x01 no xml", able.conditional_delete)):
        etag = await subject.put(key, b"1")
        if exact:
            with pytest.raises(PreconditionFailed):
                await subject.store.delete(key, etag="0" * 32)
            assert (await subject.store.head(key)).etag == etag
        await subject.store.delete(key, etag=etag)
        with pytest.raises(NotFound):
            await subject.store.head(key)
    if able.conditional_delete:
        with pytest.raises(PreconditionFailed):
            await subject.store.delete("nothing", etag="0" * 32)


async def test_delete_many_of_some_versions(subject: Subject) -> None:
    etags = {key: await subject.put(key, key.encode()) for key in ("a é&", "b", "c", "d")}
    asked = etags | {"b": "0" * 32}
    del asked["d"]
    subject.counted()
    failed = await subject.store.delete_many(list(etags), etags=asked)
    assert subject.counted() == {"delete_many": 1}
    exact = subject.capabilities.conditional_delete_many
    assert {key: type(why) for key, why in failed.items()} == ({"b": PreconditionFailed} if exact else {})
    left = [entry.key for entry in (await subject.store.list_page("")).objects]
    assert left == (["b"] if exact else [])


async def test_create_bucket_again(subject: Subject) -> None:
    await subject.put("f")
    await subject.store.create_bucket()
    await subject.store.check()
    assert (await subject.store.head("f")).size_bytes == 0
