"""Headers of cached blocks: what was written is read, and whatever was changed is noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3fuse.reading.records import BLOCK_BYTES, HEADER_BYTES, decode, describe, encode, fits

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)


@given(names, names, st.integers(0, 2**32 - 1), st.lists(st.binary(max_size=9), min_size=1, max_size=64))
def test_round_trip(key: str, etag: str, first: int, blocks: list[bytes]) -> None:
    header = describe(key, etag, first, blocks)
    text = encode(header)
    assert len(text) == HEADER_BYTES
    assert decode(text) == header


@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_is_noticed(bit: int) -> None:
    text = bytearray(encode(describe("a/key", "etag", 7, [bytes(BLOCK_BYTES), b"end"])))
    text[bit // 8] ^= 1 << bit % 8
    assert decode(bytes(text)) is None


@pytest.mark.parametrize("text", [b"", bytes(HEADER_BYTES), encode(describe("k", "e", 0, [b"x"]))[:-1]])
def test_what_is_no_header(text: bytes) -> None:
    assert decode(text) is None


def test_the_longest_key_fits() -> None:
    assert fits("k" * 1024, "e" * 128, 64)
    assert not fits("k" * 1024, "e" * 128, 4096)
