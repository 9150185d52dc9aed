"""The three stores that must behave alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from s3fuse.store.base import Bytes, Capabilities, ObjectInfo, Store
from s3fuse.store.memory import MINIO, SEAWEEDFS, MemoryStore

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import AsyncIterator

    from s3fuse.store.s3probe import Findings
    from tests.servers import Server

KINDS = ("memory-as-minio", "memory-as-seaweedfs", "minio", "seaweedfs")
_findings: dict[str, Findings] = {}


@dataclass(frozen=True, slots=True)
class Subject:
    """A probed store on an empty bucket and what its server is known to do."""

    store: Store
    kind: str
    capabilities: Capabilities

    @property
    def as_minio(self) -> bool:
        return self.kind.endswith("minio")

    async def put(self, key: str, data: bytes = b"", **metadata: str) -> str:
        return await self.store.put(key, Bytes(data), metadata=metadata, headers={})

    async def get(self, info: ObjectInfo) -> bytes:
        buffer = bytearray(info.size_bytes)
        await self.store.get_into(info.key, 0, [memoryview(buffer)], etag=info.etag)
        return bytes(buffer)

    @property
    def absent(self) -> dict[str, int]:
        """What finding out that a key is not there costs: without a reason in the answer to HEAD a listing too."""
        return {"head": 1, "list": 1} if self.kind == "seaweedfs" else {"head": 1}

    def counted(self) -> Counter[str]:
        """The requests since the last call."""
        counts = self.store.requests.copy()
        self.store.requests.clear()
        return counts


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Which store a conformance test runs on."""
    kind: str = request.param
    return kind


@pytest.fixture
def server(kind: str, request: pytest.FixtureRequest) -> Server | None:
    """The server of that store, if it has one."""
    return None if kind.startswith("memory") else request.getfixturevalue(f"{kind}_server")


@pytest.fixture
async def subject(kind: str, server: Server | None, bucket_name: str) -> AsyncIterator[Subject]:
    """The store to test."""
    store: Store
    if server is not None:
        real = store = server.store(bucket_name)
        await real.create_bucket()
        if server.kind in _findings:
            # One probe per server: on MinIO it waits most of a second for events.
            real._objects.findings = _findings[server.kind]
            await real.check()
            capabilities = real._objects.findings.capabilities(real._client.server)
        else:
            capabilities = await real.probe()
            _findings[server.kind] = real._objects.findings
    elif kind == "memory-as-minio":
        store = MemoryStore(MINIO)
    else:
        store = MemoryStore(SEAWEEDFS, conditional_copy=True)
    if server is None:
        capabilities = await store.probe()
    store.requests.clear()
    yield Subject(store, kind, capabilities)
    await store.aclose()
