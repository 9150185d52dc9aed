"""Real mounts whose process is killed or replaced, and what becomes of them when nobody can go on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from s3fuse import control, kernel
from s3fuse.worker import IGNORED
from tests.fuse.harness import S3FUSE, Gate, Mount, free_environment, is_alive, run, wait_for
from tests.keeper.kills import ALL, DIED, Campaign
from tests.proxy import proxied

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

PENDING = 3


def kill_worker(mount: Mount) -> None:
    """Kills the process that serves the mount, and returns when another one does."""
    mount.allowed.append(DIED)
    before = mount.status()["worker_pid"]
    os.kill(before, signal.SIGKILL)
    assert mount.status()["worker_pid"] != before


def restart(mount: Mount, *options: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(S3FUSE, "restart", *options, mount.path, env=free_environment(), check=check)


# -- T65, T81, T82 of the trials


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["minio", "seaweedfs"])
def test_programs_do_not_notice(
    request: pytest.FixtureRequest, kind: str, mounts: Mounts, buckets: Callable[..., Bucket], tmp_path: Path
) -> None:
    """T82, and T65 under all kinds of load, with writes that come late. The long form is `make kills`."""
    programs = ALL if kind == "minio" else ["syncing", "naming", "replacing", "unlinking", "appending"]
    server = request.getfixturevalue(f"{kind}_server")
    bucket = buckets(server)
    (tmp_path / "work").mkdir()
    with proxied(server) as proxy:
        proxy.lag_s = 1.0
        mount = mounts.new(proxy.server, bucket=bucket.name)
        campaign = Campaign(mount, tmp_path / "work", programs, seed=1)
        report = campaign.run(kills=6, restarts=3)
        assert not report.problems, report
        proxy.lag_s = 0.0
        mount.remount(empty_cache=True)
        campaign.differences(mount.path, tmp_path / "work" / "local")
        assert not report.problems, report
        mount.stop()


@pytest.mark.timeout(120)
def test_a_killed_daemon_is_back_by_itself_and_one_without_keeper_is_replaced(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """T65."""
    mount = mounts.new(minio_server)
    body = random.Random(1).randbytes(3 << 20)
    with (mount.path / "f").open("wb", 0) as file:
        for at in range(0, len(body), 1 << 19):
            file.write(body[at : at + (1 << 19)])
            os.fdatasync(file.fileno())
            if at == 1 << 20:
                kill_worker(mount)
    assert (mount.path / "f").read_bytes() == body
    (mount.path / "g").write_bytes(body)
    mount.kill()
    assert kernel.is_dead(mount.mountpoint)
    mount.start()
    assert (mount.path / "g").read_bytes() == body
    mount.stop()
    bucket = buckets(minio_server, mount.bucket)
    assert (bucket.get("f"), bucket.get("g")) == (body, body)


@pytest.mark.timeout(120)
def test_what_shows_the_mount_elsewhere_goes_on(minio_server: Server, mounts: Mounts, tmp_path: Path) -> None:
    """T81, the host's side: a bind mount (as a container has it) and a working directory never see a dead mount."""
    mount = mounts.new(minio_server)
    (mount.path / "d").mkdir()
    (mount.path / "d" / "f").write_bytes(b"data")
    (tmp_path / "bind").mkdir()
    run("mount", "--bind", mount.path / "d", tmp_path / "bind")
    try:
        with subprocess.Popen(
            [sys.executable, "-c", "import os, sys\nfor line in sys.stdin: print(os.stat('f').st_size, flush=True)"],
            cwd=mount.path / "d",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as program:
            assert program.stdin is not None
            assert program.stdout is not None
            for _ in range(2):
                kill_worker(mount)
                assert os.listdir(tmp_path / "bind") == ["f"]
                assert (tmp_path / "bind" / "f").read_bytes() == b"data"
                print("go", file=program.stdin, flush=True)
                assert program.stdout.readline() == "4\n"
            program.stdin.close()
    finally:
        run("umount", tmp_path / "bind")


# -- another process


@pytest.mark.timeout(120)
def test_a_restart_keeps_what_is_open_and_takes_new_options(minio_server: Server, mounts: Mounts) -> None:
    mount = mounts.new(minio_server, "--memory", "32MiB")
    first = mount.status()
    file = (mount.path / "f").open("w+b", 0)
    file.write(b"before")
    inode = (mount.path / "f").stat().st_ino
    said = restart(mount, "-o", "memory=64MiB,attr-ttl=5s").stderr
    assert "goes on in another process; it paused for" in said
    second = mount.status()
    assert (second["pid"], second["started_at"]) == (first["pid"], first["started_at"])
    assert second["worker_pid"] != first["worker_pid"]
    assert first["log"] == second["log"] == str(mount.log)
    assert second["cache"]["memory_limit_bytes"] == 64 << 20
    assert (second["process"]["restarts"], second["process"]["deaths"]) == (1, 0)
    assert second["process"]["last_pause_s"] is not None
    assert second["process"]["weaker"] == ""
    file.write(b" and after")
    os.fsync(file.fileno())
    file.seek(0)
    assert file.read() == b"before and after"
    assert (mount.path / "f").stat().st_ino == inode
    file.close()
    assert "restarts" in run(S3FUSE, "status", mount.path, env=free_environment()).stdout
    os.kill(mount.pid, signal.SIGHUP)
    wait_for(lambda: mount.status()["process"]["restarts"] == 2, timeout_s=60)
    assert mount.status()["cache"]["memory_limit_bytes"] == 64 << 20


@pytest.mark.timeout(120)
def test_what_cannot_change_is_refused_by_name(minio_server: Server, mounts: Mounts) -> None:
    mount = mounts.new(minio_server)
    before = mount.worker_pid
    for option, code, text in (
        ("read-only", 2, "read_only cannot be changed by a restart"),
        ("cache-dir=/elsewhere", 2, "cache_dir cannot be changed by a restart"),
        ("nosuch=1", 2, "-o nosuch: there is no such option"),
        ("memory=1MiB", 2, "--memory: '1048576' is not allowed"),
    ):
        done = restart(mount, "-o", option, check=False)
        assert done.returncode == code
        assert text in done.stderr
    assert mount.status()["worker_pid"] == before


@pytest.mark.timeout(120)
def test_options_that_no_process_can_begin_with_are_put_back(minio_server: Server, mounts: Mounts) -> None:
    mount = mounts.new(minio_server)
    mount.allowed += [DIED, "cannot be written", "cannot be read"]
    with (mount.path / "f").open("wb", 0) as file:
        file.write(b"one")
        for option in ("log-file=/nonexistent/log", "credentials-file=/nonexistent"):
            done = restart(mount, "-o", option, check=False)
            assert done.returncode == 1
            assert "goes on with the options that it had" in done.stderr
            assert "/nonexistent" in done.stderr
        file.write(b"two")
    assert (mount.path / "f").read_bytes() == b"onetwo"
    restart(mount)
    mount.stop()


@pytest.mark.timeout(120)
def test_one_that_keeps_all_in_memory_cannot_be_followed(minio_server: Server, mounts: Mounts) -> None:
    mount = mounts.new(minio_server, "--ephemeral")
    done = restart(mount, check=False)
    assert done.returncode == 1
    assert "with --ephemeral all that it holds is in its memory" in done.stderr
    assert "takes the mount with it" in run(S3FUSE, "status", mount.path, env=free_environment()).stdout
    mount.allowed.append(DIED)
    os.kill(mount.worker_pid, signal.SIGKILL)
    mount.wait_for_end()
    assert kernel.is_dead(mount.mountpoint)
    mount.start()
    mount.stop()


# -- ends


@pytest.mark.timeout(120)
def test_a_daemon_that_is_killed_while_it_uploads_the_rest_is_followed(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    gate = Gate(minio_server)
    try:
        mount = mounts.new(gate.server, bucket=buckets(minio_server).name)
        mount.allowed += [DIED, "the mount is gone; what was not uploaded is uploaded now"]
        gate.hold()
        (mount.path / "f").write_bytes(b"data")
        run("umount", mount.path)
        wait_for(lambda: mount.status()["state"] == "unmounting", timeout_s=60)
        os.kill(mount.worker_pid, signal.SIGKILL)
        gate.open()
        mount.wait_for_end(60)
        mount.check_ended()
        assert buckets(minio_server, mount.bucket).get("f") == b"data"
    finally:
        gate.close()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["umount", "s3fuse umount", "SIGTERM"])
def test_an_end_while_another_process_is_to_go_on(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket], how: str
) -> None:
    """What waits for uploads that are under way is called off, and the rest is uploaded by who is there."""
    gate = Gate(minio_server)
    try:
        mount = mounts.new(gate.server, bucket=buckets(minio_server).name)
        gate.hold()
        for name in ("f", "g"):
            (mount.path / name).write_bytes(b"data")
        wait_for(lambda: "uploading" in {item["state"] for item in mount.status()["pending"]["items"]})
        os.kill(mount.pid, signal.SIGHUP)
        wait_for(lambda: "another process goes on" in mount.log_text())
        if how == "umount":
            run("umount", mount.path)
        elif how == "SIGTERM":
            os.kill(mount.pid, signal.SIGTERM)
        else:
            ending = subprocess.Popen([S3FUSE, "umount", mount.path], env=free_environment())
        wait_for(lambda: not mount.mounted)
        gate.open()
        if how == "s3fuse umount":
            assert ending.wait(60) == 0
        mount.wait_for_end(60)
        mount.check_ended()
        bucket = buckets(minio_server, mount.bucket)
        assert {name: bucket.get(name) for name in sorted(bucket.keys())} == {"f": b"data", "g": b"data"}
    finally:
        gate.close()


@pytest.mark.timeout(120)
def test_a_daemon_that_is_killed_while_it_drains_and_the_server_is_down(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """The drain timeout and exit code 3 hold for the process that follows, too."""
    with proxied(minio_server) as proxy:
        mount = mounts.new(proxy.server, "--drain-timeout", "8s", start=False)
        mount.allowed += [DIED, "the mount is gone; what was not uploaded", "not in the bucket yet: f "]
        command = mount.command("--foreground")
        with subprocess.Popen(command, env=free_environment(**mount.server.environment), text=True) as daemon:
            wait_for(lambda: mount.mounted and "mounted" in mount.log_text())
            os.listdir(mount.path)
            proxy.down()
            (mount.path / "f").write_bytes(b"data")
            run("umount", mount.path)
            wait_for(lambda: mount.status()["state"] == "unmounting")
            assert mount.status()["process"]["weaker"].endswith("it is being unmounted")
            worker = mount.worker_pid
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: mount.worker_pid != worker)
            assert mount.status()["pending"]["files"] == 1
            assert daemon.wait(60) == PENDING
        mount.pid = daemon.pid
        mount.check_ended()
        proxy.up()
        mount.start()
        mount.flush()
        assert buckets(minio_server, mount.bucket).get("f") == b"data"


@pytest.mark.timeout(120)
def test_the_mount_lives_on_without_its_keeper(minio_server: Server, mounts: Mounts) -> None:
    mount = mounts.new(minio_server)
    mount.allowed.append("the keeper is gone: from now on the mount ends with this process")
    worker = mount.worker_pid
    os.kill(mount.pid, signal.SIGKILL)
    wait_for(lambda: "the keeper is gone" in mount.log_text(), timeout_s=60)
    (mount.path / "f").write_bytes(b"data")
    wait_for(lambda: control.last_said(mount.mountpoint)["pid"] == worker, timeout_s=60)
    assert mount.status()["pid"] == worker
    assert "its keeper is gone" in mount.status()["process"]["weaker"]
    assert run(S3FUSE, "umount", mount.path, env=free_environment()).stderr == ""
    wait_for(lambda: not is_alive(worker), timeout_s=60)
    assert not mount.mounted


@pytest.mark.timeout(120)
def test_signals_that_mean_nothing_are_no_death(minio_server: Server, mounts: Mounts) -> None:
    """QUIT, USR1, ABRT to the keeper ended it, and the mount's protection; to the worker they were deaths."""
    mount = mounts.new(minio_server)
    (mount.path / "f").write_bytes(b"data")
    worker_pid = mount.worker_pid
    used = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP}
    for number in sorted(signal.valid_signals() - used):
        os.kill(mount.pid, number)
    for number in sorted(IGNORED):
        os.kill(worker_pid, number)
    assert (mount.path / "f").read_bytes() == b"data"
    status = mount.status()
    assert (status["pid"], status["worker_pid"], status["process"]["deaths"]) == (mount.pid, worker_pid, 0)
    restart(mount)
    assert mount.status()["process"]["restarts"] == 1
    # A fault is a death, which another worker follows.
    mount.allowed.append("the worker died: killed by SIGABRT")
    os.kill(mount.worker_pid, signal.SIGABRT)
    wait_for(lambda: mount.status()["process"]["deaths"] == 1)
    assert (mount.path / "f").read_bytes() == b"data"


@pytest.mark.timeout(120)
def test_one_that_is_not_root(minio_server: Server, buckets: Callable[..., Bucket], tmp_path: Path) -> None:
    """By fusermount3, with a runtime directory of its own."""
    home = Path(f"/tmp/s3fuse-test-{os.getpid()}")  # where nobody may go: pytest's directories are root's alone
    home.mkdir()
    for name in ("mnt", "run", "cache"):
        (home / name).mkdir()
        os.chown(home / name, 65534, 65534)
    environment = free_environment(
        **minio_server.environment,
        XDG_RUNTIME_DIR=str(home / "run"),
        HOME=str(home),
        XDG_CACHE_HOME=str(home / "cache"),
    )
    bucket = buckets(minio_server)

    # Python may be where only root gets; everything else is as for any user.
    apart = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    apart += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search", "--"]

    def nobody(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(*apart, *words, env=environment, check=check, cwd="/")

    mode = os.stat("/dev/fuse").st_mode
    os.chmod("/dev/fuse", 0o666)  # as every distribution has it
    try:
        refused = nobody(S3FUSE, "mount", "--suid", bucket.name, str(home / "mnt"), check=False)
        assert (refused.returncode, "--suid is for root" in refused.stderr) == (2, True)
        nobody(S3FUSE, "mount", "-o", "noexec", bucket.name, str(home / "mnt"))
        entry = kernel.mount_entry(home / "mnt")
        assert entry is not None
        assert {"nosuid", "nodev", "noexec"} <= set(entry.flags)
        write = f"import sys; open({str(home / 'mnt' / 'f')!r}, 'a').write(sys.argv[1])"
        nobody(sys.executable, "-c", write, "one")
        (about,) = (home / "run" / "s3fuse").glob("*.json")

        def worker() -> int:
            import json

            return int(json.loads(about.read_text())["worker_pid"])

        first = worker()
        os.kill(first, signal.SIGKILL)
        nobody(sys.executable, "-c", write, "two")
        assert worker() != first
        nobody(S3FUSE, "restart", str(home / "mnt"))
        nobody(sys.executable, "-c", write, "three")
        nobody(S3FUSE, "umount", str(home / "mnt"))
        assert bucket.get("f") == b"onetwothree"
    finally:
        os.chmod("/dev/fuse", mode & 0o777)
        with suppress(OSError):
            kernel.unmount(home / "mnt", lazy=True)
        shutil.rmtree(home, ignore_errors=True)
