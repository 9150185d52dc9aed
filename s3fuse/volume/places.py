"""Where things of a volume are on this host, and its keys."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from s3fuse.errors import ExitCode, UserError
from s3fuse.volume.naming import file_name

if TYPE_CHECKING:
    from s3fuse.volume.definition import Definition, MountOptions

#: Where certificate authorities are that any volume may name.
AUTHORITIES = tuple(
    map(Path, ("/etc/s3fuse", "/etc/ssl", "/etc/pki", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates"))
)
#: Where swarm puts secrets, on a tmpfs and readable for everybody in the container that they are given to.
SWARM_SECRETS = Path("/run/secrets")


@dataclass(frozen=True, kw_only=True)
class Places:
    """The directories of a plugin, and how long its mounts live.

    A mount lingers `linger_s` after its last user; a user that did not say goodbye is forgotten after `stale_s`. The
    last Unmount waits up to `unmount_s` for uploads. Files that a volume names itself have to be below `allowed_dirs`;
    its cache directory may also be below `cache_root`, a certificate authority below `AUTHORITIES`.
    """

    base_dir: Path
    cache_root: Path
    credentials_dirs: tuple[Path, ...]
    linger_s: float
    stale_s: float
    unmount_s: float
    allowed_dirs: tuple[Path, ...] = ()

    def mountpoint(self, name: str) -> Path:
        return self.base_dir / file_name(name)

    def cache_directory(self, definition: Definition) -> Path:
        """The cache of a volume, which no other mount uses, also of the same bucket."""
        named = definition.options.get("cache-dir")
        return Path(named) if named else self.cache_root / f"volume-{file_name(definition.name)}"

    def check_path(self, option: str, path: str) -> None:
        """Raises UserError for a path of a volume's option that is nowhere where the operator of the plugin allows it.

        Whoever may make volumes shall not have files made or read anywhere on the node. Links are resolved.
        """
        own = {"cache-dir": (self.cache_root,), "ca-file": AUTHORITIES}.get(option, ())
        allowed = (*own, *self.allowed_dirs)
        where = Path(os.path.realpath(os.path.abspath(path)))
        if not any(Path(os.path.realpath(folder)) in where.parents for folder in allowed):
            really = f", which is {where}," if str(where) != path else ""
            raise UserError(
                f"option {option}: {path}{really} is not below {' or '.join(map(str, allowed)) or 'any directory'} "
                "as the plugin on this node demands; choose a path there, or have its operator add "
                f"--allow-dir {where.parent} to the flags of s3fuse plugin",
                ExitCode.USAGE,
            )

    def credentials_file(self, name: str) -> Path:
        """The file with the keys of this name. Raises UserError where there is none, or others can read it."""
        for folder in self.credentials_dirs:
            path = folder / name
            try:
                status = os.stat(path)
            except OSError:
                continue
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"credentials {name}: {path} is no file", ExitCode.USAGE)
            if folder != SWARM_SECRETS and stat.S_IMODE(status.st_mode) & 0o077:
                raise UserError(
                    f"credentials {name}: others can read {path}; make it private: chmod 600 {path}", ExitCode.USAGE
                )
            return path
        places = " or ".join(str(folder) for folder in self.credentials_dirs)
        raise UserError(f"credentials {name}: there is no file of that name in {places} on this node", ExitCode.USAGE)

    def arguments(self, definition: Definition, options: MountOptions) -> list[str]:
        """The options of `s3fuse mount` for a volume on this node, as arguments.

        Raises UserError where its keys are not to be had, or it names files that it may not name.
        """
        for option, path in options.paths(definition).items():
            self.check_path(option, path)
        credentials = options.credentials(definition)
        keys = [] if credentials is None else [f"--credentials-file={self.credentials_file(credentials)}"]
        return [*options.arguments(definition), *keys]
