"""Programs that change files on the mount, and a record of what was acknowledged.

Each worker has a directory of its own and does one system call at a time, so that when the daemon dies at most one
call of each is in doubt: its outcome may be that of before or after. Where a write is in doubt, which close(2) had
not confirmed yet, each byte may be the old or the new one, and the length anything between: pages go one by one.
Everything else has exactly one right outcome.
"""

from __future__ import annotations

import errno
import os
import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable
    from pathlib import Path

#: What calls raise when the daemon has died.
_DEAD = {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}
#: A directory has this in the state.
DIRECTORY = None
SIZES = ((0, 1), (1, 4096), (60_000, 70_000), (100_000, 400_000))
BIG = (11 << 20, 12 << 20)
MOST_FILES = 14
PAGE_BYTES = 4096

State = dict[str, "bytes | None"]


@dataclass
class Doubt:
    """A call under way: the state after it, and the file (with its bytes before) that may be between the two."""

    after: State
    written: str = ""
    before: bytes = b""


@dataclass
class Worker:
    """One program. Names in `state` are relative to `root`; a directory's value is None."""

    root: Path
    seed: str
    weights: dict[str, int]
    alive: Callable[[], bool]
    state: State = field(default_factory=dict)
    doubt: Doubt | None = None
    calls: int = 0
    failure: BaseException | None = None

    def run(self, stop: threading.Event) -> None:
        """Works until the daemon is dead or `stop` is set; `failure` is what should not have happened."""
        self.random = random.Random(self.seed)
        names, weights = zip(*self.weights.items(), strict=True)
        try:
            while not stop.is_set():
                (name,) = self.random.choices(names, weights)
                getattr(self, f"_{name}")()
                self.calls += 1
        except OSError as error:
            if error.errno not in _DEAD or (error.errno == errno.EIO and not self._dies()):
                self.failure = error
        except BaseException as error:
            self.failure = error

    def _dies(self) -> bool:
        """Whether the daemon is dead, or on its way: the kernel says EIO too where pages could not be sent."""
        end = time.monotonic() + 5
        while self.alive():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    # -- one call

    def _call(self, call: Callable[[], object], after: State) -> None:
        self.doubt = Doubt(after)
        call()
        self.state, self.doubt = after, None

    def _write(self, name: str, flags: int, offset: int, data: bytes) -> None:
        """Opens (and truncates, where the flags say so), writes and closes."""
        path = self.root / name
        old = self.state.get(name) or b""
        if flags & os.O_TRUNC:
            old = b""
        opened: list[int] = []
        self._call(lambda: opened.append(os.open(path, os.O_WRONLY | flags)), {**self.state, name: old})
        new = old.ljust(offset, b"\0")[:offset] + data + old[offset + len(data) :]
        self.doubt = Doubt({**self.state, name: new}, name, old)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(opened[0], view[: 1 << 20], offset)
                view, offset = view[written:], offset + written
        except BaseException:
            with suppress(OSError):
                os.close(opened[0])
            raise
        os.close(opened[0])
        self.state, self.doubt = self.doubt.after, None

    # -- what it does

    def _files(self) -> list[str]:
        return [name for name, content in self.state.items() if content is not DIRECTORY]

    def _directories(self) -> list[str]:
        return [name for name, content in self.state.items() if content is DIRECTORY]

    def _new_name(self) -> str:
        above = self.random.choice(["", *(f"{name}/" for name in self._directories())])
        while (name := f"{above}{self.random.choice('abcdefgh')}{self.random.randrange(10)}") in self.state:
            pass
        return name

    def _bytes(self) -> bytes:
        return self.random.randbytes(self.random.randrange(*self.random.choice(SIZES)))

    def _make_room(self) -> None:
        while len(self._files()) >= MOST_FILES:
            self._remove()

    def _create(self) -> None:
        self._make_room()
        self._write(self._new_name(), os.O_CREAT | os.O_EXCL, 0, self._bytes())

    def _create_big(self) -> None:
        self._make_room()
        for name in [name for name in self._files() if len(self.state[name] or b"") >= BIG[0]]:
            self._call((self.root / name).unlink, self._without(name))
        self._write(self._new_name(), os.O_CREAT | os.O_EXCL, 0, self.random.randbytes(self.random.randrange(*BIG)))

    def _pause(self) -> None:
        time.sleep(0.5)

    def _some_file(self) -> str:
        if not self._files():
            self._create()
        return self.random.choice(self._files())

    def _overwrite(self) -> None:
        self._write(self._some_file(), os.O_TRUNC, 0, self._bytes())

    def _patch(self) -> None:
        name = self._some_file()
        size = len(self.state[name] or b"")
        length = self.random.randrange(1, 20_000)
        self._write(name, 0, self.random.randrange(size + 1), self.random.randbytes(length))

    def _append(self) -> None:
        name = self._some_file()
        self._write(name, 0, len(self.state[name] or b""), self.random.randbytes(self.random.randrange(1, 9000)))

    def _truncate(self) -> None:
        name = self._some_file()
        content = self.state[name] or b""
        size = self.random.randrange(len(content) + 1)
        self._call(lambda: os.truncate(self.root / name, size), {**self.state, name: content[:size]})

    def _without(self, *names: str) -> State:
        return {name: content for name, content in self.state.items() if name not in names}

    def _remove(self) -> None:
        name = self._some_file()
        self._call((self.root / name).unlink, self._without(name))

    def _move(self, old: str, new: str) -> None:
        after: State = {}
        for name, content in self._without(new).items():
            below = name == old or name.startswith(f"{old}/")
            after[new + name[len(old) :] if below else name] = content
        self._call(lambda: (self.root / old).rename(self.root / new), after)

    def _rename(self) -> None:
        self._move(self._some_file(), self._new_name())

    def _replace(self) -> None:
        """As editors do: a new file, renamed over the old one."""
        old = self._some_file()
        new = self._new_name()
        self._write(new, os.O_CREAT | os.O_EXCL, 0, self._bytes())
        self._move(new, old)

    def _rotate(self) -> None:
        """Three files change their names in a circle."""
        files = self._files()
        if len(files) >= 3:
            one, two, three = self.random.sample(files, 3)
            spare = self._new_name()
            for old, new in ((three, spare), (two, three), (one, two), (spare, one)):
                self._move(old, new)

    def _mkdir(self) -> None:
        if len(self._directories()) < 3:
            name = f"d{self.random.randrange(1000)}"
            if name not in self.state:
                self._call((self.root / name).mkdir, {**self.state, name: DIRECTORY})

    def _rename_directory(self) -> None:
        self._mkdir()
        if self._directories():
            old, new = self.random.choice(self._directories()), f"d{self.random.randrange(1000)}"
            if new not in self.state:
                self._move(old, new)

    def _remove_directory(self) -> None:
        for name in self._directories():
            if not any(other.startswith(f"{name}/") for other in self.state):
                self._call((self.root / name).rmdir, self._without(name))
                return


USUAL = {
    "create": 8, "overwrite": 4, "patch": 3, "append": 4, "truncate": 1, "remove": 4, "rename": 4, "replace": 3,
    "rotate": 1, "mkdir": 1, "rename_directory": 1, "remove_directory": 1,
}  # fmt: skip


def accepts(worker: Worker, found: State) -> str:
    """Why this cannot be what is left of the worker's files; "" where it can."""
    allowed = [worker.state]
    doubt = worker.doubt
    if doubt is not None:
        allowed.append(doubt.after)
        if doubt.written and doubt.written in found:
            content = found[doubt.written]
            if content is not None and between(doubt.before, doubt.after[doubt.written] or b"", content):
                allowed.append({**doubt.after, doubt.written: content})
    if found in allowed:
        return ""
    return difference(allowed[-1], found)


def between(old: bytes, new: bytes, found: bytes) -> bool:
    """Whether each byte is the old or the new one (beyond the old end: or zero, where its page had not come)."""
    if not min(len(old), len(new)) <= len(found) <= max(len(old), len(new)):
        return False
    width = max(len(old), len(new))
    old, new = old.ljust(width, b"\0")[: len(found)], new.ljust(width, b"\0")[: len(found)]
    if found in (old, new):
        return True
    for start in range(0, len(found), PAGE_BYTES):
        page, before, after = (content[start : start + PAGE_BYTES] for content in (found, old, new))
        if page not in (before, after) and not all(
            byte in (one, other) for byte, one, other in zip(page, before, after, strict=True)
        ):
            return False
    return True


def difference(expected: State, found: State) -> str:
    """The first few names that differ, for people."""
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            lines.append(f"{name} is lost ({_told(expected[name])})")
        elif name not in expected:
            lines.append(f"{name} should not be there ({_told(found[name])})")
        elif expected[name] != found[name]:
            lines.append(f"{name} is mixed or old: {_told(found[name])} instead of {_told(expected[name])}")
    return "; ".join(lines[:5])


def _told(content: bytes | None) -> str:
    return "directory" if content is None else f"{len(content)} bytes {content[:4].hex()}…{content[-4:].hex()}"
