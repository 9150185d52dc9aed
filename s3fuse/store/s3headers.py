"""HTTP headers of objects: what goes out with a write, what comes back with an answer; pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from s3fuse.errors import BadResponse, PreconditionFailed, Refused
from s3fuse.store.base import KEPT_HEADERS, Condition, ObjectInfo
from s3fuse.store.s3fields import etag_of, http_time_ns, size_of
from s3fuse.store.s3xml import user_metadata

if TYPE_CHECKING:
    from collections.abc import Mapping

    from s3fuse.store.framing import Answer

#: Fewer than HTTP allows: MinIO makes XML element names of them in its listings.
_NAME = re.compile(r"[a-z0-9._-]+")
#: Printable ASCII without blanks at the ends: HTTP strips those, and both servers compute another signature for
#: anything beyond ASCII.
_VALUE = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")
_DEFAULT_TYPE = "application/octet-stream"


def write_headers(metadata: Mapping[str, str], headers: Mapping[str, str], key: str) -> dict[str, str]:
    """The headers that give an object its metadata and kept headers.

    Raises Refused for a name or value that a header cannot carry: encoding is up to the caller.
    """
    sent = {"content-type": _DEFAULT_TYPE}
    for name, value in headers.items():
        if name not in KEPT_HEADERS:
            raise Refused(f"{name!r} is not a header that objects keep", key)
        sent[name] = _checked(name, value, key)
    for name, value in metadata.items():
        if not _NAME.fullmatch(name):
            raise Refused(f"metadata name {name!r} has other characters than a-z, 0-9, '.', '_' and '-'", key)
        sent[f"x-amz-meta-{name}"] = _checked(name, value, key)
    return sent


def _checked(name: str, value: str, key: str) -> str:
    if not _VALUE.fullmatch(value):
        raise Refused(f"the value of {name} cannot be an HTTP header: only printable ASCII, no blank at an end", key)
    return value


def condition_headers(condition: Condition) -> dict[str, str]:
    """If-Match or If-None-Match for a write."""
    if condition.absent:
        return {"if-none-match": "*"}
    return {} if condition.etag is None else {"if-match": f'"{condition.etag}"'}


def object_info(key: str, answer: Answer) -> ObjectInfo:
    """The version that the answer to a HEAD describes. Raises BadResponse."""
    headers = answer.headers
    try:
        return ObjectInfo(
            key,
            size_of(headers["content-length"]),
            etag_of(headers["etag"]),
            http_time_ns(headers["last-modified"]),
            user_metadata(iter(headers.items())),
            {name: headers[name] for name in KEPT_HEADERS & headers.keys()},
            headers.get("x-amz-version-id", ""),
        )
    except KeyError as exc:
        raise BadResponse(f"the answer does not describe an object: it has no {exc.args[0]}", key) from exc


def check_range(answer: Answer, offset: int, size_bytes: int, etag: str, whole_bytes: int | None) -> None:
    """Raises unless the head of the answer promises exactly these bytes of this version, of `whole_bytes` if known."""
    headers = answer.headers
    found = headers.get("etag", "").strip('"')
    if not found:
        raise BadResponse(f"the answer ({headers.get('content-type')}) is not an object: it has no etag")
    if found != etag:
        raise PreconditionFailed(f"version {found} came where {etag} was asked for")
    if answer.status == 206:
        promised, _, total = headers.get("content-range", "").removeprefix("bytes ").partition("/")
        if whole_bytes is not None and total.isdecimal() and int(total) != whole_bytes:
            raise PreconditionFailed(f"a version of {total} bytes came where one of {whole_bytes} was asked for")
        if promised != f"{offset}-{offset + size_bytes - 1}":
            raise BadResponse(f"range {promised or 'unknown'} came where {size_bytes} bytes from {offset} were due")
    elif offset:
        raise BadResponse(f"the whole object came where {size_bytes} bytes from {offset} were due")
