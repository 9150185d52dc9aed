"""How a copy is made: not by what could undo a write of others where something better is there; parts within limits."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3fuse.store.base import MAX_OBJECT_BYTES, ObjectInfo
from s3fuse.store.memory import ATOMIC, MINIO, SEAWEEDFS
from s3fuse.writing.copying import Form, conflict_check, form, part_bytes
from s3fuse.writing.plan import Limits

LIMITS = Limits()
MIB, GIB = 1 << 20, 1 << 30
BLIND = dataclasses.replace(
    MINIO, conditional_put=False, conditional_multipart=False, atomic_put=False, atomic_multipart=False
)
ETAG = "0" * 32


@pytest.mark.parametrize(
    ("able", "size", "expected"),
    [
        (MINIO, 0, Form.SEND),
        (MINIO, 256 << 10, Form.SEND),
        (MINIO, (256 << 10) + 1, Form.PARTS),
        (MINIO, 6 * GIB, Form.PARTS),
        (SEAWEEDFS, 0, Form.SEND),
        (SEAWEEDFS, 5 * GIB, Form.SEND),
        (SEAWEEDFS, 5 * GIB + 1, Form.PARTS),
        (ATOMIC, 0, Form.SEND),
        (ATOMIC, 1, Form.WHOLE),
        (ATOMIC, 5 * GIB, Form.WHOLE),
        (ATOMIC, 5 * GIB + 1, Form.PARTS),
        (BLIND, 0, Form.SEND),
        (BLIND, 5 * GIB, Form.WHOLE),
        (BLIND, 5 * GIB + 1, Form.PARTS),
    ],
)
def test_forms(able: object, size: int, expected: Form) -> None:
    assert form(size, able, LIMITS, alone=False) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("able", [MINIO, SEAWEEDFS, ATOMIC, BLIND])
def test_a_key_that_nobody_knows_needs_no_condition(able: object) -> None:
    sizes = {0: Form.SEND, 1: Form.WHOLE, 5 * GIB: Form.WHOLE, 5 * GIB + 1: Form.PARTS}
    assert {size: form(size, able, LIMITS, alone=True) for size in sizes} == sizes  # type: ignore[arg-type]


@given(
    st.tuples(*[st.booleans()] * 5),
    st.one_of(st.integers(1, 2 * MIB), st.integers(1, MAX_OBJECT_BYTES)),
)
def test_whatever_a_server_can_do(flags: tuple[bool, ...], size: int) -> None:
    put, parts, exact_put, exact_parts, exact_copy = flags
    able = dataclasses.replace(
        MINIO,
        conditional_put=put,
        conditional_multipart=parts,
        atomic_put=put and exact_put,
        atomic_multipart=parts and exact_parts,
        atomic_copy=exact_copy,
    )
    safe = {
        Form.SEND: able.atomic_put and size <= LIMITS.max_put_bytes,
        Form.PARTS: able.atomic_multipart,
        Form.WHOLE: able.atomic_copy and size <= LIMITS.max_copy_bytes,
    }
    chosen = form(size, able, LIMITS, alone=False)
    assert safe[chosen] or not any(safe.values())
    assert chosen is not Form.WHOLE or size <= LIMITS.max_copy_bytes


@given(
    st.integers(1, MAX_OBJECT_BYTES),
    st.one_of(st.just(ETAG), st.integers(0, 20_000).map(lambda count: f"{ETAG}-{count}"), st.text()),
    st.booleans(),
)
def test_parts_are_within_the_limits(size: int, etag: str, moves: bool) -> None:
    step = part_bytes(ObjectInfo("k", size, etag, 0), LIMITS, moves=moves)
    assert -(-size // step) <= LIMITS.max_parts
    assert step <= LIMITS.max_part_bytes
    assert step >= LIMITS.min_part_bytes or step >= size


@pytest.mark.parametrize(("part", "size"), list(itertools.product([5, 8, 16, 64], [17 * MIB, 100 * MIB + 3, 3 * GIB])))
def test_the_parts_of_an_object_are_guessed(part: int, size: int) -> None:
    """A metadata-only change keeps the etag; several sizes of parts may make the same number of them."""
    count = -(-size // (part * MIB))
    step = part_bytes(ObjectInfo("k", size, f"{ETAG}-{count}", 0), LIMITS, moves=False)
    assert -(-size // step) == count
    assert part_bytes(ObjectInfo("k", size, f"{ETAG}-1", 0), LIMITS, moves=False) == size


def test_status_says_how_sure_it_is() -> None:
    assert conflict_check(MINIO, LIMITS) == "atomic"
    assert "above 16 MiB" in conflict_check(SEAWEEDFS, LIMITS)
    assert conflict_check(BLIND, LIMITS).startswith("best effort (HEAD")
    assert conflict_check(dataclasses.replace(MINIO, atomic_put=False), LIMITS).startswith("best effort (the server")
