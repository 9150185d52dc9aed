"""The command line with a kill point: `daemon.py POINT COUNT ARMED mount …`.

While the file ARMED exists, calls of the point are counted, and the COUNT-th one ends the worker and its keeper with
SIGKILL, before or after the work that the point names. The code of s3fuse knows nothing of this: functions are
wrapped here.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import signal
import sys
from typing import Any

#: point -> (module, what, when). Each is hit by the load of `tests.crash.load`.
POINTS = {
    "before a row": ("s3fuse.writing.journal", "Journal.put_node", "before"),
    "after a row": ("s3fuse.writing.journal", "Journal.put_node", "after"),
    "before a row is dropped": ("s3fuse.writing.journal", "Journal.drop_node", "before"),
    "before bytes are journaled": ("s3fuse.writing.journal", "Journal.put_layer", "before"),
    "after bytes are journaled": ("s3fuse.writing.journal", "Journal.put_layer", "after"),
    "before more bytes are journaled": ("s3fuse.writing.journal", "Journal.change_segments", "before"),
    "after an overwrite is announced": ("s3fuse.writing.journal", "Journal.doubt_segments", "after"),
    "before a cut is journaled": ("s3fuse.writing.journal", "Journal.cut_layer", "before"),
    "before a slot is left": ("s3fuse.writing.journal", "Journal.replace_layer", "before"),
    "after a slot is left": ("s3fuse.writing.journal", "Journal.replace_layer", "after"),
    "slot taken": ("s3fuse.staging.slab", "Slab.take", "after"),
    "slot given back": ("s3fuse.staging.slab", "Slab.give", "after"),
    "before a put": ("s3fuse.store.s3", "S3Store.put", "before"),
    "after a put": ("s3fuse.store.s3", "S3Store.put", "after"),
    "before a copy": ("s3fuse.writing.copying", "Copies.copy", "before"),
    "between copy and delete": ("s3fuse.writing.copying", "Copies.copy", "after"),
    "before a delete": ("s3fuse.store.s3", "S3Store.delete", "before"),
    "after a delete": ("s3fuse.store.s3", "S3Store.delete", "after"),
    "after deletes": ("s3fuse.store.s3", "S3Store.delete_many", "after"),
    "before a multipart upload": ("s3fuse.store.s3", "S3Store.multipart_create", "before"),
    "after a multipart upload begins": ("s3fuse.store.s3", "S3Store.multipart_create", "after"),
    "between parts": ("s3fuse.store.s3", "S3Store.multipart_put", "after"),
    "before complete": ("s3fuse.store.s3", "S3Store.multipart_complete", "before"),
    "after complete": ("s3fuse.store.s3", "S3Store.multipart_complete", "after"),
    "before it is known to be there": ("s3fuse.namespace.syncer", "Syncer._arrived", "before"),
    "after it is known to be there": ("s3fuse.namespace.syncer", "Syncer._arrived", "after"),
    "before a name goes": ("s3fuse.namespace.changes", "Changes.removed", "before"),
    "after a name went": ("s3fuse.namespace.changes", "Changes.removed", "after"),
    "after a rename": ("s3fuse.namespace.changes", "Changes.moved", "after"),
    "after an object is set aside": ("s3fuse.namespace.clearing", "Clearing._set_aside", "after"),
    "before a checkpoint": ("s3fuse.writing.journal", "Journal.checkpoint", "before"),
    "after a checkpoint": ("s3fuse.writing.journal", "Journal.checkpoint", "after"),
}


def install(point: str, count: int, armed: str) -> None:
    """Wraps the function of the point."""
    module, path, when = POINTS[point]
    holder, name = path.split(".")
    owner = getattr(importlib.import_module(module), holder)
    work = getattr(owner, name)
    left = count

    def reached(now: str) -> None:
        nonlocal left
        if now == when and os.path.exists(armed):
            left -= 1
            if left == 0:
                if os.getppid() != 1:
                    os.kill(os.getppid(), signal.SIGKILL)  # the keeper, which would start another worker
                os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(work)
    async def in_time(*args: Any, **kwargs: Any) -> Any:
        reached("before")
        result = await work(*args, **kwargs)
        reached("after")
        return result

    @functools.wraps(work)
    def at_once(*args: Any, **kwargs: Any) -> Any:
        reached("before")
        result = work(*args, **kwargs)
        reached("after")
        return result

    setattr(owner, name, in_time if inspect.iscoroutinefunction(work) else at_once)


def shrink() -> None:
    """Parts and the journal's log are small, so that a small load has several of them."""
    from s3fuse.namespace import upkeep
    from s3fuse.writing.plan import Limits

    upkeep.EVERY_S, upkeep.WAL_BYTES = 0.1, 64 << 10
    part = 5 << 20
    Limits.__init__.__defaults__ = (part, part, *(Limits.__init__.__defaults__ or ())[2:])


def main() -> None:
    point, count, armed, verb, *arguments = sys.argv[1:]
    sys.argv = [f"s3fuse {verb}", *arguments]
    if verb == "worker":
        if point:
            install(point, int(count), armed)
        shrink()
        from s3fuse.worker import main as serve

        serve()
    from s3fuse import cli, daemon

    daemon.WORKER = (sys.executable, os.path.abspath(__file__), point, count, armed, "worker")
    sys.argv = ["s3fuse", verb, *arguments]
    cli.main()


if __name__ == "__main__":
    main()
