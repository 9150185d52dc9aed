"""Random operations against a server whose answers are damaged at random: calls fail as calls fail, neighbours live.

In the end the server is well again: what the mount shows is what the bucket has, and nothing waits or is stuck. The log
has no exception that nobody expected. `S3FUSE_TEST_EXAMPLES` makes it longer.
"""

from __future__ import annotations

import logging
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree as ET

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from s3fuse.errors import StoreError
from s3fuse.namespace import changes, directories, inodes, lateness, pages, syncer
from s3fuse.store.base import Bytes
from s3fuse.store.memory import MemoryStore
from tests.engine.hostile import Hostile, Reply, Request, connected, fill
from tests.engine.rig import Clock, Rig

LOG = logging.getLogger("s3fuse")
PHASES = tuple(phase for phase in Phase if phase is not Phase.explain)  # which traces every line of every task
EXAMPLES = int(os.environ.get("S3FUSE_TEST_EXAMPLES", "500"))
FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None

NASTY = [
    "",
    "-5",
    "1" + "0" * 23,
    "xyz",
    "0",
    "9" * 18,
    "\x1b[31m",
    "\r\nHost: x",
    "../..",
    "d/",
    "a//b",
    "\u202e",
    "%ff",
]
NASTY += [
    "x" * 5000,
    "true",
    "false",
    "0001-01-01T00:00:00Z",
    "Fri, 31 Dec 9999 23:59:59 GMT",
    "\ufffd",
    "<",
    "NoSuchKey",
]
texts = st.sampled_from(NASTY) | st.text(max_size=20)
DOCUMENTS = [b"", b"<", b"<html></html>", b"<a>" * 2000, b"<Error/>", b"{}", b"\0" * 50, b"<ListBucketResult/>"]
DOCUMENTS += [b"<Error><Code>%s</Code></Error>" % code for code in (b"NoSuchBucket", b"NoSuchKey", b"AccessDenied")]
DOCUMENTS += [b"<Error><Code>SlowDown</Code><Message>" + b"\x1b]0;" * 100 + b"</Message></Error>"]
STATUSES = [200, 204, 206, 301, 304, 400, 403, 404, 409, 412, 416, 429, 500, 501, 503, 999]
HEADERS = ["Content-Length", "ETag", "Last-Modified", "x-amz-meta-mode", "x-amz-meta-mtime", "x-amz-meta-xattr"]
HEADERS += ["x-amz-meta-uid", "Content-Range", "x-amz-checksum-crc32", "Date", "Server", "Transfer-Encoding"]
HEADERS += ["Content-Type", "x-amz-meta---symlink-target", "x-amz-meta-rdev", "x-minio-error-code", "Connection"]

place = st.integers(0, 1 << 16)
mutations = st.one_of(
    st.tuples(st.just("text"), place, texts),
    st.tuples(st.just("drop"), place, st.none()),
    st.tuples(st.just("twice"), place, st.none()),
    st.tuples(st.just("rename"), place, st.sampled_from(["Contents", "Key", "Size", "Error", "a"])),
    st.tuples(st.just("nest"), place, st.integers(1, 300)),
    st.tuples(st.just("cut"), place, st.none()),
    st.tuples(st.just("byte"), place, st.integers(0, 255)),
    st.tuples(st.just("document"), st.sampled_from(DOCUMENTS), st.none()),
    st.tuples(st.just("status"), st.sampled_from(STATUSES), st.sampled_from(DOCUMENTS)),
    st.tuples(st.just("header"), st.sampled_from(HEADERS), st.none() | texts),
    st.tuples(st.just("raw"), st.binary(max_size=60), st.none()),
    st.tuples(st.just("undone"), st.none(), st.none()),
)
operations = st.sampled_from(["list", "head", "get", "put", "copy", "delete", "delete_many", "any"])
#: For which operation, in how many of its answers (bits), and what happens to them.
damages = st.lists(st.tuples(operations, st.integers(1, 15), mutations), min_size=1, max_size=3)

names = st.sampled_from(["d/a", "d/b", "d/n", "d/e/f", "d/e/n", "g", "n", "d", "d/e", "m"])
data = st.binary(max_size=30)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("ls"), names),
        st.tuples(st.just("cat"), names),
        st.tuples(st.just("put"), names, data),
        st.tuples(st.just("append"), names, data),
        st.tuples(st.just("rename"), names, names),
        st.tuples(st.just("unlink"), names),
        st.tuples(st.just("mkdir"), names),
        st.tuples(st.just("rmdir"), names),
        st.tuples(st.just("chmod"), names),
        st.tuples(st.just("drain")),
        st.tuples(st.just("forget")),
    ),
    min_size=1,
    max_size=8,
)


def damaged(reply: Reply, mutation: tuple[str, Any, Any]) -> Reply:
    kind, where, what = mutation
    if kind == "raw":
        return Reply(raw=where)
    if kind == "status":
        return Reply(where, reply.headers, what, has_body=reply.has_body)
    if kind == "document":
        return Reply(reply.status, reply.headers, where, has_body=reply.has_body)
    if kind == "header":
        headers = [pair for pair in reply.headers if pair[0].lower() != where.lower()]
        return Reply(
            reply.status, [*headers, *([(where, what)] if what is not None else [])], reply.body, None, reply.has_body
        )
    if reply.status == 206:  # nothing but its length and its etag tells whether these are the bytes
        return reply
    body = reply.body
    if kind == "cut":
        body = body[: where % (len(body) + 1)]
    elif kind == "byte" and body:
        body = body[: where % len(body)] + bytes([what]) + body[where % len(body) + 1 :]
    elif kind in ("text", "drop", "twice", "rename", "nest"):
        body = _edited(body, kind, where, what)
    return Reply(reply.status, reply.headers, body, None, reply.has_body)


def _edited(body: bytes, kind: str, where: int, what: Any) -> bytes:
    try:
        root = ET.fromstring(body)
    except ET.ParseError:
        return body
    parents = {child: parent for parent in root.iter() for child in parent}
    found = list(root.iter())[where % len(list(root.iter()))]
    parent = parents.get(found)
    if kind == "text":
        found.text = what.encode("utf-8", "replace").decode()
    elif kind == "rename":
        found.tag = what
    elif kind == "nest":
        for _ in range(what):
            found = ET.SubElement(found, "a")
    elif parent is not None and kind == "drop":
        parent.remove(found)
    elif parent is not None and kind == "twice":
        parent.append(found)
    return ET.tostring(root, "utf-8").replace(b"\r", b"&#13;")


class Attack:
    """Damages every so many answers of the operations named."""

    def __init__(self, server: Hostile, plan: list[tuple[str, int, tuple[str, Any, Any]]]) -> None:
        self.plan = plan
        self.count = 0
        server.undone = frozenset(operation for operation, _, (kind, _, _) in plan if kind == "undone")
        server.damage = self.damage

    def damage(self, request: Request, reply: Reply) -> Reply | None:
        self.count += 1
        for operation, bits, mutation in self.plan:
            if operation in (request.operation, "any") and bits & (1 << self.count % 4):
                reply = damaged(reply, mutation)
        return reply


class Faults(logging.Handler):
    """What the log must not have."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.found.append(f"{record.getMessage()} {record.exc_info}")


async def act(rig: Rig, step: tuple[Any, ...]) -> None:
    """One operation, which may fail as calls fail."""
    verb, *arguments = step
    try:
        match verb:
            case "put":
                await rig.put(*arguments)
            case "append":
                await rig.write(*arguments, flags=os.O_APPEND)
            case "chmod":
                await rig.chmod(*arguments, 0o600)
            case "forget":
                rig.forget()
            case _:
                await getattr(rig, verb)(*arguments)
    except (OSError, StoreError):
        pass


async def attack(
    script: list[tuple[Any, ...]],
    plan: list[tuple[str, int, tuple[str, Any, Any]]],
    ttl_s: float,
    on_disk: bool,
    lists_metadata: bool,
    clock: Clock,
) -> None:
    server = Hostile(MemoryStore())
    await fill(server.store)
    await server.store.put("far/x", Bytes(b"neighbour"), metadata={}, headers={})
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(dir=FOLDER) as folder,
        connected(server, patch, lists_metadata=lists_metadata) as store,
    ):
        async with trio.open_nursery() as nursery:
            rig = Rig(
                cast("MemoryStore", store),
                Path(folder) / "cache",
                nursery,
                ttl_s=ttl_s,
                ephemeral=not on_disk,
                kept=on_disk,
            )
            await rig.start()
            try:
                Attack(server, plan)
                for step in script:
                    await act(rig, step)
                server.damage, server.undone = lambda request, reply: None, frozenset()
                await after(rig, server.store, clock)
            finally:
                await rig.crash()


async def after(rig: Rig, bucket: MemoryStore, clock: Clock) -> None:
    """The server is well again: all is there, and nothing is stuck."""
    clock.advance(10_000)
    await rig.drained()
    clock.advance(10_000)
    truth = {key: found.data for key, found in bucket._objects.items()}
    assert truth["far/x"] == b"neighbour"
    assert "far" in await rig.ls()
    assert await rig.cat("far/x") == b"neighbour"
    shown: dict[str, bytes] = {}
    await _read_all(rig, "", shown)
    # A directory that is made where the server lists nothing that can be read shadows what is there.
    assert shown == {key: data for key, data in truth.items() if not _is_shadowed(key, truth)}


def _is_shadowed(key: str, truth: dict[str, bytes]) -> bool:
    return key.endswith("/") or any(other.startswith(f"{key}/") for other in truth)


async def _read_all(rig: Rig, path: str, shown: dict[str, bytes]) -> None:
    for name in await rig.ls(path):
        below = f"{path}/{name}" if path else name
        if (await rig.walk(below)).is_directory:
            await _read_all(rig, below, shown)
        else:
            shown[below] = await rig.cat(below)


@given(steps, damages, st.sampled_from([0.0, 1000.0]), st.booleans(), st.booleans())
@settings(max_examples=EXAMPLES, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))
@pytest.mark.timeout(120 + EXAMPLES)
def test_fuzz(
    script: list[tuple[Any, ...]],
    plan: list[tuple[str, int, tuple[str, Any, Any]]],
    ttl_s: float,
    on_disk: bool,
    lists_metadata: bool,
) -> None:
    """`on_disk`: with a journal and a session, whose formats have to hold whatever was believed."""
    faults = Faults()
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        for module in (changes, directories, inodes, pages, syncer):
            patch.setattr(module, "time", clock)
        for module, name, value in QUICK:
            patch.setattr(module, name, value)
        # Warnings are what such a server has to expect; they need not be kept for 20,000 examples.
        patch.setattr(LOG, "propagate", False)
        LOG.addHandler(faults)
        try:
            trio.run(partial(attack, script, plan, ttl_s, on_disk, lists_metadata, clock))
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        finally:
            LOG.removeHandler(faults)
    assert faults.found == []


QUICK = [(changes, "QUIET_S", 3600.0), (changes, "SETTLE_S", 3600.0), (changes, "GATHER_S", 0.001)]
QUICK += [(lateness, "LATE_S", 0.0), (syncer, "BEHIND_S", 0.001)]
