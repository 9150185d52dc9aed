"""Listings and other documents of servers that are broken, or hostile: bounds, pages of something else, bad entries."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3fuse.errors import BadResponse
from s3fuse.store.base import ObjectInfo, Page
from s3fuse.store.s3fields import etag_of, http_time_ns, iso_time_ns, size_of, url_decoded
from s3fuse.store.s3listing import Asked, parse_page, parse_uploads
from s3fuse.store.s3xml import Failure, parse_deleted, parse_failure, parse_result
from s3fuse.store.walk import Walk
from tests.engine.hostile import listing

if TYPE_CHECKING:
    from collections.abc import Iterator

ETAG = "0123456789abcdef0123456789abcdef"
ASKED = Asked("bucket", "d/", "/")
INFOS = tuple(ObjectInfo(f"d/{name}", 5, ETAG, 1_700_000_000 * 10**9, {"mode": "33188"}) for name in "abc")
PAGE = Page(INFOS, ("d/e/",), None)
GOOD = listing(PAGE, "d/")
ENTRY = GOOD[GOOD.index(b"<Contents>") : GOOD.index(b"</Contents>") + len(b"</Contents>")]
#: What may stand where a text is due.
NASTY = ["", "-5", "10" * 12, "xyz", "1_0", "+5", " 5", "\u0665", "9" * 5000, "\r\nHost: x", "\ufffd", "a" * 300_000]


def test_a_page_is_read_as_it_was_written() -> None:
    assert parse_page(GOOD, ASKED, metadata_known=True) == PAGE


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<ListBucketResult/>",
        b"<ListBucketResult><Name>bucket</Name><Prefix>d/</Prefix></ListBucketResult>",
        b"<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>",
        b"<Error><Code>SlowDown</Code></Error>",
        b"<html><body>log in first</body></html>",
        b'{"objects": []}',
        GOOD[: len(GOOD) // 2],
        GOOD.replace(b"<Name>bucket", b"<Name>another"),
        GOOD.replace(b"<Name>bucket</Name>", b""),
        GOOD.replace(b"<Prefix>d/</Prefix>", b"<Prefix>e/</Prefix>", 1),
        GOOD.replace(b"<Prefix>d/</Prefix>", b"", 1),
        GOOD.replace(b"<KeyCount>4", b"<KeyCount>7"),
        GOOD.replace(b"<KeyCount>4", b"<KeyCount>xyz"),
        GOOD.replace(b"<IsTruncated>false", b"<IsTruncated>"),
        GOOD.replace(b"<IsTruncated>false", b"<IsTruncated>maybe"),
        GOOD.replace(b"<IsTruncated>false", b"<IsTruncated>true"),
        GOOD.replace(ENTRY, b""),
        GOOD.replace(b"<Key>d/a", b"<Key>other/a"),
        GOOD.replace(b"<Key>d/a", b"<Key>d/sub/a"),
        GOOD.replace(b"<Prefix>d/e/", b"<Prefix>e/"),
        GOOD.replace(b"<Prefix>d/e/", b"<Prefix>d/e/f/"),
        GOOD.replace(b"<Prefix>d/e/", b"<Prefix>d/e"),
        listing(PAGE, "").replace(b"d/e/", b"e/"),
        listing(replace(PAGE, next_token="t" * 100_000), "d/"),
    ],
)
def test_what_is_not_the_page_asked_for_is_an_error(body: bytes) -> None:
    with pytest.raises(BadResponse):
        parse_page(body, ASKED, metadata_known=True)


def test_a_token_that_leads_back_is_an_error() -> None:
    with pytest.raises(BadResponse):
        parse_page(listing(replace(PAGE, next_token="t"), "d/"), replace(ASKED, token="t"), metadata_known=True)


@pytest.mark.parametrize("said", [b"<KeyCount>3</KeyCount>", b""])
def test_older_servers_count_objects_only_or_nothing(said: bytes) -> None:
    body = GOOD.replace(b"<KeyCount>4</KeyCount>", said)
    assert parse_page(body, ASKED, metadata_known=True) == PAGE


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *(("Size", text) for text in NASTY),
        *(("LastModified", text) for text in NASTY),
        *(
            ("ETag", text)
            for text in NASTY
            if not text.isascii() or not text.isprintable() or len(text) not in range(1, 99)
        ),
        ("Key", ""),
    ],
)
def test_one_bad_field_leaves_the_neighbours(field: str, text: str) -> None:
    page = parse_page(_with_field(field, text), ASKED, metadata_known=True)
    assert page.objects == INFOS[1:]
    assert page.prefixes == PAGE.prefixes
    assert page.unreadable == ("" if field == "Key" else "d/a",)


def _with_field(field: str, text: str) -> bytes:
    start = ENTRY.index(f"<{field}>".encode()) + len(field) + 2
    stop = ENTRY.index(f"</{field}>".encode())
    carried = text.replace("\r", "&#13;").replace("\n", "&#10;").encode()
    return GOOD.replace(ENTRY, ENTRY[:start] + carried + ENTRY[stop:], 1)


@given(
    st.sampled_from(["Size", "ETag", "LastModified", "StorageClass"]),
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn"])),
)
@settings(max_examples=500, deadline=None)
def test_no_text_in_one_entry_harms_another(field: str, text: str) -> None:
    page = parse_page(_with_field(field, escape(text)), ASKED, metadata_known=True)
    assert page.objects[-2:] == INFOS[1:]
    assert len(page.objects) + len(page.unreadable) == 3


def test_keys_that_are_no_utf8_are_left_out() -> None:
    page = parse_page(GOOD.replace(b"<Key>d/a", b"<Key>d/%ff"), ASKED, metadata_known=True)
    assert [info.key for info in page.objects] == ["d/b", "d/c"]
    assert page.unreadable == ("",)


@pytest.mark.parametrize(
    "body",
    [
        b"<ListBucketResult>" + b"<a>" * 5_000_000,
        b"<ListBucketResult>" + b"<a>" * 2_000_000 + b"</a>" * 2_000_000 + b"</ListBucketResult>",
        b"<ListBucketResult>" + b"<a/>" * 4_000_000 + b"</ListBucketResult>",
        b'<!DOCTYPE a [<!ENTITY b "'
        + b"b" * 60_000
        + b'">]><ListBucketResult>'
        + b"&b;" * 60_000
        + b"</ListBucketResult>",
        ('<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "b">]><a>' + "&b;" * 10 + "</a>").encode("utf-16"),
        b'<?xml version="1.0" encoding="cp037"?><ListBucketResult/>',
    ],
)
def test_documents_that_would_take_all_memory(body: bytes) -> None:
    tracemalloc.start()
    began = time.monotonic()
    try:
        with pytest.raises(BadResponse):
            parse_page(body, ASKED, metadata_known=True)
        assert parse_failure(body) == Failure()
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body) + (1 << 20)
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 5


def test_the_largest_nested_document_is_bounded() -> None:
    body = b"<ListBucketResult>" + b"<a>" * 199_000 + b"</a>" * 199_000 + b"</ListBucketResult>"
    began = time.monotonic()
    with pytest.raises(BadResponse):
        parse_page(body, ASKED, metadata_known=True)
    assert time.monotonic() - began < 5


# -- other documents


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        (b"<Error><Code>SlowDown</Code><Message>later</Message></Error>", Failure("SlowDown", "later")),
        (b"<Error><Code>a b\x07</Code></Error>", Failure()),
        (b"<Error><Code>" + b"C" * 200_000 + b"</Code><Message>m</Message></Error>", Failure("", "m")),
        (b"<Error><Code>A</Code><Message>" + b"m" * 200_000 + b"</Message></Error>", Failure("A", "m" * 500)),
        (b"<Error>", Failure()),
        (b"<html/>", Failure()),
    ],
)
def test_error_documents(body: bytes, failure: Failure) -> None:
    assert parse_failure(body) == failure


@given(st.binary())
def test_error_documents_never_raise(body: bytes) -> None:
    parse_failure(body)
    parse_failure(b"<Error><Code>" + body + b"</Code></Error>")


def test_a_delete_that_names_other_keys_is_not_believed() -> None:
    body = b"<DeleteResult><Error><Key></Key><Code>InternalError</Code></Error></DeleteResult>"
    with pytest.raises(BadResponse):
        parse_deleted(body, ["a", "b"])
    assert parse_deleted(b"<DeleteResult/>", ["a"]) == {}


@pytest.mark.parametrize("etag", ["", "a\r\nHost: x", "\u00e9", "e" * 300, 'a"b', "a b"])
def test_etags_that_no_header_can_carry(etag: str) -> None:
    body = f"<CopyObjectResult><ETag>{etag}</ETag></CopyObjectResult>".replace("\r", "&#13;").encode()
    with pytest.raises(BadResponse):
        parse_result(body, "CopyObjectResult", "ETag")
    with pytest.raises(BadResponse):
        etag_of(etag)


UPLOAD = b"<Upload><Key>k</Key><UploadId>u</UploadId><Initiated>2026-11-25T08:46:25Z</Initiated></Upload>"


@pytest.mark.parametrize(
    "bad",
    [
        UPLOAD.replace(b"k", b""),
        UPLOAD.replace(b">u<", b"><"),
        UPLOAD.replace(b"2026", b"soon"),
        b"<Upload/>",
    ],
)
def test_one_bad_upload_leaves_the_others(bad: bytes) -> None:
    head = b"<ListMultipartUploadsResult><Bucket>bucket</Bucket><IsTruncated>false</IsTruncated>"
    uploads, markers = parse_uploads(head + bad + UPLOAD + b"</ListMultipartUploadsResult>", "bucket")
    assert [upload.key for upload in uploads] == ["k"]
    assert markers is None


@pytest.mark.parametrize(
    "body",
    [
        b"<ListMultipartUploadsResult/>",
        b"<ListMultipartUploadsResult><Bucket>b</Bucket><IsTruncated>false</IsTruncated></ListMultipartUploadsResult>",
        b"<ListMultipartUploadsResult><Bucket>bucket</Bucket></ListMultipartUploadsResult>",
    ],
)
def test_a_listing_of_other_uploads(body: bytes) -> None:
    with pytest.raises(BadResponse):
        parse_uploads(body, "bucket")


# -- fields


def test_sizes() -> None:
    assert size_of(str((1 << 63) - 1)) == (1 << 63) - 1
    for text in [*NASTY, str(1 << 63), "0x10", "5.0", "nan"]:
        with pytest.raises(BadResponse):
            size_of(text)


def test_times_fit_64_bits_and_are_the_same_by_listing_and_by_head() -> None:
    assert iso_time_ns("2026-11-25T08:46:25.123Z") == http_time_ns("Wed, 25 Nov 2026 08:46:25 GMT")
    for iso, http in [
        ("0001-01-01T00:00:00Z", "Mon, 01 Jan 0001 00:00:00 GMT"),
        ("9999-12-31T23:59:59Z", "Fri, 31 Dec 9999 23:59:59 GMT"),
    ]:
        assert -(1 << 63) <= iso_time_ns(iso) < 1 << 63
        assert iso_time_ns(iso) == http_time_ns(http) or "0001" in http  # year 1 is read as 2001 there
    assert http_time_ns("Wed, 25 Nov 2026 08:46:25 -0000") == http_time_ns("Wed, 25 Nov 2026 08:46:25 GMT")


@given(st.text())
def test_times_raise_nothing_else(text: str) -> None:
    for read in (iso_time_ns, http_time_ns):
        try:
            assert -(1 << 63) <= read(text) < 1 << 63
        except BadResponse:
            continue


def test_names_are_decoded_as_all_servers_encode_them() -> None:
    assert url_decoded("a+b%2B%C3%BC%00/") == "a b+\u00fc\0/"


# -- many pages


def pages(*keys: str, token: str) -> Page:
    return Page(tuple(replace(INFOS[0], key=key) for key in keys), (), token)


def test_a_walk_goes_on_while_there_is_something_new() -> None:
    walk = Walk()
    assert walk.follow(pages("a", "b", token="1")) == "1"
    assert walk.follow(pages(token="2")) == "2"
    assert walk.follow(pages("c", token="3")) == "3"
    assert walk.follow(Page((), (), None)) is None


@pytest.mark.parametrize("period", [1, 2, 7])
@pytest.mark.parametrize("new_tokens", [False, True])
def test_a_walk_in_a_circle_ends(period: int, new_tokens: bool) -> None:
    endless = (pages(f"k{at % period}", token=str(at if new_tokens else at % period)) for at in count())
    with pytest.raises(BadResponse):
        _walk(endless)


def test_a_walk_through_nothing_ends() -> None:
    with pytest.raises(BadResponse):
        _walk(pages(token=str(at)) for at in count())


def _walk(endless: Iterator[Page]) -> None:
    walk = Walk()
    for page in endless:
        walk.follow(page)
