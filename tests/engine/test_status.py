"""What a mount says of itself to `s3fuse status --json`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.engine.rig import Bench


async def test_a_log_without_a_file_is_stderr(bench: Bench) -> None:
    """As it is with --foreground; every other mount has a file (see `test_cli`)."""
    rig = await bench.rig()
    assert rig.mount.answers.status()["log"] == "stderr"
