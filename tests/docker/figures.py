"""What a volume of the plugin costs beside a local one and a plain mount: `python -m tests.docker.figures`.

Prints a table: start and end of a container, and a container's sequential writing (with fsync) and reading of a file
that no cache has, each the median of several runs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.docker.images import tar
from tests.docker.node import Node
from tests.docker.plugin import Plugin
from tests.fuse.harness import s3_client
from tests.servers import minio

if TYPE_CHECKING:
    from collections.abc import Callable

_STARTS = 9
_TRANSFERS = 5
_MIB = 512
_WRITE = f"dd if=/dev/zero of=/data/file bs=1M count={_MIB} conv=fsync 2>/dev/null"
_READ = "cat /data/file >/dev/null"


def median_s(work: Callable[[], object], times: int, before: Callable[[], object] = lambda: None) -> float:
    """The median time of some runs."""
    found = []
    for _ in range(times):
        before()
        start = time.monotonic()
        work()
        found.append(time.monotonic() - start)
    return statistics.median(found)


def starts(node: Node, plugin: Plugin, bucket: str) -> None:
    """`docker run --rm … true` with no volume, a local one, and one of the plugin."""
    node.docker("volume", "create", "local")
    plugin.create("warm", bucket, prefix="warm")
    plugin.create("cold", bucket, prefix="cold")
    run = ("run", "--rm", "--network", "none")
    print("docker run --rm … true, seconds:")
    for name, options in {
        "no volume": (),
        "local volume": ("-v", "local:/data"),
        "plugin's volume, mounted by another container": ("-v", "warm:/data"),
        "plugin's volume, mounted for this run": ("-v", "cold:/data"),
        "the same without copy-up": ("-v", "cold:/data:nocopy"),
    }.items():
        if "another" in name:
            node.container("keep", "-v", "warm:/data")
        before = plugin.wait_until_idle if "cold:" in " ".join(options) else lambda: None
        seconds = median_s(lambda options=options: node.docker(*run, *options, "lab", "true"), _STARTS, before)
        print(f"  {seconds:.2f}  {name}")
        if "another" in name:
            node.docker("rm", "-f", "keep")


def transfers(node: Node, plugin: Plugin, bucket: str) -> None:
    """A file on the volume, by a container and by a program of the machine on the volume's mount."""
    plugin.create("vol", bucket, prefix="vol")
    node.container("one", "-v", "vol:/data")
    place = next(entry.mountpoint for entry in node.mounts() if Path(entry.mountpoint).name == "vol")

    def forget() -> None:
        """A new mount with an empty cache."""
        node.docker("stop", "one")
        plugin.wait_until_idle()
        node.script("rm -rf /var/cache/s3fuse/volume-vol")
        node.docker("start", "one")

    print(f"{_MIB} MiB, MiB/s:")
    for name, script in (("write and fsync", _WRITE), ("read, cold", _READ)):
        inside = median_s(lambda script=script: node.shell("one", script), _TRANSFERS, forget)
        outside = median_s(lambda script=script: node.script(script.replace("/data", place)), _TRANSFERS, forget)
        print(f"  {_MIB / inside:.0f} in a container, {_MIB / outside:.0f} beside it  {name}")
    node.docker("rm", "-f", "one")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="s3fuse-figures-") as folder, minio(Path(folder)) as server:
        image = Path(folder) / "lab.tar"
        image.write_bytes(tar([]))
        node = Node("n1", Path(folder) / "n1")
        try:
            node.start().start_dockerd()
            node.docker("import", image, "lab")
            with s3_client(server) as client:
                client.make_bucket("figures")
            plugin = Plugin(node, server)
            starts(node, plugin, "figures")
            transfers(node, plugin, "figures")
        finally:
            node.end()


if __name__ == "__main__":
    main()
