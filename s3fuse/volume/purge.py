"""Deletes the data of a removed volume: what its owner asked for with `purge=true` or `purge=all`.

Only what was there when the volume was removed goes, by the server's clock; with `purge=true` only what came after the
volume, which the owner's mark tells (see `ownership`). Nothing goes while anybody has the place, or what is above or
below it, mounted (see `leases`): that is asked again before each request that deletes.

Each of these jobs is a process of its own, which the plugin runs (see `jobs`).
"""

from __future__ import annotations

import hashlib
import math
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from s3fuse import credentials
from s3fuse.coherence import leases
from s3fuse.errors import AccessDenied, ExitCode, NeedsCredentials, NoSuchBucket, Refused, StoreError, UserError
from s3fuse.printable import printable
from s3fuse.store.base import UNMADE_ETAG
from s3fuse.store.s3 import S3Store
from s3fuse.store.s3markers import SIDECARS
from s3fuse.store.walk import Walk, check_readable
from s3fuse.volume import ownership

if TYPE_CHECKING:
    from s3fuse.coherence.leases import Lease
    from s3fuse.config import MountConfig
    from s3fuse.store.base import ObjectInfo, Page, Store
    from s3fuse.volume.jobs import Job
    from s3fuse.volume.ownership import Mark

#: How long looking for mounts below a place may take while somebody waits; a purge itself looks through all of it.
LOOK_S = 10.0
#: How long somebody waits for anything but a purge.
ANSWER_S = 20.0
_CLEAN_UP_S = 10.0
_NS = 1_000_000_000


class InUse(Exception):
    """Somebody uses what was to be deleted; the text says who, and what to do."""


async def run(config: MountConfig, job: Job) -> dict[str, Any]:
    """Does the job, and gives what came of it as `jobs` reads it. Raises UserError."""
    where = credentials.resolve(config)
    store = S3Store(where.endpoint, config.bucket, where.provider, region=where.region, ca_file=config.ca_file)
    place = f"{config.bucket}/{config.prefix}"
    try:
        if job.do == "purge":
            await store.probe()  # where directories' metadata is kept elsewhere, that goes too
            return await purge(store, config.prefix, job)
        with trio.fail_after(ANSWER_S):
            return await _done(store, config, job)
    except trio.TooSlowError:
        raise UserError(f"{place} at {where.endpoint}: no answer within {ANSWER_S:.0f} s", ExitCode.REFUSED) from None
    except InUse as error:
        return {"in_use": str(error)}
    except NoSuchBucket:
        return {"no_bucket": True}
    except AccessDenied as error:
        if job.do == "own" and not isinstance(error, NeedsCredentials):
            return {"refused": f"the keys may not write to {place}, which purge needs: {error}"}
        raise UserError(f"{place} at {where.endpoint}: {error}", ExitCode.REFUSED) from None
    except StoreError as error:
        raise UserError(f"{place} at {where.endpoint}: {error}", ExitCode.REFUSED) from None
    finally:
        with trio.move_on_after(5, shield=True):
            await store.aclose()


async def _done(store: S3Store, config: MountConfig, job: Job) -> dict[str, Any]:
    prefix = config.prefix
    if job.do == "look":
        return {"now_ns": await look(store, prefix, job)}
    if job.do == "disown":
        await leases.remove(store, [ownership.mark_key(prefix, job.volume), *job.own])
        return {}
    try:
        try:
            await ownership.own(store, prefix, job.volume)
        except NoSuchBucket:
            if not config.create_bucket:
                raise
            await store.create_bucket()
            await ownership.own(store, prefix, job.volume)
    except UserError as error:
        return {"refused": str(error)}
    return {}


async def look(store: Store, prefix: str, job: Job) -> int:
    """The server's time (ns), where nobody is known to use the place. Raises InUse and StoreError."""
    now_ns = await leases.server_ns(store, prefix)
    await _check_above(store, prefix, now_ns, job)
    with trio.move_on_after(LOOK_S):
        await _check_below(store, prefix, now_ns, job)
    return now_ns


async def purge(store: Store, prefix: str, job: Job) -> dict[str, Any]:
    """Deletes the data, and gives how much, and how much stays as it was there before the volume.

    "unowned" where nothing shows that it is the volume's. Raises InUse and StoreError; then some may be gone.
    """
    purging = _Purging(store, prefix, job)
    try:
        result = await purging.run()
    except BaseException:
        with trio.move_on_after(_CLEAN_UP_S, shield=True), suppress(StoreError):  # else it expires
            await purging.clean_up()
        raise
    await purging.clean_up()
    return result


class _Purging:
    """One purge under way."""

    def __init__(self, store: Store, prefix: str, job: Job) -> None:
        self._store = store
        self._prefix = prefix
        self._job = job
        # The same one when it is tried again, so that nothing stays of a try that was killed.
        which = f"{socket.gethostname()} {job.volume} {job.not_after_ns} {job.removed_ns}"
        self._announcement = leases.purge_key(prefix, hashlib.sha256(which.encode()).hexdigest()[:32])
        self._proof: list[str] = []  # what goes with the last object
        self._mark: Mark | None = None
        self._now_ns = self._until_ns = 0
        self._deleted = 0
        self._kept = 0

    async def run(self) -> dict[str, Any]:
        now_ns = await self._announce()
        self._until_ns = self._removed_at(now_ns)
        if not self._job.everything:
            self._mark = await ownership.read(self._store, self._prefix, self._job.volume)
            if self._mark is None:
                return {"unowned": True}
        await _check_above(self._store, self._prefix, now_ns, self._job)
        await _check_below(self._store, self._prefix, now_ns, self._job)
        for upload in await self._store.list_uploads(self._prefix):
            begun_ns = 0 if self._mark is None else self._mark.made_ns
            if begun_ns <= upload.initiated_ns <= self._until_ns:
                await self._store.multipart_abort(upload.key, upload.upload_id)
        found = math.inf
        # SeaweedFS deletes a directory only when nothing is in it any more: each pass takes a level.
        while (count := await self._pass()) > 0:
            if count >= found:
                raise Refused(f"{count} objects below {self._prefix} are still there though they were deleted")
            found = count
        self._proof = [ownership.mark_key(self._prefix, self._job.volume), *self._job.own]
        return {"deleted": self._deleted, "kept": self._kept}

    async def clean_up(self) -> None:
        """Nothing of the purge itself stays, nor, where the server keeps them, an empty directory of the place."""
        await leases.remove(self._store, [self._announcement, *self._proof])
        left = (await self._store.list_page(self._prefix, delimiter="", limit=2)).objects if self._prefix else ()
        if self._deleted and [info.key for info in left] == [self._prefix] and self._may_go(left[0]):
            await self._store.delete(self._prefix)

    async def _announce(self) -> int:
        self._now_ns = await leases.write(self._store, self._announcement, socket.gethostname(), "")
        return self._now_ns

    def _removed_at(self, now_ns: int) -> int:
        """When the volume was removed, by the server's clock, which is `now_ns` now; rather too early."""
        if self._job.not_after_ns is not None:
            return self._job.not_after_ns
        return now_ns - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - self._job.removed_ns)

    async def _pass(self) -> int:
        """Deletes what is there to be deleted; gives how much that was."""
        count = self._kept = 0
        token: str | None = None
        walk = Walk()
        while True:
            page = await self._store.list_page(self._prefix, delimiter="", token=token)
            check_readable(page, self._prefix)  # it could be the lease of a mount
            count += await self._delete_from(page)
            token = walk.follow(page)
            if token is None:
                return count

    async def _delete_from(self, page: Page) -> int:
        now_ns = await self._announce()
        # What was asked before does not hold any more: a mount may have begun.
        _refuse(await leases.living(self._store, _leases_in(page), now_ns, self._job.own), now_ns)
        await _check_above(self._store, self._prefix, now_ns, self._job)
        keys = [info.key for info in page.objects if self._may_go(info)]
        if keys:
            for key, reason in (await self._store.delete_many(keys)).items():
                raise Refused(f"{key} is not deleted: {reason}", key)
            self._deleted += len(keys)
        return len(keys)

    def _may_go(self, info: ObjectInfo) -> bool:
        """Whether an object was the volume's, and there when it was removed."""
        if info.key.startswith(SIDECARS) or ownership.is_mark(info.key, self._prefix):
            return False
        if leases.is_purge(info.key):
            return self._now_ns - info.modified_ns > leases.PURGE_EXPIRE_S * _NS  # what a killed one left
        if info.etag == UNMADE_ETAG:  # no object, but the directory that one was in: it has no time of its own
            return self._mark is None or info.key[len(self._prefix) :] not in self._mark.before
        if self._mark is not None and not self._mark.covers(info, self._prefix):
            self._kept += 1
            return False
        return info.modified_ns <= self._until_ns


def _leases_in(page: Page) -> list[ObjectInfo]:
    return [info for info in page.objects if leases.is_lease(info.key)]


async def _check_above(store: Store, prefix: str, now_ns: int, job: Job) -> None:
    _refuse(await leases.living_above(store, prefix, now_ns, job.own), now_ns)


async def _check_below(store: Store, prefix: str, now_ns: int, job: Job) -> None:
    infos = [info async for info in leases.listed(store, prefix) if leases.is_lease(info.key)]
    _refuse(await leases.living(store, infos, now_ns, job.own), now_ns)


def _refuse(found: list[Lease], now_ns: int) -> None:
    """Raises InUse where somebody uses something."""
    if not found:
        return
    lease = max(found, key=lambda one: one.renewed_ns)
    ago_s = lease.age_s(now_ns)
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise InUse(
        f"node {printable(lease.host)} has /{printable(lease.prefix)} mounted on {printable(lease.mountpoint)}{more}, "
        f"heard of {ago_s / 60:.0f} min ago; end what uses it there first. A node that is gone counts for "
        f"{(leases.EXPIRE_S - ago_s) / 60:.0f} min more, or until its object {printable(lease.key)} is removed"
    )
