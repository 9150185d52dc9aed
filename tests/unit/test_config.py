"""Options: what each form means, and that a wrong one is named with what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from s3fuse import config
from s3fuse.config import MountConfig, Place, parse_mode, parse_place, parse_size, parse_time
from s3fuse.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1k", 1000),
        ("1KiB", 1024),
        ("64MiB", 64 << 20),
        ("10GB", 10**10),
        (" 1.5 GiB ", 3 << 29),
        ("2T", 2 * 10**12),
        ("512b", 512),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--memory", text) == size


@pytest.mark.parametrize(("text", "seconds"), [("1.5", 1.5), ("250ms", 0.25), ("30s", 30), ("5m", 300), ("1d", 86400)])
def test_times(text: str, seconds: float) -> None:
    assert parse_time("--attr-ttl", text) == seconds


@pytest.mark.parametrize(("text", "mode"), [("644", 0o644), ("0640", 0o640), ("07777", 0o7777)])
def test_modes(text: str, mode: int) -> None:
    assert parse_mode("--umask", text) == mode


@pytest.mark.parametrize(
    ("parse", "text", "allowed"),
    [
        *((parse_size, text, "64MiB") for text in ("", "x", "-1", "1PB", "1 0", "1e3", "MiB", "64ib")),
        *((parse_time, text, "30s") for text in ("", "-1s", "5w", "1h30m", "inf")),
        *((parse_mode, text, "0644") for text in ("", "8", "0888", "rw", "0o644", "77777")),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(
    parse: Callable[[str, str], object], text: str, allowed: str
) -> None:
    with pytest.raises(UserError) as raised:
        parse("--option", text)
    assert raised.value.exit_code == ExitCode.USAGE
    assert "--option" in str(raised.value)
    assert repr(text) in str(raised.value)
    assert allowed in str(raised.value)


@pytest.fixture
def aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """mc's config.json with the alias `here`."""
    monkeypatch.setenv("MC_CONFIG_DIR", str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"aliases": {"here": {"url": "http://h:1", "accessKey": "a", "secretKey": "s"}}}))
    return path


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("bucket", Place(None, "bucket", "")),
        ("bucket/", Place(None, "bucket", "")),
        ("bucket/a//b/", Place(None, "bucket", "a/b/")),
        ("here/bucket", Place("here", "bucket", "")),
        ("here/bucket/a", Place("here", "bucket", "a/")),
        ("here", Place(None, "here", "")),
        ("there/bucket", Place(None, "there", "bucket/")),
    ],
)
@pytest.mark.usefixtures("aliases")
def test_places(text: str, place: Place) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize("text", ["", "/", "ab", "UPPER", "under_score", "-abc", "abc.", "a..b", "x" * 64, "s3://abc"])
@pytest.mark.usefixtures("aliases")
def test_what_is_no_bucket_name(text: str) -> None:
    with pytest.raises(UserError, match="is no bucket name: 3 to 63") as raised:
        parse_place(text)
    assert raised.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("prefix", [".", "a/../b"])
def test_prefixes_are_no_relative_paths(prefix: str) -> None:
    with pytest.raises(UserError, match="PREFIX"):
        parse_place(f"bucket/{prefix}")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"aliases": {"here": 1}}'])
def test_mc_settings_that_cannot_be_read_are_no_aliases(aliases: Path, content: str) -> None:
    aliases.write_text(content)
    assert config.mc_aliases() == {}


@pytest.mark.parametrize(
    ("option", "name", "least"),
    [
        ("--memory", "memory_bytes", 16 << 20),
        ("--dirty-size", "dirty_size_bytes", 1 << 20),
        ("--max-requests", "max_requests", 2),
    ],
)
def test_least_values(option: str, name: str, least: int) -> None:
    where = Path("/mnt")
    MountConfig(mountpoint=where, bucket="bbb", **{name: least})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"{option}.*at least"):
        MountConfig(mountpoint=where, bucket="bbb", **{name: least - 1})  # type: ignore[arg-type]


def test_each_place_has_its_own_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = {
        MountConfig(mountpoint=Path("/mnt"), bucket=bucket, prefix=prefix).cache_path(endpoint)
        for bucket in ("bbb", "ccc")
        for prefix in ("", "p/")
        for endpoint in ("http://a", "http://b")
    }
    assert len(paths) == 8
    assert {path.parent for path in paths} == {tmp_path / "s3fuse"}
    chosen = MountConfig(mountpoint=Path("/mnt"), bucket="bbb", cache_dir=tmp_path)
    assert chosen.cache_path("http://a") == tmp_path


@pytest.mark.parametrize(("uid", "root"), [(0, "/var/cache/s3fuse"), (1000, "/home/me/.cache/s3fuse")])
def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch, uid: int, root: str) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr("os.geteuid", lambda: uid)
    assert config.cache_root() == Path(root)
