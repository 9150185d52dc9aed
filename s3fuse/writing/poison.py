"""Bytes that a program wrote and that could not be staged: where they are, and why.

The kernel's writeback cache tells a program that a write is done before it comes here. Where the disk then is full, or
fails, the program may never hear of it: only fsync and close can say so. Its file must not reach the bucket with zeros
or old bytes in their place. So the range is poisoned until it is written anew, cut off, or the file is removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from s3fuse.writing.layers import ENDLESS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from s3fuse.writing.layers import Layer

#: How many ranges a message names.
_NAMED = 3


def text(layers: Iterable[Layer], reason: str) -> str:
    """What a user is told of poisoned layers: which bytes, why, what heals; "" where nothing is poisoned."""
    ranges = sorted(found for layer in layers for found in layer.poisoned)
    if not ranges:
        return ""
    if ranges[-1][1] == ENDLESS:
        return (
            f"damaged: {reason}; it is not uploaded until it is written anew from its beginning, or removed "
            "(s3fuse cache recover copies out what is there)"
        )
    named = ", ".join(f"{start} to {stop}" for start, stop in ranges[:_NAMED])
    if len(ranges) > _NAMED:
        named += f" and {len(ranges) - _NAMED} more ranges"
    return (
        f"bytes {named} that a program wrote could not be taken ({reason}); write them anew, cut them off or remove "
        "the file: until then it is not uploaded"
    )
