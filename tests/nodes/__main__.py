"""`python -m tests.nodes --minutes N --server KIND`: three nodes on one bucket, and what the checker says of it."""

from __future__ import annotations

import argparse
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

from tests.nodes.node import Plan
from tests.nodes.run import play
from tests.servers import minio, seaweedfs


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.nodes", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--server", choices=["minio", "seaweedfs"], default="minio")
    parser.add_argument("--seed", type=int, default=None, help="of the load; default: a new one")
    parser.add_argument("--big", type=float, default=0.01, help="share of writes that are of 20 MiB")
    parser.add_argument("--keep", action="store_true", help="keep logs, history and the server's data")
    parser.add_argument("--versioned", action="store_true", help="keep versions, which tell what became of a write")
    arguments = parser.parse_args()
    seed = secrets.randbelow(1 << 20) if arguments.seed is None else arguments.seed
    print(f"{arguments.server}, {arguments.minutes:g} minutes, seed {seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="s3fuse-nodes-"))
    (folder / "server").mkdir()
    start = {"minio": minio, "seaweedfs": seaweedfs}[arguments.server]
    failed = True
    try:
        with start(folder / "server") as server:
            plan = Plan(seed, seconds=arguments.minutes * 60, big=arguments.big)
            report = play(folder, server, f"nodes-{seed}", plan, versioned=arguments.versioned)
        print(report, flush=True)
        failed = bool(report.errors)
    finally:
        if failed or arguments.keep:
            print(f"logs, history and data are in {folder}", flush=True)
        else:
            shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
