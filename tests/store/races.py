"""Races of what s3fuse does with an object against a write of somebody else: `python -m tests.store.races ROUNDS`.

Each round starts both so that they meet: who came first last time waits a little longer this time. Undone is a write
that was acknowledged and is not there in the end, though the other was to happen only on the version before it.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from s3fuse.errors import NotFound, PreconditionFailed
from s3fuse.store.base import ANY, Bytes, Condition, ObjectInfo
from s3fuse.writing.copying import Copies
from s3fuse.writing.ephemeral import MemoryJournal
from s3fuse.writing.leftovers import Uploads
from s3fuse.writing.plan import Limits
from s3fuse.writing.upload import Target
from tests.servers import minio, seaweedfs

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from s3fuse.store.base import Store

#: What is raced: renames to a free name and over another file, chmod, an object that is set aside while it is written.
COPIES = ("free", "taken", "chmod", "aside")
DELETES = ("delete", "delete of many")
FIRST_LAG_S = 0.002
MOST_LAG_S = 0.25


@dataclass
class Tally:
    """How a race came out, over all its rounds."""

    ours: int = 0
    theirs: int = 0
    undone: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Round:
    """One race: what each does, and the key at which they meet."""

    key: str
    ours: Callable[[], Awaitable[object]]
    theirs: Callable[[], Awaitable[str]]


class Races:
    """Races on one store. `atomic` False has the server itself copy, whatever it undoes."""

    def __init__(self, store: Store, size_bytes: int, *, limits: Limits | None = None, atomic: bool = True) -> None:
        self.store = store
        self.size_bytes = size_bytes
        self.atomic = atomic
        self._copies = Copies(store, Uploads(store, MemoryJournal("races")), limits or Limits())
        self._series = os.urandom(4).hex()
        self._number = 0

    async def run(self, kind: str, rounds: int) -> Tally:
        """Does so many rounds and tells how they came out."""
        tally = Tally()
        began = time.monotonic()
        lag_s = 0.0
        for _ in range(rounds):
            race = await (self._delete(kind) if kind in DELETES else self._copy(kind))
            first = await self._meet(race, lag_s * random.uniform(0.5, 1.5), kind, tally)
            lag_s += random.uniform(0.0, 0.5) * max(FIRST_LAG_S, abs(lag_s)) * (1 if first else -1)
            lag_s = min(MOST_LAG_S, max(-MOST_LAG_S, lag_s))
        tally.seconds = time.monotonic() - began
        return tally

    async def _meet(self, race: Round, lag_s: float, kind: str, tally: Tally) -> bool:
        """Runs both, theirs `lag_s` later (negative: ours). Gives whether theirs was done first, or alone."""
        done: dict[str, object] = {}

        async def attempt(name: str, call: Callable[[], Awaitable[object]], delay_s: float) -> None:
            await trio.sleep(max(0.0, delay_s))
            with contextlib.suppress(PreconditionFailed, NotFound):
                done[name] = await call() or True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attempt, "ours", race.ours, -lag_s)
            nursery.start_soon(attempt, "theirs", race.theirs, lag_s)
        tally.ours += "ours" in done
        tally.theirs += "theirs" in done
        problem = await self._undone(race.key, kind, done)
        if problem:
            tally.undone.append(problem)
        return "theirs" in done and ("ours" not in done or next(iter(done)) == "theirs")

    async def _undone(self, key: str, kind: str, done: dict[str, object]) -> str:
        try:
            found: str | None = (await self.store.head(key)).etag
        except NotFound:
            found = None
        if "theirs" in done and found != done["theirs"]:
            return f"{key}: {found} is there, not theirs"
        if kind in ("free", "taken") and len(done) == 2:
            return f"{key}: ours was acknowledged, and theirs, which was to be on the version before it"
        if kind in ("free", "taken", "chmod") and list(done) == ["ours"] and found != done["ours"]:
            return f"{key}: {found} is there, not ours"
        if kind == "aside" and "ours" in done:
            aside = f"{key}-aside"
            info = await self.store.head(aside)
            buffer = bytearray(info.size_bytes)
            await self.store.get_into(aside, 0, [memoryview(buffer)], etag=info.etag)
            if buffer != self._body:
                return f"{aside}: other bytes than those of the version that was set aside"
        return ""

    async def _put(self, key: str, body: bytes, condition: Condition = ANY, **metadata: str) -> str:
        return await self.store.put(key, Bytes(body), metadata=metadata, headers={}, condition=condition)

    async def _copy(self, kind: str) -> Round:
        self._number += 1
        key = f"{self._series} {kind} {self._number}"
        self._body, theirs = os.urandom(self.size_bytes), os.urandom(self.size_bytes + 1)
        moves = kind in ("free", "taken")
        at = f"{self._series} source {self._number % 8}" if moves else key
        source = ObjectInfo(at, self.size_bytes, await self._put(at, self._body), 0, {}, {})
        condition = Condition(etag=source.etag)
        if kind == "free":
            condition = Condition(absent=True)
        elif kind == "taken":
            condition = Condition(etag=await self._put(key, os.urandom(self.size_bytes + 2)))
        aside = kind == "aside"
        target = Target(f"{key}-aside" if aside else key, {"mode": "1"}, {}, ANY if aside else condition)

        async def ours() -> str:
            if self.atomic:
                return await self._copies.copy(source, target)
            return await self.store.copy(
                at, target.key, source_etag=source.etag, metadata={"mode": "1"}, headers={}, condition=target.condition
            )

        return Round(key, ours, lambda: self._put(key, theirs, condition))

    async def _delete(self, kind: str) -> Round:
        self._number += 1
        key = f"{self._series} {kind} {self._number}"
        etag = await self._put(key, b"old")

        async def ours() -> object:
            if kind == "delete":
                await self.store.delete(key, etag=etag)
            elif await self.store.delete_many([key], etags={key: etag}):
                raise PreconditionFailed("the server refuses", key)
            return True

        return Round(key, ours, lambda: self._put(key, os.urandom(100)))


async def campaign(store: Store, rounds: int) -> int:
    """Prints how each race came out; gives how often something was undone that must not be."""
    undone = 0
    for size_bytes in (5_000, 300_000, 5 << 20):
        few = rounds if size_bytes < 1 << 20 else max(1, rounds // 3)
        for atomic in (True, False):
            races = Races(store, size_bytes, atomic=atomic)
            for kind in COPIES:
                tally = await races.run(kind, few)
                undone += atomic * len(tally.undone)
                _print(f"{size_bytes:>9,} {kind:<16} {'s3fuse' if atomic else 'server':<7}", few, tally)
    for kind in DELETES:
        _print(f"{'':>9} {kind:<16} {'':<7}", rounds, await Races(store, 0).run(kind, rounds))
    return undone


def _print(what: str, rounds: int, tally: Tally) -> None:
    won = f"ours {tally.ours:>4}, theirs {tally.theirs:>4} of {rounds}"
    print(f"{what} {won}; undone {len(tally.undone):>3}; {1e3 * tally.seconds / rounds:6.1f} ms a round", flush=True)


async def _main(rounds: int) -> int:
    undone = 0
    for start in (minio, seaweedfs):
        with tempfile.TemporaryDirectory() as folder, start(Path(folder)) as server:
            store = server.store("races")
            await store.create_bucket()
            print((await store.probe()).server)
            undone += await campaign(store, rounds)
            await store.aclose()
    return undone


if __name__ == "__main__":
    sys.exit(1 if trio.run(_main, int(sys.argv[1]) if len(sys.argv) > 1 else 300) else 0)
