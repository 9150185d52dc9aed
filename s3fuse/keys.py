"""Names and keys: which names may be made, which keys can be shown, and what a name says of its content."""

from __future__ import annotations

import errno
import mimetypes
import os
import secrets
import time as clock
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from s3fuse.store.base import MAX_KEY_BYTES

if TYPE_CHECKING:
    from s3fuse.store.base import ObjectInfo, Page

#: NAME_MAX of Linux.
MAX_NAME_BYTES: Final = 255
#: A name in the root of the mount that is hidden there: probe and temporary keys are below it.
RESERVED: Final = ".s3fuse"

#: Holds the attributes of the root of a whole bucket, which has no key of its own.
ROOT_MARKER: Final = f"{RESERVED}/root/"
#: Content type of directory markers, as s3fs-fuse writes it.
DIRECTORY_TYPE: Final = "application/x-directory"

#: Hosts in conflict names are cut to this, so that there is room for the name itself.
_MAX_HOST_BYTES: Final = 128
#: An instance has Python's own table only; the module's functions would also look into files of the host.
_TYPES: Final = mimetypes.MimeTypes().types_map[True]
#: What Python takes for a content encoding; served without that header, it is the type.
_PACKED_TYPES: Final = {
    ".br": "application/x-brotli",
    ".bz2": "application/x-bzip2",
    ".gz": "application/gzip",
    ".xz": "application/x-xz",
    ".zst": "application/zstd",
}


def _error(number: int, name: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), name)


def check_name(name: bytes) -> str:
    """The text of a name that a program gives for a new or existing file.

    Raises OSError: EILSEQ where it is not UTF-8 (keys are), ENAMETOOLONG above 255 bytes, EINVAL for '', '.', '..'
    and where it has '/' or NUL in it.
    """
    if len(name) > MAX_NAME_BYTES:
        raise _error(errno.ENAMETOOLONG)
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise _error(errno.EILSEQ) from None
    if text in ("", ".", "..") or "/" in text or "\0" in text:
        raise _error(errno.EINVAL, text)
    return text


def join(prefix_key: str, name: str) -> str:
    """The key of `name` in the directory whose key is `prefix_key` ('' or ending in '/').

    Raises OSError(ENAMETOOLONG) where it is longer than the 1024 bytes that S3 allows.
    """
    key = prefix_key + name
    # No character has more than four bytes, and few keys come near the limit.
    if len(key) > MAX_KEY_BYTES // 4 and len(key.encode()) > MAX_KEY_BYTES:
        raise _error(errno.ENAMETOOLONG, name)
    return key


def temporary_key(prefix: str) -> str:
    """A new random key below RESERVED of the mount whose root is `prefix` ('' or ending in '/')."""
    return f"{prefix}{RESERVED}/{secrets.token_hex(16)}"


@dataclass(slots=True)
class Shown:
    """What one page of a listing shows of a directory.

    `marker` is the directory's own object, if it was in this page. `hidden` counts keys that no name can stand for
    (an empty component, '.', '..', NUL, more than 255 bytes) and files shadowed by a directory of the same name.
    """

    files: dict[str, ObjectInfo] = field(default_factory=dict)
    directories: dict[str, None] = field(default_factory=dict)
    marker: ObjectInfo | None = None
    hidden: int = 0


def shown(page: Page, prefix: str) -> Shown:
    """Sorts a page listed with `prefix` and delimiter '/' into names, in key order.

    A name may be a file in one page and a directory in a later one; then the directory wins, which is for the caller
    to do. RESERVED is not left out: only the caller knows whether this is the root.
    """
    cut = len(prefix)
    result = Shown()
    files, directories = result.files, result.directories
    for info in page.objects:
        name = info.key[cut:]
        if _can_be_shown(name):
            files[name] = info
        elif name:
            result.hidden += 1
        else:
            result.marker = info
    for common in page.prefixes:
        name = common[cut:-1]
        if not _can_be_shown(name):
            result.hidden += 1
            continue
        directories[name] = None
        if files.pop(name, None) is not None:
            result.hidden += 1
    return result


def _can_be_shown(name: str) -> bool:
    try:
        size = len(name) if name.isascii() else len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size <= MAX_NAME_BYTES and name not in (".", "..") and "/" not in name and "\0" not in name


def content_type(name: str) -> str:
    """The content type that the extension of a name or key stands for; the same on every host.

    Keys that end in '/' are directories. Unknown extensions are application/octet-stream.
    """
    if name.endswith("/"):
        return DIRECTORY_TYPE
    extension = os.path.splitext(name)[1].lower()
    return _PACKED_TYPES.get(extension) or _TYPES.get(extension, "application/octet-stream")


def conflict_name(name: str, host: str, time: float) -> str:
    """NAME.conflict-HOST-TIME of at most 255 bytes, for a version that lost `name` to another writer.

    `time` is in seconds since the epoch and shown to the second in UTC. NAME is cut where it does not fit, between
    characters.
    """
    host = _fit(host.replace("/", "_").replace("\0", "_"), _MAX_HOST_BYTES)
    suffix = f".conflict-{host}-{clock.strftime('%Y%m%dT%H%M%SZ', clock.gmtime(time))}"
    return _fit(name, MAX_NAME_BYTES - len(suffix.encode())) + suffix


def _fit(text: str, max_bytes: int) -> str:
    return text.encode()[:max_bytes].decode(errors="ignore")
