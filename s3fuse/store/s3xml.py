"""S3's XML answers and request bodies, parsed and written; pure.

Elements are matched by local name: MinIO and AWS use a namespace, SeaweedFS mostly does not. Keys in listings are
asked for with `encoding-type=url` because XML cannot carry control characters; all servers write a blank as `+`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from s3fuse.errors import BadResponse
from s3fuse.store.base import ObjectInfo, Page, Upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from s3fuse.store.base import Part

_META = "x-amz-meta-"
#: Characters no XML 1.0 document can hold, escaped or not.
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_ESCAPES = {"\r": "&#13;", "\n": "&#10;", "\t": "&#9;"}


@dataclass(frozen=True, slots=True)
class Failure:
    """The content of an <Error> document; both are empty where there was none."""

    code: str = ""
    message: str = ""


def parse_failure(body: bytes) -> Failure:
    """The error that `body` tells of."""
    try:
        root = ET.fromstring(body.strip())
    except ET.ParseError:
        return Failure()
    if _local(root) != "Error":
        return Failure()
    return Failure(_text(root, "Code"), _text(root, "Message"))


def parse_page(body: bytes, *, metadata_known: bool) -> Page:
    """A ListObjectsV2 answer. With `metadata_known` an entry without user metadata has {}, else None."""
    objects: list[ObjectInfo] = []
    prefixes: list[str] = []
    token = ""
    truncated = False
    root = _parse(body, "ListBucketResult")
    decode = _decoder(root)
    for element in root:
        match _local(element):
            case "Contents":
                objects.append(_entry(element, decode, metadata_known))
            case "CommonPrefixes":
                prefixes.append(decode(_text(element, "Prefix")))
            case "NextContinuationToken":
                token = element.text or ""
            case "IsTruncated":
                truncated = element.text == "true"
    if truncated and not token:
        raise BadResponse("the listing is cut off without a continuation token")
    if "\ufffd" in token:
        # SeaweedFS gives the last name as token, and XML has replaced a control character in it.
        token = max([entry.key for entry in objects[-1:]] + prefixes[-1:])
    return Page(tuple(objects), tuple(prefixes), token if truncated else None)


def _entry(element: ET.Element, decode: Callable[[str], str], metadata_known: bool) -> ObjectInfo:
    key = etag = modified = ""
    size_bytes = 0
    metadata: Mapping[str, str] | None = {} if metadata_known else None
    for child in element:
        # Comparing suffixes spares a split for each of six elements of each of a thousand entries.
        tag = child.tag
        if tag.endswith("Key"):
            key = child.text or ""
        elif tag.endswith("LastModified"):
            modified = child.text or ""
        elif tag.endswith("ETag"):
            etag = child.text or ""
        elif tag.endswith("Size"):
            size_bytes = int(child.text or 0)
        elif tag.endswith("UserMetadata"):
            metadata = user_metadata((item.tag[item.tag.rfind("}") + 1 :], item.text or "") for item in child)
    if not key:
        raise BadResponse("the listing has an entry without a key")
    return ObjectInfo(decode(key), size_bytes, etag.strip('"'), parse_time(modified), metadata)


def user_metadata(headers: Iterator[tuple[str, str]]) -> dict[str, str]:
    """The user metadata among headers: lower-case names without `x-amz-meta-`."""
    start = len(_META)
    return {name[start:].lower(): value for name, value in headers if name[:start].lower() == _META}


def parse_uploads(body: bytes) -> tuple[list[Upload], tuple[str, str] | None]:
    """A ListMultipartUploads answer and the markers (key, upload id) of the next page."""
    root = _parse(body, "ListMultipartUploadsResult")
    decode = _decoder(root)
    uploads = [
        Upload(decode(_text(item, "Key")), _text(item, "UploadId"), parse_time(_text(item, "Initiated")))
        for item in root
        if _local(item) == "Upload"
    ]
    if _text(root, "IsTruncated") != "true":
        return uploads, None
    return uploads, (decode(_text(root, "NextKeyMarker")), _text(root, "NextUploadIdMarker"))


def parse_result(body: bytes, kind: str, field: str) -> str:
    """One field of a small answer such as CopyObjectResult, without quotes. Raises BadResponse where it is missing."""
    value = _text(_parse(body, kind), field).strip('"')
    if not value:
        raise BadResponse(f"the answer {kind} has no {field}")
    return value


def parse_deleted(body: bytes) -> dict[str, str]:
    """The keys that a multi-object delete could not delete, with the reason."""
    return {
        _text(item, "Key"): f"{_text(item, 'Code')}: {_text(item, 'Message')}"
        for item in _parse(body, "DeleteResult")
        if _local(item) == "Error" and _text(item, "Code") != "NoSuchKey"
    }


def fits_xml(key: str) -> bool:
    """Whether an XML request body can name this key."""
    return _ILLEGAL.search(key) is None


def delete_body(keys: Sequence[str]) -> bytes:
    """The request of a multi-object delete that answers only failures."""
    objects = "".join(f"<Object><Key>{escape(key, _ESCAPES)}</Key></Object>" for key in keys)
    return f"<Delete><Quiet>true</Quiet>{objects}</Delete>".encode()


def complete_body(parts: Sequence[Part]) -> bytes:
    """The request that completes a multipart upload."""
    listed = "".join(
        f'<Part><PartNumber>{part.number}</PartNumber><ETag>"{part.etag}"</ETag></Part>'
        for part in sorted(parts, key=lambda part: part.number)
    )
    return f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()


def parse_time(text: str) -> int:
    """ns since the epoch of an ISO 8601 time in UTC, without its fraction: HEAD has none, and the two must agree."""
    return _second_ns(text[:19])


@lru_cache(maxsize=1024)
def _second_ns(text: str) -> int:
    try:
        return int(datetime.fromisoformat(f"{text}+00:00").timestamp()) * 1_000_000_000
    except ValueError as exc:
        raise BadResponse(f"not a time: {text!r}") from exc


def _parse(body: bytes, kind: str) -> ET.Element:
    try:
        root = ET.fromstring(body.strip())
    except ET.ParseError as exc:
        raise BadResponse(f"the answer is not the XML that was due: {exc}") from exc
    if _local(root) != kind:
        raise BadResponse(f"the answer is {_local(root)} where {kind} was due")
    return root


def _decoder(root: ET.Element) -> Callable[[str], str]:
    """How names in an answer are decoded."""
    return unquote_plus if _text(root, "EncodingType") == "url" else str


def _local(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]


def _text(element: ET.Element, name: str) -> str:
    for child in element:
        if _local(child) == name:
            return child.text or ""
    return ""
