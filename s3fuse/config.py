"""Options as validated values: parse, check, freeze. Sizes in bytes, times in seconds."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from s3fuse.errors import ExitCode, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)", re.IGNORECASE)
_TIME_UNITS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def usage(option: str, value: str, allowed: str) -> UserError:
    """The error for a wrong value: option, value, and what is allowed."""
    return UserError(f"{option}: {value!r} is not allowed; it takes {allowed}", ExitCode.USAGE)


def parse_size(option: str, text: str) -> int:
    """Bytes of `64MiB`, `10GB`, `4096`. Raises UserError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise usage(option, text, "a size such as 64MiB, 10GB or a number of bytes")
    number, letter, binary = found.groups()
    power = " kmgt".index(letter.lower()) if letter else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def parse_time(option: str, text: str) -> float:
    """Seconds of `30s`, `5m`, `1.5`. Raises UserError."""
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise usage(option, text, "a time such as 30s, 5m or a number of seconds")
    return float(found.group(1)) * _TIME_UNITS[found.group(2).lower()]


def parse_mode(option: str, text: str) -> int:
    """Permission bits of an octal number such as 0644. Raises UserError."""
    if re.fullmatch(r"0?[0-7]{3,4}", text.strip()) is None:
        raise usage(option, text, "an octal mode such as 0644")
    return int(text, 8)


@dataclass(frozen=True)
class Place:
    """What `[ALIAS/]BUCKET[/PREFIX]` names; `prefix` is empty or ends with "/"."""

    alias: str | None
    bucket: str
    prefix: str


def mc_aliases() -> dict[str, dict[str, str]]:
    """The aliases of mc's config.json (url, accessKey, secretKey); empty where there is none that can be read."""
    folder = Path(os.environ.get("MC_CONFIG_DIR") or Path.home() / ".mc")
    try:
        aliases = json.loads((folder / "config.json").read_text())["aliases"]
        return {str(name): dict(entry) for name, entry in aliases.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def parse_place(text: str) -> Place:
    """Raises UserError for a name that no bucket can have."""
    first, _, rest = text.strip("/").partition("/")
    alias = None
    if rest and first in mc_aliases():
        alias = first
        first, _, rest = rest.partition("/")
    if _BUCKET.fullmatch(first) is None or ".." in first:
        raise UserError(
            f"{first!r} is no bucket name: 3 to 63 of a-z, 0-9, '.' and '-', "
            "beginning and ending with a letter or digit",
            ExitCode.USAGE,
        )
    parts = [part for part in rest.split("/") if part]
    if any(part in (".", "..") for part in parts):
        raise usage("PREFIX", rest, "names without . and ..")
    return Place(alias, first, "".join(f"{part}/" for part in parts))


#: Options whose names in `MountConfig` tell the unit.
_FIELDS = {
    "cache_size": "cache_size_bytes",
    "memory": "memory_bytes",
    "dirty_size": "dirty_size_bytes",
    "restart_above": "restart_above_bytes",
    "drain_timeout": "drain_timeout_s",
    "attr_ttl": "attr_ttl_s",
}


def by_field(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `s3fuse mount` by their names in `MountConfig`."""
    return {_FIELDS.get(name, name): value for name, value in options.items()}


@dataclass(frozen=True, kw_only=True)
class MountConfig:
    """Everything that one mount needs to know. `prefix` is empty or ends with "/"."""

    mountpoint: Path
    bucket: str
    prefix: str = ""
    alias: str | None = None
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    credentials_file: Path | None = None
    ca_file: str | None = None
    cache_dir: Path | None = None
    ephemeral: bool = False
    cache_size_bytes: int = 10 << 30
    memory_bytes: int = 256 << 20
    dirty_size_bytes: int = 4 << 30
    max_requests: int = 32
    close: Literal["local", "upload"] = "local"
    fsync: Literal["upload", "local"] = "upload"
    hard_links: Literal["refuse", "copy"] = "refuse"
    attr_ttl_s: float = 1.0
    drain_timeout_s: float = 300.0
    read_only: bool = False
    suid: bool = False
    dev: bool = False
    exec: bool = True
    noatime: bool = False
    uid: int = 0
    gid: int = 0
    file_mode: int = 0o644
    dir_mode: int = 0o755
    allow_other: bool = True
    nonempty: bool = False
    create_bucket: bool = False
    restart_above_bytes: int = 0
    log_file: Path | None = None
    log_level: str = "warning"

    def __post_init__(self) -> None:
        self._at_least("--memory", self.memory_bytes, 16 << 20, "16MiB")
        self._at_least("--dirty-size", self.dirty_size_bytes, 1 << 20, "1MiB")
        self._at_least("--max-requests", self.max_requests, 2, "2")

        if self.ephemeral and self.cache_dir is not None:
            raise usage("--cache-dir", str(self.cache_dir), "no value with --ephemeral, which keeps nothing on disk")
        if self.ephemeral and self.fsync == "local":
            raise usage("--fsync", "local", "only upload with --ephemeral, which keeps nothing on disk")

    @classmethod
    def from_options(cls, bucket: str, mountpoint: Path, options: Mapping[str, Any]) -> MountConfig:
        """The configuration that these arguments and options of `s3fuse mount` ask for. Raises UserError."""
        place, named = parse_place(bucket), dict(options)
        umask, ca_file = named.pop("umask"), named.pop("ca_file")
        named["dirty_size"] = named["dirty_size"] or (256 << 20 if named["ephemeral"] else 4 << 30)
        return cls(
            mountpoint=mountpoint,
            bucket=place.bucket,
            prefix=place.prefix,
            alias=place.alias,
            ca_file=ca_file and str(ca_file),
            file_mode=named.pop("file_mode") & ~umask,
            dir_mode=named.pop("dir_mode") & ~umask,
            **by_field(named),
        )

    @staticmethod
    def _at_least(option: str, value: int, least: int, text: str) -> None:
        if value < least:
            raise usage(option, str(value), f"at least {text}")

    def mount_flags(self) -> tuple[str, ...]:
        """The flags of the kernel's mount, by their names in fstab."""
        wanted = {
            "ro": self.read_only,
            "nosuid": not self.suid,
            "nodev": not self.dev,
            "noexec": not self.exec,
            "noatime": self.noatime,
        }
        return tuple(flag for flag, is_wanted in wanted.items() if is_wanted)

    def cache_path(self, endpoint: str) -> Path:
        """The cache directory: the one asked for, or one that belongs to this endpoint, bucket and prefix alone."""
        if self.cache_dir is not None:
            return self.cache_dir
        identity = f"{endpoint}/{self.bucket}/{self.prefix}"
        return cache_root() / f"{self.bucket}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


_PATHS = ("mountpoint", "credentials_file", "cache_dir", "log_file")


def to_json(config: MountConfig) -> dict[str, Any]:
    """The options as JSON has them: they hold no secrets."""
    return {
        name: str(value) if name in _PATHS and value is not None else value for name, value in asdict(config).items()
    }


def from_json(options: dict[str, Any]) -> MountConfig:
    """What `to_json` gave. Options that this version does not know are left out."""
    known = {name: value for name, value in options.items() if name in MountConfig.__dataclass_fields__}
    for name in _PATHS:
        if known.get(name) is not None:
            known[name] = Path(known[name])
    return MountConfig(**known)


def cache_root() -> Path:
    """Where cache directories are kept: below XDG_CACHE_HOME, /var/cache for root, ~/.cache else."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "s3fuse"
    return Path("/var/cache/s3fuse") if os.geteuid() == 0 else Path.home() / ".cache" / "s3fuse"
