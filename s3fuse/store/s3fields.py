"""Single fields of S3's answers: sizes, etags, times and names, refused unless they are what they have to be; pure.

What a server says ends in requests, in the journal and in the kernel: nothing gets there that these do not take.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_to_bytes

from s3fuse.errors import BadResponse

#: The largest size that a file can have on Linux.
MAX_SIZE_BYTES: Final = (1 << 63) - 1
_SIZE: Final = re.compile(r"[0-9]{1,19}")
#: RFC 9110's characters of an entity tag without those beyond ASCII: etags go out again in headers.
_ETAG: Final = re.compile(r"[!#-~]{1,256}")
_ISO: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}")
_SECOND_NS: Final = 10**9
#: The last and first whole seconds whose ns fit 64 bits, as the kernel and the journal keep them.
_MAX_S: Final = MAX_SIZE_BYTES // _SECOND_NS
_QUOTED_CHARS: Final = 60


def quoted(text: str) -> str:
    """The beginning of a text that is not what it should be, for messages."""
    return repr(text[:_QUOTED_CHARS])


def size_of(text: str) -> int:
    """A size in bytes. Raises BadResponse unless it is a plain number that a file's size can be."""
    size_bytes = int(text) if _SIZE.fullmatch(text) else -1
    if not 0 <= size_bytes <= MAX_SIZE_BYTES:
        raise BadResponse(f"not a size: {quoted(text)}")
    return size_bytes


def etag_of(text: str) -> str:
    """An etag without its quotes. Raises BadResponse where a header cannot carry it."""
    etag = text.strip('"')
    if not _ETAG.fullmatch(etag):
        raise BadResponse(f"not an etag: {quoted(text)}")
    return etag


def iso_time_ns(text: str) -> int:
    """ns since the epoch of an ISO 8601 time in UTC, without its fraction: HEAD has none, and the two must agree.

    A time that 64 bits cannot hold is the nearest one that they can: year 1 is what some servers write for "unknown".
    Raises BadResponse where it is no time.
    """
    return _iso_ns(text[:19])


@lru_cache(maxsize=1024)
def _iso_ns(text: str) -> int:
    try:
        if not _ISO.fullmatch(text):  # Python takes many other forms
            raise ValueError
        return _ns(datetime.fromisoformat(f"{text}+00:00"))
    except (ValueError, OverflowError) as exc:
        raise BadResponse(f"not a time: {quoted(text)}") from exc


def http_time(text: str) -> datetime:
    """The moment that an HTTP date names. Raises BadResponse."""
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, TypeError, OverflowError, IndexError) as exc:
        raise BadResponse(f"not a date: {quoted(text)}") from exc


def http_time_ns(text: str) -> int:
    """ns since the epoch of an HTTP date; the same limits as `iso_time_ns`. Raises BadResponse."""
    return _ns(http_time(text))


def _ns(moment: datetime) -> int:
    return max(-_MAX_S, min(_MAX_S, int(moment.timestamp()))) * _SECOND_NS


def url_decoded(text: str) -> str:
    """A name of an answer with `encoding-type=url`; all servers write a blank as `+`. Raises BadResponse.

    Bytes that are no UTF-8 are refused, not replaced: the name would be that of another object.
    """
    if "%" not in text and "+" not in text:
        return text
    try:
        return unquote_to_bytes(text.replace("+", " ")).decode()
    except UnicodeDecodeError as exc:
        raise BadResponse(f"not UTF-8: {quoted(text)}") from exc
