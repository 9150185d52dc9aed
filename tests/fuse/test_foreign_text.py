"""Names that terminals would obey, on a real mount: what verbs and logs show of them, and what JSON carries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.fuse.harness import S3FUSE, Gate, run, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

NAME = "a\x1b[2J\x07\n2026-11-30 00:00:00,000 ERROR forged: x\u202egpj"


def is_plain(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


def test_names_obey_nobody(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    bucket = buckets(minio_server)
    gate = Gate(minio_server)
    mount = mounts.new(gate.server, "--log-level", "debug", bucket=bucket.name)
    try:
        gate.hold()
        (mount.path / NAME).write_bytes(b"mine")
        wait_for(lambda: mount.status()["pending"]["files"] == 1)
        assert mount.status()["pending"]["items"][0]["name"] == NAME
        shown = run(S3FUSE, "status", mount.path).stdout
        assert is_plain(shown)
        assert r"a\x1b[2J\x07\n2026" in shown
        assert json.loads(run(S3FUSE, "status", mount.path, "--json").stdout)[0]["pending"]["items"][0]["name"] == NAME
        done = run(S3FUSE, "umount", "--drain-timeout", "1s", mount.path, check=False)
        assert done.returncode == 3
        assert is_plain(done.stderr)
        assert r"\u202egpj (4 bytes)" in done.stderr
        listed = run(S3FUSE, "cache", "list", mount.cache)
        assert is_plain(listed.stdout)
        assert r"\u202egpj" in listed.stdout
        gate.open()
        mount.wait_for_end()
        mount.start()
        mount.flush()
        assert bucket.get(NAME) == b"mine"
        log = mount.log_text()
        assert is_plain(log)
        assert not any(line.startswith("2026-11-30 00:00:00,000") for line in log.splitlines())
        mount.allowed.append("not in the bucket yet")
        mount.stop()
    finally:
        gate.close()
