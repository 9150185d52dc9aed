"""`make kills KILLS=200`: the campaign in its long form, as root."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuse.harness import Mount, s3_client
from tests.keeper.kills import ALL, Campaign
from tests.proxy import proxied
from tests.servers import minio, seaweedfs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--programs", nargs="*", default=ALL)
    parser.add_argument("--lag", type=float, default=0.0, help="seconds that writes may be on their way")
    parser.add_argument("--server", choices=["minio", "seaweedfs"], default="minio")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="s3fuse-kills-"))
    for name in ("mnt", "work", "server"):
        (folder / name).mkdir()
    with (
        (minio if options.server == "minio" else seaweedfs)(folder / "server") as real,
        proxied(real) as proxy,
    ):
        server = proxy.server if options.lag else real
        proxy.lag_s = options.lag
        with s3_client(server) as client:
            client.make_bucket("kills")
        mount = Mount(server, "kills", folder / "mnt", folder / "cache", folder / "log")
        try:
            mount.start()
            campaign = Campaign(mount, folder / "work", options.programs, options.seed)
            report = campaign.run(options.kills, options.restarts)
            print(report)
            if not report.problems:
                mount.remount(empty_cache=True)
                campaign.differences(mount.path, folder / "work" / "local")
                print("what the bucket has:", report.problems or "equal")
            mount.stop()
        finally:
            mount.abort()
            print(f"everything is kept in {folder}")
    return bool(report.problems)


if __name__ == "__main__":
    sys.exit(main())
