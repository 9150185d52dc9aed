"""T09: many programs at once make, write, cut, move and delete the same few names, and the mount is like a model."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

pytestmark = pytest.mark.timeout(180)

WORKERS = 16
STEPS = int(os.environ.get("PARALLEL_STEPS", "60"))
SEED = int(os.environ.get("PARALLEL_SEED", "9"))
FOLDERS = ("", "one/", "one/two/")
NAMES = [f"{FOLDERS[n % 3]}name{n}" for n in range(50)]


class Model:
    """What each name should be: its bytes, or absent. Who holds the locks of its names may use them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bodies: dict[str, bytes] = {}
        self.locks = {name: threading.Lock() for name in NAMES}

    def step(self, rng: random.Random) -> str:
        """One random operation, on the mount and on the model; gives what it was."""
        one, two = rng.sample(NAMES, 2)
        operation = rng.choice(
            (
                self.create,
                self.create,
                self.overwrite,
                self.append,
                self.cut,
                self.move,
                self.unlink,
                self.read,
                self.sync,
            )
        )
        with ExitStack() as held:
            for name in sorted((one, two)):
                held.enter_context(self.locks[name])
            operation(one, two, rng)
            self.check(one)
            if operation == self.move:
                self.check(two)
        return f"{operation.__name__} {one} {two}"

    def check(self, name: str) -> None:
        path = self.root / name
        body = self.bodies.get(name)
        if body is None:
            with pytest.raises(FileNotFoundError):
                path.stat()
        else:
            assert path.stat().st_size == len(body), name

    @staticmethod
    def body(rng: random.Random) -> bytes:
        return rng.randbytes(rng.choice((0, 1, 100, 4096, 70_000, 300_000)))

    def create(self, name: str, other: str, rng: random.Random) -> None:
        body = self.body(rng)
        (self.root / name).write_bytes(body)
        self.bodies[name] = body

    def overwrite(self, name: str, other: str, rng: random.Random) -> None:
        before = self.bodies.get(name)
        if before is None:
            return
        at, body = rng.randint(0, len(before)), self.body(rng)
        with (self.root / name).open("r+b") as file:
            file.seek(at)
            file.write(body)
        self.bodies[name] = before[:at] + body + before[at + len(body) :]

    def append(self, name: str, other: str, rng: random.Random) -> None:
        body = self.body(rng)
        with (self.root / name).open("ab") as file:
            file.write(body)
        self.bodies[name] = self.bodies.get(name, b"") + body

    def cut(self, name: str, other: str, rng: random.Random) -> None:
        before = self.bodies.get(name)
        if before is None:
            with pytest.raises(FileNotFoundError):
                os.truncate(self.root / name, 0)
            return
        size = rng.randint(0, 2 * len(before))
        os.truncate(self.root / name, size)
        self.bodies[name] = before[:size].ljust(size, b"\0")

    def move(self, name: str, other: str, rng: random.Random) -> None:
        if name not in self.bodies:
            with pytest.raises(FileNotFoundError):
                os.rename(self.root / name, self.root / other)
            return
        os.rename(self.root / name, self.root / other)
        self.bodies[other] = self.bodies.pop(name)

    def unlink(self, name: str, other: str, rng: random.Random) -> None:
        if self.bodies.pop(name, None) is None:
            with pytest.raises(FileNotFoundError):
                (self.root / name).unlink()
            return
        (self.root / name).unlink()

    def read(self, name: str, other: str, rng: random.Random) -> None:
        if name in self.bodies:
            assert (self.root / name).read_bytes() == self.bodies[name], name

    def sync(self, name: str, other: str, rng: random.Random) -> None:
        if name in self.bodies:
            descriptor = os.open(self.root / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def everything(self) -> dict[str, bytes]:
        files = [path for path in self.root.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in files}


def test_parallel_changes_of_few_names(server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    mount = mounts.new(server)
    for folder in FOLDERS[1:]:
        (mount.path / folder).mkdir()
    model = Model(mount.path)

    def work(worker: int) -> None:
        rng = random.Random(f"{SEED}-{worker}")
        steps = []
        for _ in range(STEPS):
            try:
                steps.append(model.step(rng))
            except BaseException as error:
                error.add_note(f"worker {worker} of seed {SEED}, after {steps[-5:]}")
                raise

    with ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(work, worker) for worker in range(WORKERS)]:
            done.result()
    assert model.everything() == model.bodies
    mount.flush()
    bucket = buckets(server, mount.bucket)
    assert bucket.keys() == set(model.bodies) | set(FOLDERS[1:])
    assert all(bucket.each(lambda key: bucket.get(key) == model.bodies[key], list(model.bodies)))
    mount.remount(empty_cache=True)
    assert model.everything() == model.bodies
