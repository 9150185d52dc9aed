"""What is interrupted half-way leaves nothing behind: a program by Ctrl-C, the daemon by SIGKILL (trial T69)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import wait_for
from tests.proxy import Fault, Proxy, proxied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

MIB = 1 << 20
SIZE_BYTES = 96 * MIB


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with proxied(server) as proxy:
        yield proxy


def unfinished(bucket: Bucket, key: str) -> list[str]:
    """Multipart uploads of the key that the server has begun."""
    found = bucket.client._list_multipart_uploads(bucket.name, prefix=key).uploads
    return [upload.object_name for upload in found if upload.object_name == key]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(random.Random(69).randbytes(SIZE_BYTES))
    return path


def test_interrupted_copy(
    server: Server, proxy: Proxy, mounts: Mounts, buckets: Callable[..., Bucket], source: Path
) -> None:
    """The file is what the program has written, here and in the bucket, and nothing else is in the bucket."""
    bucket = buckets(server)
    mount = mounts.new(proxy.server, "--dirty-size", "32MiB", bucket=bucket.name)
    target = mount.path / "copy"
    proxy.fail(Fault.STALLED, "put", "multipart_put")
    # Where the tests run in a shell's background they have SIGINT ignored, and so would the program.
    copy = subprocess.Popen(["env", "--default-signal=INT", "cp", source, target])
    wait_for(lambda: mount.status()["cache"]["waiting_writers"] > 0, timeout_s=30)
    assert copy.poll() is None  # it waits for room
    copy.send_signal(signal.SIGINT)
    assert copy.wait(timeout=30) == -signal.SIGINT
    proxy.heal()
    size = target.stat().st_size
    assert 0 < size < SIZE_BYTES
    whole = source.read_bytes()
    assert target.read_bytes() == whole[:size]
    mount.flush()
    assert bucket.get("copy") == whole[:size]
    assert unfinished(bucket, "copy") == []
    wait_for(lambda: not bucket.temporaries())
    mount.remount()
    assert target.read_bytes() == whole[:size]


def test_killed_in_the_middle_of_an_upload(
    server: Server, proxy: Proxy, mounts: Mounts, buckets: Callable[..., Bucket], source: Path
) -> None:
    bucket = buckets(server)
    mount = mounts.new(proxy.server, bucket=bucket.name)
    proxy.fail(Fault.STALLED, "multipart_put", when=lambda request: "partNumber=3" in request.head)
    target = mount.path / "copy"
    target.write_bytes(source.read_bytes())
    wait_for(lambda: proxy.counts["STALLED", "multipart_put"] > 0, timeout_s=30)
    mount.kill()
    assert unfinished(bucket, "copy") == ["copy"]
    assert "copy" not in bucket.keys()
    proxy.heal()
    mount.start()
    assert target.read_bytes() == source.read_bytes()
    mount.flush()
    assert bucket.get("copy") == source.read_bytes()
    wait_for(lambda: not unfinished(bucket, "copy"), timeout_s=30)
    assert bucket.temporaries() == set()
    assert os.listdir(mount.path) == ["copy"]
