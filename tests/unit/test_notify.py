"""What is told to the kernel goes to its connection, or nowhere."""

from __future__ import annotations

import os
import struct

from s3fuse.fuse.notify import invalidation


def test_a_name_is_told_to_the_connection_that_there_was() -> None:
    """The descriptor's number may be another file's when the thread comes to it."""
    reader, device = os.pipe()
    tell = invalidation(device, 7, "ä".encode())
    os.close(device)
    other_reader, other = os.pipe()  # may have the number
    try:
        tell()
        text = os.read(reader, 100)
        assert struct.unpack("<IiQQII", text[:32]) == (len(text), 3, 0, 7, 2, 0)
        assert text[32:] == "ä".encode() + b"\0"
        os.set_blocking(other_reader, False)
        os.close(other)
        assert os.read(other_reader, 1) == b""
        assert os.read(reader, 1) == b""  # nothing keeps the connection open
    finally:
        os.close(reader)
        os.close(other_reader)


def test_a_connection_that_has_ended_is_told_nothing() -> None:
    device = os.open(os.devnull, os.O_RDONLY)
    os.close(device)
    invalidation(device, 1, b"f")()
