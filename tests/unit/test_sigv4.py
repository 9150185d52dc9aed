"""Our signatures against those of the SDK."""

from __future__ import annotations

from datetime import UTC, datetime
from urllib.parse import SplitResult, quote, urlencode

from hypothesis import given, settings
from hypothesis import strategies as st
from minio.credentials.credentials import Credentials
from minio.signer import sign_v4_s3

from s3fuse.store import sigv4

TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="\x7f"), max_size=20)
NAMES = st.text("abcdefghijklmnopqrstuvwxyz-ABC", min_size=1, max_size=12)
VALUES = st.text("abc XYZ/=,;:0123", max_size=20)


@settings(deadline=None)
@given(
    st.sampled_from(["GET", "PUT", "HEAD", "POST", "DELETE"]),
    TEXT,
    st.dictionaries(NAMES, TEXT, max_size=4),
    st.dictionaries(NAMES.map(lambda name: f"x-amz-meta-{name}".lower()), VALUES, max_size=4),
    st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1)).map(lambda when: when.replace(tzinfo=UTC)),
    st.sampled_from(["us-east-1", "eu-central-1"]),
    st.text("abcXYZ/+=", min_size=1, max_size=40),
)
def test_signatures_are_the_sdks(
    method: str,
    key: str,
    fields: dict[str, str],
    more: dict[str, str],
    when: datetime,
    region: str,
    secret: str,
) -> None:
    path, query = f"/bucket/{quote(key, safe='/~')}", urlencode(fields, quote_via=quote)
    headers = {
        "Host": "localhost:9000",
        "x-amz-content-sha256": sigv4.UNSIGNED,
        "x-amz-date": when.strftime("%Y%m%dT%H%M%SZ"),
        **more,
    }
    ours = sigv4.authorization("access", secret, region, method, path, query, headers)
    theirs = sign_v4_s3(
        method=method,
        url=SplitResult("http", "localhost:9000", path, query, ""),
        region=region,
        headers=dict(headers),
        credentials=Credentials("access", secret),
        content_sha256=sigv4.UNSIGNED,
        date=when,
    )
    assert ours == theirs["Authorization"]
