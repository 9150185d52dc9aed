"""`S3Store` behind the faulty proxy: what one or two bad answers are taken for, and what many are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from s3fuse.errors import AccessDenied, BadResponse, NeedsCredentials, NoSuchBucket, NotFound, StoreError, Unavailable
from s3fuse.store.base import Bytes, Condition
from s3fuse.store.s3client import S3Client
from tests.proxy import RANDOM, Fault, Proxy, proxied

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from s3fuse.store.s3 import S3Store
    from tests.servers import Server

BODY = bytes(range(256)) * 500
#: What a fault ends in that comes every time; those not named do no harm.
FINAL: dict[Fault, type[StoreError]] = {
    Fault.DENIED: AccessDenied,
    Fault.NO_BUCKET: NoSuchBucket,
    Fault.XML: BadResponse,
    Fault.HTML: BadResponse,
    Fault.SHORT_BODY: BadResponse,
    Fault.EXPIRED: NeedsCredentials,
    Fault.RESET: Unavailable,
    Fault.CUT: Unavailable,
    Fault.LOST: Unavailable,
    Fault.LONG_LENGTH: StoreError,  # a get sees it in the head, others when the connection ends
    Fault.ERROR_500: Unavailable,
    Fault.ERROR_503: Unavailable,
}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S3Client, "backoff_s", lambda _self, _attempt: 0.0)


@pytest.fixture(params=["minio", "seaweedfs"])
def proxy(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    server: Server = request.getfixturevalue(f"{request.param}_server")
    with proxied(server) as proxy:
        proxy.stall_s = proxy.slow_s = proxy.late_s = 0.1
        yield proxy


@pytest.fixture
async def store(proxy: Proxy, bucket_name: str) -> AsyncIterator[S3Store]:
    store = proxy.server.store(bucket_name)
    await store.create_bucket()
    yield store
    await store.aclose()


async def use(store: S3Store) -> None:
    """Every kind of request; fails where one is not answered as it should be."""
    etag = await store.put("d/k", Bytes(BODY), metadata={"mode": "1"}, headers={})
    assert (await store.head("d/k")).etag == etag
    buffer = bytearray(len(BODY))
    await store.get_into("d/k", 0, [memoryview(buffer)], etag=etag)
    assert buffer == BODY
    assert [entry.key for entry in (await store.list_page("d/")).objects] == ["d/k"]
    with pytest.raises(NotFound):
        await store.head("d/none")
    new = await store.put("d/k", Bytes(b"new"), metadata={}, headers={}, condition=Condition(etag=etag))
    assert await store.copy("d/k", "d/copy", source_etag=new)
    upload = await store.multipart_create("d/m", metadata={}, headers={})
    part = await store.multipart_put("d/m", upload, 1, Bytes(BODY))
    await store.multipart_complete("d/m", upload, [part], condition=Condition(absent=True))
    assert (await store.head("d/m")).size_bytes == len(BODY)
    await store.delete("d/copy")
    assert await store.delete_many(["d/k", "d/m"]) == {}
    assert (await store.list_page("")).objects == ()


@pytest.mark.parametrize("fault", RANDOM)
async def test_one_fault_with_each_request_is_not_noticed(proxy: Proxy, store: S3Store, fault: Fault) -> None:
    failed: set[str] = set()

    def first(request: object) -> bool:
        operation = getattr(request, "operation", "")
        if operation in failed:
            return False
        failed.add(operation)
        return True

    proxy.fail(fault, when=first)
    await use(store)
    assert failed >= {"put", "head", "get", "list", "copy", "multipart_put", "multipart_complete", "delete_many"}
    assert store.health.up
    assert store.health.needs == ""


@pytest.mark.parametrize("fault", sorted(FINAL, key=lambda fault: fault.name))
async def test_a_fault_that_stays_is_an_error_and_nothing_else(proxy: Proxy, store: S3Store, fault: Fault) -> None:
    etag = await store.put("d/k", Bytes(BODY), metadata={}, headers={})
    proxy.fail(fault)
    kind = FINAL[fault]
    buffer = bytearray(len(BODY))
    with pytest.raises(kind):
        await store.get_into("d/k", 0, [memoryview(buffer)], etag=etag)
    with pytest.raises(kind):
        await store.list_page("d/")
    for attempt in (store.head("d/k"), store.put("d/l", Bytes(b"x"), metadata={}, headers={}), store.delete("d/none")):
        with pytest.raises(StoreError) as caught:
            await attempt
        assert not isinstance(caught.value, NotFound)
    assert store.health.last_error
    proxy.heal()
    await store.get_into("d/k", 0, [memoryview(buffer)], etag=etag)
    assert buffer == BODY
    await store.ping()
    assert store.health.up
