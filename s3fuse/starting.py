"""What has to be there before a mount is made, or gone on with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from s3fuse import control
from s3fuse.cachedir import check_place, make_private
from s3fuse.errors import AccessDenied, ExitCode, NoSuchBucket, StoreError, Unavailable, UserError
from s3fuse.session import state
from s3fuse.writing.ephemeral import MemoryJournal
from s3fuse.writing.journal import Journal

if TYPE_CHECKING:
    from s3fuse.config import MountConfig
    from s3fuse.keeping import Keeping
    from s3fuse.session.state import State
    from s3fuse.store.s3 import S3Store

#: A mount command answers within 10 s, also when the server does not.
START_S = 7.0


@dataclass(frozen=True)
class Session:
    """Where the session of a mount is recorded (None: nowhere), and what an earlier process has left there.

    `findings` are those of the store.
    """

    findings: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    earlier: State | None = None


def open_journal(config: MountConfig, endpoint: str, *, is_successor: bool) -> Journal:
    """Raises UserError. Where an earlier process has mounted, nothing may touch the mountpoint: nobody answers yet."""
    name = f"{endpoint}/{config.bucket}/{config.prefix}"
    if config.ephemeral:
        return MemoryJournal(name)
    directory = config.cache_path(endpoint)
    if not is_successor:
        check_place(directory, config.mountpoint)
    make_private(directory, is_new_mount=not is_successor)
    return Journal(directory, name)


async def session(config: MountConfig, keeping: Keeping, store: S3Store, journal: Journal, endpoint: str) -> Session:
    """A new session, or the one that an earlier process of this mount has left. Raises UserError."""
    left = keeping.held.get("session")
    if left is None and not keeping.is_successor:
        path = control.session_path(config.mountpoint, keeping.pid)
        return Session(store.findings(), path if keeping.end is not None and not config.ephemeral else None)
    if left is not None and not keeping.given_up:
        path = Path(left)
        try:
            earlier = state.load(path, journal.step())
            store.adopt(earlier.facts["findings"])
            return Session(earlier.facts["findings"], path, earlier)
        except FileNotFoundError:
            pass  # the mount was gone already: there is only something to upload
        except OSError as error:
            raise UserError(f"the session {path} cannot be read: {error.strerror}") from None
    findings = keeping.held.get("findings")
    if findings is None:  # the keeper is of an earlier version
        await check_bucket(config, store, endpoint)
        findings = store.findings()
    store.adopt(findings)
    return Session(findings)


async def check_bucket(config: MountConfig, store: S3Store, endpoint: str) -> None:
    """Finds out in time whether the bucket can be used. Raises UserError that names what is wrong."""
    try:
        with trio.fail_after(START_S):
            try:
                await store.check()
            except NoSuchBucket:
                if not config.create_bucket:
                    raise
                await store.create_bucket()
            await store.probe()
    except trio.TooSlowError:
        raise UserError(
            f"{endpoint} does not answer within {START_S:.0f} s; check --endpoint and that the server is running",
            ExitCode.REFUSED,
        ) from None
    except NoSuchBucket:
        raise UserError(
            f"bucket {config.bucket!r} does not exist at {endpoint}; check its name or add --create-bucket",
            ExitCode.REFUSED,
        ) from None
    except AccessDenied as error:
        raise UserError(
            f"{endpoint} refuses these credentials; check the keys and what they may do: {error}",
            ExitCode.REFUSED,
        ) from None
    except Unavailable as error:
        raise UserError(
            f"{endpoint} cannot be reached; check --endpoint (http or https, host, port) and that the server runs "
            f"({error})",
            ExitCode.REFUSED,
        ) from None
    except StoreError as error:
        raise UserError(
            f"bucket {config.bucket!r} at {endpoint} cannot be used; check that --endpoint is an S3 server: {error}",
            ExitCode.REFUSED,
        ) from None
