"""What a volume is made of: its name, its options, its place, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3fuse.cli import cli
from s3fuse.errors import UserError
from s3fuse.volume.definition import Definition, MountOptions
from s3fuse.volume.naming import NameRule, check_name, file_name
from s3fuse.volume.places import Places
from s3fuse.volume.removal import Removal
from s3fuse.volume.state import State

if TYPE_CHECKING:
    from collections.abc import Mapping

RULE = NameRule("{name}")
DEFAULTS = {"umask": "000", "drain-timeout": "300s"}


def define(name: str = "vol", rule: NameRule = RULE, **options: str) -> Definition:
    given = {key.replace("_", "-"): value for key, value in options.items()}
    return MountOptions(cli.commands["mount"], DEFAULTS).define(name, given, rule, "2026-01-01T00:00:00Z")


@pytest.fixture(autouse=True)
def no_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_CONFIG_DIR", "/nonexistent")


# -- names


@pytest.mark.parametrize("name", ["a", "A_b.c-9", "0" * 64, "x" * 255, "a.json", "a..b"])
def test_names(name: str) -> None:
    check_name(name)
    part = file_name(name)
    assert len(part) <= 200
    assert "/" not in part
    assert not part.startswith(".")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-a", "_a", "a b", "a\n", "ä", "x" * 256, "a\0"])
def test_no_names(name: str) -> None:
    with pytest.raises(UserError, match="is not allowed"):
        check_name(name)


def test_long_names_that_begin_alike_have_files_of_their_own() -> None:
    assert file_name("x" * 254 + "a") != file_name("x" * 254 + "b")


@pytest.mark.parametrize(
    ("rule", "name", "place"),
    [
        ("{name}", "photos", ("photos", "")),
        ("docker-volumes/{name}", "My_Vol", ("docker-volumes", "My_Vol")),
        ("b-{name}/data", "x1", ("b-x1", "data")),
        ("docker/volumes/{name}/data", "0" * 64, ("docker", f"volumes/{'0' * 64}/data")),
    ],
)
def test_rule(rule: str, name: str, place: tuple[str, str]) -> None:
    assert NameRule(rule).place(name) == place


@pytest.mark.parametrize("rule", ["bucket", "bucket/{name}/{name}", "Bucket/{name}", "bucket/../{name}", ""])
def test_no_rule(rule: str) -> None:
    with pytest.raises(UserError):
        NameRule(rule)


def test_a_name_that_is_no_bucket_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"volume My_Vol names no bucket.*bucket=NAME.*--name-rule BUCKET/\{name\}"):
        define("My_Vol")


# -- options


def test_place_of_a_volume() -> None:
    assert define("photos").place == "photos"
    assert define(bucket="other").place == "other"
    assert define(bucket="other", prefix="/a//b/").place == "other/a/b"
    assert define("photos", prefix="a").place == "photos/a"
    assert define("photos", prefix="a/.s3fuse-of-mine").place == "photos/a/.s3fuse-of-mine"
    assert define(rule=NameRule("all/{name}"), prefix="a").place == "all/a"


def test_every_option_of_mount_is_one_of_volumes() -> None:
    """The values are those of another test's command line."""
    from tests.unit.test_cli import LONG

    words = [word.strip() for word in LONG.replace(" --", "\n--").splitlines()]
    given = {}
    for word in words:
        name, _, value = word.removeprefix("--").partition(" ")
        if name in ("credentials-file", "nonempty"):
            continue
        given[name] = value
    assert given.pop("no-allow-other") == ""
    given["allow-other"] = "false"
    definition = define("bucket", **given)
    arguments = MountOptions(cli.commands["mount"], DEFAULTS).arguments(definition)
    assert sorted(arguments) == sorted(
        word.replace(" ", "=", 1) for word in words if not word.startswith(("--credentials-file", "--nonempty"))
    )


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, ["--drain-timeout=300s", "--umask=000"]),
        ({"umask": "027", "drain_timeout": "1s"}, ["--drain-timeout=1s", "--umask=027"]),
        ({"read-only": "true", "uid": "7"}, ["--drain-timeout=300s", "--read-only", "--uid=7", "--umask=000"]),
        ({"read-only": "false", "allow-other": "no"}, ["--no-allow-other", "--drain-timeout=300s", "--umask=000"]),
        ({"credentials": "prod", "purge": "true", "prefix": "p"}, ["--drain-timeout=300s", "--umask=000"]),
    ],
)
def test_arguments(options: Mapping[str, str], arguments: list[str]) -> None:
    assert MountOptions(cli.commands["mount"], DEFAULTS).arguments(define("bucket", **options)) == arguments


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"nosuch": "1"}, r"option nosuch is unknown; known: allow-other, attr-ttl, bucket,.*, umask"),
        ({"secret-key": "hush"}, r"option secret-key is refused.*credentials=NAME"),
        ({"credentials-file": "/x"}, r"option credentials-file is unknown"),
        ({"foreground": "true"}, r"option foreground is unknown"),
        ({"credentials": "../x"}, r"takes the name of a credentials file"),
        ({"credentials": "KEY:SECRET"}, r"takes the name of a credentials file on the node, never a path or a key$"),
        ({"bucket": "Upper"}, r"'Upper' is no bucket name"),
        ({"bucket": "a-bucket/x"}, r"option bucket: 'a-bucket/x' is not allowed.*prefix"),
        ({"endpoint": "http://KEY:hush@127.0.0.1"}, r"endpoint has a user or a password in it"),
        ({"endpoint": "http://host/path"}, r"endpoint: 'http://host/path' is not allowed"),
        ({"prefix": "a/../b"}, r"PREFIX"),
        ({"prefix": "/.s3fuse"}, r"option prefix: '.s3fuse/' is not allowed; it takes nothing below .s3fuse"),
        ({"prefix": ".s3fuse/x"}, r"option prefix: '.s3fuse/x/' is not allowed"),
        ({"memory": "1"}, r"--memory: '1' is not allowed; it takes at least 16MiB"),
        ({"close": "never"}, r"'never' is not one of 'local', 'upload'"),
        ({"uid": "me"}, r"'me' is not a valid integer"),
        ({"gid": "-5"}, r"'--gid': -5 is not in the range"),
        ({"uid": "4294967295"}, r"'--uid': 4294967295 is not in the range"),
        ({"cache-dir": "rel"}, r"option cache-dir: 'rel' is not allowed; it takes a path that begins with /"),
        ({"ca-file": "../rel"}, r"option ca-file: '../rel' is not allowed; it takes a path that begins with /"),
        ({"read-only": "maybe"}, r"option read-only: 'maybe' is not allowed; it takes true or false"),
        ({"purge": "maybe"}, r"option purge: 'maybe'"),
        ({"ephemeral": "true", "cache-dir": "/x"}, r"--cache-dir: '/x' is not allowed"),
    ],
)
def test_wrong_options(options: Mapping[str, str], text: str) -> None:
    with pytest.raises(UserError, match=text) as raised:
        define("bucket", **options)
    assert "hush" not in str(raised.value)
    assert "KEY:SECRET" not in str(raised.value)


def test_the_same_volume_may_be_said_in_two_ways() -> None:
    assert define("photos").same_as(define("photos", bucket="photos"))
    assert define(bucket="b-1", uid="7").same_as(define(uid="7", bucket="b-1"))
    assert not define(bucket="b-1").same_as(define(bucket="b-2"))
    assert not define(bucket="b-1").same_as(define(bucket="b-1", read_only="true"))


# -- credentials


def places(*folders: Path) -> Places:
    nowhere = Path("/nonexistent")
    return Places(base_dir=nowhere, cache_root=nowhere, credentials_dirs=folders, linger_s=1, stale_s=1, unmount_s=1)


def test_credentials_by_name(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    (second / "prod").write_text("a:b")
    (second / "prod").chmod(0o600)
    assert places(first, second).credentials_file("prod") == second / "prod"
    with pytest.raises(UserError, match=f"credentials dev: there is no file of that name in {first} or {second}"):
        places(first, second).credentials_file("dev")
    (second / "prod").chmod(0o640)
    with pytest.raises(UserError, match=r"others can read .*chmod 600"):
        places(first, second).credentials_file("prod")


def test_secrets_of_swarm_are_readable_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3fuse.volume.places.SWARM_SECRETS", tmp_path)
    (tmp_path / "prod").write_text("a:b")
    (tmp_path / "prod").chmod(0o444)
    assert places(tmp_path).credentials_file("prod") == tmp_path / "prod"


# -- files that volumes name


@pytest.fixture(scope="module")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories with links from each into the other."""
    top = tmp_path_factory.mktemp("maze")
    for name in ("cache/in", "allowed/in", "outside/in"):
        (top / name).mkdir(parents=True)
    for here in ("cache", "allowed", "outside"):
        for there in ("cache", "allowed", "outside"):
            (top / here / f"to-{there}").symlink_to(top / there)
            (top / here / "in" / f"to-{there}").symlink_to(f"../../{there}/in")
        (top / here / "loop").symlink_to("loop")
    return top


@pytest.mark.parametrize("option", ["cache-dir", "ca-file"])
@given(
    start=st.sampled_from(["cache", "allowed", "outside"]),
    steps=st.lists(
        st.sampled_from(["in", "new", "..", ".", "", "to-cache", "to-allowed", "to-outside", "loop"]), max_size=6
    ),
)
def test_a_volume_names_files_only_where_its_nodes_operator_allows_it(
    maze: Path, option: str, start: str, steps: list[str]
) -> None:
    path = "/".join((str(maze), start, *steps))
    node = dataclasses.replace(
        places(), cache_root=maze / "outside" / "to-cache", allowed_dirs=(maze / "allowed" / ".." / "allowed",)
    )
    # What `s3fuse mount` makes of the path, and the kernel of that.
    really = Path(os.path.realpath(os.path.abspath(path)))
    good = [maze / "allowed", *([maze / "cache"] if option == "cache-dir" else [])]
    options = MountOptions(cli.commands["mount"], DEFAULTS)
    definition = define("bucket", **{option: path})
    if any(folder in really.parents for folder in good):
        node.arguments(definition, options)
        return
    with pytest.raises(UserError, match=f"option {option}: .*--allow-dir {really.parent} "):
        node.arguments(definition, options)


def test_every_option_that_takes_a_path_is_asked_about() -> None:
    """A new one of `mount` is refused until somebody says where it may be."""
    options = MountOptions(cli.commands["mount"], DEFAULTS)
    definition = define("bucket", **{"cache-dir": "/etc/shadow", "ca-file": "/etc/shadow"})
    assert set(options.paths(definition)) == {"cache-dir", "ca-file"}
    for option in ("cache-dir", "ca-file"):
        with pytest.raises(UserError, match=f"option {option}: /etc/shadow is not below"):
            places().arguments(define("bucket", **{option: "/etc/shadow"}), options)
    places().arguments(define("bucket", **{"ca-file": "/usr/share/ca-certificates/x.crt"}), options)


# -- the file


def test_definitions_come_back(tmp_path: Path) -> None:
    made = [define("b-1"), define("v.x", bucket="b-2", prefix="a/b", uid="7"), define("x" * 255, bucket="b-3")]
    with State(tmp_path / "state").opened() as state:
        for definition in made:
            state.save(definition)
        state.save(made[0])
    with State(tmp_path / "state").opened() as again:
        volumes, purges = again.load()
        assert sorted(volumes, key=lambda one: one.name) == sorted(made, key=lambda one: one.name)
        assert not purges
        assert not again.broken
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()} == {0o600}


def test_a_removed_volume_is_kept_until_its_data_is_purged(tmp_path: Path) -> None:
    kept, purged = define("b-1"), define("b-2", purge="true")
    with State(tmp_path).opened() as state:
        state.save(kept)
        state.save(purged)
        state.remove(kept, None)
        removal = Removal.now(server_ns=7, leases=("a", "b"))
        state.remove(purged, removal)
        assert state.load() == ([], [(purged, removal)])
        state.purged(purged)
        assert state.load() == ([], [])


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        json.dumps({"version": 2, "name": "vol"}),
        json.dumps({"version": 1, "name": "vol"}),
        json.dumps({"version": 1, "name": "other", "bucket": "b", "prefix": "", "options": {}, "created_at": ""}),
        json.dumps({"version": 1, "name": "../x", "bucket": "b", "prefix": "", "options": {}, "created_at": ""}),
    ],
)
def test_a_file_that_cannot_be_read_stays_and_is_named(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "vol.json").write_text(content)
    (tmp_path / ".half.part").write_text("{")
    with State(tmp_path).opened() as state:
        state.save(define("good"))
        volumes, _ = state.load()
        assert [one.name for one in volumes] == ["good"]
        assert list(state.broken) == ["vol"]
        assert str(tmp_path / "vol.json") in state.broken["vol"]
    assert (tmp_path / "vol.json").read_text() == content
    assert not (tmp_path / ".half.part").exists()
    assert "vol.json" in caplog.text


def test_two_plugins_do_not_share_a_state_directory(tmp_path: Path) -> None:
    used = pytest.raises(UserError, match="is used by another s3fuse plugin")
    with State(tmp_path).opened(), used, State(tmp_path).opened():
        pass
