"""Headers of cached blocks: what was written is read, and whatever was changed is noticed."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3fuse.reading.records import BLOCK_BYTES, HEADER_BYTES, decode, describe, encode, fits

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)


@given(
    names,
    names,
    st.integers(0, 5 << 40),
    st.integers(0, 2**32 - 1),
    st.lists(st.binary(max_size=9), min_size=1, max_size=64),
)
def test_round_trip(key: str, etag: str, size: int, first: int, blocks: list[bytes]) -> None:
    header = describe((key, etag, size), first, blocks)
    text = encode(header)
    assert len(text) == HEADER_BYTES
    assert decode(text) == header


@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_is_noticed(bit: int) -> None:
    text = bytearray(encode(describe(("a/key", "etag", 9 * BLOCK_BYTES), 7, [bytes(BLOCK_BYTES), b"end"])))
    text[bit // 8] ^= 1 << bit % 8
    assert decode(bytes(text)) is None


@pytest.mark.parametrize("text", [b"", bytes(HEADER_BYTES), encode(describe(("k", "e", 1), 0, [b"x"]))[:-1]])
def test_what_is_no_header(text: bytes) -> None:
    assert decode(text) is None


@pytest.mark.parametrize("whole", [True, False])
def test_what_an_earlier_version_wrote_is_read(whole: bool) -> None:
    """It did not say how long the version is; its last block does, unless that is a whole one."""
    last = BLOCK_BYTES if whole else 10
    checksums = (1, 2)
    text = struct.pack("<4sHHIII", b"s3b1", 1, 4, 7, 2, BLOCK_BYTES + last) + b"ketag" + struct.pack("<2I", *checksums)
    text = text.ljust(HEADER_BYTES - 4, b"\0")
    header = decode(text + struct.pack("<I", zlib.crc32(text)))
    assert header is not None
    assert (header.key, header.etag, header.first, header.checksums) == ("k", "etag", 7, checksums)
    assert header.size_bytes == (-1 if whole else 8 * BLOCK_BYTES + 10)


def test_the_longest_key_fits() -> None:
    assert fits("k" * 1024, "e" * 128, 64)
    assert not fits("k" * 1024, "e" * 128, 4096)
