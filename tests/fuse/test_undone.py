"""A rename or a change of attributes is held on its way to the server, and another node writes what it is about."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from minio.versioningconfig import VersioningConfig

from tests.fuse.harness import run, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Gate, Mounts
    from tests.servers import Server

CHANGED = "was changed by somebody else"
#: The request that makes the new version: a PUT, or the completion of a multipart upload.
PUT, COMPLETE = rb"PUT (?!\S*s3fuse)", rb"POST \S*uploadId="


@pytest.mark.parametrize("size", [2, 1 << 20])
@pytest.mark.parametrize("how", ["to a free name", "over a file", "chmod"])
def test_another_node_writes_meanwhile(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket], gate: Gate, how: str, size: int
) -> None:
    bucket = buckets(server)
    ours, theirs = os.urandom(size), b"theirs"
    if how != "to a free name":
        bucket.put("doc", b"there before")
    one = mounts.new(gate.server, bucket=bucket.name)
    two = mounts.new(server, bucket=bucket.name)
    one.allowed.append(CHANGED)
    two.allowed.append(CHANGED)
    os.listdir(two.path)
    name = "doc" if how == "chmod" else "tmp"
    (one.path / name).write_bytes(ours)
    one.flush()
    wait_for(lambda: how != "chmod" or (two.path / "doc").stat().st_size == size)
    gate.hold(COMPLETE if server.kind == "minio" and size > 1 << 18 else PUT)
    if how == "chmod":
        (one.path / "doc").chmod(0o600)
    else:
        run("mv", "-f", one.path / "tmp", one.path / "doc")
    wait_for(lambda: gate.waiting)
    (two.path / "doc").write_bytes(theirs)
    two.flush()
    gate.open()
    one.flush()
    assert bucket.get("doc") == theirs
    if how == "chmod":  # the other version was written over ours, on purpose
        assert bucket.keys() == {"doc"}
        assert int(bucket.metadata("doc")["mode"]) & 0o777 == 0o600
    else:
        (other,) = bucket.keys() - {"doc"}
        assert bucket.get(other) == ours
        assert len(one.status()["conflicts"]) == 1
    assert one.status()["capabilities"]["conflict_check"].startswith("atomic")


def test_the_log_names_the_version_that_was_deleted(
    server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """Where the bucket keeps versions a delete can be undone; elsewhere there is none to name."""
    bucket = buckets(server)
    kept = server.kind == "minio"
    if kept:
        bucket.client.set_bucket_versioning(bucket.name, VersioningConfig("Enabled"))
    bucket.put("file", b"content")
    version = bucket.head("file").version_id
    mount = mounts.new(server, bucket=bucket.name)
    (mount.path / "file").unlink()
    mount.flush()
    assert bucket.keys() == set()
    assert (f"deleted file: version {version} with etag" in mount.log_text()) == kept
    deletes = mount.status()["deletes"]
    assert deletes == {"conditional": int(not kept), "looked_before": int(kept), "left": 0}
    if kept:
        answer = bucket.client.get_object(bucket.name, "file", version_id=version)
        assert answer.read() == b"content"
        answer.close()
        answer.release_conn()
        for one in list(bucket.client.list_objects(bucket.name, include_version=True, recursive=True)):
            bucket.client.remove_object(bucket.name, one.object_name, version_id=one.version_id)
