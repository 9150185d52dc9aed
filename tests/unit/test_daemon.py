"""Going to the background: what the caller learns, and that a daemon holds on to nothing of its caller's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from s3fuse.daemon import set_up_logging
from s3fuse.errors import ExitCode, UserError

if TYPE_CHECKING:
    from pathlib import Path

COMMAND = """
import logging, os, sys, time
from pathlib import Path
from s3fuse.daemon import run_in_background, set_up_logging
from s3fuse.errors import ExitCode, UserError

def serve(ready):
    {body}

set_up_logging("info", Path("daemon.log"))
try:
    code = run_in_background(serve, "THE-LOG")
except UserError as error:
    print(error)
    code = error.exit_code
sys.exit(int(code))
"""


def command(folder: Path, body: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs a command whose daemon is `body`. Returns when both its output pipes are closed, by the daemon too."""
    code = COMMAND.format(body=body.strip().replace("\n", "\n    "))
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=30, **options
    )


def log(folder: Path) -> str:
    return (folder / "daemon.log").read_text()


SERVING = """
import json
ready()
os.read({wait}, 1)  # until the test lets go of the other end
facts = [os.getsid(0) == os.getpid(), os.getcwd(), [os.readlink(f"/proc/self/fd/{{n}}") for n in range(3)]]
os.write({tell}, json.dumps(facts).encode())
logging.info("the end")
return ExitCode.DONE
"""


def test_the_caller_returns_when_ready_and_the_daemon_goes_on(tmp_path: Path) -> None:
    wait, let_go = os.pipe()
    told, tell = os.pipe()
    done = command(tmp_path, SERVING.format(wait=wait, tell=tell), pass_fds=(wait, tell))
    os.close(wait)
    os.close(tell)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert log(tmp_path) == "", "it waits still"
    os.close(let_go)
    with os.fdopen(told) as pipe:
        facts = json.loads(pipe.read())  # to the end of the daemon, which has the other end
    assert facts == [True, "/", ["/dev/null"] * 3]
    assert "the end" in log(tmp_path)


def test_the_callers_reason_is_the_daemons(tmp_path: Path) -> None:
    done = command(tmp_path, 'raise UserError("there is no bucket like it", ExitCode.REFUSED)')
    assert (done.returncode, done.stdout, done.stderr) == (ExitCode.REFUSED, "there is no bucket like it\n", "")


def test_a_failure_that_nobody_foresaw_is_told_and_logged(tmp_path: Path) -> None:
    done = command(tmp_path, "1 / 0")
    assert done.returncode == ExitCode.FAILED
    assert done.stdout == "the daemon failed: ZeroDivisionError('division by zero')\n"
    assert "Traceback" in log(tmp_path)


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)", "return ExitCode.DONE"])
def test_a_daemon_that_ends_without_a_word(tmp_path: Path, end: str) -> None:
    done = command(tmp_path, end)
    assert done.returncode == ExitCode.FAILED
    assert done.stdout == "the daemon ended without a word before the mount was up; see THE-LOG\n"


def test_what_fails_after_ready_is_in_the_log_only(tmp_path: Path) -> None:
    told, tell = os.pipe()
    done = command(tmp_path, "ready()\nready()\n1 / 0", pass_fds=(tell,))
    os.close(tell)
    assert (done.returncode, done.stdout) == (0, "")
    with os.fdopen(told) as pipe:
        pipe.read()  # to the daemon's end
    assert "ZeroDivisionError" in log(tmp_path)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--log-file .*/nowhere/log cannot be written: No such file") as raised:
        set_up_logging("info", tmp_path / "nowhere/log")
    assert raised.value.exit_code == ExitCode.USAGE
