"""The keeper with workers that are scripts: what whoever mounts learns, who follows whom, and when nobody does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from s3fuse.config import MountConfig, to_json
from s3fuse.daemon import set_up_logging
from s3fuse.errors import ExitCode, UserError
from tests.fuse.harness import is_alive, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

#: A worker: `said` appends a line to the journal of the test, `wait` waits for a byte in a fifo.
WORKER = """
import json, os, signal, socket, sys
from s3fuse import link
end = socket.socket(fileno=int(sys.argv[1]))
folder = {folder!r}
def said(*words):
    with open(folder + "/said", "a") as file:
        file.write(json.dumps([os.getpid(), *words]) + "\\n")
def hold():
    held = {{"init": "00", "session": "s", "after_death": True, "after_hand_over": True}}
    device = os.open("/dev/null", os.O_RDONLY)
    link.send(end, {{"hold": held, "descriptors": ["device"]}}, device)
def say(**words):
    link.send(end, words)
if os.path.exists(folder + "/broken"):
    os._exit(9)
link.send(end, {{"warm": True}})
given, descriptors = link.receive(end)
if given is None:
    os._exit(0)
said("begins", given["restarts"], given["reason"], len(descriptors), given["given_up"])
{body}
"""

SERVING = """
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: (said("signal", number), say(ended=0), os._exit(0)))
hold()
say(serving=True)
if not given["restarts"]:
    say(ready=True)
said("serves")
while True:
    message, _ = link.receive(end)
    if message is None:
        os._exit(1)
    said("hears", message)
    if "hand_over" in message:
        os._exit(link.GO_ON)
"""


@dataclass
class Kept:
    """A keeper that runs."""

    folder: Path
    process: subprocess.Popen[str]

    def said(self) -> list[list[Any]]:
        path = self.folder / "said"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def nth(self, count: int, word: str) -> int:
        """The pid of the `count`-th worker that has said this word."""
        wait_for(lambda: len(self._saying(word)) >= count, timeout_s=60)
        return int(self._saying(word)[count - 1][0])

    def _saying(self, word: str) -> list[list[Any]]:
        return [line for line in self.said() if line[1] == word]


@contextmanager
def keeper(folder: Path, body: str, python: str = sys.executable) -> Iterator[Kept]:
    """A keeper in the foreground, with workers of this body."""
    code = WORKER.format(folder=str(folder), body=body)
    spec = {
        "config": to_json(MountConfig(mountpoint=folder, bucket="bucket", log_file=folder / "log")),
        "worker": [python, "-c", code],
        "log": "THE-LOG",
    }
    with (folder / "spec").open("w+b") as file:
        file.write(json.dumps(spec).encode())
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "s3fuse.keeper", str(file.fileno()), "-1"],
            pass_fds=[file.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
    kept = Kept(folder, process)
    try:
        yield kept
    finally:
        process.kill()
        process.communicate(timeout=30)
        for line in kept.said():
            wait_for(lambda pid=line[0]: not is_alive(pid), timeout_s=60)  # they hear that it is gone


def start(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    """What the mount command does, to its end."""
    code = f"""
import sys
from pathlib import Path
from s3fuse.config import MountConfig
from s3fuse.daemon import start_keeper
from s3fuse.errors import UserError
config = MountConfig(mountpoint=Path({str(folder)!r}), bucket="bucket", log_file=Path({str(folder / "log")!r}))
try:
    start_keeper(config, [sys.executable, "-c", sys.argv[1]], "THE-LOG", foreground=False)
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    worker = WORKER.format(folder=str(folder), body=body)
    return subprocess.run([sys.executable, "-c", code, worker], capture_output=True, text=True, timeout=60)


# -- the mount command


def test_the_command_returns_when_the_mount_is_up_and_holds_on_to_nothing(tmp_path: Path) -> None:
    facts = "said([os.getcwd(), os.getsid(0) == os.getppid(), [os.readlink(f'/proc/self/fd/{n}') for n in range(3)]])"
    done = start(tmp_path, f"{facts}\nhold()\nsay(serving=True, ready=True)\nlink.receive(end)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    _, (worker, found) = (json.loads(line) for line in (tmp_path / "said").read_text().splitlines())
    assert found == ["/", True, ["/dev/null", "/dev/null", str(tmp_path / "log")]]
    keeper_pid = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(keeper_pid, signal.SIGKILL)
    wait_for(lambda: not is_alive(worker), timeout_s=60)


def test_the_commands_reason_is_the_workers(tmp_path: Path) -> None:
    done = start(tmp_path, "say(error='there is no bucket like it', exit_code=4)\nos._exit(4)")
    assert (done.returncode, done.stdout, done.stderr) == (ExitCode.REFUSED, "there is no bucket like it\n", "")


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)", "1 / 0"])
def test_a_worker_that_ends_without_a_word(tmp_path: Path, end: str) -> None:
    done = start(tmp_path, end)
    assert done.returncode == ExitCode.FAILED
    assert done.stdout == "the daemon ended without a word before the mount was up; see THE-LOG\n"


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--log-file .*/nowhere/log cannot be written: No such file") as raised:
        set_up_logging("info", tmp_path / "nowhere/log")
    assert raised.value.exit_code == ExitCode.USAGE


# -- who follows whom


def test_a_killed_worker_is_followed_and_the_next_one_gets_what_was_held(tmp_path: Path) -> None:
    with keeper(tmp_path, SERVING) as kept:
        for count in range(1, 4):
            os.kill(kept.nth(count, "serves"), signal.SIGKILL)
        kept.nth(4, "serves")
        begun = [line[2:] for line in kept.said() if line[1] == "begins"]
        assert begun[0] == [0, "", 0, ""]
        assert [line[0] for line in begun] == [0, 1, 2, 3]
        assert {line[1] for line in begun[1:]} == {"killed by SIGKILL"}
        assert {line[2] for line in begun[1:]} == {1}
        assert (tmp_path / "log").read_text().count("the worker died: killed by SIGKILL") == 3
        kept.process.send_signal(signal.SIGTERM)
        assert kept.process.wait(60) == 0
        assert ["signal", signal.SIGTERM] in [line[1:] for line in kept.said()]


def dispositions(pid: int, field: str) -> set[int]:
    """The signals that a process ignores (SigIgn), catches (SigCgt) or blocks (SigBlk)."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{field}:"))
    mask = int(line.split()[1], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_every_signal_that_the_keeper_does_not_use_is_ignored(tmp_path: Path) -> None:
    used = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
    cannot = {signal.SIGKILL, signal.SIGSTOP}
    with keeper(tmp_path, SERVING) as kept:
        worker = kept.nth(1, "serves")
        others = {int(number) for number in signal.valid_signals() - used - cannot}
        assert len(others) > 55
        for number in sorted(others):
            os.kill(kept.process.pid, number)
        assert dispositions(kept.process.pid, "SigIgn") >= others
        assert dispositions(kept.process.pid, "SigCgt") >= {int(number) for number in used}
        # A worker begins as any program does; Python itself ignores two.
        assert dispositions(worker, "SigIgn") & others <= {signal.SIGPIPE, signal.SIGXFSZ}
        assert dispositions(worker, "SigBlk") == set()
        wait_for(lambda: (kept.process.send_signal(signal.SIGHUP), len(kept.said()) > 2)[1], timeout_s=60, every_s=0.5)
        kept.nth(2, "serves")
        kept.process.send_signal(signal.SIGTERM)
        assert kept.process.wait(60) == 0


def test_a_hangup_has_the_worker_replaced_by_one_that_is_ready_before_that_one_goes(tmp_path: Path) -> None:
    with keeper(tmp_path, SERVING) as kept:
        first = kept.nth(1, "serves")
        # It may come before the keeper knows that the first one serves, and then means nothing.
        wait_for(lambda: (kept.process.send_signal(signal.SIGHUP), len(kept.said()) > 2)[1], timeout_s=60, every_s=0.5)
        second = kept.nth(2, "serves")
        assert not is_alive(first)
        assert [line[2:] for line in kept.said() if line[0] == second and line[1] == "begins"] == [[1, "", 1, ""]]
        assert "died" not in ((tmp_path / "log").read_text() if (tmp_path / "log").exists() else "")


def test_a_successor_that_cannot_begin_leaves_the_one_before_where_it_is(tmp_path: Path) -> None:
    body = SERVING.replace(
        '    said("hears", message)', '    said("hears", message)\n    if "refused" in message:\n        continue'
    )
    body = body.replace('said("serves")', 'open(folder + "/broken", "w").close()\nsaid("serves")\nsay(replace={})')
    with keeper(tmp_path, body) as kept:
        first = kept.nth(1, "serves")
        kept.nth(1, "hears")
        assert kept.said()[-1] == [first, "hears", {"refused": "it ended with exit code 9"}]
        assert is_alive(first)
        (tmp_path / "broken").unlink()
        os.kill(first, signal.SIGKILL)
        kept.nth(2, "serves")
        assert "cannot: it ended with exit code 9; the one before it stays" in (tmp_path / "log").read_text()


def test_a_successor_that_the_host_cannot_start_leaves_the_one_before_where_it_is(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    body = SERVING.replace(
        '    said("hears", message)', '    said("hears", message)\n    if "refused" in message:\n        continue'
    )
    body = body.replace('said("serves")', 'os.unlink(folder + "/python")\nsaid("serves")\nsay(replace={})')
    with keeper(tmp_path, body, str(python)) as kept:
        first = kept.nth(1, "hears")
        reason = "the host cannot start it (No such file or directory)"
        assert kept.said()[-1] == [first, "hears", {"refused": reason}]
        assert is_alive(first)
        assert kept.process.poll() is None


def test_options_with_which_none_can_serve_are_put_back(tmp_path: Path) -> None:
    body = SERVING.replace("\nhold()", "\nif given['config'].get('bucket') == 'wrong':\n    os._exit(8)\nhold()", 1)
    body = body.replace(
        'said("serves")',
        """said("serves", given["refused"])
if not given["restarts"]:
    say(replace={**given["config"], "bucket": "wrong"})""",
    )
    with keeper(tmp_path, body) as kept:
        kept.nth(2, "serves")
        assert [line[2] for line in kept.said() if line[1] == "serves"] == ["", "it ended with exit code 8"]
        assert "the worker died: it ended with exit code 8\n" in (tmp_path / "log").read_text()
        os.kill(kept.nth(2, "serves"), signal.SIGKILL)
        kept.nth(3, "serves")


def test_what_a_worker_says_that_cannot_write_the_log_itself_is_there(tmp_path: Path) -> None:
    body = SERVING.replace("\nhold()", "\nif given['restarts'] == 1:\n    import not_installed\nhold()", 1)
    with keeper(tmp_path, body) as kept:
        os.kill(kept.nth(1, "serves"), signal.SIGKILL)
        kept.nth(2, "serves")
        assert "No module named 'not_installed'" in (tmp_path / "log").read_text()


def test_a_worker_that_cannot_live_is_tried_a_few_times_and_the_last_one_learns_why(tmp_path: Path) -> None:
    dying = """
if given["given_up"]:
    said("drains")
    say(ended=3)
    os._exit(3)
hold()
say(serving=True)
if not given["restarts"]:
    say(ready=True)
os._exit(7)
"""
    with keeper(tmp_path, dying) as kept:
        assert kept.process.wait(60) == ExitCode.PENDING
        begun = [line[2:] for line in kept.said() if line[1] == "begins"]
        assert begun[-1][3] == "it ended with exit code 7"
        assert begun[-1][2] == 0, "the connection is closed"
        assert len(begun) == 6
        assert "there will be no other one" in (tmp_path / "log").read_text()


def test_a_signal_while_nobody_serves_reaches_the_next_one(tmp_path: Path) -> None:
    body = SERVING.replace("\nhold()", "\nif given['restarts']:\n    open(folder + '/fifo').read()\nhold()", 1)
    os.mkfifo(tmp_path / "fifo")
    with keeper(tmp_path, body) as kept:
        os.kill(kept.nth(1, "serves"), signal.SIGKILL)
        kept.nth(2, "begins")
        kept.process.send_signal(signal.SIGINT)
        (tmp_path / "fifo").write_text("go")
        assert kept.process.wait(60) == 0
        assert ["signal", signal.SIGINT] in [line[1:] for line in kept.said()]


def test_whose_state_cannot_be_kept_has_no_successor(tmp_path: Path) -> None:
    body = SERVING.replace("hold()", "hold()\nsay(hold={'after_death': False, 'after_hand_over': False})", 1)
    with keeper(tmp_path, body) as kept:
        os.kill(kept.nth(1, "serves"), signal.SIGKILL)
        assert kept.process.wait(60) == 1
        assert len([line for line in kept.said() if line[1] == "begins"]) == 1
