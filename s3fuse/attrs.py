"""POSIX attributes of an object and the user metadata that carries them.

The format is s3fs-fuse's (metaheader.cpp, string_util.cpp, s3fs.cpp and types.h of its sources; 1.90 to 1.97 agree):

* `mode`: st_mode with its type bits; `uid`, `gid`: all decimal. s3fs reads a leading 0 as octal.
* `mtime`, `atime`, `ctime`: tv_sec, then '.' and tv_nsec in exactly nine digits unless it is 0. s3fs reads what
  follows the dot as a number of ns, so a shorter fraction would be wrong to it. tv_nsec counts upwards before 1970
  too: -0.25 s is -1.750000000.
* `xattr`: `{"NAME":"BASE64","NAME":"BASE64"}`, percent-encoded byte by byte except for letters, digits and `/._-~`.
  s3fs does not parse JSON: it cuts at ',' and ':' and knows no escapes. We write such characters of a name as
  \\u00xx: JSON to everybody else, and a plain name that it keeps and rewrites unharmed to s3fs.
* A symlink has S_IFLNK in `mode` and its target as body. s3fs keeps no device numbers: `rdev` is geesefs's, decimal.

Read as well: rclone's `mtime` (seconds with a trimmed fraction and a sign in front, or RFC 3339) and octal `mode`,
gcsfuse's `gcsfuse_mtime` (RFC 3339), gsutil's `goog-reserved-file-mtime` (as s3fs does), geesefs's
`--symlink-target` (percent-encoded).
"""

from __future__ import annotations

import binascii
import errno
import os
import re
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote_to_bytes

from s3fuse.store.base import MAX_METADATA_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

_NO_XATTRS: Final[Mapping[str, bytes]] = MappingProxyType({})
_SYMLINK_TARGET: Final = "--symlink-target"
_OTHER_MTIMES: Final = ("gcsfuse_mtime", "goog-reserved-file-mtime")

_SECOND_NS: Final = 10**9
_MIN_NS: Final = -(1 << 63)
_MAX_NS: Final = (1 << 63) - 1
_MAX_ID: Final = (1 << 32) - 2  # (uid_t)-1 means "no change" to chown(2)
_MAX_RDEV: Final = (1 << 32) - 1  # what FUSE has for it
#: Further away than any filesystem's times: no time at all.
_MAX_SECONDS: Final = 1 << 63
_FILE_TYPES: Final = frozenset(
    {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}
)

#: MinIO counts the whole header name, AWS what follows the prefix: the stricter of the two.
_HEADER_PREFIX_BYTES: Final = len("x-amz-meta-")

_RFC3339: Final = re.compile(r"(\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?([Zz]|[+-]\d\d:\d\d)?", re.ASCII)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_XATTR: Final = re.compile(rb'"([^"]+)"\s*:\s*"([A-Za-z0-9+/]*={0,2})"')
_ESCAPED: Final = re.compile(rb"\\u00([0-9a-fA-F]{2})")
_TO_ESCAPE: Final = re.compile(rb'[\x00-\x1f",:\\{}]')


@dataclass(slots=True, frozen=True)
class Attributes:
    """What stat(2), listxattr(2) and readlink(2) say of a file, apart from its size.

    `mode` has the type bits; times are ns since the epoch. Names of xattrs that are not UTF-8 are surrogate-escaped.
    `target` is a symlink's target where the metadata gave it, else it is in the object's body.
    """

    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    rdev: int = 0
    xattrs: Mapping[str, bytes] = field(default_factory=lambda: _NO_XATTRS)
    target: bytes | None = None


@dataclass(slots=True, frozen=True)
class Defaults:
    """Owner and permission bits of objects that do not say."""

    uid: int
    gid: int
    file_mode: int
    dir_mode: int


def clamp_ns(time_ns: int) -> int:
    """The nearest time that is kept: 64 bits of ns hold the years 1677 to 2262."""
    return max(_MIN_NS, min(_MAX_NS, time_ns))


def decode(
    metadata: Mapping[str, str] | None, *, is_directory: bool, modified_ns: int, defaults: Defaults
) -> Attributes:
    """The attributes that an object's user metadata gives; each one that is absent or garbage has its default.

    Never raises. `is_directory` is decided by the key: no metadata makes a directory a file or a file a directory.
    atime and ctime default to mtime, mtime to `modified_ns`, the object's Last-Modified. Times are as `clamp_ns` gives.
    """
    modified_ns = clamp_ns(modified_ns)
    if not metadata:
        mode = stat.S_IFDIR | defaults.dir_mode if is_directory else stat.S_IFREG | defaults.file_mode
        return Attributes(mode, defaults.uid, defaults.gid, modified_ns, modified_ns, modified_ns)
    get = metadata.get
    target = None
    mode = _mode(get("mode"), is_directory, defaults)
    if _SYMLINK_TARGET in metadata and not is_directory:
        target = _unquote(metadata[_SYMLINK_TARGET])
        mode = stat.S_IFLNK | 0o777
    mtime_ns = _time(get("mtime"))
    if mtime_ns is None:
        times = (_time(get(name)) for name in _OTHER_MTIMES)
        mtime_ns = next((time for time in times if time is not None), modified_ns)
    atime_ns = _time(get("atime"))
    ctime_ns = _time(get("ctime"))
    xattr = get("xattr")
    return Attributes(
        mode,
        _number(get("uid"), _MAX_ID, defaults.uid),
        _number(get("gid"), _MAX_ID, defaults.gid),
        mtime_ns if atime_ns is None else atime_ns,
        mtime_ns,
        mtime_ns if ctime_ns is None else ctime_ns,
        _number(get("rdev"), _MAX_RDEV, 0),
        _decode_xattrs(xattr) if xattr else _NO_XATTRS,
        target,
    )


def encode(attributes: Attributes, existing: Mapping[str, str]) -> dict[str, str]:
    """The user metadata to store: `existing`, with what we know of replaced and the rest kept.

    Raises OSError(ENOSPC), as setxattr(2) does, where it is more than S3 takes.
    """
    metadata = dict(existing)
    metadata["mode"] = str(attributes.mode)
    metadata["uid"] = str(attributes.uid)
    metadata["gid"] = str(attributes.gid)
    metadata["atime"] = _format_time(attributes.atime_ns)
    metadata["mtime"] = _format_time(attributes.mtime_ns)
    metadata["ctime"] = _format_time(attributes.ctime_ns)
    if attributes.rdev:
        metadata["rdev"] = str(attributes.rdev)
    else:
        metadata.pop("rdev", None)
    if attributes.xattrs:
        metadata["xattr"] = _encode_xattrs(attributes.xattrs)
    else:
        metadata.pop("xattr", None)
    if not stat.S_ISLNK(attributes.mode):
        metadata.pop(_SYMLINK_TARGET, None)
    elif attributes.target is not None and _SYMLINK_TARGET in metadata:
        metadata[_SYMLINK_TARGET] = quote(attributes.target)
    if _size_bytes(metadata) > MAX_METADATA_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return metadata


def _size_bytes(metadata: Mapping[str, str]) -> int:
    return sum(_HEADER_PREFIX_BYTES + len(_utf8(name)) + len(_utf8(value)) for name, value in metadata.items())


def _utf8(text: str) -> bytes:
    """Never raises, whatever a header was decoded to."""
    return text.encode(errors="surrogatepass")


def _unquote(text: str) -> bytes:
    return unquote_to_bytes(_utf8(text))


def _number(text: str | None, largest: int, default: int) -> int:
    if text is None:
        return default
    try:
        number = int(text)
    except ValueError:
        return default
    return number if 0 <= number <= largest else default


def _mode(text: str | None, is_directory: bool, defaults: Defaults) -> int:
    permissions = defaults.dir_mode if is_directory else defaults.file_mode
    file_type = stat.S_IFREG
    if text is not None:
        # rclone writes octal: 100644, which as a decimal number is too large, or 40755, whose type bits do not exist.
        for base in (8,) if text.startswith("0") else (10, 8):
            try:
                mode = int(text, base)
            except ValueError:
                break
            if 0 <= mode <= 0o177777 and (not stat.S_IFMT(mode) or stat.S_IFMT(mode) in _FILE_TYPES):
                permissions, file_type = stat.S_IMODE(mode), stat.S_IFMT(mode)
                break
    if is_directory:
        return stat.S_IFDIR | permissions
    if file_type in (0, stat.S_IFDIR):
        file_type = stat.S_IFREG
    return file_type | permissions


def _time(text: str | None) -> int | None:
    """ns since the epoch, clamped; None where there is no such time."""
    if text is None:
        return None
    seconds, dot, fraction = text.partition(".")
    try:
        if not -_MAX_SECONDS <= int(seconds) < _MAX_SECONDS:
            return None
        ns = int(seconds) * _SECOND_NS
        if dot:
            below = int(fraction[:9].ljust(9, "0")) if fraction.isdecimal() else 0
            # rclone puts the sign before the whole number. Nine digits are s3fs's, unless no tv_sec is written so.
            ns += -below if seconds[0] == "-" and (len(fraction) < 9 or int(seconds) == 0) else below
    except ValueError:
        return _rfc3339(text)
    return clamp_ns(ns)


def _rfc3339(text: str) -> int | None:
    match = _RFC3339.fullmatch(text)
    if match is None:
        return None
    date, fraction, zone = match.groups()
    try:
        since = datetime.fromisoformat(date.upper() + (zone or "Z").upper()) - _EPOCH
    except (ValueError, OverflowError):
        return None
    return clamp_ns((since.days * 86400 + since.seconds) * _SECOND_NS + int((fraction or "").ljust(9, "0")))


def _format_time(time_ns: int) -> str:
    seconds, ns = divmod(time_ns, _SECOND_NS)
    return f"{seconds}.{ns:09d}" if ns else str(seconds)


def _decode_xattrs(text: str) -> dict[str, bytes]:
    """The pairs that are whole; s3fs skips the others as well."""
    xattrs = {}
    for name, value in _XATTR.findall(_unquote(text)):
        plain = _ESCAPED.sub(lambda match: bytes.fromhex(match[1].decode()), name) if b"\\" in name else name
        try:
            xattrs[plain.decode(errors="surrogateescape")] = binascii.a2b_base64(value)
        except binascii.Error:
            continue
    return xattrs


def _encode_xattrs(xattrs: Mapping[str, bytes]) -> str:
    pairs = []
    for name, value in sorted(xattrs.items()):
        plain = _TO_ESCAPE.sub(lambda match: b"\\u%04x" % match[0][0], name.encode(errors="surrogateescape"))
        pairs.append(b'"%b":"%b"' % (plain, binascii.b2a_base64(value, newline=False)))
    return quote(b"{%b}" % b",".join(pairs))
