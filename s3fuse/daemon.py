"""Runs a mount in the background: the caller learns whether it came up, and why not if it did not."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from s3fuse.config import to_json
from s3fuse.errors import ExitCode, UserError, described
from s3fuse.host.private import NotPrivate, open_log
from s3fuse.printable import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import TextIOWrapper
    from pathlib import Path

    from s3fuse.config import MountConfig

#: The command that runs a worker: always the version that is installed when it starts.
WORKER = (sys.executable, "-P", "-m", "s3fuse.worker")

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

#: What a log shows of one message.
MESSAGE_CHARS = 4000


class LogFormatter(logging.Formatter):
    """One line a message, whatever it says; what follows it is indented, so that no line of that looks like one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message, MESSAGE_CHARS)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        first, *others = super().formatException(ei).split("\n")
        return "\n".join([first, *(f"  {printable(line)}" for line in others)])


class _LogFile(logging.FileHandler):
    """A log that only its user can read. Raises NotPrivate, OSError."""

    def __init__(self, path: Path, *, is_new_mount: bool) -> None:
        self._is_new_mount = is_new_mount
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def _open(self) -> TextIOWrapper:
        descriptor = open_log(self.baseFilename, is_new_mount=self._is_new_mount)
        return open(descriptor, "a", encoding=self.encoding, errors=self.errors)


def set_up_logging(level: str, log_file: Path | None, *, is_new_mount: bool = True) -> None:
    """Sends the log to a file, which nobody else can read, or to stderr.

    `is_new_mount` is as for `open_log`. Raises UserError where the file cannot be written, or is somebody else's.
    """
    try:
        handler: logging.Handler = (
            _LogFile(log_file, is_new_mount=is_new_mount) if log_file else logging.StreamHandler()
        )
    except NotPrivate as error:
        raise UserError(f"--log-file: {error}", ExitCode.USAGE) from None
    except OSError as error:
        raise UserError(f"--log-file {log_file} cannot be written: {error.strerror}", ExitCode.USAGE) from None
    handler.setFormatter(LogFormatter(FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Its warnings show addresses, and those of token services have the token of a web identity in them.
    logging.getLogger("urllib3").setLevel(logging.CRITICAL)


def start_keeper(
    config: MountConfig, worker: Sequence[str], log_hint: str, *, foreground: bool, log_is_new: bool = False
) -> None:
    """Starts the mount's keeper, whose workers are run by the command `worker`. `log_is_new`: this mount has made it.

    In the foreground this process becomes the keeper. Else it returns when the mount is up. Raises UserError with the
    daemon's own reason when it failed before that.
    """
    spec = os.memfd_create("s3fuse-mount")
    words = {"config": to_json(config), "worker": list(worker), "log": log_hint, "log_is_new": log_is_new}
    os.write(spec, json.dumps(words).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    if foreground:
        _become_keeper(spec, -1)
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            os.close(reading)
            _leave_terminal(keep_stderr=config.log_file is None)
            _become_keeper(spec, writing)
        except BaseException as error:
            failure = {"error": f"the daemon failed: {described(error)}", "exit_code": int(ExitCode.FAILED)}
            os.write(writing, json.dumps(failure).encode())
            os._exit(ExitCode.FAILED)
    os.close(writing)
    os.close(spec)
    with os.fdopen(reading, "rb") as pipe:
        word = pipe.read()
    if not word:
        raise UserError(f"the daemon ended without a word before the mount was up; see {log_hint}")
    answer = json.loads(word)
    if "error" in answer:
        raise UserError(answer["error"], ExitCode(answer["exit_code"]))


def _become_keeper(spec: int, tell: int) -> NoReturn:
    for descriptor in (spec, tell):
        if descriptor >= 0:
            os.set_inheritable(descriptor, True)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "s3fuse.keeper", str(spec), str(tell)])


def _leave_terminal(*, keep_stderr: bool) -> None:
    """A session of its own, no terminal, and the root as its directory."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1) if keep_stderr and not os.isatty(2) else (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    os.chdir("/")
