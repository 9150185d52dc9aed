"""Listings as S3 answers them, checked against what was asked; pure.

A page that is not the one asked for raises: taken for an empty one it would make files vanish. A single entry that
cannot be read is left out, and its key is in `Page.unreadable`. Keys are asked for with `encoding-type=url` because
XML cannot carry control characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from s3fuse.errors import BadResponse
from s3fuse.store.base import ObjectInfo, Page, Upload
from s3fuse.store.s3fields import etag_of, iso_time_ns, quoted, size_of, url_decoded
from s3fuse.store.s3xml import local_name, parse, text_of, user_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from xml.etree import ElementTree as ET

#: Servers put the last key into it, in base64 or escaped.
_MAX_TOKEN_CHARS: Final = 16 << 10
#: What stands for a character that XML cannot hold.
_REPLACED: Final = "\ufffd"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a page was asked for."""

    bucket: str
    prefix: str = ""
    delimiter: str = ""
    token: str | None = None


def parse_page(body: bytes, asked: Asked, *, metadata_known: bool) -> Page:
    """A ListObjectsV2 answer. With `metadata_known` an entry without user metadata has {}, else None.

    Raises BadResponse where it is not an answer to what was `asked`.
    """
    root = parse(body, "ListBucketResult")
    fields = _fields(root)
    decode = _decoder(fields)
    objects: list[ObjectInfo] = []
    prefixes: list[str] = []
    unreadable: list[str] = []
    grouped = 0
    for element in root:
        key = ""
        try:
            match local_name(element):
                case "Contents":
                    key = _named(decode(text_of(element, "Key")))
                    objects.append(_entry(key, element, metadata_known))
                case "CommonPrefixes":
                    grouped += 1
                    prefixes.append(_named(decode(text_of(element, "Prefix"))))
        except BadResponse:
            unreadable.append(key)
    _check_asked(fields, asked, decode)
    _check_count(fields.get("KeyCount", ""), len(objects) + len(prefixes) + len(unreadable), grouped)
    _check_keys(asked, [entry.key for entry in objects], prefixes)
    token = _next_token(fields)
    if token and _REPLACED in token:
        # SeaweedFS gives the last name as token, and XML has replaced a control character in it.
        token = max([entry.key for entry in objects[-1:]] + prefixes[-1:], default=token)
    if token is not None and token == asked.token:
        raise BadResponse("the listing does not go on: its continuation token is the one that it was asked with")
    return Page(tuple(objects), tuple(prefixes), token, tuple(unreadable))


def _fields(root: ET.Element) -> dict[str, str]:
    """What the answer says of itself: the elements that are no entries."""
    return {local_name(element): element.text or "" for element in root if not len(element)}


def _named(key: str) -> str:
    if not key:
        raise BadResponse("the listing has an entry without a key")
    return key


def _entry(key: str, element: ET.Element, metadata_known: bool) -> ObjectInfo:
    etag = modified = size = ""
    metadata: Mapping[str, str] | None = {} if metadata_known else None
    for child in element:
        # Comparing suffixes spares a split for each of six elements of each of a thousand entries.
        tag = child.tag
        if tag.endswith("LastModified"):
            modified = child.text or ""
        elif tag.endswith("ETag"):
            etag = child.text or ""
        elif tag.endswith("Size"):
            size = child.text or ""
        elif tag.endswith("UserMetadata"):
            metadata = user_metadata((item.tag[item.tag.rfind("}") + 1 :], item.text or "") for item in child)
    return ObjectInfo(key, size_of(size), etag_of(etag), iso_time_ns(modified), metadata)


def _check_asked(fields: Mapping[str, str], asked: Asked, decode: Callable[[str], str]) -> None:
    """Whether the page says that it is of this bucket and prefix."""
    name, prefix = fields.get("Name", ""), fields.get("Prefix", "")
    if name != asked.bucket:
        raise BadResponse(f"the listing is of the bucket {quoted(name)}, not of {asked.bucket}")
    # SeaweedFS writes the prefix as it is, also where it says that names are encoded.
    if asked.prefix not in (prefix, _or_none(decode, prefix)) and _REPLACED not in prefix:
        raise BadResponse(f"the listing is of the prefix {quoted(prefix)}, not of {quoted(asked.prefix)}")


def _or_none(decode: Callable[[str], str], text: str) -> str | None:
    try:
        return decode(text)
    except BadResponse:
        return None


def _check_count(count: str, entries: int, grouped: int) -> None:
    """Whether all is there that the page says it has. Older servers count no prefixes, or nothing."""
    if count and count not in (str(entries), str(entries - grouped)):
        raise BadResponse(f"the listing has {entries} keys where it says {quoted(count)}")


def _check_keys(asked: Asked, keys: list[str], prefixes: list[str]) -> None:
    """Whether the server has looked at prefix and delimiter: names would be cut wrongly, or be missing."""
    cut, delimiter = len(asked.prefix), asked.delimiter
    for key in keys:
        if not key.startswith(asked.prefix) or (delimiter and delimiter in key[cut:]):
            raise BadResponse(f"the listing of {quoted(asked.prefix)} has the key {quoted(key)}")
    for prefix in prefixes:
        ends = prefix.find(delimiter, cut) if delimiter else -1
        if not prefix.startswith(asked.prefix) or ends < 0 or ends + len(delimiter) != len(prefix):
            raise BadResponse(f"the listing of {quoted(asked.prefix)} has the prefix {quoted(prefix)}")


def _next_token(fields: Mapping[str, str]) -> str | None:
    """The continuation token; None on the last page."""
    if not _is_truncated(fields):
        return None
    token = fields.get("NextContinuationToken", "")
    if not token:
        raise BadResponse("the listing is cut off without a continuation token")
    if len(token) > _MAX_TOKEN_CHARS:
        raise BadResponse(f"the continuation token has {len(token)} characters")
    return token


def _is_truncated(fields: Mapping[str, str]) -> bool:
    truncated = fields.get("IsTruncated")
    if truncated not in ("true", "false"):
        raise BadResponse("the listing does not say whether it is all")
    return truncated == "true"


def parse_uploads(body: bytes, bucket: str) -> tuple[list[Upload], tuple[str, str] | None]:
    """A ListMultipartUploads answer and the markers (key, upload id) of the next page.

    Entries that cannot be read are left out: without key and id there is nothing to abort.
    """
    root = parse(body, "ListMultipartUploadsResult")
    fields = _fields(root)
    decode = _decoder(fields)
    if fields.get("Bucket") != bucket:
        raise BadResponse(
            f"the listing of uploads is of the bucket {quoted(fields.get('Bucket', ''))}, not of {bucket}"
        )
    truncated = _is_truncated(fields)
    found = (_upload(item, decode) for item in root if local_name(item) == "Upload")
    uploads = [upload for upload in found if upload is not None]
    if not truncated:
        return uploads, None
    return uploads, (decode(fields.get("NextKeyMarker", "")), fields.get("NextUploadIdMarker", ""))


def _upload(item: ET.Element, decode: Callable[[str], str]) -> Upload | None:
    upload_id = text_of(item, "UploadId")
    try:
        key, begun_ns = decode(text_of(item, "Key")), iso_time_ns(text_of(item, "Initiated"))
    except BadResponse:
        return None
    return Upload(key, upload_id, begun_ns) if key and upload_id else None


def _decoder(fields: Mapping[str, str]) -> Callable[[str], str]:
    """How names in an answer are decoded."""
    return url_decoded if fields.get("EncodingType") == "url" else str
