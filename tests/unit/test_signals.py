"""Which pending signals end a call on the mount: those meant to end the program, and no others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from s3fuse.fuse.signals import _pending, process_threads, thread_is_signalled


def status(*, pending: int = 0, shared: int = 0, blocked: int = 0, ignored: int = 0, caught: int = 0) -> dict[str, str]:
    masks = {"SigPnd": pending, "ShdPnd": shared, "SigBlk": blocked, "SigIgn": ignored, "SigCgt": caught}
    return {name: f"{1 << (number - 1) if number else 0:016x}" for name, number in masks.items()}


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_signals_meant_to_end_a_program(number: int) -> None:
    assert _pending(status(shared=number))
    assert _pending(status(pending=number, caught=number))
    assert not _pending(status(pending=number, ignored=number))
    assert not _pending(status(shared=number, blocked=number, caught=number))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGALRM, signal.SIGUSR1, signal.SIGPIPE])
def test_signals_that_end_a_program_without_a_handler(number: int) -> None:
    assert _pending(status(pending=number))
    assert not _pending(status(blocked=number))


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGALRM, signal.SIGPROF, signal.SIGURG, signal.SIGUSR2])
def test_handled_signals_that_programs_get_all_the_time(number: int) -> None:
    assert not _pending(status(shared=number, caught=number))


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGSTOP, signal.SIGCONT, signal.SIGWINCH])
def test_signals_that_end_nothing(number: int) -> None:
    assert not _pending(status(shared=number))


def test_real_threads() -> None:
    assert not thread_is_signalled(os.getpid())
    blocked = (
        "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", blocked], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.terminate()  # pending for ever, and it does not want to act on it
        assert not thread_is_signalled(child.pid)
        child.kill()
    assert not thread_is_signalled(child.pid)


@pytest.mark.parametrize("thread", [0, -1, 1 << 30])
def test_a_caller_that_is_not_to_be_seen(thread: int) -> None:
    assert not thread_is_signalled(thread)
    assert process_threads(1 << 30) == []


def test_threads_of_a_process() -> None:
    found: list[list[int]] = []
    other = threading.Thread(target=lambda: found.append(process_threads(threading.get_native_id())))
    other.start()
    other.join()
    assert os.getpid() in found[0]
