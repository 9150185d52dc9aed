"""The limit of the S3 client: what s3fuse's own store needs for the bytes of a workload, with no filesystem around it.

Each function works on one store and gives the seconds of the part that counts.
"""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING, TypeVar

import trio
from minio.commonconfig import SnowballObject

from bench.inputs import files_of
from bench.scenario import offsets
from s3fuse.store.base import Bytes, ObjectInfo

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from pathlib import Path

    from minio import Minio

    from bench.inputs import Inputs
    from s3fuse.store.s3 import S3Store

T = TypeVar("T")

_PART_BYTES = 8 << 20
_AT_ONCE = 8


async def each(work: Callable[[T], Awaitable[object]], items: Iterable[T], at_once: int = _AT_ONCE) -> None:
    """Does the work on every item, `at_once` at a time."""
    left = iter(items)

    async def worker() -> None:
        for item in left:
            await work(item)

    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(worker)


async def _put(store: S3Store, key: str, data: bytes) -> None:
    if len(data) <= _PART_BYTES:
        await store.put(key, Bytes(data), metadata={}, headers={})
        return
    upload = await store.multipart_create(key, metadata={}, headers={})
    parts = []

    async def send(start: int) -> None:
        piece = memoryview(data)[start : start + _PART_BYTES]
        parts.append(await store.multipart_put(key, upload, start // _PART_BYTES + 1, Bytes(piece)))

    await each(send, range(0, len(data), _PART_BYTES), 4)
    await store.multipart_complete(key, upload, sorted(parts, key=lambda part: part.number))


async def _get(store: S3Store, info: ObjectInfo) -> None:
    buffers = [memoryview(bytearray(min(_PART_BYTES, info.size_bytes))) for _ in range(4)]

    async def fetch(start: int) -> None:
        buffer = buffers.pop()
        await store.get_into(info.key, start, [buffer[: info.size_bytes - start]], etag=info.etag)
        buffers.append(buffer)

    await each(fetch, range(0, info.size_bytes, _PART_BYTES), 4)


async def listed(store: S3Store, prefix: str = "", delimiter: str = "") -> list[ObjectInfo]:
    """Every object below a prefix."""
    found: list[ObjectInfo] = []
    token = None
    while True:
        page = await store.list_page(prefix, delimiter=delimiter, token=token)
        found += page.objects
        token = page.next_token
        if token is None:
            return found


async def put_big(store: S3Store, inputs: Inputs) -> float:
    data = inputs.big.read_bytes()
    began = time.perf_counter()
    await _put(store, "big", data)
    return time.perf_counter() - began


async def put_parallel(store: S3Store, inputs: Inputs) -> float:
    data = inputs.parallel.read_bytes()
    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(_put, store, f"parallel{number}", data)
    return time.perf_counter() - began


async def get_big(store: S3Store, inputs: Inputs) -> float:
    began = time.perf_counter()
    await _get(store, await store.head("big"))
    return time.perf_counter() - began


async def get_parallel(store: S3Store, inputs: Inputs) -> float:
    began = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(_get, store, await store.head(f"parallel{number}"))
    return time.perf_counter() - began


async def get_random(store: S3Store, inputs: Inputs) -> float:
    """One ranged GET of 4 KiB after the other, as the one program that reads."""
    began = time.perf_counter()
    info = await store.head("big")
    buffer = memoryview(bytearray(4096))
    for offset in offsets(info.size_bytes, inputs.size.random_reads):
        await store.get_into("big", offset, [buffer], etag=info.etag)
    return time.perf_counter() - began


async def get_small(store: S3Store, inputs: Inputs) -> float:
    return await _get_all(store, "small/")


async def get_tree(store: S3Store, inputs: Inputs) -> float:
    return await _get_all(store, "tree/")


async def _get_all(store: S3Store, prefix: str) -> float:
    began = time.perf_counter()
    await each(lambda info: _get(store, info), await listed(store, prefix))
    return time.perf_counter() - began


async def list_names(store: S3Store, inputs: Inputs) -> float:
    began = time.perf_counter()
    await listed(store, "names/", "/")
    return time.perf_counter() - began


async def put_tree(store: S3Store, inputs: Inputs) -> float:
    """One PUT a file, in parallel."""
    contents = tree_contents(inputs.tree)
    began = time.perf_counter()
    await each(lambda key: _put(store, key, contents[key]), contents)
    return time.perf_counter() - began


async def delete_tree(store: S3Store, inputs: Inputs) -> float:
    await put_tree(store, inputs)
    began = time.perf_counter()
    keys = [info.key for info in await listed(store)]
    for start in range(0, len(keys), 1000):
        await store.delete_many(keys[start : start + 1000])
    return time.perf_counter() - began


async def copy_directory(store: S3Store, inputs: Inputs) -> float:
    """What moving a directory is on a server without rename: copies, then deletes."""
    await each(lambda n: _put(store, f"old/file{n:04}", b"x" * 100), range(inputs.size.renamed))
    began = time.perf_counter()
    objects = await listed(store, "old/")

    async def copy(info: ObjectInfo) -> None:
        await store.copy(info.key, "new/" + info.key.removeprefix("old/"), source_etag=info.etag)

    await each(copy, objects)
    for start in range(0, len(objects), 1000):
        await store.delete_many([info.key for info in objects[start : start + 1000]])
    return time.perf_counter() - began


def tree_contents(tree: Path) -> dict[str, bytes]:
    """Contents of all files below a directory by their path from it."""
    return {str(path.relative_to(tree)): path.read_bytes() for path in files_of(tree)}


def fill(client: Minio, bucket: str, contents: Mapping[str, bytes | Path]) -> None:
    """Makes these objects; small ones by snowball, which MinIO takes at twice the pace."""
    small = {key: data for key, data in contents.items() if isinstance(data, bytes)}
    for key in contents.keys() - small.keys():
        client.fput_object(bucket, key, str(contents[key]), part_size=16 << 20, num_parallel_uploads=2)
    keys = list(small)
    for start in range(0, len(keys), 10_000):
        objects = (
            SnowballObject(key, data=io.BytesIO(small[key]), length=len(small[key]))
            for key in keys[start : start + 10_000]
        )
        client.upload_snowball_objects(bucket, objects)
