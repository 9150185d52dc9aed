"""What every store does with directory markers: their metadata is kept on every server; numbers of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from s3fuse.errors import NotFound, PreconditionFailed, Refused
from s3fuse.store.base import MAX_KEY_BYTES, Bytes, Condition
from s3fuse.store.s3 import S3Store
from s3fuse.store.s3markers import SIDECARS

if TYPE_CHECKING:
    from tests.servers import Server
    from tests.store.conftest import Subject

ABSENT = Condition(absent=True)
HEADERS = {"content-type": "application/x-directory"}
METADATA = {"mode": "16877", "uid": "33", "mtime": "1.5"}


async def make(subject: Subject, key: str, metadata: dict[str, str] = METADATA, condition: Condition = ABSENT) -> str:
    return await subject.store.put(key, Bytes(b""), metadata=metadata, headers=HEADERS, condition=condition)


async def metadata_of(subject: Subject, key: str) -> object:
    return (await subject.store.head(key)).metadata


async def keys(subject: Subject) -> list[str]:
    return sorted(entry.key for entry in (await subject.store.list_page("", delimiter="")).objects)


def expect(subject: Subject, native: dict[str, int], apart: dict[str, int]) -> None:
    """Checks the requests since the last check."""
    assert subject.counted() == (native if subject.capabilities.marker_metadata else apart)


async def test_the_probe_sees_who_loses_metadata(subject: Subject) -> None:
    assert subject.capabilities.marker_metadata == subject.as_minio


async def test_put_head_list(subject: Subject) -> None:
    etag = await make(subject, "d/")
    expect(subject, {"put": 1}, {"put": 2})
    info = await subject.store.head("d/")
    expect(subject, {"head": 1}, {"head": 2})
    assert (info.key, info.etag, info.size_bytes, info.metadata, info.headers) == ("d/", etag, 0, METADATA, HEADERS)
    (entry,) = (await subject.store.list_page("d/")).objects
    expect(subject, {"list": 1}, {"list": 1})
    assert (entry.key, entry.etag, entry.modified_ns) == ("d/", etag, info.modified_ns)
    assert entry.metadata == (METADATA if subject.capabilities.list_metadata else None)
    # What is s3fuse's own comes in the bucket's root only.
    assert [prefix for prefix in (await subject.store.list_page("")).prefixes if prefix != ".s3fuse/"] == ["d/"]


async def test_missing_marker_is_not_asked_for_its_metadata(subject: Subject) -> None:
    with pytest.raises(NotFound):
        await subject.store.head("d/")
    expect(subject, subject.absent, subject.absent)


async def test_files_cost_nothing_more(subject: Subject) -> None:
    etag = await subject.put("f", b"1", mode="1")
    await subject.store.head("f")
    await subject.store.copy("f", "g", source_etag=etag)
    await subject.store.delete("f")
    await subject.store.delete_many(["g"])
    assert subject.counted() == {"put": 1, "head": 1, "copy": 1, "delete": 1, "delete_many": 1}


async def test_put_again_replaces_the_metadata(subject: Subject) -> None:
    etag = await make(subject, "d/")
    subject.counted()
    for condition, value in ((Condition(), "2.5"), (Condition(etag=etag), "3.5")):
        changed = METADATA | {"mtime": value}
        assert await make(subject, "d/", changed, condition) == etag
        expect(subject, {"put": 1}, {"put": 2})
        assert await metadata_of(subject, "d/") == changed
        subject.counted()
    await make(subject, "d/", {}, Condition())
    expect(subject, {"put": 1}, {"put": 1, "delete": 1})
    assert await metadata_of(subject, "d/") == {}
    assert await keys(subject) == ["d/"]


async def test_refused_put_leaves_the_metadata(subject: Subject) -> None:
    await make(subject, "d/")
    for condition in (ABSENT, Condition(etag="0" * 32)):
        with pytest.raises(PreconditionFailed):
            await make(subject, "d/", {"mode": "1"}, condition)
    for metadata in ({"mode": "é"}, {"Upper": "1"}):
        with pytest.raises(Refused):
            await make(subject, "d/", metadata, Condition())
        with pytest.raises(Refused):
            await make(subject, "new/", metadata)
    assert await metadata_of(subject, "d/") == METADATA
    with pytest.raises(NotFound):
        await subject.store.head("new/")


async def test_metadata_only_change(subject: Subject) -> None:
    etag = await make(subject, "d/")
    subject.counted()
    for condition in (Condition(), Condition(etag=etag)):
        copied = await subject.store.copy(
            "d/", "d/", source_etag=etag, metadata={"mode": "1"}, headers=HEADERS, condition=condition
        )
        assert copied == etag
        expect(subject, {"copy": 1}, {"head": 1, "put": 2})
    info = await subject.store.head("d/")
    assert (info.etag, info.metadata, info.headers) == (etag, {"mode": "1"}, HEADERS)


async def test_copy_to_another_marker(subject: Subject) -> None:
    etag = await make(subject, "a/")
    subject.counted()
    assert await subject.store.copy("a/", "b/", source_etag=etag, metadata={"mode": "1"}, headers=HEADERS) == etag
    expect(subject, {"copy": 1}, {"head": 1, "put": 2})
    assert await subject.store.copy("a/", "c/", source_etag=etag) == etag
    expect(subject, {"copy": 1}, {"head": 2, "put": 2})
    b, c = await subject.store.head("b/"), await subject.store.head("c/")
    assert (b.metadata, b.headers) == ({"mode": "1"}, HEADERS)
    assert (c.metadata, c.headers) == (METADATA, HEADERS)
    assert await metadata_of(subject, "a/") == METADATA


async def test_copy_that_is_refused(subject: Subject) -> None:
    etag = await make(subject, "a/")
    await make(subject, "b/", {"mode": "1"})
    copy = subject.store.copy
    with pytest.raises(NotFound):
        await copy("nothing/", "c/", source_etag=etag, metadata={})
    with pytest.raises(PreconditionFailed):
        await copy("a/", "b/", source_etag="0" * 32, metadata={})
    with pytest.raises(PreconditionFailed):
        await copy("a/", "b/", source_etag=etag, metadata={}, condition=ABSENT)
    with pytest.raises(Refused):
        await copy("a/", "a/", source_etag=etag)
    assert await metadata_of(subject, "a/") == METADATA
    assert await metadata_of(subject, "b/") == {"mode": "1"}


async def test_delete_takes_everything(subject: Subject) -> None:
    await make(subject, "d/")
    await make(subject, "d/e/")
    subject.counted()
    await subject.store.delete("d/")
    expect(subject, {"delete": 1}, {"delete": 2})
    assert await metadata_of(subject, "d/e/") == METADATA
    await subject.store.delete("d/e/")
    await subject.store.delete("nothing/")
    assert await keys(subject) == []
    await make(subject, "d/", {})
    assert await metadata_of(subject, "d/") == {}


async def test_delete_many_takes_everything(subject: Subject) -> None:
    names = ["d/", "d/e/", "d/e/f", "g/"]
    for name in names:
        await make(subject, name)
    subject.counted()
    assert await subject.store.delete_many([*names, "nothing/"]) == {}
    expect(subject, {"delete_many": 1}, {"delete_many": 2})
    assert await keys(subject) == []


async def test_nested_in_either_order(subject: Subject) -> None:
    for name in ("a/", "a/b/", "x/y/", "x/"):
        await make(subject, name, METADATA | {"name": name})
    for name in ("a/", "a/b/", "x/y/", "x/"):
        assert await metadata_of(subject, name) == METADATA | {"name": name}


@pytest.mark.parametrize("key", [".s3fuse/root/", "a b+%41/", "é&😀/", "\x01/", "dir/sub dir/", "n" * 240 + "/"])
async def test_odd_markers(subject: Subject, key: str) -> None:
    await make(subject, key)
    assert await metadata_of(subject, key) == METADATA
    assert await subject.store.delete_many([key]) == {}
    assert await keys(subject) == []


async def test_two_kilobytes_of_metadata(subject: Subject) -> None:
    metadata = {"xattr": "v" * (2048 - len("x-amz-meta-xattr"))}
    await make(subject, "d/", metadata)
    assert await metadata_of(subject, "d/") == metadata


async def test_keys_too_long_for_a_sidecar(subject: Subject) -> None:
    longest = MAX_KEY_BYTES - len(SIDECARS)
    fits = ("n" * 199 + "/") * 5
    fits += "n" * (longest - len(fits)) + "/"
    await make(subject, fits)
    assert await metadata_of(subject, fits) == METADATA
    longer = "m" + fits
    if subject.capabilities.marker_metadata:
        await make(subject, longer)
        assert await metadata_of(subject, longer) == METADATA
        return
    with pytest.raises(Refused):
        await make(subject, longer)
    await make(subject, longer, {})
    assert await metadata_of(subject, longer) == {}
    await subject.store.delete(longer)
    assert await subject.store.delete_many([longer]) == {}


async def test_another_mount_sees_them(subject: Subject, server: Server | None) -> None:
    if server is None:
        return
    assert isinstance(subject.store, S3Store)
    etag = await make(subject, "d/")
    other = server.store(subject.store._bucket)
    assert (await other.probe()).marker_metadata == subject.capabilities.marker_metadata
    info = await other.head("d/")
    assert (info.etag, info.metadata) == (etag, METADATA)
    await other.aclose()


async def test_a_bucket_with_sidecars_keeps_them(subject: Subject, server: Server | None) -> None:
    if server is None or not subject.as_minio:
        return
    assert isinstance(subject.store, S3Store)
    await subject.put("d/")
    await subject.put(f"{SIDECARS}d", mode="1")
    found = await subject.store.probe()
    assert (found.list_metadata, found.marker_metadata) == (True, False)
    assert await metadata_of(subject, "d/") == {"mode": "1"}
    assert [entry.metadata for entry in (await subject.store.list_page("d/")).objects] == [None]
