"""What a volume is: its options checked and put in order, and the `s3fuse mount` command that they ask for.

The options are those of that command, taken from its own definition; there is no second list of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from s3fuse import keys
from s3fuse.config import MountConfig, parse_place, usage
from s3fuse.credentials import check_endpoint
from s3fuse.errors import ExitCode, UserError
from s3fuse.options import FilePath

if TYPE_CHECKING:
    from collections.abc import Mapping

    from s3fuse.volume.naming import NameRule

#: Options of volumes that `mount` does not have.
OWN = ("bucket", "prefix", "credentials", "purge")
#: Options of `mount` that the plugin gives itself. A file with keys is named by `credentials`.
_GIVEN = frozenset({"credentials-file", "foreground", "help", "log-file", "nonempty", "shared"})
_ON = frozenset({"", "true", "1", "yes", "on"})
_OFF = frozenset({"false", "0", "no", "off"})
_CREDENTIALS = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}")
_ALL = "all"
_SECRET = re.compile(r"(?i)secret|access.?key|password|token|passwd")


@dataclass(frozen=True)
class Definition:
    """A volume as it was made. `options` has what was asked for, `bucket` and `prefix` what came of it.

    `prefix` is without "/" at its end; `created_at` is a time in RFC 3339.
    """

    name: str
    bucket: str
    prefix: str
    options: Mapping[str, str]
    created_at: str

    @property
    def place(self) -> str:
        """BUCKET[/PREFIX] as `s3fuse mount` takes it."""
        return f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket

    @property
    def purge(self) -> bool:
        """Whether the data of the volume goes with it."""
        return self.purge_all or _truth("purge", self.options.get("purge", "false"))

    @property
    def purge_all(self) -> bool:
        """Whether that is also about what was there before the volume."""
        return self.options.get("purge", "").lower() == _ALL

    @property
    def ephemeral(self) -> bool:
        return _truth("ephemeral", self.options.get("ephemeral", "false"))

    def overlaps(self, other: Definition) -> bool:
        """Whether the places of two volumes have objects in common, if their servers are the same."""
        ours, theirs = f"{self.place}/", f"{other.place}/"
        return theirs.startswith(ours) or ours.startswith(theirs)

    def same_as(self, other: Definition) -> bool:
        """Whether both mean the same volume, however bucket and prefix were said."""
        return (self.bucket, self.prefix, self._rest()) == (other.bucket, other.prefix, other._rest())

    def _rest(self) -> dict[str, str]:
        return {name: value for name, value in self.options.items() if name not in ("bucket", "prefix")}


class MountOptions:
    """The options of `s3fuse mount` that a volume may have."""

    def __init__(self, command: click.Command, defaults: Mapping[str, str]) -> None:
        """`defaults` are values of options that a volume does not name."""
        self._command = command
        self._defaults = dict(defaults)
        self._known = {
            opt.removeprefix("--"): param
            for param in command.params
            if isinstance(param, click.Option)
            for opt in param.opts
            if opt.startswith("--") and opt.removeprefix("--") not in _GIVEN
        }

    def define(self, name: str, given: Mapping[str, str], rule: NameRule, created_at: str) -> Definition:
        """The definition of a volume from the options it is made with. Raises UserError that names a wrong one."""
        options = {key.strip().replace("_", "-"): str(value).strip() for key, value in given.items()}
        unknown = [key for key in options if key not in self._known and key not in OWN]
        if unknown:
            raise self._unknown(unknown[0])
        credentials = options.get("credentials")
        if credentials is not None and _CREDENTIALS.fullmatch(credentials) is None:
            # Not shown: somebody may have given a key.
            raise UserError(
                "option credentials takes the name of a credentials file on the node, never a path or a key",
                ExitCode.USAGE,
            )
        if (purge := options.get("purge", "false")).lower() not in _ON | _OFF | {_ALL}:
            raise usage("option purge", purge, "true, false or all")
        bucket, prefix = self._place(name, options, rule)
        definition = Definition(name, bucket, prefix, dict(sorted(options.items())), created_at)
        for option, path in self.paths(definition).items():
            if not path.startswith("/"):
                raise usage(f"option {option}", path, "a path that begins with /")
        self._check(definition)
        return definition

    def effective(self, definition: Definition) -> dict[str, str]:
        """The options of a volume with what the plugin adds."""
        place = {"bucket": definition.bucket, "prefix": definition.prefix}
        return dict(sorted({**self._defaults, **definition.options, **place}.items()))

    def paths(self, definition: Definition) -> dict[str, str]:
        """The options of a volume that name files on the node."""
        return {
            name: value
            for name, value in definition.options.items()
            if name in self._known and isinstance(self._known[name].type, FilePath)
        }

    def credentials(self, definition: Definition) -> str | None:
        """The name of the credentials file of a volume, if it has one."""
        return self.effective(definition).get("credentials")

    def arguments(self, definition: Definition) -> list[str]:
        """The options of `s3fuse mount` for a volume, as arguments."""
        words = []
        for name, value in self.effective(definition).items():
            if name in OWN:
                continue
            param = self._known[name]
            if not param.is_flag:
                words.append(f"--{name}={value}")
            elif _truth(name, value):
                words.append(f"--{name}")
            elif param.secondary_opts:
                words.append(param.secondary_opts[0])
        return words

    def _unknown(self, name: str) -> UserError:
        known = ", ".join(sorted((*self._known, *OWN)))
        if _SECRET.search(name):
            return UserError(
                f"option {name} is refused: everybody who inspects the volume would see the key; put the keys into a "
                f"file on the node and name it with credentials=NAME; known options: {known}",
                ExitCode.USAGE,
            )
        return UserError(f"option {name} is unknown; known: {known}", ExitCode.USAGE)

    def _place(self, name: str, options: Mapping[str, str], rule: NameRule) -> tuple[str, str]:
        bucket, prefix = options.get("bucket"), options.get("prefix")
        if bucket is None:
            bucket, by_rule = rule.place(name)
            prefix = by_rule if prefix is None else prefix
        elif "/" in bucket:
            raise usage("option bucket", bucket, "the name of a bucket; what is below it is named by prefix")
        place = parse_place(f"{bucket}/{prefix or ''}")
        if place.prefix.startswith(f"{keys.RESERVED}/"):
            raise usage("option prefix", place.prefix, f"nothing below {keys.RESERVED}, which is s3fuse's own")
        return place.bucket, place.prefix.rstrip("/")

    def _check(self, definition: Definition) -> None:
        """Has the command read its arguments, without running it. Raises UserError."""
        try:
            arguments = [*self.arguments(definition), "--", definition.place, "/"]
            with self._command.make_context("mount", arguments) as context:
                options = dict(context.params)
        except click.UsageError as error:
            raise UserError(error.format_message(), ExitCode.USAGE) from None
        for name in ("bucket", "mountpoint", "foreground", "shared"):
            options.pop(name)
        if options["endpoint"]:
            check_endpoint("endpoint", options["endpoint"])
        MountConfig.from_options(definition.place, Path("/"), options)


def _truth(option: str, value: str) -> bool:
    """What a flag's value means. Raises UserError."""
    if value.lower() not in _ON | _OFF:
        raise usage(f"option {option}", value, "true or false")
    return value.lower() in _ON
