"""The definitions of volumes: one file each, written whole or not at all, and never dropped.

A file that cannot be read stays where it is. Its volume is known to exist, so that nobody makes another under its
name, and every use of it says what is wrong.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from s3fuse.errors import UserError
from s3fuse.volume.definition import Definition
from s3fuse.volume.naming import check_name, file_name
from s3fuse.volume.removal import Removal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

_VERSION = 1
_VOLUME = ".json"
_PURGE = ".purge"


class State:
    """The folder with the definitions, which belongs to one plugin at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Names of volumes whose file cannot be read, and why.
        self.broken: dict[str, str] = {}

    @contextmanager
    def opened(self) -> Iterator[State]:
        """Makes the folder if it is missing and holds it. Raises UserError where another plugin has it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UserError(f"--state-dir {self.folder} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield self
        except BlockingIOError:
            raise UserError(
                f"--state-dir {self.folder} is used by another s3fuse plugin; end that, or choose another directory"
            ) from None
        finally:
            os.close(descriptor)

    def load(self) -> tuple[list[Definition], list[tuple[Definition, Removal]]]:
        """The volumes, and the removed ones whose data is still to be purged. `broken` has what cannot be read."""
        for part in self.folder.glob(".*.part"):  # a write that did not come to its end, and was not acknowledged
            part.unlink()
        return [definition for definition, _ in self._all(_VOLUME)], self._all(_PURGE)

    def unread(self) -> list[str]:
        """Names of volumes, not of removed ones, whose definition could not be read and is still there (blocks)."""
        return [name for name in sorted(self.broken) if (self.folder / f"{name}{_VOLUME}").exists()]

    def _all(self, suffix: str) -> list[tuple[Definition, Removal]]:
        found = []
        for path in sorted(self.folder.glob(f"*{suffix}")):
            try:
                found.append(self._read(path))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
                self.broken[path.stem] = (
                    f"its definition {path} cannot be read ({error!r}); mend or remove that file, and start s3fuse "
                    "plugin anew"
                )
                log.error("volume %s: %s", path.stem, self.broken[path.stem])
        return found

    def _read(self, path: Path) -> tuple[Definition, Removal]:
        content = json.loads(path.read_text())
        if content["version"] > _VERSION:
            raise ValueError(f"it was written by a newer s3fuse (version {content['version']} of the form)")
        name = content["name"]
        check_name(name)
        if self._path(name).stem != path.stem:
            raise ValueError(f"it is of volume {name}")
        options = {str(key): str(value) for key, value in content["options"].items()}
        definition = Definition(
            name, str(content["bucket"]), str(content["prefix"]), options, str(content["created_at"])
        )
        if "removed" in content:
            return definition, Removal.from_json(content["removed"])
        # Versions before that had none: a removal renamed the file, and that is its ctime.
        return definition, Removal(wall_ns=path.stat().st_ctime_ns)

    def save(self, definition: Definition) -> None:
        """Returns when the definition is on the disk (blocks). Raises UserError."""
        self._write(self._path(definition.name), definition, {})

    def _write(self, path: Path, definition: Definition, more: dict[str, Any]) -> None:
        content: dict[str, Any] = {
            "version": _VERSION,
            "name": definition.name,
            "created_at": definition.created_at,
            "bucket": definition.bucket,
            "prefix": definition.prefix,
            "options": dict(definition.options),
            **more,
        }
        part = path.with_name(f".{path.stem}.part")
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(content, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            self._sync()
        except OSError as error:
            raise UserError(f"the definition {path} cannot be written: {error.strerror}") from None

    def remove(self, definition: Definition, removal: Removal | None) -> None:
        """Returns when the volume is gone from the disk, save that with `removal` its data is still to go (blocks).

        Raises UserError.
        """
        path = self._path(definition.name)
        if removal is not None:
            self._write(path, definition, {"removed": removal.to_json()})
        try:
            if removal is not None:
                path.replace(path.with_suffix(_PURGE))  # only this makes it a removed one
            else:
                path.unlink(missing_ok=True)
            self._sync()
        except OSError as error:
            raise UserError(f"the definition {path} cannot be removed: {error.strerror}") from None

    def note(self, definition: Definition, removal: Removal) -> None:
        """Returns when what is known of a removal is on the disk (blocks). Raises UserError."""
        self._write(self._path(definition.name).with_suffix(_PURGE), definition, {"removed": removal.to_json()})

    def purged(self, definition: Definition) -> None:
        """Forgets a removed volume whose data is gone (blocks)."""
        self._path(definition.name).with_suffix(_PURGE).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{file_name(name)}{_VOLUME}"

    def _sync(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
