"""Names of volumes: which are allowed, what files they get, and which bucket a volume has that names none."""

from __future__ import annotations

import hashlib
import re

from s3fuse.config import parse_place
from s3fuse.errors import ExitCode, UserError

#: What Docker allows.
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_MOST_BYTES = 255
#: A file name has 255 bytes, and some are for what stands before and after the volume's name.
_MOST_IN_FILES = 200


def check_name(name: str) -> None:
    """Raises UserError for what can be no volume's name; it becomes part of paths."""
    if _NAME.fullmatch(name) is None or len(name) > _MOST_BYTES:
        raise UserError(
            f"volume name {name[:300]!r} is not allowed; it takes up to {_MOST_BYTES} letters, digits, '_', '.' and "
            "'-', beginning with a letter or digit",
            ExitCode.USAGE,
        )


def file_name(name: str) -> str:
    """What the files of a volume are named after: its name, cut where that is too long for a file."""
    if len(name) <= _MOST_IN_FILES:
        return name
    return f"{name[: _MOST_IN_FILES - 20]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


class NameRule:
    """Where the data of a volume is that was made by its name only: BUCKET[/PREFIX] with `{name}` in it.

    Every node that has the same rule finds the same data for a name.
    """

    def __init__(self, text: str) -> None:
        """Raises UserError for a rule that gives the same place to every volume, or no place at all."""
        self.text = text
        if text.count("{name}") != 1:
            raise UserError(
                f"--name-rule: {text!r} is not allowed; it takes BUCKET[/PREFIX] with {{name}} in it once, such as "
                "{name} or docker-volumes/{name}",
                ExitCode.USAGE,
            )
        parse_place(text.replace("{name}", "abc"))

    def place(self, name: str) -> tuple[str, str]:
        """Bucket and prefix (without "/" at its end). Raises UserError where the name does not fit."""
        try:
            place = parse_place(self.text.replace("{name}", name))
        except UserError as error:
            raise UserError(
                f"volume {name} names no bucket, and the rule {self.text} gives it none: {error}; add the option "
                "bucket=NAME, or start the plugin with --name-rule BUCKET/{name}",
                ExitCode.USAGE,
            ) from None
        return place.bucket, place.prefix.rstrip("/")
