"""Where the real servers differ from S3 and from each other; the rest of s3fuse relies on knowing these facts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from s3fuse.credentials import StaticProvider
from s3fuse.errors import AccessDenied, NoSuchBucket, NotFound, PreconditionFailed, StoreError
from s3fuse.store.base import Bytes, Condition
from s3fuse.store.s3 import S3Store
from s3fuse.store.s3client import Call

if TYPE_CHECKING:
    from s3fuse.store.s3objects import S3Objects
    from tests.store.conftest import Subject

MARKER = {"mode": "16877", "uid": "33"}


@pytest.fixture(params=["minio", "seaweedfs"])
def kind(request: pytest.FixtureRequest) -> str:
    """Only the real servers."""
    kind: str = request.param
    return kind


def objects(subject: Subject) -> S3Objects:
    """What the server itself does."""
    assert isinstance(subject.store, S3Store)
    return subject.store._objects


async def marker(subject: Subject, key: str) -> str:
    return await objects(subject).put(
        key, Bytes(b""), metadata=MARKER, headers={"content-type": "application/x-directory"}
    )


async def test_probe(subject: Subject) -> None:
    found = await subject.store.probe()
    if subject.as_minio:
        assert found.server == "MinIO"
        assert (found.list_metadata, found.snowball, found.marker_metadata) == (True, True, True)
    else:
        assert found.server.startswith("SeaweedFS")
        assert (found.list_metadata, found.snowball, found.notifications) == (False, False, False)
        assert not found.marker_metadata
    assert (found.conditional_put, found.conditional_multipart) == (True, True)
    # What is refused when asked once is not always refused in a race: `races`.
    assert (found.atomic_put, found.atomic_multipart, found.atomic_copy) == (True, subject.as_minio, False)
    assert (found.conditional_delete, found.conditional_delete_many) == (
        (False, False) if subject.as_minio else (True, True)
    )
    assert (await subject.store.list_page("", delimiter="")).objects == ()
    assert (await subject.store.list_page("")).prefixes == ()


async def test_a_key_can_be_both_object_and_prefix(subject: Subject) -> None:
    for first, second in (("a", "a/b"), ("p/q", "p")):
        await subject.put(first, b"1")
        await subject.put(second, b"22")
        assert (await subject.store.head(first)).size_bytes == 1
        assert (await subject.store.head(second)).size_bytes == 2
    page = await subject.store.list_page("")
    assert [entry.key for entry in page.objects] == ["a", "p"]
    flat = await subject.store.list_page("", delimiter="")
    below = await subject.store.list_page("a/")
    if subject.as_minio:
        # No listing shows what lies below an object until that object is deleted.
        assert page.prefixes == ()
        assert [entry.key for entry in flat.objects] == ["a", "p"]
        assert below.objects == ()
        await subject.store.delete("a")
        below = await subject.store.list_page("a/")
    else:
        assert page.prefixes == ("a/", "p/")
        assert sorted(entry.key for entry in flat.objects) == ["a", "a/b", "p", "p/q"]
    assert [entry.key for entry in below.objects] == ["a/b"]


async def test_directory_marker(subject: Subject) -> None:
    plain = objects(subject)
    etag = await marker(subject, "d/")
    info = await plain.head("d/")
    assert (info.size_bytes, info.etag) == (0, etag)
    assert info.headers == {"content-type": "application/x-directory"}
    # SeaweedFS makes a directory of its own of it and drops the metadata.
    assert info.metadata == (MARKER if subject.as_minio else {})
    assert [entry.key for entry in (await subject.store.list_page("d/")).objects] == ["d/"]
    assert (await subject.store.list_page("")).prefixes == ("d/",)
    with pytest.raises(NotFound):
        await plain.head("d")


async def test_copy_of_a_directory_marker(subject: Subject) -> None:
    plain = objects(subject)
    etag = await marker(subject, "d/")
    for target in ("d/", "e/"):
        change = plain.copy("d/", target, source_etag=etag, metadata={"mode": "1"})
        if subject.as_minio:
            assert await change == etag
            assert (await plain.head(target)).metadata == {"mode": "1"}
        else:
            with pytest.raises(NotFound):
                await change


async def test_tags_of_a_directory_marker(subject: Subject) -> None:
    store = subject.store
    assert isinstance(store, S3Store)
    await store._client.send(Call("put", "PUT", "d/", "", {"x-amz-tagging": "a=1"}, Bytes(b"")))
    found = await store._client.send(Call("get", "GET", "d/", "tagging="))
    # If SeaweedFS kept them, metadata of markers would better be there.
    assert (b"<Value>1</Value>" in found.body) == subject.as_minio


async def test_content_type_of_a_directory_marker(subject: Subject) -> None:
    plain = objects(subject)
    headers = {"content-type": "application/x-directory; x=" + "v" * 4096}
    await plain.put("d/", Bytes(b""), metadata={}, headers=headers)
    assert (await plain.head("d/")).headers == headers


async def test_versions_of_a_directory_that_was_never_made(subject: Subject) -> None:
    await subject.put("d/f")
    if subject.as_minio:
        with pytest.raises(NotFound):
            await subject.store.head("d/")
        return
    etag = (await subject.store.head("d/")).etag
    assert etag.endswith("-0")
    condition = Condition(etag=etag)
    with pytest.raises(PreconditionFailed):
        await objects(subject).put("d/", Bytes(b""), metadata={}, headers={}, condition=condition)
    # Then the store looks.
    await subject.store.put("d/", Bytes(b""), metadata=MARKER, headers={}, condition=condition)
    assert (await subject.store.head("d/")).metadata == MARKER
    for condition in (Condition(etag=etag), Condition(absent=True)):
        with pytest.raises(PreconditionFailed):
            await subject.store.put("d/", Bytes(b""), metadata={}, headers={}, condition=condition)
    await subject.put("a/f")
    await subject.store.put("a/", Bytes(b""), metadata=MARKER, headers={}, condition=Condition(absent=True))
    assert (await subject.store.head("a/")).metadata == MARKER
    await subject.put("i/f")
    etag = (await subject.store.head("i/")).etag
    await subject.store.copy("i/", "i/", source_etag=etag, metadata=MARKER, condition=Condition(etag=etag))
    assert (await subject.store.head("i/")).metadata == MARKER


async def test_directory_marker_with_content(subject: Subject) -> None:
    await subject.put("d/", b"five5")
    info = await subject.store.head("d/")
    # SeaweedFS keeps the etag of the content and loses the content.
    assert info.size_bytes == (5 if subject.as_minio else 0)


async def test_marker_and_content_live_apart(subject: Subject) -> None:
    await subject.put("d/f")
    await marker(subject, "d/")
    await subject.store.delete("d/")
    assert (await subject.store.head("d/f")).size_bytes == 0
    assert [entry.key for entry in (await subject.store.list_page("d/")).objects] == ["d/f"]


async def test_prefix_after_its_last_object(subject: Subject) -> None:
    await subject.put("d/e/f")
    await subject.store.delete("d/e/f")
    page = await subject.store.list_page("")
    if subject.as_minio:
        assert page.prefixes == ()
        with pytest.raises(NotFound):
            await subject.store.head("d/")
    else:
        # The directory stays (for now: it is removed some time later), and answers HEAD like a marker.
        assert page.prefixes == ("d/",)
        assert (await subject.store.head("d/")).size_bytes == 0
        await subject.store.delete("d/e/")
        await subject.store.delete("d/")
        assert (await subject.store.list_page("")).prefixes == ()


async def test_metadata_names_that_break_minio_s_listing(subject: Subject) -> None:
    await subject.put("f", b"1", mode="1")
    store = subject.store
    assert isinstance(store, S3Store)
    await store._client.send(Call("put", "PUT", "odd", "", {"x-amz-meta-a!b": "1"}, Bytes(b"")))
    page = await store.list_page("")
    assert [entry.key for entry in page.objects] == ["f", "odd"]


async def test_forbidden(subject: Subject) -> None:
    store = subject.store
    assert isinstance(store, S3Store)
    for provider in (StaticProvider("nobody", "secret-secret"), StaticProvider("nobody", "x" * 40)):
        other = S3Store(store._transport.endpoint, store._bucket, provider)
        for attempt in (other.check(), other.create_bucket(), other.head("f")):
            with pytest.raises(AccessDenied) as caught:
                await attempt
            assert "secret-secret" not in str(caught.value)
        await other.aclose()


async def test_no_such_bucket(subject: Subject, bucket_name: str) -> None:
    store = subject.store
    assert isinstance(store, S3Store)
    other = S3Store(store._transport.endpoint, f"{bucket_name}-other", store._client._signer._provider)
    for attempt in (other.check(), other.list_page(""), other.put("f", Bytes(b"1"), metadata={}, headers={})):
        with pytest.raises(NoSuchBucket):
            await attempt
    with pytest.raises(StoreError):
        await other.head("f")
    await other.aclose()
