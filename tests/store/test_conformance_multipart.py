"""What every store does with multipart uploads."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from s3fuse.errors import NotFound, PreconditionFailed, Refused
from s3fuse.store.base import MIN_PART_BYTES, Bytes, Condition, Part

if TYPE_CHECKING:
    from tests.store.conftest import Subject

FIRST = bytes(range(256)) * (MIN_PART_BYTES // 256)
LAST = b"the end"


async def begin(subject: Subject, key: str = "f") -> str:
    return await subject.store.multipart_create(key, metadata={"mode": "1"}, headers={"content-type": "text/css"})


async def test_upload(subject: Subject) -> None:
    upload_id = await begin(subject)
    second = await subject.store.multipart_put("f", upload_id, 2, Bytes(LAST))
    first = await subject.store.multipart_put("f", upload_id, 1, Bytes(FIRST))
    assert (first, second) == (
        Part(1, hashlib.md5(FIRST).hexdigest()),
        Part(2, hashlib.md5(LAST).hexdigest()),
    )
    with pytest.raises(NotFound):
        await subject.store.head("f")
    etag = await subject.store.multipart_complete("f", upload_id, [second, first])
    digests = hashlib.md5(FIRST).digest() + hashlib.md5(LAST).digest()
    assert etag == f"{hashlib.md5(digests).hexdigest()}-2"
    info = await subject.store.head("f")
    assert (info.etag, info.size_bytes) == (etag, len(FIRST) + len(LAST))
    assert (info.metadata, info.headers) == ({"mode": "1"}, {"content-type": "text/css"})
    assert await subject.get(info) == FIRST + LAST
    assert await subject.store.list_uploads("") == []
    expected = {"multipart_create": 1, "multipart_put": 2, "multipart_complete": 1, "get": 1, "list_uploads": 1}
    assert subject.counted() == expected | subject.absent | {"head": 2}


async def test_parts_copied_from_another_object(subject: Subject) -> None:
    source = FIRST + LAST
    etag = await subject.put("source é+", source)
    upload_id = await begin(subject)
    parts = [
        await subject.store.multipart_copy(
            "f", upload_id, 1, source="source é+", source_etag=etag, start=1, stop=1 + MIN_PART_BYTES
        ),
        await subject.store.multipart_put("f", upload_id, 2, Bytes(b"middle" * 1_000_000)),
        await subject.store.multipart_copy("f", upload_id, 3, source="source é+", source_etag=etag, start=0, stop=2),
    ]
    await subject.store.multipart_complete("f", upload_id, parts)
    data = await subject.get(await subject.store.head("f"))
    assert data == source[1 : 1 + MIN_PART_BYTES] + b"middle" * 1_000_000 + source[:2]


async def test_part_copied_from_the_wrong_version(subject: Subject) -> None:
    etag = await subject.put("source", b"hello")
    upload_id = await begin(subject)
    with pytest.raises(PreconditionFailed):
        await subject.store.multipart_copy("f", upload_id, 1, source="source", source_etag="0" * 32, start=0, stop=2)
    with pytest.raises(NotFound):
        await subject.store.multipart_copy("f", upload_id, 1, source="nothing", source_etag=etag, start=0, stop=2)


async def test_small_part(subject: Subject) -> None:
    upload_id = await begin(subject)
    parts = [await subject.store.multipart_put("f", upload_id, number, Bytes(b"x")) for number in (1, 2)]
    with pytest.raises(Refused):
        await subject.store.multipart_complete("f", upload_id, parts)


async def test_unknown_part(subject: Subject) -> None:
    upload_id = await begin(subject)
    await subject.store.multipart_put("f", upload_id, 1, Bytes(b"x"))
    with pytest.raises(Refused):
        await subject.store.multipart_complete("f", upload_id, [Part(1, "0" * 32)])


async def test_condition(subject: Subject) -> None:
    etag = await subject.put("f", b"there")
    upload_id = await begin(subject)
    part = await subject.store.multipart_put("f", upload_id, 1, Bytes(b"mine"))
    for condition in (Condition(absent=True), Condition(etag="0" * 32)):
        with pytest.raises(PreconditionFailed):
            await subject.store.multipart_complete("f", upload_id, [part], condition=condition)
    assert (await subject.store.head("f")).etag == etag
    # A refused completion leaves the upload as it was.
    await subject.store.multipart_complete("f", upload_id, [part], condition=Condition(etag=etag))
    assert await subject.get(await subject.store.head("f")) == b"mine"


async def test_abort(subject: Subject) -> None:
    upload_id = await begin(subject)
    part = await subject.store.multipart_put("f", upload_id, 1, Bytes(b"x"))
    await subject.store.multipart_abort("f", upload_id)
    await subject.store.multipart_abort("f", upload_id)
    with pytest.raises(NotFound):
        await subject.store.multipart_complete("f", upload_id, [part])
    with pytest.raises(NotFound):
        await subject.store.head("f")
    assert await subject.store.list_uploads("") == []


async def test_list_uploads(subject: Subject) -> None:
    ids = {key: await begin(subject, key) for key in ("a/x +é", "a/y", "b")}
    listed = await subject.store.list_uploads("a/")
    assert {upload.key: upload.upload_id for upload in listed} == {key: ids[key] for key in ("a/x +é", "a/y")}
    assert all(upload.initiated_ns for upload in listed)
    assert len(await subject.store.list_uploads("")) == 3
