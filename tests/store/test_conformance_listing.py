"""What every store does with listings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3fuse.store.base import Page
    from tests.store.conftest import Subject


async def everything(subject: Subject, prefix: str, *, delimiter: str, limit: int) -> list[Page]:
    pages = [await subject.store.list_page(prefix, delimiter=delimiter, limit=limit)]
    while pages[-1].next_token is not None:
        assert len(pages) < 50
        token = pages[-1].next_token
        pages.append(await subject.store.list_page(prefix, delimiter=delimiter, token=token, limit=limit))
    return pages


async def test_objects_and_prefixes(subject: Subject) -> None:
    for key in ("a", "d/", "d/x", "d/y/z", "e/f", "dd"):
        await subject.put(key)
    subject.counted()
    top = await subject.store.list_page("")
    assert [entry.key for entry in top.objects] == ["a", "dd"]
    assert top.prefixes == ("d/", "e/")
    inside = await subject.store.list_page("d/")
    assert [entry.key for entry in inside.objects] == ["d/", "d/x"]
    assert inside.prefixes == ("d/y/",)
    assert [entry.key for entry in (await subject.store.list_page("d", delimiter="")).objects] == [
        "d/",
        "d/x",
        "d/y/z",
        "dd",
    ]
    assert (await subject.store.list_page("nothing/")).objects == ()
    assert subject.counted() == {"list": 4}


async def test_entries_agree_with_head(subject: Subject) -> None:
    await subject.put("f", b"hello", mode="33188", mtime="1.5")
    await subject.put("plain", b"")
    for entry in (await subject.store.list_page("")).objects:
        info = await subject.store.head(entry.key)
        assert (entry.size_bytes, entry.etag, entry.modified_ns) == (info.size_bytes, info.etag, info.modified_ns)
        assert entry.metadata == (info.metadata if subject.capabilities.list_metadata else None)


@pytest.mark.parametrize("limit", [1, 2, 3, 1000])
async def test_pages(subject: Subject, limit: int) -> None:
    objects = {f"p/o{number} +%é" for number in range(4)}
    prefixes = {f"p/d{number} +%é/" for number in range(4)}
    for key in (*objects, *(f"{prefix}{name}" for prefix in prefixes for name in ("x", "y"))):
        await subject.put(key)
    subject.counted()
    pages = await everything(subject, "p/", delimiter="/", limit=limit)
    assert all(len(page.objects) + len(page.prefixes) <= limit for page in pages)
    assert [entry.key for page in pages for entry in page.objects] == sorted(objects)
    assert [prefix for page in pages for prefix in page.prefixes] == sorted(prefixes)
    assert subject.counted()["list"] == len(pages)


async def test_pages_of_keys_with_control_characters(subject: Subject) -> None:
    keys = [f"p/\x01{number}\x02" for number in range(4)]
    for key in keys:
        await subject.put(key)
    pages = await everything(subject, "p/", delimiter="/", limit=1)
    assert [entry.key for page in pages for entry in page.objects] == keys


async def test_flat_pages(subject: Subject) -> None:
    keys = sorted(f"{directory}/{name}" for directory in "abc" for name in "xyz")
    for key in keys:
        await subject.put(key)
    pages = await everything(subject, "", delimiter="", limit=2)
    assert [entry.key for page in pages for entry in page.objects] == keys


async def test_start_after(subject: Subject) -> None:
    for key in ("a", "b", "c", "d/x", "e"):
        await subject.put(key)
    page = await subject.store.list_page("", start_after="b")
    assert [entry.key for entry in page.objects] == ["c", "e"]
    assert page.prefixes == ("d/",)


async def test_list_sees_writes_at_once(subject: Subject) -> None:
    for number in range(3):
        await subject.put("f", b"x" * number)
        assert [entry.size_bytes for entry in (await subject.store.list_page("")).objects] == [number]
        await subject.store.delete("f")
        assert (await subject.store.list_page("")).objects == ()
