"""The lease of one mount: written before the mount is there, renewed while it is, and taken away at its end."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from s3fuse.coherence import leases
from s3fuse.errors import AccessDenied, ExitCode, NeedsCredentials, StoreError, Unavailable, UserError
from s3fuse.printable import printable

if TYPE_CHECKING:
    from pathlib import Path

    from s3fuse.coherence.leases import Lease
    from s3fuse.store.base import Store

log = logging.getLogger(__name__)

#: The file of a cache directory with the name of its mount's lease.
FILE = "lease"
PART = f"{FILE}.part"
#: When a renewal that failed is tried again.
RETRY_S = 30.0
#: How long the beginning of a mount waits for it; else it is written while the mount is there.
BEGIN_S = 5.0
#: How long the end of a mount waits for its lease to be taken away; else it expires.
END_S = 5.0


def identity(directory: Path | None) -> str:
    """The name of the lease of whoever mounts with this cache directory; after a crash the next mount goes on with it.

    A new one where there is no directory, or its file is missing or cannot be read or written.
    """
    new = secrets.token_hex(16)
    if directory is None:
        return new
    try:
        if (found := read_identity(directory)) is not None:
            return found
        part = directory / PART
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(new)
        part.replace(directory / FILE)
    except OSError as error:
        log.info("the name of the lease is not kept in %s: %s", directory, error.strerror)
    return _of_this_host(new)


def read_identity(directory: Path) -> str | None:
    """The name that `identity` gives for a cache directory; None where it has none yet. Raises OSError."""
    try:
        text = (directory / FILE).read_bytes()[:64].decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    return _of_this_host(text) if len(text) == 32 and text.isalnum() else None


def forget_identity(directory: Path | None) -> None:
    """The lease is gone: where there is a name, there may be a lease."""
    if directory is not None:
        with suppress(OSError):
            (directory / FILE).unlink(missing_ok=True)


def _of_this_host(text: str) -> str:
    """Another name on each host: a machine that was copied with its disk does not take the other one for itself."""
    return hashlib.sha256(f"{text} {socket.gethostname()}".encode()).hexdigest()[:32]


class Renewal:
    """Keeps the lease of a mount of `prefix`. Where the keys may not write, or the mount is read-only, there is none.

    A failed renewal is no failure of the mount: it is told in `status` and tried again.
    """

    def __init__(self, store: Store, prefix: str, directory: Path | None, mountpoint: Path, *, read_only: bool) -> None:
        """`directory` is the cache directory of the mount, None where it has none."""
        self.key = None if read_only else leases.lease_key(prefix, identity(directory))
        self.problem = "a read-only mount has none" if read_only else ""
        self._store = store
        self._prefix = prefix
        self._directory = directory
        self._mountpoint = str(mountpoint)
        self._pause_s = 0.0
        self._written = False
        #: One request about the lease at a time: a renewal must not come after its end.
        self._asking = trio.Lock()

    async def begin(self) -> None:
        """Writes the lease, before there is a mount. Raises UserError while somebody deletes what is there."""
        if self.key is None:
            return
        purges: list[Lease] = []
        now_ns = 0
        try:
            with trio.fail_after(BEGIN_S):
                now_ns = await self._renew()
                purges = await leases.purges_above(self._store, self._prefix, now_ns)
                await leases.forget_expired(self._store, self._prefix, now_ns)
        except StoreError as error:
            self._failed(error)
        except trio.TooSlowError:
            self._failed(Unavailable(f"the server did not answer within {BEGIN_S:.0f} s"))
        if purges:
            await self.end()
            raise UserError(
                f"node {printable(purges[0].host)} is deleting what is here, for a volume that was removed there with "
                f"purge; try again when it is done (it was heard of {purges[0].age_s(now_ns):.0f} s ago)",
                ExitCode.REFUSED,
            )

    async def run(self) -> None:
        """Renews the lease until cancelled; at once where `begin` did not write it, as an earlier process has."""
        while self.key is not None:
            await trio.sleep(self._pause_s)
            try:
                await self._renew()
            except StoreError as error:
                self._failed(error)

    async def end(self) -> None:
        """Takes the lease away, as far as that is possible within `END_S`; else it expires."""
        if self.key is None or not self._store.health.up:
            return
        with trio.move_on_after(END_S, shield=True):
            async with self._asking:
                key, self.key = self.key, None
                try:
                    await leases.remove(self._store, [key])
                    forget_identity(self._directory)
                except StoreError as error:
                    log.info("the lease %s stays until it expires: %s", key, error)

    async def _renew(self) -> int:
        """Gives the server's time (ns), 0 where the lease has ended."""
        async with self._asking:
            if self.key is None:
                return 0
            now_ns = await leases.write(self._store, self.key, socket.gethostname(), self._mountpoint)
        self._written, self.problem, self._pause_s = True, "", leases.RENEW_S
        return now_ns

    def _failed(self, error: StoreError) -> None:
        if self.problem != str(error):
            log.info("other nodes may not learn that this place is in use: %s", error)
        self.problem, self._pause_s = str(error), RETRY_S if error.transient else leases.RENEW_S
        if isinstance(error, AccessDenied) and not isinstance(error, NeedsCredentials) and not self._written:
            self.key = None  # keys that may only read: asking again would show in `status` as a fault
