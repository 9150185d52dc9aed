"""S3's XML: documents parsed within bounds, their small answers read, and request bodies written; pure.

Elements are matched by local name: MinIO and AWS use a namespace, SeaweedFS mostly does not. Listings are read by
`s3listing`.

A document costs memory and time by its tags (300 bytes and 2 µs each where they are nested), so these are counted
before anything is built. That bounds the depth as well, which costs nothing beyond its tags.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from s3fuse.errors import BadResponse
from s3fuse.store.s3fields import etag_of, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from s3fuse.store.base import Part

#: A thousand entries with 2 KiB of metadata in names of one letter have 380,000.
MAX_TAGS: Final = 400_000
#: The interpreter's lock is free between two pieces: each takes about a millisecond.
_PIECE_BYTES: Final = 32 << 10
_BOM: Final = b"\xef\xbb\xbf"
_CODE: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MESSAGE_CHARS: Final = 500
_META: Final = "x-amz-meta-"
#: Characters no XML 1.0 document can hold, escaped or not.
_ILLEGAL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_ESCAPES: Final = {"\r": "&#13;", "\n": "&#10;", "\t": "&#9;"}


@dataclass(frozen=True, slots=True)
class Failure:
    """The content of an <Error> document; both are empty where there was none."""

    code: str = ""
    message: str = ""


def parse(body: bytes, kind: str) -> ET.Element:
    """The root of a document, which is a `kind`. Raises BadResponse where it is none, or too large to be one."""
    root = _document(body)
    if local_name(root) != kind:
        raise BadResponse(f"the answer is {quoted(local_name(root))} where {kind} was due")
    return root


def _document(body: bytes) -> ET.Element:
    data = body.strip().removeprefix(_BOM)
    # In UTF-8 alone are the bytes of a tag what is counted here.
    if not data.startswith(b"<") or b"\0" in data[:4]:
        raise BadResponse("the answer is not the XML that was due")
    if b"<!DOCTYPE" in data:  # which could declare entities that stand for any amount of text
        raise BadResponse("the answer is not the XML that was due: it has a document type")
    if data.count(b"<") > MAX_TAGS:
        raise BadResponse(f"the answer has more than {MAX_TAGS} tags")
    parser = ET.XMLParser(encoding="utf-8")
    try:
        for at in range(0, len(data), _PIECE_BYTES):
            parser.feed(data[at : at + _PIECE_BYTES])
        root: ET.Element = parser.close()
    except ET.ParseError as exc:
        raise BadResponse(f"the answer is not the XML that was due: {exc}") from exc
    return root


def local_name(element: ET.Element) -> str:
    """The name of an element without its namespace."""
    return element.tag.rpartition("}")[2]


def text_of(element: ET.Element, name: str) -> str:
    """The text of the first child with this name; "" where there is none."""
    return next((child.text or "" for child in element if local_name(child) == name), "")


def parse_failure(body: bytes) -> Failure:
    """The error that `body` tells of. Its code is a name and its message short, else they are left out and cut."""
    try:
        root = parse(body, "Error")
    except BadResponse:
        return Failure()
    code = text_of(root, "Code")
    return Failure(code if _CODE.fullmatch(code) else "", text_of(root, "Message")[:_MESSAGE_CHARS])


def user_metadata(headers: Iterator[tuple[str, str]]) -> dict[str, str]:
    """The user metadata among headers: lower-case names without `x-amz-meta-`."""
    start = len(_META)
    return {name[start:].lower(): value for name, value in headers if name[:start].lower() == _META}


def parse_result(body: bytes, kind: str, field: str) -> str:
    """One field of a small answer such as CopyObjectResult, without quotes. Raises BadResponse where it is missing."""
    value = text_of(parse(body, kind), field)
    if not value:
        raise BadResponse(f"the answer {kind} has no {field}")
    return etag_of(value) if field == "ETag" else value


def parse_deleted(body: bytes, keys: Sequence[str]) -> dict[str, Failure]:
    """Those of the keys that a multi-object delete could not delete, with the reason.

    Raises BadResponse where the answer names another key: then it is not known which of ours are left.
    """
    asked = set(keys)
    failed: dict[str, Failure] = {}
    for item in parse(body, "DeleteResult"):
        if local_name(item) != "Error":
            continue
        key, code = text_of(item, "Key"), text_of(item, "Code")
        if key not in asked:
            raise BadResponse(f"the answer names {quoted(key)}, which was not to be deleted")
        if code != "NoSuchKey":
            failed[key] = Failure(code, text_of(item, "Message")[:_MESSAGE_CHARS])
    return failed


def fits_xml(key: str) -> bool:
    """Whether an XML request body can name this key."""
    return _ILLEGAL.search(key) is None


def delete_body(keys: Sequence[str], etags: Mapping[str, str]) -> bytes:
    """The request of a multi-object delete that answers only failures; a key in `etags` goes only as that version."""

    def named(key: str) -> str:
        etag = f'<ETag>"{escape(etags[key])}"</ETag>' if key in etags else ""
        return f"<Object><Key>{escape(key, _ESCAPES)}</Key>{etag}</Object>"

    return f"<Delete><Quiet>true</Quiet>{''.join(map(named, keys))}</Delete>".encode()


def complete_body(parts: Sequence[Part]) -> bytes:
    """The request that completes a multipart upload."""
    listed = "".join(
        f'<Part><PartNumber>{part.number}</PartNumber><ETag>"{escape(part.etag)}"</ETag></Part>'
        for part in sorted(parts, key=lambda part: part.number)
    )
    return f"<CompleteMultipartUpload>{listed}</CompleteMultipartUpload>".encode()
