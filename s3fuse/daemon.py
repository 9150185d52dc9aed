"""Runs a mount in the background: the caller learns whether it came up, and why not if it did not."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING

from s3fuse.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_logging(level: str, log_file: Path | None) -> None:
    """Sends the log to a file, or to stderr. Raises UserError where the file cannot be written."""
    try:
        handler: logging.Handler = logging.FileHandler(log_file) if log_file else logging.StreamHandler()
    except OSError as error:
        raise UserError(f"--log-file {log_file} cannot be written: {error.strerror}", ExitCode.USAGE) from None
    logging.basicConfig(level=level.upper(), format=FORMAT, handlers=[handler], force=True)
    logging.getLogger("urllib3").setLevel(logging.WARNING)


def run_in_background(serve: Callable[[Callable[[], None]], ExitCode], log_hint: str) -> ExitCode:
    """Forks; the child runs `serve(ready)`. Returns DONE in the parent once the child called `ready`.

    Raises UserError in the parent with the child's own reason when it failed before that. The child never returns.
    Call it before any thread or event loop exists.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        os.close(reading)
        _child(serve, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        word = pipe.read()
    if not word:
        raise UserError(f"the daemon ended without a word before the mount was up; see {log_hint}")
    answer = json.loads(word)
    if "error" in answer:
        raise UserError(answer["error"], ExitCode(answer["exit_code"]))
    return ExitCode.DONE


def _child(serve: Callable[[Callable[[], None]], ExitCode], writing: int) -> None:
    """The daemon: its own session, no terminal, and one word to the parent."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    keep_stderr = not any(isinstance(handler, logging.FileHandler) for handler in logging.root.handlers)
    for descriptor in (0, 1) if keep_stderr and not os.isatty(2) else (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    os.chdir("/")
    told = False

    def tell(word: dict[str, object]) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(writing, json.dumps(word).encode())
            os.close(writing)

    try:
        code = serve(lambda: tell({"ready": True}))
    except UserError as error:
        tell({"error": str(error), "exit_code": int(error.exit_code)})
        code = error.exit_code
    except BaseException as error:
        logging.getLogger(__name__).exception("the daemon failed")
        tell({"error": f"the daemon failed: {error!r}", "exit_code": int(ExitCode.FAILED)})
        code = ExitCode.FAILED
    logging.shutdown()
    os._exit(int(code))
