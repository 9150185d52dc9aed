"""fsx, the file system exerciser (Rust crate fsx 0.3.2): random operations on one file against its own model.

S3FUSE_TEST_FSX_OPERATIONS sets how many (10,000 by default; 100,000 take some minutes on two cores).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import run

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

FSX = Path(__file__).parents[2] / ".tools/bin/fsx"
OPERATIONS = int(os.environ.get("S3FUSE_TEST_FSX_OPERATIONS", 10_000))
#: posix_fallocate and punch_hole are left out: neither exists here, nor in an object.
CONFIGURATION = """
flen = {length}
nomsyncafterwrite = false
nosizechecks = false
blockmode = false
[opsize]
max = {most}
min = 0
align = 1
[weights]
close_open = 1
read = 10
write = 10
mapread = 10
mapwrite = 10
invalidate = 1
truncate = 5
fsync = {syncs}
fdatasync = {syncs}
posix_fallocate = 0
punch_hole = 0
sendfile = 3
posix_fadvise = 1
copy_file_range = 3
"""


@pytest.mark.timeout(60 + OPERATIONS // 50)
@pytest.mark.parametrize(
    ("length", "most", "syncs", "share"),
    [(256 << 10, 64 << 10, 0.2, 1.0), (24 << 20, 2 << 20, 0.2, 0.02)],
    ids=["small", "multipart"],
)
def test_fsx(
    server: Server,
    mounts: Mounts,
    buckets: Callable[..., Bucket],
    tmp_path: Path,
    length: int,
    most: int,
    syncs: float,
    share: float,
) -> None:
    if not FSX.exists():
        pytest.fail(f"{FSX} is missing: run make setup", pytrace=False)
    configuration = tmp_path / "fsx.toml"
    configuration.write_text(CONFIGURATION.format(length=length, most=most, syncs=syncs))
    mount = mounts.new(server)
    file = mount.path / "file"
    operations = str(int(OPERATIONS * share))
    done = run(
        FSX,
        "-f",
        configuration,
        "-N",
        operations,
        "-S",
        "7",
        "-P",
        tmp_path,
        file,
        check=False,
        timeout_s=50 + OPERATIONS // 50,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    body = file.read_bytes()
    digest = hashlib.sha256(body).hexdigest()
    assert body
    mount.remount(empty_cache=True)
    assert buckets(server, mount.bucket).digest("file") == digest
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
