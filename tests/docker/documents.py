"""The commands that the documents tell people to run, so that tests run exactly those."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(document: str, name: str) -> list[str]:
    """The shell blocks of a document that follow a comment <!-- run: NAME -->, in order."""
    text = (ROOT / document).read_text()
    found = re.findall(rf"<!-- run: {re.escape(name)} -->\n+```sh\n(.*?)```", text, re.DOTALL)
    assert found, f"{document} has no shell block after <!-- run: {name} -->"
    return found


def commands(document: str, name: str) -> str:
    """The same as one script."""
    return "".join(blocks(document, name))
