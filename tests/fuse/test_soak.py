"""The soak (see `tests.soak`), short and with a fixed seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests import soak
from tests.proxy import proxied

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server


@pytest.mark.timeout(240)
def test_mixed_load_through_a_faulty_proxy(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    bucket = buckets(minio_server)
    with proxied(minio_server, seed=3) as proxy:
        proxy.stall_s = 2.0
        mount = mounts.new(proxy.server, "--memory", "32MiB", bucket=bucket.name)
        mount.allowed += soak.ALLOWED
        report = soak.soak(mount, bucket, proxy, seconds=10, rate=0.1, seed=3, workers=3, big=0.0, forget_s=100)
        print(report.text())
        assert report.losses == []
        assert report.faults.total() >= 10
        mount.stop()
