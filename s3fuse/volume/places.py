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
    from s3fuse.volume.definition import Definition

#: Where swarm puts secrets, on a tmpfs and readable for everybody in the container that they are given to.
SWARM_SECRETS = Path("/run/secrets")


@dataclass(frozen=True, kw_only=True)
class Places:
    """The directories of a plugin, and how long its mounts live.

    A mount lingers `linger_s` after its last user; a user that did not say goodbye is forgotten after `stale_s`. The
    last Unmount waits up to `unmount_s` for uploads.
    """

    base_dir: Path
    cache_root: Path
    credentials_dirs: tuple[Path, ...]
    linger_s: float
    stale_s: float
    unmount_s: float

    def mountpoint(self, name: str) -> Path:
        return self.base_dir / file_name(name)

    def cache_directory(self, definition: Definition) -> Path:
        """The cache of a volume, which no other mount uses, also of the same bucket."""
        named = definition.options.get("cache-dir")
        return Path(named) if named else self.cache_root / f"volume-{file_name(definition.name)}"

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
