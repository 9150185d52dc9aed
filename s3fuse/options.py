"""The forms that options take: types that name a wrong value, groups in --help, and fstab's `-o a,b=c`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s3fuse import config, kernel
from s3fuse.errors import ExitCode, UserError
from s3fuse.printable import MOST_CHARS, printable

if TYPE_CHECKING:
    from collections.abc import Callable


def say(text: str, *, err: bool = False, lines: bool = False) -> None:
    """Prints what may have foreign names in it; with `lines` on as many as our own text has."""
    click.echo(printable(text, 8 * MOST_CHARS, lines=lines), err=err)


class Size(click.ParamType[int]):
    """64MiB, 10GB or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else config.parse_size(_named(param), value)


class Seconds(click.ParamType[float]):
    """30s, 5m or a number of seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return value if isinstance(value, float) else config.parse_time(_named(param), value)


class Mode(click.ParamType[int]):
    """An octal mode such as 0644."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else config.parse_mode(_named(param), value)


class FilePath(click.ParamType[Path]):
    """A path made absolute, since the daemon's directory is /. Symlinks stay: a secret is rotated by changing one."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return Path(os.path.abspath(value))


class Mountpoint(click.ParamType[Path]):
    """A directory by the name that the kernel's list of mounts has for it."""

    name = "mountpoint"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return kernel.absolute(Path(value))


def _named(param: click.Parameter | None) -> str:
    return param.opts[0] if param is not None else "value"


# -- groups


class GroupedCommand(click.Command):
    """A command whose --help shows options under the headings given to `grouped`, in the order of definition."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(param, "heading", "Other"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class _Option(click.Option):
    def __init__(self, *args: Any, heading: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading = heading


def grouped(heading: str) -> Callable[..., Callable[[Any], Any]]:
    """click's `option`, for options that --help shows under this heading."""

    def option(*names: str, **attributes: Any) -> Callable[[Any], Any]:
        return click.option(*names, cls=_Option, heading=heading, **attributes)

    return option


# -- fstab's form

#: Words that mount(8) passes on from fstab, or leaves in it for itself.
_MOUNT_WORDS = ("rw", "auto", "noauto", "nouser", "nofail", "-netdev", "defaults", "nodiratime", "comment")
#: Those that ask something of us. As for mount(8), one that lets users mount takes rights, unless a later word gives
#: them.
_MEANT: dict[str, dict[str, Any]] = {
    "ro": {"read_only": True},
    "atime": {"noatime": False},
    "user": {"suid": False, "dev": False, "exec": False},
    "users": {"suid": False, "dev": False, "exec": False},
    "owner": {"suid": False, "dev": False},
    "group": {"suid": False, "dev": False},
}
#: What they begin with where they are for other programs, such as systemd.
_FOR_OTHERS = ("x-", "X-")
#: Those that may have a value.
_WITH_VALUE = ("comment", "user")


def from_fstab(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> None:
    """`-o a,b=c`: each name is an option of this command without its dashes; mount(8)'s own words are skipped."""
    ctx.params |= parse_fstab(ctx, ctx.command, values)


def parse_fstab(ctx: click.Context, command: click.Command, values: tuple[str, ...]) -> dict[str, Any]:
    """The options of `command` that words in fstab's form give, as its parameters. Raises UserError."""
    known = {
        opt.removeprefix("--"): (option, opt not in option.secondary_opts)
        for option in command.params
        for opt in (*option.opts, *option.secondary_opts)
        if opt.startswith("--")
    }
    given: dict[str, Any] = {}
    for word in (word for value in values for word in value.split(",") if word):
        name, has_value, value = word.partition("=")
        name = name.replace("_", "-")
        if name.startswith(_FOR_OTHERS):
            continue
        if name in (*_MOUNT_WORDS, *_MEANT) and (not has_value or name in _WITH_VALUE):
            given |= _MEANT.get(name, {})
            continue
        option, turned_on = known.get(name, (None, True))
        if option is None or option.name is None:
            raise UserError(f"-o {name}: there is no such option; see s3fuse mount --help", ExitCode.USAGE)
        flag = isinstance(option, click.Option) and option.is_flag
        if flag == bool(has_value):
            raise UserError(f"-o {name} {'takes no value' if flag else 'needs a value'}", ExitCode.USAGE)
        given[option.name] = turned_on if flag else option.type_cast_value(ctx, value)
    return given


def default_umask() -> int:
    """The umask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
