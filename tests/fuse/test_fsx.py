"""fsx (Rust crate, installed by `make setup`): random reads, writes, truncations, mmaps and fsyncs on one file.

`S3FUSE_TEST_FSX_OPERATIONS` sets how many; 100,000 take some minutes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import run, sha256

if TYPE_CHECKING:
    from tests.fuse.harness import Mounts
    from tests.servers import Server

FSX = Path(__file__).parents[2] / ".tools" / "bin" / "fsx"
OPERATIONS = int(os.environ.get("S3FUSE_TEST_FSX_OPERATIONS", 8000))


@pytest.mark.timeout(max(120, OPERATIONS // 100))
@pytest.mark.parametrize("seed", [5, 11])
def test_fsx_finds_no_mismatch(minio_server: Server, mounts: Mounts, tmp_path: Path, seed: int) -> None:
    assert FSX.exists(), f"{FSX} is missing: run make setup"
    mount = mounts.new(minio_server)
    file = mount.path / "file"
    seeded = ("-N", str(OPERATIONS), "-S", str(seed), "-P", str(tmp_path))
    done = run(str(FSX), *seeded, str(file), timeout_s=max(100, OPERATIONS // 100))
    assert "A-OK" in done.stdout + done.stderr
    before = sha256(file)
    mount.remount(empty_cache=True)
    assert sha256(file) == before
