"""What is this user's alone: each way in which a directory, a file or a socket may be somebody else's."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from s3fuse import control
from s3fuse.daemon import set_up_logging
from s3fuse.errors import ExitCode, UserError
from s3fuse.host.private import NotPrivate, PrivateDirectory, open_log, open_private_file, remove_new_log
from s3fuse.session import log as session_log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives things to other users")

OTHER = 65534
MOUNTPOINT = Path("/mnt/x")
ABOUT = {"mountpoint": str(MOUNTPOINT), "pid": os.getpid()}


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(control, "runtime_dir", lambda: tmp_path / "run")
    return tmp_path / "run"


# -- the runtime directory


def a_link(path: Path) -> str:
    path.with_name("elsewhere").mkdir(mode=0o700)
    path.symlink_to("elsewhere")
    return f"is a symbolic link, .*mv {path} {path}.old"


def a_dangling_link(path: Path) -> str:
    path.symlink_to("nowhere")
    return f"is a symbolic link, .*mv {path} {path}.old"


def a_file(path: Path) -> str:
    path.touch(0o600)
    return "is no directory"


def a_fifo(path: Path) -> str:
    os.mkfifo(path)
    return "is no directory"


def anothers(path: Path) -> str:
    path.mkdir(mode=0o700)
    os.chown(path, OTHER, OTHER)
    return rf"belongs to user nobody \({OTHER}\), .*mv {path} {path}.old"


def nameless(path: Path) -> str:
    path.mkdir(mode=0o700)
    os.chown(path, 3_999_999, 0)
    return "belongs to user 3999999, "


def of_mode(mode: int) -> Callable[[Path], str]:
    def make(path: Path) -> str:
        path.mkdir()
        path.chmod(mode)
        return rf"is open to others \(mode {mode:04o}\), .*chmod 700 {path}"

    return make


WRONG = [a_link, a_dangling_link, a_file, a_fifo, anothers, nameless, *map(of_mode, (0o755, 0o770, 0o701, 0o1777))]
USES: dict[str, Callable[[], object]] = {
    "mount": partial(control.open_door, MOUNTPOINT, ABOUT),
    "default log": control.make_runtime_dir,
    "session": partial(control.session_path, MOUNTPOINT, 1),
    "list": control.mounts,
    "draining": partial(control.draining, Path("/cache")),
    **{verb: partial(control.request, MOUNTPOINT, verb) for verb in ("status", "flush", "umount", "restart")},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("use", USES)
def test_a_runtime_directory_that_is_not_ours_is_not_used(
    runtime: Path, wrong: Callable[[Path], str], use: str
) -> None:
    """Nothing in it is believed, asked or removed."""
    text = wrong(runtime)
    left = []
    listener = socket.socket(socket.AF_UNIX)
    if runtime.is_dir():
        for name in (control.socket_path(MOUNTPOINT).stem, "another"):
            (runtime / f"{name}.json").write_text(json.dumps({"mountpoint": "/mnt/dead", "pid": 1}))
            (runtime / f"{name}.1.session").touch()
        listener.bind(str(control.socket_path(MOUNTPOINT)))
        listener.listen()
        listener.setblocking(False)
        left = sorted(runtime.iterdir())
    with listener:
        with pytest.raises(UserError, match=f"the runtime directory {runtime} {text}"):
            USES[use]()
        assert control.last_said(MOUNTPOINT) == {}
        if runtime.is_dir():
            assert sorted(runtime.iterdir()) == left
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_a_missing_one_is_no_error(runtime: Path) -> None:
    assert control.mounts() == []
    assert control.last_said(MOUNTPOINT) == {}
    with pytest.raises(FileNotFoundError):
        control.request(MOUNTPOINT, "status")
    assert not runtime.exists()
    control.make_runtime_dir()
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700


def test_who_may_not_mend_it_learns_what_else_can_be_done(tmp_path: Path) -> None:
    """A user whose directory in /tmp another one has made first; the command line, as that user runs it."""
    user = 61_000 + os.getpid() % 1000
    place = Path(f"/tmp/s3fuse-{user}")
    place.mkdir(mode=0o755)
    try:
        (place / "dead.json").write_text(json.dumps(ABOUT))
        environment = {k: v for k, v in os.environ.items() if k != "XDG_RUNTIME_DIR"} | {"HOME": "/nonexistent"}
        # Python may be where only root gets.
        apart = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        apart += [
            "--inh-caps=+dac_read_search",
            "--ambient-caps=+dac_read_search",
            "--",
            sys.executable,
            "-m",
            "s3fuse",
        ]
        for words in (["status"], ["flush", "/mnt"], ["umount", "/mnt"], ["restart", "/mnt"], ["status", "/mnt"]):
            done = subprocess.run([*apart, *words], env=environment, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stdout) == (ExitCode.FAILED, ""), words
            assert done.stderr == (
                f"s3fuse: the runtime directory {place} belongs to user root (0), and s3fuse takes only what is its "
                "user's alone; have it removed by its owner or root, or set XDG_RUNTIME_DIR to a directory of yours\n"
            )
        assert [path.name for path in place.iterdir()] == ["dead.json"]
    finally:
        (place / "dead.json").unlink()
        place.rmdir()


@pytest.mark.parametrize("owner", [0, OTHER])
@pytest.mark.parametrize("kind", ["file", "link", "socket"])
def test_what_others_left_in_it_stays(runtime: Path, kind: str, owner: int) -> None:
    """Root may have moved it there; what is ours and dead goes."""
    runtime.mkdir(mode=0o700)
    path = runtime / "left.json"
    if kind == "file":
        path.write_text(json.dumps(ABOUT))
    elif kind == "link":
        runtime.with_name("about").write_text(json.dumps(ABOUT))
        path.symlink_to("../about")
    else:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    os.chown(path, owner, owner, follow_symlinks=False)
    assert control.mounts() == []
    assert path.is_symlink() or path.exists() == (owner != 0)
    assert runtime.with_name("about").exists() == (kind == "link")


def test_a_running_mount_is_not_ended_for_it(runtime: Path, caplog: pytest.LogCaptureFixture) -> None:
    door = control.open_door(MOUNTPOINT, ABOUT)
    with door.listener:
        runtime.chmod(0o777)
        control.say_anew(MOUNTPOINT, {**ABOUT, "pid": 7}, door)
        assert f"{runtime} is open to others" in caplog.text
        runtime.chmod(0o700)
        assert control.last_said(MOUNTPOINT) == ABOUT


def test_paths_of_any_length(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's address has 108 bytes; a home directory may be longer."""
    runtime = runtime.joinpath(*["a" * 60] * 4)
    monkeypatch.setattr(control, "runtime_dir", lambda: runtime)
    with control.open_door(MOUNTPOINT, ABOUT).listener:
        assert control.mounts() == [ABOUT]


@pytest.mark.parametrize(
    ("value", "folder"),
    [("run/user", "/tmp/s3fuse-7"), (".", "/tmp/s3fuse-7"), ("/run/user/7/", "/run/user/7/s3fuse")],
)
def test_a_relative_place_is_none(monkeypatch: pytest.MonkeyPatch, value: str, folder: str) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 7)
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    assert control.runtime_dir() == Path(folder)


# -- the socket


def as_other(code: str, *descriptors: int, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Python that another user runs; ends when its input does."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import os, socket, sys\nos.setgid({OTHER}); os.setuid({OTHER})\n{code}"],
        pass_fds=descriptors,
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


@pytest.fixture
def foreign_socket(runtime: Path) -> Iterator[socket.socket]:
    """A socket under our name that another user listens at."""
    runtime.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(control.socket_path(MOUNTPOINT)))
        number = listener.fileno()
        code = f"socket.socket(fileno={number}).listen()\nprint(flush=True)\nsys.stdin.read()"
        with as_other(code, number) as process:
            assert process.stdout is not None
            process.stdout.readline()
            listener.setblocking(False)
            yield listener


@pytest.mark.parametrize("verb", ["status", "flush", "umount", "restart"])
def test_a_socket_that_another_user_serves_is_told_nothing(foreign_socket: socket.socket, verb: str) -> None:
    with pytest.raises(UserError, match=rf"is served by user nobody \({OTHER}\) and not by you"):
        control.request(MOUNTPOINT, verb, secret="s")
    connection, _ = foreign_socket.accept()
    with connection:
        assert connection.recv(1) == b""


async def test_another_users_request_is_not_answered(runtime: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def umount(request: dict[str, Any], progress: object) -> dict[str, Any]:
        raise AssertionError

    stopping = trio.Event()
    door = control.open_door(MOUNTPOINT, ABOUT)
    path = control.socket_path(MOUNTPOINT)
    os.chmod(runtime, 0o711)
    os.chmod(path, 0o777)
    code = f"""
end = socket.socket(socket.AF_UNIX)
end.connect({path.name!r})
try:
    end.sendall(b'{{"verb": "umount"}}\\n')
    print(end.recv(10))
except ConnectionError:
    print(b"")
"""
    async with trio.open_nursery() as nursery:
        await nursery.start(control.serve, door, MOUNTPOINT, {"umount": umount}, stopping)
        with as_other(code, cwd=runtime) as process:
            out, _ = await trio.to_thread.run_sync(process.communicate)
        assert out == b"b''\n"
        os.chmod(runtime, 0o700)
        stopping.set()
    assert "user nobody (65534) asked at the control socket, and got no answer" in caplog.text


# -- files


@pytest.mark.parametrize("made", ["link", "fifo", "other"])
def test_a_session_of_others_is_not_believed(tmp_path: Path, made: str) -> None:
    path = tmp_path / "s.session"
    with session_log.Log(tmp_path / "mine", new=True)._map:
        pass
    if made == "link":
        path.symlink_to("mine")
    elif made == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes((tmp_path / "mine").read_bytes())
        os.chown(path, OTHER, OTHER)
    for use in (lambda: list(session_log.read(path)), lambda: session_log.Log(path, new=False)):
        with pytest.raises((UserError, OSError)):
            use()


def test_files_and_directories_reached_through_a_descriptor(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with PrivateDirectory(tmp_path) as folder:
        folder.write("a.json", b"one")
        folder.write("a.json", b"two")
        assert folder.read("a.json") == b"two"
        assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o600
        (tmp_path / "b.json.part").symlink_to("a.json")
        with pytest.raises(FileExistsError):
            folder.write("b.json", b"three")
        assert folder.read("a.json") == b"two"
        assert folder.names(".json") == ["a.json"]
        (tmp_path / "dir").mkdir()
        for name in ("a.json", "a.json", "dir", "b.json.part"):
            folder.remove(name)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json.part", "dir"]
        with pytest.raises(FileNotFoundError):
            folder.read("a.json")
        tmp_path.rename(tmp_path.with_name("moved"))
        folder.write("a.json", b"four")
    assert (tmp_path.with_name("moved") / "a.json").read_bytes() == b"four"
    with pytest.raises(NotPrivate):
        open_private_file(tmp_path.with_name("moved"), os.O_RDONLY)


# -- logs


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("before", [None, 0o600, 0o644, 0o666, 0o640])
def test_a_log_is_for_its_user(tmp_path: Path, umask: int, before: int | None) -> None:
    path = tmp_path / "log"
    if before is not None:
        path.write_text("before\n")
        path.chmod(before)
    mask = os.umask(umask)
    try:
        descriptor = open_log(str(path))
    finally:
        os.umask(mask)
    os.write(descriptor, b"after\n")
    os.close(descriptor)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == ("after\n" if before is None else "before\nafter\n")


def test_a_log_of_another_user(tmp_path: Path) -> None:
    path = tmp_path / "a log"
    path.touch()
    os.chown(path, OTHER, OTHER)
    with pytest.raises(UserError, match=rf"--log-file: {path} belongs to user nobody .*: chown 0 '{path}'") as raised:
        set_up_logging("info", path)
    assert raised.value.exit_code == ExitCode.USAGE
    (tmp_path / "link").symlink_to("/etc/hostname")
    os.lchown(tmp_path / "link", OTHER, OTHER)
    with pytest.raises(UserError, match=r"--log-file: .*/link is a symbolic link of user nobody"):
        set_up_logging("info", tmp_path / "link")
    os.close(open_log(str(path), is_new_mount=False))
    assert path.stat().st_uid == OTHER, "a mount that runs goes on with it"


def test_links_of_ours_and_devices_are_taken(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("log")
    os.close(open_log(str(tmp_path / "link")))
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600
    mode = os.stat("/dev/null").st_mode
    os.close(open_log("/dev/null"))
    assert os.stat("/dev/null").st_mode == mode


def test_only_a_log_of_its_own_goes_with_a_failed_mount(tmp_path: Path) -> None:
    """`--log-file /dev/null` is empty, too."""
    for path, is_new, goes in (
        ("new", True, True),
        ("old", False, False),
        ("written", True, False),
        ("dev", True, False),
    ):
        if path == "dev":
            os.mknod(tmp_path / path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        else:
            (tmp_path / path).write_text("text" if path == "written" else "")
        remove_new_log(tmp_path / path, is_new=is_new)
        assert (tmp_path / path).exists() != goes, path


@pytest.mark.parametrize("foreground", [False, True])
def test_the_command_leaves_a_log_that_was_there(tmp_path: Path, foreground: bool) -> None:
    log, device = tmp_path / "log", tmp_path / "null"
    log.touch()
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (tmp_path / "mnt").mkdir()
    for path in (log, device):
        words = ["mount", "--log-file", str(path), "--endpoint", "http://h:1", "bucket", str(tmp_path / "mnt")]
        words += ["-f"] if foreground else []
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MINIO_"))}
        environment["HOME"] = str(tmp_path)
        done = subprocess.run(
            [sys.executable, "-m", "s3fuse", *words], env=environment, capture_output=True, timeout=60
        )
        assert done.returncode == ExitCode.USAGE
        assert path.exists()
