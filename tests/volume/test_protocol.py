"""What Docker asks and what the plugin keeps: no call but Mount and Unmount waits for anything."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.fuse.harness import free_environment, wait_for
from tests.volume.harness import WAIT_S, Plugin, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.servers import Server

    Plugins = Callable[..., Plugin]


@pytest.fixture
def silent(minio_server: Server) -> Iterator[Server]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield replace(minio_server, endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_definitions(plugins: Plugins, minio_server: Server) -> None:
    plugin = plugins(minio_server)
    assert plugin.call("Plugin.Activate")["Implements"] == ["VolumeDriver"]
    assert plugin.call("Capabilities")["Capabilities"] == {"Scope": "global"}
    assert plugin.names() == set()
    with pytest.raises(Refused, match="no such volume: photos"):
        plugin.get("photos")

    plugin.create("photos", bucket="photos", prefix="a/b", uid="7")
    plugin.create("photos", bucket="photos", prefix="/a/b/", uid="7")
    plugin.call("Create", Name="by-name", Opts=None)
    with pytest.raises(Refused, match=r"photos exists with other options \(bucket=photos, prefix=a/b, uid=7\)"):
        plugin.create("photos", bucket="other")
    with pytest.raises(Refused, match="option size is unknown; known: allow-other,"):
        plugin.create("new", bucket="photos", size="1")
    with pytest.raises(Refused, match="'Photos' is no bucket name"):
        plugin.create("new", bucket="Photos")
    with pytest.raises(Refused, match="credentials prod: there is no file of that name"):
        plugin.create("new", bucket="photos", credentials="prod")

    assert plugin.names() == {"photos", "by-name"}
    volume = plugin.get("photos")
    assert (volume["Name"], volume["Mountpoint"]) == ("photos", str(plugin.mountpoint("photos")))
    assert volume["CreatedAt"].endswith("Z")
    status = volume["Status"]
    assert (status["bucket"], status["prefix"], status["state"]) == ("photos", "a/b", "unmounted")
    assert status["options"]["uid"] == "7"
    assert plugin.status("by-name")["bucket"] == "by-name"
    assert plugin.call("Path", Name="photos")["Mountpoint"] == str(plugin.mountpoint("photos"))

    plugin.stop()
    assert not plugin.socket.exists()
    plugin.start()
    assert plugin.get("photos") == volume
    plugin.call("Remove", Name="photos")
    with pytest.raises(Refused, match="no such volume: photos"):
        plugin.call("Remove", Name="photos")
    with pytest.raises(Refused, match="no such volume: photos"):
        plugin.mount("photos")
    assert plugin.names() == {"by-name"}


@pytest.mark.parametrize("name", ["../x", "..", "a/b", "", "-x", "x" * 256, "a\0b"])
def test_a_name_never_leads_out_of_the_directories(plugins: Plugins, minio_server: Server, name: str) -> None:
    plugin = plugins(minio_server)
    for call in ("Create", "Get", "Mount", "Unmount", "Path", "Remove"):
        with pytest.raises(Refused):
            plugin.call(call, Name=name, ID="1", Opts={"bucket": "photos"})
    assert list(plugin.state.iterdir()) == []
    assert list((plugin.folder / "mounts").iterdir()) == []


def test_killed_at_any_time_and_started_again(plugins: Plugins, minio_server: Server) -> None:
    plugin = plugins(minio_server)
    plugin.create("a" * 255, bucket="photos")
    plugin.create("good", bucket="photos")
    plugin.stop(signal.SIGKILL)
    assert plugin.socket.exists()
    (plugin.state / ".half.part").write_text('{"version": 1, "na')
    (plugin.state / "bad.json").write_text('{"version": 1, "na')
    (plugin.state / "newer.json").write_text('{"version": 99}')
    plugin.allowed.append(r"volume (bad|newer): its definition .* cannot be read")
    plugin.start()
    assert plugin.names() == {"a" * 255, "good"}
    for name in ("bad", "newer"):
        for call in ("Create", "Get", "Mount", "Remove"):
            with pytest.raises(Refused, match=f"{name}.json cannot be read .*; mend or remove that file"):
                plugin.call(call, Name=name, Opts={"bucket": "photos"}, ID="1")
        assert (plugin.state / f"{name}.json").exists()


def test_a_second_plugin_is_refused(plugins: Plugins, minio_server: Server) -> None:
    plugin = plugins(minio_server)
    for options, text in (
        ((), "is used by another s3fuse plugin"),
        ((f"--state-dir={plugin.folder}/other",), "another plugin listens on"),
    ):
        done = subprocess.run([*plugin.command(), *options], capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 1
        assert text in done.stderr
    plugin.call("List")


def test_nothing_waits_for_a_server_that_says_nothing(plugins: Plugins, silent: Server) -> None:
    plugin = plugins(silent)
    plugin.create("vol", bucket="photos")
    with ThreadPoolExecutor() as pool:
        mounting = pool.submit(plugin.mount, "vol")
        wait_for(lambda: plugin.status("vol")["state"] == "starting", timeout_s=WAIT_S)
        for _ in range(2):
            plugin.call("Plugin.Activate")
            plugin.call("Capabilities")
            plugin.call("List")
            plugin.call("Path", Name="vol")
            plugin.create("vol", bucket="photos")
            plugin.create("more", bucket="photos")
            plugin.call("Remove", Name="more")
        assert not mounting.done(), "all of that was answered before the Mount"
        with pytest.raises(Refused, match=f"{silent.endpoint} does not answer"):
            mounting.result(WAIT_S)
    assert plugin.status("vol")["last_error"]
    assert plugin.gone("vol")
    plugin.allowed.append("volume vol cannot be mounted")
    plugin.call("Remove", Name="vol")


def test_nothing_waits_for_a_hung_daemon(plugins: Plugins, minio_server: Server) -> None:
    plugin = plugins(minio_server)
    plugin.create("hung", bucket="hung-bucket", create_bucket="true")
    plugin.mount("hung")
    pid = plugin.serving("hung")
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(20):  # 20 waits of seconds each would not fit into this test
            assert plugin.names() == {"hung"}
            plugin.get("hung")
            plugin.call("Path", Name="hung")
            plugin.create("hung", bucket="hung-bucket", create_bucket="true")
    finally:
        os.kill(pid, signal.SIGCONT)
    plugin.unmount("hung")
    plugin.until_gone("hung")


def test_socket_activation(plugins: Plugins, minio_server: Server, tmp_path: Path) -> None:
    """systemd holds the socket: what Docker asks while the plugin is away is answered when it is back."""
    plugin = plugins(minio_server, start=False)
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.settimeout(WAIT_S)
    with socket.socket(socket.AF_UNIX) as held, told:
        held.bind(str(plugin.socket))
        held.listen()

        def start() -> subprocess.Popen[bytes]:
            words = 'exec 3<&"$0" && LISTEN_PID=$$ && export LISTEN_PID && exec "$@"'
            with plugin.log.open("ab") as log:
                return subprocess.Popen(
                    ["bash", "-c", words, str(held.fileno()), *plugin.command()],
                    pass_fds=[held.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=free_environment(
                        **minio_server.environment, LISTEN_FDS="1", NOTIFY_SOCKET=str(tmp_path / "notify")
                    ),
                )

        with ThreadPoolExecutor() as pool:
            early = pool.submit(plugin.create, "vol", bucket="photos")
            plugin.process = start()
            assert told.recv(100) == b"READY=1"
            early.result(WAIT_S)
            plugin.stop()
            assert told.recv(100) == b"STOPPING=1"
            assert plugin.socket.exists(), "it belongs to systemd"
            while_away = pool.submit(plugin.names)
            plugin.process = start()
            assert while_away.result(WAIT_S) == {"vol"}


def test_many_at_once(plugins: Plugins, minio_server: Server) -> None:
    """Calls from many threads for few volumes: one daemon each, and nothing is left at the end."""
    plugin = plugins(minio_server)
    names = ["one-volume", "two-volumes", "three-volumes"]
    pids: dict[str, set[int]] = {name: set() for name in names}
    first = threading.Barrier(12, timeout=WAIT_S)

    def use(number: int) -> None:
        name = names[number % len(names)]
        plugin.create(name, create_bucket="true")
        path = plugin.mount(name, f"id{number}")
        first.wait()
        pids[name].add(plugin.daemon(name))
        (path / f"file{number}").write_text(name)
        plugin.unmount(name, f"id{number}")

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(use, range(12)))
    assert [len(found) for found in pids.values()] == [1, 1, 1]
    for name in names:
        plugin.until_gone(name)
        assert plugin.status(name)["mount_ids"] == 0
        plugin.call("Remove", Name=name)
    assert plugin.names() == set()
