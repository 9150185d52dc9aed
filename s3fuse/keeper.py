"""Holds a mount's connection to the kernel while workers come and go: `python -m s3fuse.keeper SPEC TELL`.

The worker does everything else. It makes the mount and hands over the descriptor of the connection, what the kernel
said first on it (INIT) and the control socket; a worker that is killed has a successor, which is given all that. While
none runs, the kernel keeps the requests and their callers wait. The keeper ends when a worker has unmounted, or when
there is no use in another one: then the connection is closed, and calls fail as after any crash.

SPEC is the descriptor of a file with the options (JSON), TELL that of a pipe for one word to whoever mounts, or -1.
Standard library only: it has to be small, and never to fail.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from s3fuse import link, systemd
from s3fuse.host.private import open_log, remove_new_log
from s3fuse.printable import printable
from s3fuse.succession import Succession

#: A worker that is asked to hand over has so long to finish what it has begun, before it is killed.
HAND_OVER_S = 30.0
#: When a worker is started again where the host could not start one.
AGAIN_S = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
#: All others that a process can ignore: whatever they mean elsewhere, they are not to end what protects the mount.
#: A fault of its own still ends it, since the kernel does not let that be ignored.
_IGNORED = signal.valid_signals() - {*_SIGNALS, signal.SIGKILL, signal.SIGSTOP}


class _Worker:
    """One worker's process and what it has said."""

    def __init__(self, command: list[str], log: str | None) -> None:
        self.link, theirs = link.pair()
        errors = _open_log(log)
        # What ends it before it can write its log, as a program that is installed by half, is said there all the same.
        actions = [(os.POSIX_SPAWN_DUP2, errors, 2)] if errors is not None else []
        try:
            with theirs:
                arguments = [*command, str(theirs.fileno())]
                # A process group of its own: what a terminal sends comes from here, and once.
                self.pid = os.posix_spawn(
                    arguments[0],
                    arguments,
                    os.environ,
                    file_actions=actions,
                    setpgroup=0,
                    setsigmask=[],
                    setsigdef=_IGNORED,
                )
        finally:
            if errors is not None:
                os.close(errors)
        self.serving = False
        self.stopped = False  # it is not needed after all
        self.ended: int | None = None  # its exit code, once the mount is to end with it
        self.error: dict[str, Any] | None = None

    def send(self, message: dict[str, Any], *descriptors: int) -> None:
        with suppress(OSError):  # it is dead: SIGCHLD tells
            link.send(self.link, message, *descriptors)


class Keeper:
    """One mount, from the mount command to its end."""

    def __init__(self, spec: dict[str, Any], tell: int) -> None:
        self.spec = spec
        self.succession = Succession()
        self._tell = tell
        self._held: dict[str, Any] = {}
        self._descriptors: dict[str, int] = {}
        self._current: _Worker | None = None
        self._next: _Worker | None = None  # it waits until the current one has handed over
        self._hand_over_by = 0.0
        self._start_at: float | None = 0.0
        self._stop = 0  # the signal that asked for the end
        self._given_up = ""
        self._orderly = 0
        self._is_mounted = False
        self._config_before = spec["config"]  # with which a worker has served
        self._refused = ""  # why no worker could serve with the options of the last restart
        self._since: float | None = None  # since when nobody serves the mount
        self._select = selectors.DefaultSelector()
        self._wake, wake = socket.socketpair()
        for end in (self._wake, wake):
            end.setblocking(False)
        self._waker = wake
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        self._select.register(self._wake, selectors.EVENT_READ, None)

    def run(self) -> NoReturn:
        while True:
            now = time.monotonic()
            if self._start_at is not None and now >= self._start_at:
                self._start(now)
            self._watch_handing_over(now)
            for key, _ in self._select.select(self._patience(now)):
                if key.data is None:
                    self._signals()
                else:
                    self._heard(key.data)

    def _start(self, now: float) -> None:
        self._start_at = None
        try:
            self._begin(self._spawn())
        except OSError as error:  # no memory, no processes: that may pass
            if not self._is_mounted:
                raise
            self._log(f"no worker can be started now: {error.strerror}")
            self._start_at = now + AGAIN_S

    def _patience(self, now: float) -> float | None:
        times = [at for at in (self._start_at, self._hand_over_by or None) if at is not None]
        return max(0.0, min(times) - now) if times else None

    # -- workers

    def _spawn(self) -> _Worker:
        worker = _Worker(self.spec["worker"], self.spec["config"].get("log_file"))
        self._select.register(worker.link, selectors.EVENT_READ, worker)
        return worker

    def _begin(self, worker: _Worker) -> None:
        """Gives the worker the mount."""
        self._current = worker
        message = {
            "config": self.spec["config"],
            "keeper": os.getpid(),
            "held": self._held,
            "restarts": self.succession.deaths + self._orderly,
            "deaths": self.succession.deaths,
            "reason": self.succession.reason,
            "given_up": self._given_up,
            "refused": self._refused,
            "since": self._since,
            "descriptors": list(self._descriptors),
        }
        worker.send(message, *self._descriptors.values())

    def _heard(self, worker: _Worker) -> None:
        """Takes what a worker says; that it says nothing more is left to its end."""
        if worker.link.fileno() < 0:
            return  # it has ended just now
        try:
            message, descriptors = link.receive(worker.link)
        except OSError:
            message, descriptors = None, []
        if message is None:
            self._select.unregister(worker.link)
        else:
            self._take(worker, message, descriptors)

    def _take(self, worker: _Worker, message: dict[str, Any], descriptors: list[int]) -> None:
        for name, descriptor in zip(message.get("descriptors", ()), descriptors, strict=False):
            os.set_inheritable(descriptor, False)
            self._descriptors[name] = descriptor
        self._held |= message.get("hold", {})
        worker.error = message if "error" in message else worker.error
        self._since = message.get("since", self._since)
        worker.ended = message.get("ended", worker.ended)
        if "warm" in message and worker is self._next and self._current is not None:
            self._current.send({"hand_over": True})
            if self._held["after_death"]:
                self._hand_over_by = time.monotonic() + HAND_OVER_S
        if "stays" in message and self._next is not None:
            self._hand_over_by = 0.0
            self._next.stopped = True
            os.kill(self._next.pid, signal.SIGKILL)
        if "serving" in message:
            worker.serving = True
            self._config_before = self.spec["config"]
            if self._stop:
                os.kill(worker.pid, self._stop)
        if "ready" in message:
            self._is_mounted = True
            self._say({"ready": True})
            systemd.tell("READY=1")
        if "replace" in message:
            self._replace(message["replace"])

    def _replace(self, config: dict[str, Any] | None) -> None:
        """Has the current worker replaced by one of the program that is installed now."""
        ready = self._current is not None and self._current.serving and self._held["after_hand_over"]
        if ready and self._next is None:
            self._refused = ""
            self.spec["config"] = config or self.spec["config"]
            try:
                self._next = self._spawn()
            except OSError as error:
                self.spec["config"] = self._config_before
                self._stays(f"the host cannot start it ({error.strerror})")

    def _stays(self, reason: str) -> None:
        """The worker that was to be replaced goes on."""
        if self._current is not None:
            self._log(f"the worker that was to go on cannot: {reason}; the one before it stays")
            self._current.send({"refused": reason})

    def _watch_handing_over(self, now: float) -> None:
        if self._hand_over_by and now >= self._hand_over_by and self._current is not None:
            self._hand_over_by = 0.0
            os.kill(self._current.pid, signal.SIGKILL)

    # -- signals

    def _signals(self) -> None:
        for number in os.read(self._wake.fileno(), 4096):
            if number == signal.SIGHUP:
                self._replace(None)
            elif number in (signal.SIGTERM, signal.SIGINT):
                if not self._stop:
                    systemd.tell("STOPPING=1")
                self._stop = number
                if self._current is not None and (self._current.serving or not self._held):
                    os.kill(self._current.pid, number)  # another one is told when it serves
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for worker in (self._current, self._next):
                if worker is not None and worker.pid == pid:
                    self._ended(worker, os.waitstatus_to_exitcode(status))

    def _ended(self, worker: _Worker, code: int) -> None:
        self._hear_last(worker)
        if worker is self._next:
            self._next = None
            self.spec["config"] = self._config_before
            if not worker.stopped:
                self._stays(_why(worker, code))
            return
        self._current, self._hand_over_by = None, 0.0
        if worker.ended is not None or self._given_up:
            self._end(code if worker.ended is None else worker.ended)
        if not self._is_mounted:
            self._failed(worker, code)
        if code == link.GO_ON:
            self._orderly += 1
            self._follow(0.0)
            return
        self._since = time.monotonic()
        killed = code == -signal.SIGKILL and worker.serving
        reason = _why(worker, code)
        if not worker.serving and self.spec["config"] != self._config_before:
            self.spec["config"], self._refused = self._config_before, reason
        delay_s = self.succession.died(reason, time.monotonic(), killed=killed)
        if not self._held["after_death"]:
            delay_s = None
        self._log(f"the worker died: {reason}" + ("" if delay_s is not None else "; there will be no other one"))
        if delay_s is None:
            self._give_up(reason)
        else:
            self._follow(delay_s)

    def _hear_last(self, worker: _Worker) -> None:
        if worker.link.fileno() in self._select.get_map():
            self._select.unregister(worker.link)
            worker.link.setblocking(False)
            try:
                while (said := link.receive(worker.link))[0] is not None:
                    self._take(worker, said[0], said[1])
            except OSError:
                pass  # that was all
        worker.link.close()

    def _follow(self, delay_s: float) -> None:
        if self._next is not None:
            following, self._next = self._next, None
            self._begin(following)
        else:
            self._start_at = time.monotonic() + delay_s

    # -- ends

    def _failed(self, worker: _Worker, code: int) -> NoReturn:
        """The first worker could not mount."""
        hint = self.spec["log"]
        error = worker.error or {
            "error": f"the daemon ended without a word before the mount was up; see {hint}",
            "exit_code": 1,
        }
        remove_new_log(self.spec["config"].get("log_file"), is_new=self.spec.get("log_is_new", False))
        if self._tell < 0:
            print(f"s3fuse: {printable(error['error'], lines=True)}", file=sys.stderr, flush=True)
        self._say(error)
        os._exit(int(error["exit_code"]))

    def _give_up(self, reason: str) -> None:
        """Nobody serves the mount any more: calls fail from now on, and what waits is uploaded by a last worker."""
        self._given_up = reason
        os.close(self._descriptors.pop("device"))
        if not self._held["after_death"]:
            os._exit(1)
        self._begin(self._spawn())

    def _end(self, code: int) -> NoReturn:
        if self._next is not None:
            os.kill(self._next.pid, signal.SIGKILL)
        os._exit(code)

    def _say(self, word: dict[str, Any]) -> None:
        if self._tell >= 0:
            with suppress(OSError):
                os.write(self._tell, json.dumps(word).encode())
            os.close(self._tell)
            self._tell = -1

    def _log(self, text: str) -> None:
        """A line in the log's form."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f",{int(now % 1 * 1000):03d}"
        line = f"{stamp} WARNING s3fuse.keeper: {printable(text)}\n".encode()
        path = self.spec["config"].get("log_file")
        descriptor = 2 if path is None else _open_log(path)
        if descriptor is None:
            return
        with suppress(OSError):
            os.write(descriptor, line)
        if descriptor != 2:
            os.close(descriptor)


def _open_log(path: str | None) -> int | None:
    """A descriptor of the log, None where there is no file for it."""
    try:
        return None if path is None else open_log(path, is_new_mount=False)
    except OSError:
        return None


def _why(worker: _Worker, code: int) -> str:
    """Why a worker has ended."""
    if worker.error is not None:
        return str(worker.error["error"])
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"it ended with exit code {code}"


def main() -> NoReturn:
    spec_fd, tell = int(sys.argv[1]), int(sys.argv[2])
    if tell >= 0:
        os.set_inheritable(tell, False)
    with os.fdopen(spec_fd, "rb") as file:
        file.seek(0)
        spec = json.loads(file.read())
    Keeper(spec, tell).run()


if __name__ == "__main__":
    main()
