"""The s3fuse commands that the plugin runs. What mounts is never ended with the plugin, and never waited for by it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import trio

from s3fuse.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

log = logging.getLogger(__name__)

_OURS = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID")


class Command:
    """One run of `s3fuse …` in a session of its own."""

    def __init__(self, *arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _OURS}
        # Not pipes: a daemon that the command leaves behind would hold them open.
        self._errors, self._output = os.memfd_create("errors"), os.memfd_create("output")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "s3fuse", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._errors,
            cwd="/",
            env=environment,
            start_new_session=True,
        )

    def close(self) -> None:
        os.close(self._errors)
        os.close(self._output)

    async def wait(self) -> int:
        """The exit code. Cancelling leaves the command running."""
        descriptor = os.pidfd_open(self._process.pid)
        try:
            await trio.lowlevel.wait_readable(descriptor)
        finally:
            os.close(descriptor)
        return self._process.wait()

    @property
    def output(self) -> str:
        return _content(self._output)

    @property
    def errors(self) -> str:
        """What it said on stderr so far, without our name before it."""
        lines = [line.removeprefix("s3fuse: ") for line in _content(self._errors).splitlines()]
        return "\n".join(filter(None, lines))


def _content(descriptor: int) -> str:
    return os.pread(descriptor, 1 << 20, 0).decode(errors="replace")


async def run(*arguments: str, started: Callable[[Command], None] = lambda command: None) -> str:
    """Runs `s3fuse …` and gives its output. Raises UserError with its own words."""
    command = Command(*arguments)
    try:
        started(command)
        code = await command.wait()
        if code:
            raise UserError(command.errors or f"s3fuse {arguments[0]} ended with code {code}")
        return command.output
    finally:
        command.close()


async def waiting_in(directories: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What `s3fuse cache list` says of cache directories of which nothing is mounted, by directory."""
    there = [str(path) for path in directories if path.is_dir()]
    if not there:
        await trio.lowlevel.checkpoint()
        return {}
    try:
        return {one["directory"]: one for one in json.loads(await run("cache", "list", "--json", *there))}
    except (UserError, ValueError) as error:
        log.error("the cache directories cannot be looked at: %s", error)
        return {}
