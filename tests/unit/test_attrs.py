"""User metadata: exact round trips, s3fs-fuse's format to the letter, and no garbage that raises."""

from __future__ import annotations

import base64
import errno
import json
import re
import stat
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, unquote_to_bytes

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from s3fuse import attrs
from s3fuse.attrs import Attributes, Defaults
from s3fuse.store.base import MAX_METADATA_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULTS = Defaults(1000, 1001, 0o640, 0o750)
MODIFIED_NS = 1_600_000_000_000_000_000
SECOND = 10**9

TIMES = st.integers(-(1 << 63), (1 << 63) - 1)
IDS = st.integers(0, (1 << 32) - 2)
TYPES = st.sampled_from([stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
XATTR_NAMES = st.binary(min_size=1, max_size=12).filter(lambda name: b"\0" not in name) | st.sampled_from(
    [b'user."', b"user.a,b:c", b"user.\\u0022", b"user.{}", b"user.\xff\xfe"]
)
XATTRS = st.dictionaries(
    XATTR_NAMES.map(lambda name: name.decode(errors="surrogateescape")), st.binary(max_size=20), max_size=5
)
ATTRIBUTES = st.builds(
    Attributes,
    st.builds(int.__or__, TYPES, st.integers(0, 0o7777)),
    IDS,
    IDS,
    TIMES,
    TIMES,
    TIMES,
    st.integers(0, (1 << 32) - 1),
    XATTRS,
)
FIELDS = st.sampled_from(
    ["mode", "uid", "gid", "mtime", "atime", "ctime", "rdev", "xattr", "--symlink-target", "gcsfuse_mtime", "other"]
)
GARBAGE = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.datetimes().map(lambda time: time.isoformat()),
    st.sampled_from(
        ["\ud800", "9" * 5000, "-", ".5", "-.5", "1.x", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+01:00"]
    ),
    st.sampled_from(["0000-01-01T00:00:00Z", "%7B%22a%22%3A%22Q%22%7D", '{"a":"QQ=="', "0x1ff", "0644", "40755"]),
)


def decode(metadata: Mapping[str, str] | None, *, is_directory: bool = False) -> Attributes:
    return attrs.decode(metadata, is_directory=is_directory, modified_ns=MODIFIED_NS, defaults=DEFAULTS)


def make(**changes: object) -> Attributes:
    fields: dict[str, object] = {"mode": stat.S_IFREG | 0o644, "uid": 1, "gid": 2}
    fields |= {"atime_ns": 3, "mtime_ns": 4, "ctime_ns": 5} | changes
    return Attributes(**fields)  # type: ignore[arg-type]


def s3fs_xattrs(text: str) -> dict[bytes, bytes]:
    """Reads `xattr` as s3fs does: between the outer braces, cut at ',' then at the first ':', quotes taken off."""
    plain = unquote_to_bytes(text)
    found = {}
    for pair in plain[plain.index(b"{") + 1 : plain.rindex(b"}")].split(b","):
        name, _, value = pair.partition(b":")
        assert name[:1] == name[-1:] == value[:1] == value[-1:] == b'"'
        assert b'"' not in name[1:-1] + value[1:-1]
        found[name[1:-1]] = base64.b64decode(value[1:-1])
    return found


def s3fs_time(text: str) -> int:
    """Reads a time as s3fs does: tv_sec and tv_nsec are the numbers before and after the dot."""
    seconds, _, ns = text.partition(".")
    return int(seconds) * SECOND + int(ns or "0")


@given(ATTRIBUTES)
def test_what_is_encoded_is_decoded(attributes: Attributes) -> None:
    metadata = attrs.encode(attributes, {})
    assert all(value.isascii() and value.isprintable() for value in metadata.values())
    assert decode(metadata) == attributes


@given(ATTRIBUTES)
def test_s3fs_reads_what_is_encoded(attributes: Attributes) -> None:
    metadata = attrs.encode(attributes, {})
    assert int(metadata["mode"]) == attributes.mode
    assert (int(metadata["uid"]), int(metadata["gid"])) == (attributes.uid, attributes.gid)
    for field in ("atime", "mtime", "ctime"):
        assert re.fullmatch(r"-?\d+(\.\d{9})?", metadata[field])
        assert s3fs_time(metadata[field]) == getattr(attributes, f"{field}_ns")
    if attributes.xattrs:
        assert list(s3fs_xattrs(metadata["xattr"]).values()) == [
            attributes.xattrs[name] for name in sorted(attributes.xattrs)
        ]
        assert re.fullmatch(r"[A-Za-z0-9/._~%-]+", metadata["xattr"])
    else:
        assert "xattr" not in metadata


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), st.binary(max_size=9), min_size=1, max_size=4
    )
)
def test_xattrs_are_json(xattrs: dict[str, bytes]) -> None:
    read = json.loads(unquote(attrs.encode(make(xattrs=xattrs), {})["xattr"]))
    assert {name: base64.b64decode(value) for name, value in read.items()} == xattrs


@given(ATTRIBUTES)
def test_xattrs_survive_being_rewritten_by_s3fs(attributes: Attributes) -> None:
    metadata = attrs.encode(make(xattrs=attributes.xattrs, mode=stat.S_IFREG), {})
    if attributes.xattrs:
        kept = s3fs_xattrs(metadata["xattr"])
        pairs = b",".join(b'"%b":"%b"' % (name, base64.b64encode(value)) for name, value in kept.items())
        assert decode({"xattr": quote(b"{%b}" % pairs)}).xattrs == attributes.xattrs


def test_the_format_to_the_letter() -> None:
    attributes = make(
        atime_ns=1_700_000_000_000_000_005,
        mtime_ns=1_700_000_001 * SECOND,
        ctime_ns=-SECOND // 4,
        xattrs={"user.b": b"value", "user.a": b""},
    )
    assert attrs.encode(attributes, {"owner-of": "another tool"}) == {
        "owner-of": "another tool",
        "mode": "33188",
        "uid": "1",
        "gid": "2",
        "atime": "1700000000.000000005",
        "mtime": "1700000001",
        "ctime": "-1.750000000",
        "xattr": "%7B%22user.a%22%3A%22%22%2C%22user.b%22%3A%22dmFsdWU%3D%22%7D",
    }


@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, SECOND - 1))
@example(10413792000, 0)  # the year 2300
@example(-(1 << 63), 0)
def test_a_time_of_any_int64_of_seconds_is_the_nearest_that_is_kept(seconds: int, ns: int) -> None:
    wanted = max(-(1 << 63), min((1 << 63) - 1, seconds * SECOND + ns))
    assert attrs.clamp_ns(seconds * SECOND + ns) == wanted
    found = decode(dict.fromkeys(("mtime", "atime", "ctime"), f"{seconds}.{ns:09d}"))
    if seconds:  # rclone's sign is that of the fraction where there are no seconds
        assert (found.mtime_ns, found.atime_ns, found.ctime_ns) == (wanted, wanted, wanted)
    late = attrs.decode(None, is_directory=False, modified_ns=seconds * SECOND, defaults=DEFAULTS)
    assert late.mtime_ns == max(-(1 << 63), min((1 << 63) - 1, seconds * SECOND))
    encoded = attrs.encode(found, {})
    assert decode(encoded) == found


@given(st.dictionaries(FIELDS, GARBAGE), st.booleans())
def test_garbage_never_raises(metadata: dict[str, str], is_directory: bool) -> None:
    found = decode(metadata, is_directory=is_directory)
    assert stat.S_ISDIR(found.mode) == is_directory
    assert 0 <= found.uid < 1 << 32
    assert all(-(1 << 63) <= time < 1 << 63 for time in (found.atime_ns, found.mtime_ns, found.ctime_ns))
    assert decode({**metadata, "uid": "7"}).uid == 7


@pytest.mark.parametrize("metadata", [None, {}, {"other": "tool"}, {"mode": "x", "uid": "-1", "gid": "4294967295"}])
def test_defaults(metadata: dict[str, str] | None) -> None:
    times = (MODIFIED_NS, MODIFIED_NS, MODIFIED_NS)
    assert decode(metadata) == Attributes(stat.S_IFREG | 0o640, 1000, 1001, *times)
    assert decode(metadata, is_directory=True) == Attributes(stat.S_IFDIR | 0o750, 1000, 1001, *times)


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("33188", stat.S_IFREG | 0o644),
        ("420", stat.S_IFREG | 0o644),
        ("0644", stat.S_IFREG | 0o644),
        ("16877", stat.S_IFREG | 0o755),
        ("41471", stat.S_IFLNK | 0o777),
        ("100755", stat.S_IFREG | 0o755),
        ("120777", stat.S_IFLNK | 0o777),
        ("20666", stat.S_IFCHR | 0o666),
        ("0100644", stat.S_IFREG | 0o644),
        ("09", stat.S_IFREG | 0o640),
        ("-1", stat.S_IFREG | 0o640),
        ("99999999", stat.S_IFREG | 0o640),
    ],
)
def test_modes_of_s3fs_and_rclone(text: str, mode: int) -> None:
    assert decode({"mode": text}).mode == mode


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("0", 0),
        ("1700000000", 1_700_000_000 * SECOND),
        ("1700000000.5", 1_700_000_000 * SECOND + 500_000_000),
        ("1700000000.123456789", 1_700_000_000_123_456_789),
        ("1700000000.1234567891", 1_700_000_000_123_456_789),
        ("1700000000.", 1_700_000_000 * SECOND),
        ("1700000000.5x", 1_700_000_000 * SECOND),
        ("-1.5", -1_500_000_000),
        ("-1.500000000", -500_000_000),
        ("-0.123456789", -123_456_789),
        ("2023-11-14T22:13:20Z", 1_700_000_000 * SECOND),
        ("2023-11-14T22:13:20.123456789Z", 1_700_000_000_123_456_789),
        ("2023-11-14T23:13:20.5+01:00", 1_700_000_000_500_000_000),
        ("1969-12-31T23:59:59.75Z", -SECOND // 4),
        ("2023-13-14T22:13:20Z", MODIFIED_NS),
        ("9999-01-01T00:00:00Z", (1 << 63) - 1),
        ("9223372037", (1 << 63) - 1),
        ("yesterday", MODIFIED_NS),
        ("", MODIFIED_NS),
    ],
)
def test_times_of_s3fs_rclone_and_gcsfuse(text: str, ns: int) -> None:
    assert decode({"mtime": text}).mtime_ns == ns
    assert decode({"gcsfuse_mtime": text}).mtime_ns == ns
    assert decode({"mtime": "0", "atime": text}).atime_ns == (0 if ns == MODIFIED_NS else ns)


def test_mtime_wins_and_is_the_default_of_the_others() -> None:
    found = decode({"mtime": "5", "gcsfuse_mtime": "2023-11-14T22:13:20Z"})
    assert found.mtime_ns == found.atime_ns == found.ctime_ns == 5 * SECOND
    assert decode({"mtime": "x", "goog-reserved-file-mtime": "6"}).mtime_ns == 6 * SECOND


def test_symlinks_of_geesefs() -> None:
    metadata = {"--symlink-target": "..%2Fa%20b%FF", "uid": "5"}
    found = decode(metadata)
    assert stat.S_ISLNK(found.mode)
    assert found.target == b"../a b\xff"
    assert decode(metadata, is_directory=True).target is None
    kept = attrs.encode(found, metadata)
    assert decode(kept) == found
    assert "--symlink-target" not in attrs.encode(make(), metadata)
    unknown = attrs.encode(make(mode=stat.S_IFLNK | 0o777), metadata)
    assert unknown["--symlink-target"] == metadata["--symlink-target"]


def test_rdev_and_xattrs_that_are_gone_are_removed() -> None:
    assert attrs.encode(make(), {"rdev": "5", "xattr": "%7B%7D"}).keys() == {
        "mode",
        "uid",
        "gid",
        "atime",
        "mtime",
        "ctime",
    }


def test_xattr_pairs_that_are_broken_are_skipped() -> None:
    text = quote('{"a":"!","b":"Q","c": "QQ==" , "d" : "","e\\n":"Qg=="}')
    assert decode({"xattr": text}).xattrs == {"c": b"A", "d": b"", "e\\n": b"B"}


def test_more_than_s3_takes_is_refused() -> None:
    def size(metadata: Mapping[str, str]) -> int:
        return sum(len("x-amz-meta-") + len(name) + len(value) for name, value in metadata.items())

    room = MAX_METADATA_BYTES - size(attrs.encode(make(), {"foreign": ""}))
    assert size(attrs.encode(make(), {"foreign": "x" * room})) == MAX_METADATA_BYTES
    with pytest.raises(OSError, match="No space") as caught:
        attrs.encode(make(), {"foreign": "x" * (room + 1)})
    assert caught.value.errno == errno.ENOSPC
