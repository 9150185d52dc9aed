"""Keys as texts: read whole from files, checked before they are used, never shown.

Keys go into the heads of requests, and what no head can carry must not get there: an error of a library that has seen
a head may show all of it, the session token included.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

#: What a file of keys or a config of mc has at most; more is something else.
_MOST_BYTES = 1 << 20
_MARKS = ((b"\xef\xbb\xbf", "UTF-8"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
#: In heads a blank would end the key. Secret keys are only computed with.
_WORD = re.compile("[!-~]+")
_TEXT = re.compile("[ -~]+")
#: Where swarm, compose and Kubernetes put secrets: readable for all in a container that was given them, by nobody else.
_SECRETS = Path("/run/secrets")


class BadKeys(ValueError):
    """Keys that cannot be used. The text says what is wrong, and shows nothing of them."""


def read_text(path: Path) -> str:
    """The text of a file without blanks at its ends. Raises OSError, and BadKeys for what is no such text."""
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    for mark, name in _MARKS:
        if data.startswith(mark):
            raise BadKeys(f"it begins with a byte order mark ({name}); save it as plain text without one")
    if len(data) > _MOST_BYTES or b"\0" in data:
        raise BadKeys("it is no text; write it anew, whole")
    try:
        text = data.decode().strip()
    except UnicodeDecodeError as error:
        raise BadKeys(f"it is no UTF-8 text (byte {error.start + 1}); write it anew, whole") from None
    if not text:
        raise BadKeys("it is empty; it may be written only by half: write it anew, whole")
    return text


def check_keys(access_key: object, secret_key: object, session_token: object) -> None:
    """Returns where requests can be signed with these; a session token may be None or empty. Raises BadKeys."""
    _check("access key", access_key, _WORD)
    _check("secret key", secret_key, _TEXT)
    if session_token:
        _check("session token", session_token, _WORD)


def _check(name: str, key: object, allowed: re.Pattern[str]) -> None:
    if not isinstance(key, str):
        raise BadKeys(f"the {name} is no text")
    if not key:
        raise BadKeys(f"the {name} is empty")
    for at, character in enumerate(key):
        if not character.isascii():
            raise BadKeys(f"character {at + 1} of the {name} is not ASCII")
    if not allowed.fullmatch(key):
        raise BadKeys(f"the {name} has a blank, a line end or a control character in it")


def open_to_others(path: Path) -> str:
    """Says that others can read a file with keys, and what mends it; "" where they cannot, or it is a secret."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return ""  # the error of reading it says more
    if not mode & (stat.S_IRGRP | stat.S_IROTH) or _SECRETS in Path(os.path.realpath(path)).parents:
        return ""
    return f"others can read the keys in {path} (mode {stat.S_IMODE(mode):04o}); make it private: chmod 600 {path}"
