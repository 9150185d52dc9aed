"""One of the processes of the mixed workload: python -m bench.scenarios.worker DIRECTORY NUMBER OPERATIONS

It creates, reads back, appends, renames, lists and deletes files in a directory of its own and one that all share, and
ends with an error at the first wrong byte.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path


def main() -> None:
    base, number, operations = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    choice = random.Random(number)
    shared = base / "shared"
    own = base / f"worker{number}"
    for folder in (shared, own):
        folder.mkdir(exist_ok=True)
    contents: dict[Path, bytes] = {}
    for step in range(operations):
        what = choice.choice(("create", "create", "read", "read", "append", "rename", "list", "delete"))
        path = choice.choice(sorted(contents)) if contents else None
        if what == "create" or path is None:
            path = choice.choice((shared, own)) / f"{number}-{step}"
            contents[path] = choice.randbytes(choice.choice((100, 5000, 200_000)))
            path.write_bytes(contents[path])
        elif what == "read":
            check(path, contents[path])
        elif what == "append":
            more = choice.randbytes(300)
            with path.open("ab") as file:
                file.write(more)
            contents[path] += more
        elif what == "rename":
            target = path.with_name(f"{number}-{step}-renamed")
            path.rename(target)
            contents[target] = contents.pop(path)
        elif what == "list":
            if path.name not in os.listdir(path.parent):
                sys.exit(f"{path.name} is not listed")
        else:
            path.unlink()
            del contents[path]
    for path, data in contents.items():
        check(path, data)


def check(path: Path, expected: bytes) -> None:
    if path.read_bytes() != expected:
        sys.exit(f"{path.name} has other bytes than were written")


if __name__ == "__main__":
    main()
