"""A run: nodes work on one bucket, are killed at times, come to rest, and are judged by what the bucket has."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from minio.versioningconfig import ENABLED, VersioningConfig

from s3fuse import control
from tests.fuse.harness import Bucket, Mount, Mounts, s3_client
from tests.nodes.content import Id, Mixed, ids_in, parse
from tests.nodes.history import Finding, History
from tests.nodes.node import CONFLICT, FOLDERS, STUCK_S, Node, Plan

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import Server

NODES = 3
DRAIN_S = 180.0
#: What s3fuse keeps for itself in a bucket while mounts are there.
_OURS = re.compile(r"\.s3fuse/(directories/|lease|root/)")
_TRACE = re.compile(r"^Traceback |Group Traceback|in a way that nobody expected")


@dataclass
class Report:
    """What came of a run."""

    findings: list[Finding]
    history: History
    kept: Counter[str] = field(default_factory=Counter)

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_error]

    def __str__(self) -> str:
        done = Counter(event.verb for event in self.history.events if not event.errno)
        failed = Counter((event.verb, event.errno) for event in self.history.events if event.errno)
        slowest = max(self.history.events, key=lambda event: event.ended - event.began, default=None)
        lines = [f"done: {dict(done)}", f"failed: {dict(failed)}", f"in the bucket: {dict(self.kept)}"]
        lines.append(f"acknowledged writes: {sum(event.acknowledged for event in self.history.events)}")
        if slowest is not None:
            lines.append(f"slowest: {slowest.verb} {slowest.ended - slowest.began:.1f} s")
        lines.append(f"found: {dict(Counter(finding.kind for finding in self.findings))}")
        return "\n".join([*lines, *(f"{one.kind}: {one.text}" for one in self.findings[:60])])


class Cluster:
    """The nodes, each with a mount that is there."""

    def __init__(self, mounts: Mounts, server: Server, bucket: Bucket, plan: Plan) -> None:
        self.bucket = bucket
        self.findings: list[Finding] = []
        self.history = History()
        self.versioned = False
        self._versions: dict[str, str] = {}
        self.nodes = []
        for number in range(1, NODES + 1):
            mount = mounts.new(server, name=f"node{number}", bucket=bucket.name)
            self.nodes.append(Node(number, mount, self.history, self.findings, plan))
        for folder in FOLDERS:
            (self.nodes[0].mount.mountpoint / folder).mkdir()

    def run(self) -> None:
        """Lets all work; a call that hangs is found, and freed by aborting the mount."""
        threads = [threading.Thread(target=node.work, daemon=True) for node in self.nodes]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.2)
            for node in self.nodes:
                doing = node.doing
                if doing is not None and doing.verb != "flush" and time.monotonic() - doing.began > STUCK_S:
                    self.findings.append(Finding("stuck", f"node {node.number}: {doing.verb} {doing.path} hangs"))
                    node.mount.abort()
                    threads[node.number - 1].join(10)

    def rest(self) -> None:
        """Brings all to the bucket, and ends the mounts."""
        for node in self.nodes:
            if not node.mount.mounted:
                continue
            for _ in range(3):
                if node.flush():
                    break
        for node in self.nodes:
            self._end(node)

    def _end(self, node: Node) -> None:
        mount = node.mount
        if not mount.mounted:
            self.findings.append(Finding("stuck", f"node {node.number} is not mounted any more"))
            return
        left = mount.status()["pending"]
        if left["files"]:
            self.findings.append(Finding("stuck", f"node {node.number} after flush: {left}"))
        result = control.request(mount.mountpoint, "umount", timeout_s=DRAIN_S, drain_timeout_s=DRAIN_S)
        if result["pending"]:
            self.findings.append(Finding("stuck", f"node {node.number} after umount: {result['pending']}"))
        mount.wait_for_end()

    def judge(self, fresh: Mount) -> Report:
        """Reads the bucket, and compares it with what was done and what a new mount shows."""
        report = Report(self.findings, self.history)
        kept: set[Id] = set()
        contents: dict[str, bytes] = {}
        for key in sorted(self.bucket.every_key()):
            if _OURS.match(key) or key.endswith("/"):
                continue
            if key.startswith(".s3fuse"):
                self.findings.append(Finding("left", f"{key} is in the bucket"))
                continue
            contents[key] = self.bucket.get(key)
            kept |= self._records(key, contents[key], report)
        self.findings += [self._explained(finding) for finding in self.history.judge(kept)]
        self._compare(contents, fresh)
        for node in self.nodes:
            self._logs(node)
        return report

    def _explained(self, finding: Finding) -> Finding:
        """With what became of the write in the bucket, where that keeps versions."""
        if not self.versioned or finding.id is None:
            return finding
        by_key: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for version in self.bucket.client.list_objects(self.bucket.name, recursive=True, include_version=True):
            by_key[version.object_name or ""].append(self._version(version))
        lines = []
        for key, versions in by_key.items():
            told = [text for _, text in sorted(versions)]
            for at, text in enumerate(told):
                if str(finding.id) in text.replace(",", " ").split():
                    lines.append(f"{key}: " + " ; ".join(told[max(0, at - 1) : at + 3]))
        return replace(finding, text=f"{finding.text}\n      " + "\n      ".join(lines or ["never in the bucket"]))

    def _version(self, version: Any) -> tuple[str, str]:
        """Its time, and what it was."""
        when = version.last_modified.strftime("%H:%M:%S.%f")
        if version.is_delete_marker:
            return when, f"{when} deleted"
        if version.version_id not in self._versions:
            response = self.bucket.client.get_object(
                self.bucket.name, version.object_name, version_id=version.version_id
            )
            ids = ",".join(sorted(map(str, ids_in(response.read()))))
            response.close()
            self._versions[version.version_id] = f" {ids} "
        return when, f"{when} wrote{self._versions[version.version_id]}"

    def _records(self, key: str, data: bytes, report: Report) -> set[Id]:
        is_conflict = CONFLICT in key
        report.kept["conflict files" if is_conflict else "files"] += 1
        try:
            return {one.id for one in parse(data)}
        except Mixed as error:
            # A change of a part whose base is gone has zeros or other bytes in its place: the log and status say so.
            kind = "laid over" if is_conflict else "mixed"
            report.kept[kind] += 1
            if not is_conflict:
                self.findings.append(Finding("mixed", f"{key} in the bucket: {error}"))
            return ids_in(data)

    def _compare(self, contents: dict[str, bytes], fresh: Mount) -> None:
        shown = {
            str(path.relative_to(fresh.mountpoint)): path.read_bytes()
            for path in fresh.mountpoint.rglob("*")
            if path.is_file()
        }
        shadowed = {key for key in contents if any(other.startswith(f"{key}/") for other in contents)}
        for key in sorted((contents.keys() | shown.keys()) - shadowed):
            if contents.get(key) != shown.get(key):
                sizes = [len(data) if data is not None else "none" for data in (contents.get(key), shown.get(key))]
                self.findings.append(Finding("differs", f"{key}: bucket {sizes[0]}, a new mount {sizes[1]}"))

    def _logs(self, node: Node) -> None:
        lines = node.mount.log_text().splitlines()
        for at, line in enumerate(lines):
            if _TRACE.search(line):
                told = " / ".join(lines[max(0, at - 1) : at + 40])
                self.findings.append(Finding("traceback", f"node {node.number}: {told[:3000]}"))


@contextmanager
def cluster(folder: Path, server: Server, bucket: str, plan: Plan) -> Iterator[tuple[Cluster, Mounts]]:
    """Nodes on a new bucket, whose mounts end with the block."""
    with s3_client(server) as client:
        client.make_bucket(bucket)
        mounts = Mounts(folder, lambda _: bucket)
        try:
            yield Cluster(mounts, server, Bucket(server, bucket, client), plan), mounts
        finally:
            mounts.abort()


def play(folder: Path, server: Server, bucket: str, plan: Plan, *, versioned: bool = False) -> Report:
    """A whole run. The history is kept in `folder`. A `versioned` bucket tells what became of each write."""
    with cluster(folder, server, bucket, plan) as (nodes, mounts):
        if versioned:
            nodes.bucket.client.set_bucket_versioning(bucket, VersioningConfig(ENABLED))
            nodes.versioned = True
        nodes.run()
        nodes.rest()
        nodes.history.save(folder / "history.jsonl")
        fresh = mounts.new(server, name="fresh", bucket=bucket)
        report = nodes.judge(fresh)
        fresh.stop()
    return report
