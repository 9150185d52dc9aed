"""The control socket: every client that waits gets an answer, and no client can harm the daemon."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from s3fuse import control
from s3fuse.errors import ExitCode, Unavailable, UserError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from s3fuse.control import Handler, Progress

MOUNTPOINT = Path("/mnt/some where")
ABOUT = {"mountpoint": str(MOUNTPOINT), "pid": os.getpid()}


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of this test's own, which does not exist yet."""
    monkeypatch.setattr(control, "runtime_dir", lambda: tmp_path / "run")
    return tmp_path / "run"


@asynccontextmanager
async def served(**handlers: Handler) -> AsyncIterator[trio.Event]:
    """A daemon that answers these verbs; gives the event that stops it."""
    stopping = trio.Event()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(control.serve, control.open_door(MOUNTPOINT, ABOUT), MOUNTPOINT, handlers, stopping)
            yield stopping
            stopping.set()


async def ask(verb: str, **arguments: Any) -> dict[str, Any]:
    """What the command line gets, from a thread as it blocks."""
    return await trio.to_thread.run_sync(partial(control.request, MOUNTPOINT, verb, **arguments))


async def echo(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    return request


def names(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir()}


def make(folder: Path, mode: int = 0o700) -> None:
    folder.mkdir()
    folder.chmod(mode)


async def failure(verb: str = "work", **arguments: Any) -> UserError:
    with pytest.raises(UserError) as raised:
        await ask(verb, **arguments)
    return raised.value


# -- answers


async def test_arguments_arrive_and_the_result_comes_back() -> None:
    async with served(echo=echo):
        assert await ask("echo", drain_timeout_s=1.5, text="ä\n") == {
            "verb": "echo",
            "drain_timeout_s": 1.5,
            "text": "ä\n",
        }


async def test_progress_comes_before_the_result() -> None:
    async def work(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        for number in range(3):
            await progress({"files": number})
        return {"done": True}

    seen: list[dict[str, Any]] = []
    async with served(work=work):
        assert await ask("work", on_progress=seen.append) == {"done": True}
    assert seen == [{"files": 0}, {"files": 1}, {"files": 2}]


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("in use", ExitCode.REFUSED), ExitCode.REFUSED), (Unavailable("no answer"), ExitCode.FAILED)],
)
@pytest.mark.parametrize("nurseries", [0, 1, 2])
async def test_an_error_arrives_with_its_text_and_code(error: Exception, code: ExitCode, nurseries: int) -> None:
    async def work(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        raised = error
        for _ in range(nurseries):
            raised = ExceptionGroup("a nursery", [raised])
        raise raised

    async with served(work=work):
        found = await failure()
    assert (str(found), found.exit_code) == (str(error), code)


async def test_an_unforeseen_failure_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def work(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        raise OSError(5, "Input/output error")

    async with served(work=work, echo=echo):
        found = await failure()
        assert await ask("echo") == {"verb": "echo"}
    assert "work failed: OSError(5, 'Input/output error')" in str(found)
    assert found.exit_code == ExitCode.FAILED
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_unknown_verbs() -> None:
    async with served(echo=echo):
        found = await failure("dance")
    assert (str(found), found.exit_code) == ("unknown verb 'dance'", ExitCode.USAGE)


# -- clients that misbehave


async def test_a_client_that_goes_away_ends_its_own_request_only(caplog: pytest.LogCaptureFixture) -> None:
    ended = trio.Event()

    async def work(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        try:
            while True:
                await progress({})
        finally:
            ended.set()

    async with served(work=work, echo=echo):
        async with await trio.open_unix_socket(str(control.socket_path(MOUNTPOINT))) as client:
            await client.send_all(b'{"verb": "work"}\n')
            assert await client.receive_some()
        await ended.wait()
        assert await ask("echo") == {"verb": "echo"}
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


@pytest.mark.parametrize(
    "sent",
    [b"", b"\n", b"no json\n", b"[]\n", b"\xff\n", b'{"verb": "echo"}', b"x" * (control.MAX_REQUEST_BYTES + 9000)],
)
async def test_what_is_no_request_gets_no_answer(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with served(echo=echo):
        async with await trio.open_unix_socket(str(control.socket_path(MOUNTPOINT))) as client:
            try:
                await client.send_all(sent)
                await client.send_eof()
                assert await client.receive_some() == b""
            except trio.BrokenResourceError:
                pass  # it hung up before all was sent
        assert await ask("echo") == {"verb": "echo"}
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


# -- begin and end


async def test_a_request_from_before_the_end_is_answered(runtime: Path) -> None:
    working, finish = trio.Event(), trio.Event()
    results = []

    async def work(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
        working.set()
        await finish.wait()
        return {"done": True}

    async def client() -> None:
        results.append(await ask("work"))

    async with trio.open_nursery() as nursery, served(work=work) as stopping:
        nursery.start_soon(client)
        await working.wait()
        stopping.set()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionRefusedError):
            await ask("work")
        finish.set()
    assert results == [{"done": True}]
    assert names(runtime) == set()


async def test_the_socket_is_for_its_owner_and_found_by_name(runtime: Path) -> None:
    async with served(echo=echo):
        assert stat.S_IMODE(os.stat(runtime).st_mode) == 0o700
        assert control.mounts() == [ABOUT]
        assert names(runtime) == {".sock", ".json"}
    assert control.mounts() == []


async def test_a_killed_daemons_socket_is_replaced(runtime: Path) -> None:
    make(runtime)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(control.socket_path(MOUNTPOINT)))
    async with served(echo=echo):
        assert await ask("echo") == {"verb": "echo"}


async def test_the_end_without_the_runtime_directory(runtime: Path) -> None:
    async with served(echo=echo):
        await trio.to_thread.run_sync(runtime.rename, runtime.with_name("elsewhere"))


async def test_a_daemon_that_drains_leaves_the_next_ones_socket_alone(runtime: Path) -> None:
    async with served(old=echo) as stopping, trio.open_nursery() as nursery:
        later = trio.Event()
        door = control.open_door(MOUNTPOINT, {**ABOUT, "bucket": "next"})
        await nursery.start(control.serve, door, MOUNTPOINT, {"new": echo}, later)
        stopping.set()
        await trio.testing.wait_all_tasks_blocked()
        assert await ask("new") == {"verb": "new"}
        assert control.mounts() == [{**ABOUT, "bucket": "next"}]
        later.set()
    assert names(runtime) == set()


def test_a_directory_that_others_can_write_is_refused(runtime: Path) -> None:
    make(runtime, 0o770)
    with pytest.raises(UserError, match=f"{runtime} is open to others .*: chmod 700 {runtime}"):
        control.open_door(MOUNTPOINT, ABOUT)


def test_no_daemon() -> None:
    with pytest.raises(FileNotFoundError):
        control.request(MOUNTPOINT, "status")


async def test_a_daemon_that_ends_before_it_answers(runtime: Path) -> None:
    make(runtime)
    with trio.socket.socket(socket.AF_UNIX) as listener:
        await listener.bind(str(control.socket_path(MOUNTPOINT)))
        listener.listen()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def hang_up() -> None:
                connection, _ = await listener.accept()
                await connection.recv(4096)
                connection.close()

            with pytest.raises(ConnectionError, match="ended before it answered"):
                await ask("status")


def test_a_daemon_that_is_mute_is_waited_for_in_bounds(runtime: Path) -> None:
    make(runtime)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(control.socket_path(MOUNTPOINT)))
        listener.listen()
        with pytest.raises(TimeoutError):
            control.request(MOUNTPOINT, "status", timeout_s=0.01)


# -- which mounts there are


def test_no_mounts() -> None:
    assert control.mounts() == []


def test_what_dead_daemons_left_is_removed(runtime: Path) -> None:
    make(runtime)
    with ExitStack() as stack:
        for name, text in (
            ("alive", json.dumps(ABOUT)),
            ("busy", json.dumps(ABOUT)),
            ("half", '{"pid": '),
            ("list", "[]"),
            ("other", "{}"),
        ):
            (runtime / f"{name}.json").write_text(text)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(runtime / f"{name}.sock"))
            listener.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(str(runtime / "busy.sock"))  # and its queue is full
        # A zombie keeps its pid, so ours may stand for a killed daemon's.
        (runtime / "dead.json").write_text(json.dumps(ABOUT))
        (runtime / f"dead.{ABOUT['pid']}.session").touch()
        (runtime / "dead.1.session").touch()
        (runtime / f"alive.{ABOUT['pid']}.session").touch()
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(runtime / "dead.sock"))
        (runtime / "bare.json").write_text(json.dumps(ABOUT))
        assert control.mounts() == [ABOUT, ABOUT]
        kept = {"alive.json", "alive.sock", "busy.json", "busy.sock"}
        sessions = {f"alive.{ABOUT['pid']}.session", "dead.1.session"}  # the last is of who is about to mount there
        assert {path.name for path in runtime.iterdir()} == kept | sessions


@pytest.mark.parametrize(
    ("uid", "xdg", "folder"),
    [(0, "/run/user/0", "/run/s3fuse"), (7, "/run/user/7", "/run/user/7/s3fuse"), (7, "", "/tmp/s3fuse-7")],
)
def test_where_sockets_are(monkeypatch: pytest.MonkeyPatch, uid: int, xdg: str, folder: str) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("os.geteuid", lambda: uid)
    monkeypatch.setenv("XDG_RUNTIME_DIR", xdg)
    assert control.runtime_dir() == Path(folder)
