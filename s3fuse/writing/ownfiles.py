"""The staging files of one dirty file whose layers outgrew their slots, open as long as they are used."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from s3fuse.staging.sparse import make_anew

if TYPE_CHECKING:
    from s3fuse.writing.staging import Staging


class OwnFiles:
    """Descriptors by generation. They may be closed at any time between awaits, and are opened again when needed."""

    __slots__ = ("_descriptors", "_number", "_staging")

    def __init__(self, staging: Staging, number: int) -> None:
        self._staging = staging
        self._number = number
        self._descriptors: dict[int, int] = {}

    def descriptor(self, generation: int) -> int:
        """The open staging file of a layer, which is made if it is missing. Raises OSError."""
        found = self._descriptors.get(generation)
        if found is None:
            found = self._descriptors[generation] = self._open(self._staging.path(self._number, generation))
            self._staging.open_files.add(self)
        return found

    def _open(self, path: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._staging.open_files:
                raise
        for others in list(self._staging.open_files):
            others.close()
        return os.open(path, flags, 0o600)

    def close_one(self, generation: int) -> None:
        """Closes the file of a layer, if it is open."""
        descriptor = self._descriptors.pop(generation, None)
        if descriptor is not None:
            os.close(descriptor)
            if not self._descriptors:
                self._staging.open_files.discard(self)

    def close(self) -> None:
        """Closes them all until they are needed again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        self._staging.open_files.discard(self)

    def mend(self) -> list[str]:
        """Puts open staging files back that were removed; gives their names."""
        mended = []
        for generation, descriptor in self._descriptors.items():
            if not os.fstat(descriptor).st_nlink:
                path = self._staging.path(self._number, generation)
                make_anew(descriptor, path)
                mended.append(os.path.basename(path))
        return mended
