"""`python -m tests.crash --kills N --seed S`: more kills than the tests have, and what came of them."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.crash.kills import campaign, plan
from tests.servers import minio, seaweedfs


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--server", choices=["minio", "seaweedfs"], default="minio")
    arguments = parser.parse_args()
    start = {"minio": minio, "seaweedfs": seaweedfs}[arguments.server]
    with tempfile.TemporaryDirectory(prefix="s3fuse-crash-") as name:
        folder = Path(name)
        (folder / "server").mkdir()
        with (
            start(folder / "server") as server,
            campaign(folder / "mount", server, f"crash-{arguments.seed}", arguments.seed) as one,
        ):
            try:
                one.run(plan(arguments.kills, arguments.seed))
            finally:
                print(one.report, flush=True)
    return 1 if one.report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
