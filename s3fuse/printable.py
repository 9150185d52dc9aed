"""Foreign text made safe and short, for terminals and logs. The standard library only, for the keeper.

Names, and what servers say, may hold anything: escape sequences that a terminal obeys, line ends that forge lines of a
log, marks that reverse the order of what is read, any number of bytes. Whatever is shown goes through `printable`;
JSON for programs carries the true text.
"""

from __future__ import annotations

from typing import Final

#: What is shown of a text; S3's longest key has 1024 bytes.
MOST_CHARS: Final = 1000
#: What is left of the end of a text that is too long.
_TAIL_CHARS: Final = 100


def printable(text: str, most_chars: int = MOST_CHARS, *, lines: bool = False) -> str:
    """The text on one line: what does not print is written as in Python (`\\x1b`, `\\n`, `\\u202e`), long ones are cut.

    With `lines` line ends stay: only for text of our own, whose foreign parts have been made printable.
    """
    if len(text) > most_chars:
        left = f"... ({len(text) - most_chars:,} characters left out) ..."
        text = text[: most_chars - _TAIL_CHARS] + left + text[-_TAIL_CHARS:]
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or (lines and char == "\n") else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
