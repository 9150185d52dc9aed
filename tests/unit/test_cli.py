"""The command line: one line and an exit code for each failure, and options that arrive as they were given."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from s3fuse import cli, config, control, kernel
from s3fuse.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from s3fuse.config import MountConfig

    Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No mounts but this test's own, no server and no keys."""
    folder = tmp_path / "run"
    monkeypatch.setattr(control, "runtime_dir", lambda: folder)
    every = kernel.dead_mounts
    monkeypatch.setattr(kernel, "dead_mounts", lambda: [e for e in every() if e.mountpoint.startswith(str(tmp_path))])
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in list(os.environ):
        if name.startswith(("AWS_", "MINIO_", "MC_")):
            monkeypatch.delenv(name)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs s3fuse with these arguments; gives exit code, output and errors."""

    def invoke(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["s3fuse", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return invoke


@pytest.fixture
def mount(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MountConfig]:
    """What `s3fuse mount` with these arguments would serve."""
    served: list[MountConfig] = []

    def start(
        config: MountConfig, worker: object, log_hint: str, *, foreground: bool, log_is_new: bool = False
    ) -> None:
        served.append(config)

    monkeypatch.setattr("s3fuse.daemon.start_keeper", start)
    monkeypatch.setattr("s3fuse.daemon.set_up_logging", lambda level, log_file: None)

    def invoke(*arguments: str, foreground: bool = True) -> MountConfig:
        code, _, errors = run("mount", *(["-f"] if foreground else []), *arguments)
        assert (code, errors) == (0, "")
        return served.pop()

    return invoke


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any] | Exception], list[dict[str, Any]]]:
    """Has every daemon give this answer; gives the list of what it is asked."""

    def answer(result: dict[str, Any] | Exception) -> list[dict[str, Any]]:
        asked = []

        def request(mountpoint: Path, verb: str, **arguments: Any) -> dict[str, Any]:
            asked.append({"mountpoint": mountpoint, "verb": verb, **arguments})
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(control, "request", request)
        return asked

    return answer


@pytest.fixture
def listed(runtime: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Lists a mount with this to say of it; something listens at its socket."""
    with ExitStack() as stack:

        def add(about: dict[str, Any]) -> None:
            runtime.mkdir(mode=0o700)
            path = control.socket_path(Path(about["mountpoint"]))
            path.with_suffix(".json").write_text(json.dumps(about))
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            listener.listen()

        yield add


@pytest.fixture
def dead_mount(tmp_path: Path) -> Iterator[Path]:
    """A mount whose daemon is gone."""
    path = tmp_path / "dead"
    path.mkdir()
    os.close(kernel.mount(path, source="s3fuse#test", allow_other=False, flags=("ro",)))
    yield path
    with suppress(OSError):
        kernel.unmount(path, lazy=True)


# -- options


def test_defaults(mount: Callable[..., MountConfig], tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        config = mount("bucket/some/prefix", str(tmp_path))
    finally:
        os.umask(mask)
    assert (config.bucket, config.prefix, config.mountpoint) == ("bucket", "some/prefix/", tmp_path)
    assert (config.close, config.fsync, config.attr_ttl_s, config.drain_timeout_s) == ("local", "upload", 1.0, 300.0)
    assert (config.memory_bytes, config.dirty_size_bytes, config.max_requests) == (256 << 20, 4 << 30, 32)
    assert (config.file_mode, config.dir_mode) == (0o640, 0o750)
    assert (config.uid, config.gid) == (os.geteuid(), os.getegid())
    assert config.allow_other == (os.geteuid() == 0)
    assert [config.read_only, config.nonempty, config.create_bucket] == [False] * 3


LONG = (
    "--endpoint http://h:1 --region eu --memory 64MiB --dirty-size 1GB --max-requests 5 --close upload --fsync local "
    "--drain-timeout 2m --attr-ttl 500ms --read-only --uid 5 --gid 6 --umask 077 --file-mode 0644 --nonempty "
    "--no-allow-other --create-bucket --log-level debug --cache-dir /c --credentials-file /k --ca-file /ca"
)
EXPECTED = {
    "endpoint": "http://h:1",
    "region": "eu",
    "memory_bytes": 64 << 20,
    "dirty_size_bytes": 10**9,
    "max_requests": 5,
    "close": "upload",
    "fsync": "local",
    "drain_timeout_s": 120.0,
    "attr_ttl_s": 0.5,
    "read_only": True,
    "uid": 5,
    "gid": 6,
    "file_mode": 0o600,
    "nonempty": True,
    "create_bucket": True,
    "log_level": "debug",
    "cache_dir": Path("/c"),
    "credentials_file": Path("/k"),
    "ca_file": "/ca",
}


def test_long_options(mount: Callable[..., MountConfig], tmp_path: Path) -> None:
    config = mount("bucket", str(tmp_path), *LONG.split())
    assert {name: getattr(config, name) for name in EXPECTED} == EXPECTED
    assert not config.allow_other


def test_the_same_in_fstab_form(mount: Callable[..., MountConfig], tmp_path: Path) -> None:
    words = re.sub(r" ([^- ])", r"=\1", LONG).replace("--", "").split()
    words = ["ro", "_netdev", "defaults", *(word.replace("-", "_") for word in words if word != "read-only")]
    config = mount("bucket", str(tmp_path), "-o", ",".join(words[:8]), "-o", ",".join(words[8:]))
    assert {name: getattr(config, name) for name in EXPECTED} == EXPECTED
    assert not config.allow_other


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("defaults", {"nosuid", "nodev"}),
        ("nosuid,nodev,noexec,noatime,nouser,_netdev,nofail,x-a,x-b.c=d,X-mount.mkdir", "nosuid nodev noexec noatime"),
        ("relatime", {"nosuid", "nodev"}),
        ("noatime,relatime,noexec,exec", {"nosuid", "nodev"}),
        ("noatime,atime,nodiratime,auto,noauto,rw,comment=any", {"nosuid", "nodev"}),
        ("suid,dev", set()),
        ("suid,nosuid,nodev,dev", {"nosuid"}),
        ("suid,dev,user", {"nosuid", "nodev", "noexec"}),
        ("users,exec,suid,ro", {"ro", "nodev"}),
        ("suid,dev,user=somebody", {"nosuid", "nodev", "noexec"}),
        ("suid,dev,owner", {"nosuid", "nodev"}),
    ],
)
def test_the_words_of_mount(
    mount: Callable[..., MountConfig], tmp_path: Path, words: str, flags: set[str] | str
) -> None:
    """The later word holds, as for mount(8)."""
    wanted = set(flags.split()) if isinstance(flags, str) else flags
    assert set(mount("bucket", str(tmp_path), "-o", words).mount_flags()) == wanted


def test_an_older_versions_options_are_safe() -> None:
    """It did not write down what it did not know."""
    assert config.from_json({"mountpoint": "/m", "bucket": "bucket"}).mount_flags() == kernel.SAFE_FLAGS


def test_paths_do_not_depend_on_the_directory(
    mount: Callable[..., MountConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mnt").mkdir()
    (tmp_path / "link").symlink_to("mnt")
    (tmp_path / "secret").symlink_to("of-today")
    monkeypatch.chdir(tmp_path)
    words = "link --cache-dir cache --credentials-file secret --ca-file ca --log-file log"
    config = mount("bucket", *words.split())
    assert config.mountpoint == tmp_path / "mnt", "as the kernel names it"
    assert config.credentials_file == tmp_path / "secret", "it may point elsewhere tomorrow"
    assert (config.cache_dir, config.log_file) == (tmp_path / "cache", tmp_path / "log")
    assert config.ca_file == str(tmp_path / "ca")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("mount --memory x bucket M", "s3fuse: --memory: 'x' is not allowed; it takes a size such as 64MiB"),
        ("mount --memory 1MiB bucket M", "s3fuse: --memory: '1048576' is not allowed; it takes at least 16MiB"),
        ("mount --attr-ttl soon bucket M", "s3fuse: --attr-ttl: 'soon' is not allowed; it takes a time such as 30s"),
        ("mount --umask 9 bucket M", "s3fuse: --umask: '9' is not allowed; it takes an octal mode such as 0644"),
        ("mount -o memory=x bucket M", "s3fuse: --memory: 'x' is not allowed"),
        ("mount -o nosuch bucket M", "s3fuse: -o nosuch: there is no such option"),
        ("mount -o help bucket M", "s3fuse: -o help: there is no such option"),
        ("mount -o ro=1 bucket M", "s3fuse: -o ro: there is no such option"),
        ("mount -o read_only=1 bucket M", "s3fuse: -o read-only takes no value"),
        ("mount -o no-allow-other=1 bucket M", "s3fuse: -o no-allow-other takes no value"),
        ("mount -o endpoint bucket M", "s3fuse: -o endpoint needs a value"),
        ("mount -o close=never bucket M", "'never' is not one of 'local', 'upload'"),
        ("mount Bucket M", "s3fuse: 'Bucket' is no bucket name: 3 to 63"),
        ("mount bucket", "Missing argument 'MOUNTPOINT'"),
        ("mount --nosuch bucket M", "No such option"),
        ("mount -f bucket M", "s3fuse: no server is named; give --endpoint"),
        ("mount bucket M", "s3fuse: no server is named; give --endpoint"),
        ("mount --endpoint http://h:1 bucket M", "s3fuse: no keys were found"),
        ("mount --endpoint http://h:x bucket M", "s3fuse: --endpoint: 'http://h:x' is not allowed; it takes http://"),
        ("mount --log-file /nowhere/log bucket M", "s3fuse: --log-file /nowhere/log cannot be written"),
        ("server --port 70000", "'--port'"),
        (
            "plugin --name-rule bucket",
            "s3fuse: --name-rule: 'bucket' is not allowed; it takes BUCKET[/PREFIX] with {name}",
        ),
        ("plugin --endpoint http://a:b@h", "s3fuse: --endpoint has a user or a password in it"),
        ("plugin --linger soon", "s3fuse: --linger: 'soon' is not allowed"),
        ("dance", "No such command 'dance'"),
    ],
)
def test_usage(tmp_path: Path, arguments: str, text: str) -> None:
    # A process of its own: a wrong option that is let through would mount, and daemons fork.
    (tmp_path / "mnt").mkdir()
    words = [str(tmp_path / "mnt") if word == "M" else word for word in arguments.split()]
    done = subprocess.run([sys.executable, "-m", "s3fuse", *words], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (ExitCode.USAGE, ""), done.stderr
    assert text in done.stderr
    if text.startswith("s3fuse:"):
        assert done.stderr.count("\n") == 1


def test_where_the_log_is(mount: Callable[..., MountConfig], tmp_path: Path, runtime: Path) -> None:
    """The settings that the daemon gets say it, and `status` says what they say."""
    beside = control.socket_path(tmp_path).with_suffix(".log")
    assert mount("bucket", str(tmp_path), foreground=False).log_file == beside
    assert beside.parent == runtime
    assert mount("bucket", str(tmp_path)).log_file is None
    for foreground in (False, True):
        assert mount("--log-file", "/l", "bucket", str(tmp_path), foreground=foreground).log_file == Path("/l")


def test_a_failed_mount_leaves_no_empty_log(tmp_path: Path) -> None:
    words = ["mount", "--log-file", "daemon.log", "--endpoint", "http://h:1", "bucket", "mnt"]
    done = subprocess.run([sys.executable, "-m", "s3fuse", *words], cwd=tmp_path, capture_output=True, timeout=30)
    assert done.returncode == ExitCode.USAGE
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick_as_it_loads_nothing_big() -> None:
    big = ("minio", "pyfuse3", "rich", "httptools", "urllib3", "sqlite3")
    code = f"import sys; from s3fuse import cli; print([name for name in {big} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=30) == "[]\n"


@pytest.mark.parametrize("verb", ["mount", "umount", "flush", "restart", "status", "server", "plugin"])
def test_every_verb_has_help(run: Run, verb: str) -> None:
    code, text, _ = run(verb, "--help")
    assert code == 0
    assert f"Usage: s3fuse {verb}" in text
    assert verb in run("--help")[1]


def test_help_shows_options_by_group(run: Run) -> None:
    text = run("mount", "--help")[1]
    headings = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert headings == [
        "Server and keys",
        "Local state and limits",
        "Meaning of calls",
        "How it looks",
        "Running it",
        "Other",
    ]
    assert text.index("Local state") < text.index("--memory") < text.index("Meaning of calls") < text.index("--close ")


# -- status


def test_status_of_nothing(run: Run, tmp_path: Path) -> None:
    assert run("status") == (0, "nothing is mounted\n", "")
    assert run("status", "--json") == (0, "[]\n", "")
    code, _, errors = run("status", str(tmp_path))
    assert (code, errors) == (ExitCode.FAILED, f"s3fuse: {tmp_path} is not mounted by s3fuse; see s3fuse status\n")


STATUS = {
    "mountpoint": "/mnt/[b]x",
    "bucket": "bucket",
    "prefix": "",
    "endpoint": "http://h:1",
    "state": "mounted",
    "pid": 77,
    "log": "/log/" + "l" * 90,
    "pending": {
        "files": 1,
        "bytes": 12345,
        "items": [{"name": "odd [/name] :smile:", "error": "refused", "state": ""}],
    },
    "cache": {
        "memory_bytes": 1,
        "memory_limit_bytes": 2000,
        "disk_bytes": 3,
        "disk_limit_bytes": 4000,
        "disk_hits": 5,
        "staged_bytes": 6,
        "dirty_limit_bytes": 7000,
        "waiting_writers": 2,
        "directory": "/cache/" + "d" * 90,
    },
    "capabilities": {"server": "MinIO", "conflict_check": "atomic"},
    "conflicts": ["a.conflict-host-time"],
    "hidden_keys": 3,
    "last_error": "a [red]error",
    "server": {
        "state": "down",
        "since": 1_800_000_000,
        "needs": "credentials",
        "last_error": "ExpiredToken",
        "last_error_at": 1_800_000_001,
    },
}


@pytest.fixture
def mounted(listed: Callable[[dict[str, Any]], None]) -> Path:
    """A mount that is listed, at a mountpoint with brackets in its name."""
    about = {"mountpoint": "/mnt/[b]x", "pid": os.getpid(), "bucket": "bucket", "prefix": "", "endpoint": "http://h:1"}
    listed({**about, "log": "/its/log"})
    return Path("/mnt/[b]x")


def test_status_shows_names_as_they_are(run: Run, mounted: Path, answers: Callable[..., object]) -> None:
    answers(STATUS)
    code, text, _ = run("status", str(mounted))
    assert code == 0
    for part in (
        "/mnt/[b]x",
        "odd [/name] :smile:: refused",
        "a.conflict-host-time",
        "a [red]error",
        "12,345",
        "pid 77",
        "MinIO, down since 2027-01-1",
        "needs credentials",
        "ExpiredToken",
    ):
        assert part in text
    whole = re.sub(r"\s", "", text)
    assert "/cache/" + "d" * 90 in whole
    assert "log/log/" + "l" * 90 in whole
    assert json.loads(run("status", "--json")[1]) == [STATUS]


def test_status_of_a_daemon_that_does_not_answer(run: Run, mounted: Path, answers: Callable[..., object]) -> None:
    answers(TimeoutError("timed out"))
    code, text, _ = run("status", str(mounted))
    assert code == ExitCode.FAILED, "as a health check wants it"
    assert "no answer: timed out, pid" in text
    assert re.search(r"^ *log +/its/log *$", text, re.MULTILINE), "which is where one looks then"


def test_status_of_a_dead_daemons_mount(run: Run, dead_mount: Path) -> None:
    code, text, _ = run("status", str(dead_mount))
    assert code == ExitCode.FAILED
    assert "dead; mount the bucket there again" in re.sub(r"\s+", " ", text)
    code, text, _ = run("status", "--json")
    assert code == 0
    assert [(m["mountpoint"], m["bucket"], m["prefix"], m["pid"]) for m in json.loads(text)] == [
        (str(dead_mount), "test", "", None)
    ]
    assert run("status", str(dead_mount.parent))[0] == ExitCode.FAILED


# -- flush


def test_flush(run: Run, tmp_path: Path, answers: Callable[..., list[dict[str, Any]]]) -> None:
    asked = answers({"failed": []})
    assert run("flush", str(tmp_path)) == (0, "", "")
    assert (asked[0]["mountpoint"], asked[0]["verb"]) == (tmp_path, "flush")


def test_flush_lists_what_could_not_be_uploaded(run: Run, tmp_path: Path, answers: Callable[..., object]) -> None:
    answers({"failed": [{"name": "a/b", "bytes": 5, "error": "quota", "state": "waiting"}]})
    code, _, errors = run("flush", str(tmp_path))
    assert code == ExitCode.FAILED
    assert f"these files of {tmp_path} are not in the bucket" in errors
    assert "  a/b (5 bytes): quota\n" in errors


@pytest.mark.parametrize("verb", ["flush", "umount"])
@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (FileNotFoundError(), ExitCode.FAILED, "is not mounted by s3fuse; see s3fuse status"),
        (ConnectionRefusedError(), ExitCode.FAILED, "is not mounted by s3fuse; see s3fuse status"),
        (TimeoutError(), ExitCode.FAILED, "does not answer; see its log and s3fuse status"),
        (UserError("it is in use", ExitCode.REFUSED), ExitCode.REFUSED, "it is in use"),
    ],
)
def test_no_good_answer(
    run: Run, tmp_path: Path, answers: Callable[..., object], verb: str, error: Exception, code: ExitCode, text: str
) -> None:
    answers(error)
    found, _, errors = run(verb, str(tmp_path))
    assert found == code
    assert text in errors
    assert errors.count("\n") == 1


def test_flush_of_a_dead_daemons_mount(run: Run, dead_mount: Path) -> None:
    code, _, errors = run("flush", str(dead_mount))
    assert (code, errors.count("\n")) == (ExitCode.FAILED, 1)
    assert f"the daemon of {dead_mount} is dead; mount the bucket there again" in errors


# -- umount


def test_umount(run: Run, tmp_path: Path, answers: Callable[..., list[dict[str, Any]]]) -> None:
    asked = answers({"pending": []})
    assert run("umount", str(tmp_path), "--drain-timeout", "2m") == (0, "", "")
    assert asked[0]["verb"] == "umount"
    assert asked[0]["drain_timeout_s"] == 120.0


def test_umount_with_uploads_left(run: Run, tmp_path: Path, answers: Callable[..., object]) -> None:
    answers({"pending": [{"name": "a/b", "bytes": 5, "error": None, "state": "waiting"}]})
    code, _, errors = run("umount", str(tmp_path))
    assert code == ExitCode.PENDING
    assert f"{tmp_path} is unmounted, but these wait in the journal" in errors
    assert "  a/b (5 bytes): waiting\n" in errors


def test_umount_of_a_dead_daemons_mount(run: Run, dead_mount: Path) -> None:
    code, _, errors = run("umount", str(dead_mount))
    assert code == ExitCode.PENDING
    assert f"the daemon of {dead_mount} is dead and the mount detached" in errors
    assert kernel.mount_entry(dead_mount) is None


def test_umount_of_a_living_mount_whose_socket_is_elsewhere(
    run: Run, dead_mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "is_dead", lambda path: False)
    code, _, errors = run("umount", str(dead_mount))
    assert code == ExitCode.FAILED
    assert f"the daemon of {dead_mount} is not to be found" in errors
    assert kernel.mount_entry(dead_mount) is not None


def test_umount_when_the_daemon_dies_meanwhile(run: Run, tmp_path: Path, answers: Callable[..., object]) -> None:
    answers(ConnectionError("ended before it answered"))
    code, _, errors = run("umount", str(tmp_path))
    assert code == ExitCode.PENDING
    assert "in its journal" in errors


def test_a_mute_daemons_mount_is_left_alone(run: Run, dead_mount: Path, answers: Callable[..., object]) -> None:
    answers(TimeoutError())
    assert run("umount", str(dead_mount))[0] == ExitCode.FAILED
    assert kernel.mount_entry(dead_mount) is not None


def test_umount_returns_when_the_daemon_has_ended(
    run: Run, listed: Callable[[dict[str, Any]], None], tmp_path: Path, answers: Callable[..., object]
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as daemon:
        listed({"mountpoint": str(tmp_path), "pid": daemon.pid})
        answers({"pending": []})
        real_open = os.pidfd_open
        ended = []

        def watch(pid: int) -> int:
            """The daemon ends once it is waited for."""
            descriptor = real_open(pid)
            assert daemon.stdin is not None
            daemon.stdin.close()
            ended.append(pid)
            return descriptor

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("os.pidfd_open", watch)
            assert run("umount", str(tmp_path))[0] == 0
        assert ended == [daemon.pid]
        assert daemon.poll() is not None
