"""The plugin's HTTP: what Docker sends, what others may send, and that no failure is silence."""

from __future__ import annotations

import json
import os
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from s3fuse.errors import UserError
from s3fuse.volume import api

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ACTIVATE = b"POST /Plugin.Activate HTTP/1.1\r\nHost: \r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: 0\r\n\r\n"


def post(path: str, body: bytes, *more: bytes) -> bytes:
    head = [f"POST {path} HTTP/1.1".encode(), b"Host: plugin", f"Content-Length: {len(body)}".encode(), *more]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


class Calls:
    """Calls of a driver that does nothing but wait where it is told to."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.go = trio.Event()

    async def echo(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(arguments)
        return {"Got": arguments}

    async def wait(self, arguments: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(arguments)
        await self.go.wait()
        return {}

    async def refuse(self, arguments: dict[str, Any]) -> dict[str, Any]:
        raise UserError("that is not to be had")

    async def fail(self, arguments: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("oh")


@asynccontextmanager
async def serving(path: Path, calls: Calls) -> AsyncIterator[trio.Event]:
    routes = {"/Plugin.Activate": calls.echo, "/wait": calls.wait, "/refuse": calls.refuse, "/fail": calls.fail}
    stopping = trio.Event()
    with api.listener(path) as where:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.Server(routes).serve, where, stopping)
            yield stopping
            stopping.set()


async def answer(stream: trio.SocketStream) -> tuple[int, dict[str, Any]]:
    """One response, which has a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += await stream.receive_some()
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += await stream.receive_some()
    return int(head.split()[1]), json.loads(body)


async def test_requests_one_after_the_other_on_one_connection(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", Calls()):
        stream = await trio.open_unix_socket(tmp_path / "s")
        for request, wanted in [
            (ACTIVATE, (200, {"Err": "", "Got": {}})),
            (post("/Plugin.Activate", b'{"Opts": null}'), (200, {"Err": "", "Got": {"Opts": None}})),
            (post("/refuse", b"{}"), (200, {"Err": "that is not to be had"})),
            (post("/nowhere", b"{}"), (404, {"Err": "s3fuse has no /nowhere"})),
            (ACTIVATE, (200, {"Err": "", "Got": {}})),
        ]:
            await stream.send_all(request)
            assert await answer(stream) == wanted
        for body in (b"{", b"[]", b"\xff"):
            await stream.send_all(post("/Plugin.Activate", body))
            status, content = await answer(stream)
            assert status == 400
            assert "is not JSON as expected" in content["Err"]
        await stream.aclose()


async def test_a_failure_is_told_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path / "s", Calls()):
        stream = await trio.open_unix_socket(tmp_path / "s")
        await stream.send_all(post("/fail", b"{}"))
        status, content = await answer(stream)
        assert status == 200
        assert "/fail failed: RuntimeError('oh')" in content["Err"]
        await stream.aclose()
    assert "Traceback" in caplog.text


async def test_a_request_in_pieces_and_with_expect(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", Calls()):
        stream = await trio.open_unix_socket(tmp_path / "s")
        head, _, body = post("/Plugin.Activate", b'{"Name": "x"}', b"Expect: 100-continue").partition(b"\r\n\r\n")
        for piece in (*(head[at : at + 7] for at in range(0, len(head), 7)), b"\r\n\r\n"):
            await stream.send_all(piece)
            await trio.testing.wait_all_tasks_blocked()
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 100")
        for at in range(len(body)):
            await stream.send_all(body[at : at + 1])
        assert await answer(stream) == (200, {"Err": "", "Got": {"Name": "x"}})
        await stream.aclose()


async def test_what_is_no_http_or_too_long_ends_only_its_connection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path / "s", Calls()):
        for junk in (b"hello\r\n\r\n", post("/Plugin.Activate", b"x" * (2 << 20)), b""):
            stream = await trio.open_unix_socket(tmp_path / "s")
            try:
                await stream.send_all(junk)
                await stream.send_eof()
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
            await stream.aclose()
        stream = await trio.open_unix_socket(tmp_path / "s")
        await stream.send_all(ACTIVATE)
        assert (await answer(stream))[0] == 200
        await stream.aclose()
    assert "does not speak HTTP" in caplog.text


async def test_a_call_ends_although_its_client_went_away_and_others_go_on(tmp_path: Path) -> None:
    calls = Calls()
    async with serving(tmp_path / "s", calls):
        waiting = await trio.open_unix_socket(tmp_path / "s")
        await waiting.send_all(post("/wait", b'{"ID": "1"}'))
        while not calls.seen:
            await trio.testing.wait_all_tasks_blocked()
        await waiting.aclose()
        stream = await trio.open_unix_socket(tmp_path / "s")
        await stream.send_all(ACTIVATE)
        assert (await answer(stream))[0] == 200
        calls.go.set()
        await stream.aclose()


async def test_an_end_waits_for_what_is_being_answered_and_not_for_idle_clients(tmp_path: Path) -> None:
    calls = Calls()
    async with serving(tmp_path / "s", calls) as stopping:
        idle = await trio.open_unix_socket(tmp_path / "s")
        waiting = await trio.open_unix_socket(tmp_path / "s")
        await waiting.send_all(post("/wait", b'{"ID": "1"}'))
        while not calls.seen:
            await trio.testing.wait_all_tasks_blocked()
        stopping.set()
        await trio.testing.wait_all_tasks_blocked()
        calls.go.set()
        assert await answer(waiting) == (200, {"Err": ""})
        assert await idle.receive_some() == b""
        await waiting.aclose()
        await idle.aclose()
    assert not (tmp_path / "s").exists()


def test_the_socket_is_private_and_a_dead_plugins_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "plugins" / "s"
    with api.listener(path):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(UserError, match="another plugin listens on"), api.listener(path):
            pass
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with api.listener(path):
        pass
    path.write_text("mine")
    with pytest.raises(UserError, match="exists and is no socket"), api.listener(path):
        pass
    assert path.read_text() == "mine"


def test_sockets_passed_by_others_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "1")
    with api.listener(tmp_path / "s"):
        assert (tmp_path / "s").exists()
        assert "LISTEN_FDS" not in os.environ
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "2")
    with pytest.raises(UserError, match="one socket"), api.listener(tmp_path / "s"):
        pass
