"""A server that is away, stalls, refuses or answers nonsense behind a real mount, which heals without a remount."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from minio.credentials.providers import AssumeRoleProvider, StaticProvider
from minio.minioadmin import MinioAdmin

from s3fuse.errors import ExitCode
from tests.fuse.harness import S3FUSE, run, wait_for
from tests.proxy import Fault, Proxy, proxied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fuse.harness import Bucket, Mounts
    from tests.servers import Server

#: How long a call may take in all while the server sends nothing; README: 40 s, fsync 50 s.
LIMIT_S = 60
HEALED_S = 60


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with proxied(server) as proxy:
        yield proxy


def ended(code: int | None) -> bool:
    return code in (errno.EIO, errno.ETIMEDOUT)


def program(source: str, *arguments: object) -> subprocess.Popen[str]:
    """A program on the mount, since a call that hangs would keep the test from seeing it."""
    command = ["python3", "-c", f"import os, sys\n{source}", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def arrive(bucket: Bucket, expected: dict[str, bytes]) -> None:
    wait_for(lambda: expected.keys() <= bucket.keys(), timeout_s=HEALED_S)
    for key, data in expected.items():
        wait_for(lambda key=key, data=data: bucket.get(key) == data, timeout_s=HEALED_S)  # type: ignore[misc]


def test_files_closed_while_the_server_is_down_arrive_by_themselves(
    server: Server, proxy: Proxy, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """T06, T71: longer than all retries; status says what waits and why."""
    bucket = buckets(server)
    mount = mounts.new(proxy.server, bucket=bucket.name)
    (mount.path / "before").write_bytes(b"before")
    mount.flush()
    assert os.listdir(mount.path) == ["before"]  # where names are known, new ones are taken without asking
    proxy.down()
    expected = {f"file{number}": os.urandom(3000) for number in range(20)}
    for name, data in expected.items():
        (mount.path / name).write_bytes(data)
    failed = run(S3FUSE, "flush", mount.path, check=False, timeout_s=LIMIT_S)
    assert failed.returncode == 1
    assert "file" in failed.stderr
    status = mount.status()
    assert status["pending"]["files"] == 20
    assert status["pending"]["bytes"] >= 60_000
    assert status["server"]["state"] == "down"
    assert status["server"]["last_error"]
    assert abs(status["server"]["last_error_at"] - time.time()) < 600
    assert any("no connection" in (item["error"] or "") for item in status["pending"]["items"])
    shown = run(S3FUSE, "status", mount.path).stdout
    assert "down since" in shown
    assert "20 files" in shown
    for name, data in expected.items():
        assert (mount.path / name).read_bytes() == data
    assert (mount.path / "before").read_bytes() == b"before"
    proxy.up()
    arrive(bucket, expected)
    wait_for(lambda: mount.status()["pending"]["files"] == 0, timeout_s=HEALED_S)
    status = mount.status()
    assert (status["server"]["state"], status["server"]["needs"]) == ("up", "")


def test_refused_overwrite_leaves_both_versions(
    server: Server, proxy: Proxy, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """T04: close says it; the object is as it was; what was written stays and goes when it may."""
    bucket = buckets(server)
    mount = mounts.new(proxy.server, "--close", "upload", "--attr-ttl", "100ms", bucket=bucket.name)
    (mount.path / "f").write_bytes(b"old")
    proxy.fail(Fault.DENIED, "put", "multipart_create", "copy")
    with pytest.raises(OSError, match="Input/output"):
        (mount.path / "f").write_bytes(b"new")
    assert bucket.get("f") == b"old"
    assert (mount.path / "f").read_bytes() == b"new"
    item = mount.status()["pending"]["items"][0]
    assert item["name"] == "f"
    assert "AccessDenied" in item["error"]
    assert mount.status()["server"]["needs"] == "permission"
    proxy.heal()
    file = os.open(mount.path / "f", os.O_RDONLY)
    os.fsync(file)
    os.close(file)
    assert bucket.get("f") == b"new"


def test_refused_overwrite_can_be_given_up(
    server: Server, proxy: Proxy, mounts: Mounts, buckets: Callable[..., Bucket], tmp_path: Path
) -> None:
    """T04 for who will never get the permission: what was written is copied out, and reads give the old bytes again."""
    bucket = buckets(server)
    mount = mounts.new(proxy.server, bucket=bucket.name)
    run("bash", "-c", "echo old > f; sync f", cwd=mount.path)
    proxy.fail(Fault.DENIED, "put", "multipart_create", "copy")
    (mount.path / "f").write_bytes(b"new")
    wait_for(lambda: mount.status()["server"]["needs"] == "permission")
    mount.allowed += [r"AccessDenied", r"not uploaded", r"f: "]
    done = run(S3FUSE, "umount", "--drain-timeout", "1s", mount.path, check=False)
    assert done.returncode == ExitCode.PENDING
    mount.wait_for_end()
    assert re.search(r"^  f \(3 bytes\): .*AccessDenied", run(S3FUSE, "cache", "list", mount.cache).stdout, re.M)
    run(S3FUSE, "cache", "recover", mount.cache, tmp_path / "out")
    assert (tmp_path / "out/f").read_bytes() == b"new"
    shutil.rmtree(mount.cache)
    mount.start()
    assert (mount.path / "f").read_bytes() == bucket.get("f") == b"old\n"
    mount.stop()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("minio", Fault.XML),
        ("minio", Fault.SHORT_BODY),
        ("seaweedfs", Fault.HTML),
        ("seaweedfs", Fault.NO_BUCKET),
    ],
)
def test_nothing_else_is_taken_for_a_file_or_a_listing(
    request: pytest.FixtureRequest, mounts: Mounts, buckets: Callable[..., Bucket], kind: str, fault: Fault
) -> None:
    server: Server = request.getfixturevalue(f"{kind}_server")
    with proxied(server) as proxy:
        answered_wrong(proxy, mounts, buckets(server), fault)


def answered_wrong(proxy: Proxy, mounts: Mounts, bucket: Bucket, fault: Fault) -> None:
    body = os.urandom(300_000)
    bucket.put("d/f", body)
    mount = mounts.new(proxy.server, "--attr-ttl", "100ms", bucket=bucket.name)
    bodies = ("get", "list") if fault is Fault.SHORT_BODY else ("get", "list", "head")
    proxy.fail(fault, *bodies)
    for look in (
        lambda: os.listdir(mount.path),
        lambda: os.stat(mount.path / "d/f"),
        lambda: (mount.path / "d/f").read_bytes(),
        lambda: os.path.getsize(mount.path / "d/none"),
    ):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            look()
        assert ended(caught.value.errno), caught.value
    proxy.heal()
    assert os.listdir(mount.path) == ["d"]
    with (mount.path / "d/f").open("rb") as file:
        proxy.fail(fault, "get")
        with pytest.raises(OSError) as caught:  # noqa: PT011
            file.read()
        assert ended(caught.value.errno), caught.value
        proxy.heal()
        assert (mount.path / "d/f").read_bytes() == body
    # A few bad answers are not even seen.
    mount.remount()
    proxy.fail(fault, "get", times=2)
    proxy.fail(fault, "list", times=2)
    assert (mount.path / "d/f").read_bytes() == body
    mount.stop()


@pytest.mark.timeout(240)
def test_stalled_network(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """T63: calls end in time, statfs never waits, all is well after healing."""
    with proxied(minio_server) as proxy:
        stalled(proxy, mounts, buckets(minio_server))


def stalled(proxy: Proxy, mounts: Mounts, bucket: Bucket) -> None:
    body = os.urandom(200_000)
    bucket.put("d/cold", body)
    bucket.put("known", body)
    mount = mounts.new(proxy.server, bucket=bucket.name)
    assert (mount.path / "known").read_bytes() == body
    assert sorted(os.listdir(mount.path)) == ["d", "known"]  # files can be made where the names are known
    proxy.fail(Fault.STALLED)
    calls = {
        "ls": program("os.listdir(sys.argv[1])", mount.path / "d"),
        "stat": program("os.stat(sys.argv[1])", mount.path / "d/never"),
        "read": program("open(sys.argv[1], 'rb').read()", mount.path / "d/cold"),
        "fsync": program("f = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY); os.write(f, b'x'); os.fsync(f)",
                         mount.path / "new"),
    }  # fmt: skip
    known = program("print(len(open(sys.argv[1], 'rb').read()))", mount.path / "known")
    began = time.monotonic()
    for _ in range(5):
        os.statvfs(mount.path)
    assert time.monotonic() - began < 10, "statfs waits for the net"
    assert known.communicate(timeout=LIMIT_S)[0] == f"{len(body)}\n"
    for name, call in calls.items():
        _, errors = call.communicate(timeout=2 * LIMIT_S)
        assert re.search("ETIMEDOUT|timed out|Errno 5]", errors), f"{name}: {call.returncode} {errors}"
    (mount.path / "meanwhile").write_bytes(b"written")
    proxy.heal()
    assert (mount.path / "d/cold").read_bytes() == body
    assert os.listdir(mount.path / "d") == ["cold"]
    arrive(bucket, {"new": b"x", "meanwhile": b"written"})
    mount.stop()


def test_one_bad_answer_spoils_nothing(
    server: Server, proxy: Proxy, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """T10: lines appended and synced, other files read; a 404 NoSuchBucket, a burst of 503 and lost answers between."""
    bucket = buckets(server)
    others = {f"other{number}": os.urandom(5000) for number in range(8)}
    for name, data in others.items():
        bucket.put(name, data)
    mount = mounts.new(proxy.server, "--attr-ttl", "100ms", bucket=bucket.name)
    lines = []
    with (mount.path / "log").open("ab", buffering=0) as log:
        for number in range(60):
            match number:
                case 10:
                    proxy.fail(Fault.NO_BUCKET, times=1)
                case 20:
                    proxy.fail(Fault.ERROR_503, times=6)
                case 30:
                    proxy.fail(Fault.LOST, "put", "multipart_complete", times=2)
                case 40:
                    proxy.fail(Fault.DENIED, times=1)
            line = f"line {number}\n".encode()
            log.write(line)
            lines.append(line)
            if number % 5 == 4:
                os.fsync(log.fileno())
                assert bucket.get("log") == b"".join(lines)
            name = f"other{number % 8}"
            assert (mount.path / name).read_bytes() == others[name]
    mount.flush()
    assert bucket.get("log") == (mount.path / "log").read_bytes() == b"".join(lines)
    assert bucket.keys() == {"log", *others}
    assert mount.status()["conflicts"] == []
    assert proxy.faults_done().total() >= 9


# -- keys


def test_replaced_keys_are_used_and_what_waits_goes_on(
    server: Server, proxy: Proxy, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """The keys of a file are revoked, and a file with good ones takes its place: no remount, nothing lost."""
    bucket = buckets(server)
    mount = mounts.new(proxy.server, bucket=bucket.name, start=False)
    file = mount.mountpoint.parent / "keys.json"

    def write(access_key: str) -> None:
        new = file.with_suffix(".new")
        new.write_text(json.dumps({"accessKey": access_key, "secretKey": proxy.server.secret_key}))
        new.chmod(0o600)
        new.rename(file)

    write(proxy.server.access_key)
    mount.start("--credentials-file", str(file))
    (mount.path / "before").write_bytes(b"before")
    mount.flush()
    assert os.listdir(mount.path) == ["before"]
    write("revoked")
    with (mount.path / "after").open("wb", buffering=0) as after:
        after.write(b"after")
        # Until the file is read again the old keys, which are good, are used.
        wait_for(lambda: _fsync_fails(after.fileno()), timeout_s=HEALED_S)
    (mount.path / "later").write_bytes(b"later")
    wait_for(lambda: mount.status()["server"]["needs"] == "credentials", timeout_s=HEALED_S)
    assert "credentials" in run(S3FUSE, "status", mount.path).stdout
    assert (mount.path / "after").read_bytes() == b"after"
    write(proxy.server.access_key)
    wait_for(lambda: mount.status()["server"]["needs"] == "", timeout_s=HEALED_S)
    arrive(bucket, {"before": b"before", "after": b"after", "later": b"later"})


def _fsync_fails(file: int) -> bool:
    try:
        os.pwrite(file, b"after", 0)
        os.fsync(file)
    except OSError:
        return True
    return False


def session_keys(server: Server) -> dict[str, str]:
    """New temporary keys of a user, as a credentials file has them."""
    root = StaticProvider(server.access_key, server.secret_key)
    admin = MinioAdmin(endpoint=server.endpoint.removeprefix("http://"), credentials=root, secure=False)
    user = (f"user-{secrets.token_hex(4)}", secrets.token_hex(20))
    admin.user_add(*user)
    admin.attach_policy(["readwrite"], user=user[0])
    role = AssumeRoleProvider(sts_endpoint=server.endpoint, access_key=user[0], secret_key=user[1])
    found = role.retrieve()
    return {
        "accessKey": found.access_key,
        "secretKey": found.secret_key,
        "sessionToken": found.session_token or "",
    }


def test_session_that_expires_is_followed_by_another(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """Temporary keys: while they have expired writes are kept, and new ones in their file, token and all, are used."""
    bucket = buckets(minio_server)
    with proxied(minio_server) as proxy:
        mount = mounts.new(proxy.server, "--attr-ttl", "100ms", bucket=bucket.name, start=False)
        file = mount.mountpoint.parent / "keys.json"
        first, second = session_keys(minio_server), session_keys(minio_server)
        file.write_text(json.dumps(first))
        file.chmod(0o600)
        mount.start("--credentials-file", str(file))
        (mount.path / "before").write_bytes(b"before")
        mount.flush()
        proxy.fail(Fault.EXPIRED)
        (mount.path / "before").write_bytes(b"after")
        wait_for(lambda: mount.status()["server"]["needs"] == "credentials", timeout_s=HEALED_S)
        assert bucket.get("before") == b"before"
        file.write_text(json.dumps(second | {"sessionToken": first["sessionToken"]}))  # not the one of these keys
        seen = proxy.counts.total()
        wait_for(lambda: proxy.counts.total() >= seen + 3, timeout_s=HEALED_S)  # each refusal has the file read again
        proxy.heal()
        sent = proxy.requests.total()
        wait_for(lambda: proxy.requests.total() >= sent + 3, timeout_s=HEALED_S)
        assert (mount.path / "before").read_bytes() == b"after"
        assert bucket.get("before") == b"before"
        assert mount.status()["server"]["needs"]
        file.write_text(json.dumps(second))
        arrive(bucket, {"before": b"after"})


# -- clocks


def test_clock_that_is_off(minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]) -> None:
    """T68: the server's time is learnt, said once, and again when the clock is set right. It allows 30 s."""
    with proxied(minio_server) as proxy:
        proxy.skew_limit_s = 30.0
        bucket = buckets(minio_server)
        mount = mounts.new(proxy.server, "--attr-ttl", "100ms", bucket=bucket.name)
        mount.allowed.append("the clock of 127.0.0.1:[0-9]+ is [0-9]+ s (ahead of|behind) that of this host")
        for number, offset_s in enumerate((-600.0, 45.0, 0.0)):
            proxy.clock_offset_s = offset_s
            (mount.path / f"f{number}").write_bytes(b"data")
            mount.flush()
            assert bucket.get(f"f{number}") == b"data"
            assert sorted(os.listdir(mount.path)) == [f"f{n}" for n in range(number + 1)]
        said = [line for line in mount.log_text().splitlines() if "the clock of" in line]
        assert len(said) == 3, said
        # The server says whole seconds, some time before they are read.
        assert re.search("(599|60[0-9]) s behind", said[0]), said[0]
        mount.stop()


@pytest.mark.parametrize("offset_s", [-800.0, 800.0])
def test_clock_that_is_off_from_the_beginning(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket], offset_s: float
) -> None:
    """T68: when the bucket is mounted, and set right later. The server behind the proxy allows 15 minutes."""
    with proxied(minio_server) as proxy:
        proxy.skew_limit_s, proxy.clock_offset_s = 30.0, offset_s
        bucket = buckets(minio_server)
        mount = mounts.new(proxy.server, bucket=bucket.name)
        mount.allowed.append("the clock of 127.0.0.1:[0-9]+ is [0-9]+ s (ahead of|behind) that of this host")
        for name in ("off", "right"):
            (mount.path / name).write_bytes(b"data")
            mount.flush()
            assert bucket.get(name) == b"data"
            proxy.clock_offset_s = 0.0
        said = [line for line in mount.log_text().splitlines() if "the clock of" in line]
        assert len(said) == 2, said
        assert re.search("(799|80[0-9]) s " + ("ahead" if offset_s > 0 else "behind"), said[0]), said[0]
        mount.stop()


def test_each_attempt_is_signed_when_it_is_sent(
    minio_server: Server, mounts: Mounts, buckets: Callable[..., Bucket]
) -> None:
    """T67: many parts through a slow line that fails, on a server that allows less skew than the upload takes."""
    with proxied(minio_server) as proxy:
        bucket = buckets(minio_server)
        mount = mounts.new(proxy.server, "--max-requests", "2", bucket=bucket.name)
        proxy.skew_limit_s = 4.0
        proxy.upload_bytes_per_s = 1600 << 10
        proxy.fail(Fault.ERROR_503, "multipart_put", times=2)
        data = os.urandom(1 << 20) * 24
        (mount.path / "big").write_bytes(data)
        mount.flush()
        assert proxy.counts["SKEWED", "multipart_put"] == 0
        assert proxy.requests["multipart_put"] >= 5
        assert bucket.get("big") == data
        mount.stop()
