"""The purges of one plugin: the proof that a volume made its data, who uses that, and what is still to be deleted.

The removal of a volume with `purge` asks first who uses its data, and is refused where somebody does. The deletion
itself comes after the removal was answered, and is tried again until it is done; each time the question is asked anew,
and where somebody has begun to use the data meanwhile, it is his: it stays for good.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from s3fuse.coherence.leases import lease_key
from s3fuse.coherence.renewal import read_identity
from s3fuse.errors import UserError
from s3fuse.volume import jobs
from s3fuse.volume.jobs import Job
from s3fuse.volume.removal import Removal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from s3fuse.volume.definition import Definition, MountOptions
    from s3fuse.volume.mounts import VolumeMount
    from s3fuse.volume.places import Places
    from s3fuse.volume.state import State

log = logging.getLogger(__name__)

#: How long a purge that failed waits before it is tried again: first and at most.
RETRY_S = (5.0, 300.0)
#: How long a removal waits for the server to say who uses the data; Docker gives it 60 s.
ASK_S = 30.0


class Purges:
    """`volumes` are those that the plugin has now, by name."""

    def __init__(self, state: State, options: MountOptions, places: Places, volumes: Mapping[str, VolumeMount]) -> None:
        self._state = state
        self._options = options
        self._places = places
        self._volumes = volumes
        #: Names of removed volumes whose data is still to be purged.
        self.waiting: set[str] = set()
        self._running: dict[str, Definition] = {}
        self._making: list[Definition] = []

    def check_name(self, name: str) -> None:
        """Raises UserError where a removed volume of this name is still to be purged."""
        if name in self.waiting:
            raise UserError(f"volume {name} was removed, and its data is still being purged; try again later")

    @asynccontextmanager
    async def making(self, definition: Definition) -> AsyncIterator[None]:
        """While a volume is made nothing is deleted at its place. Raises UserError where that is done just now."""
        self.check_name(definition.name)
        for other in self._running.values():
            if definition.overlaps(other):
                raise UserError(
                    f"the data of the removed volume {other.name}, in {other.place}, is being purged; try again later"
                )
        self._making.append(definition)
        try:
            yield
        finally:
            self._making.remove(definition)

    async def own(self, definition: Definition) -> None:
        """Puts the owner's mark of a volume that is being made, before anything else is written at its place.

        Where the server is away the volume's first mount does that. Raises UserError where purge cannot be promised.
        """
        if not definition.purge or definition.purge_all:
            return
        try:
            found = await self._job(definition, do="own")
        except UserError as error:
            log.info("volume %s: its first mount will mark its data as its own: %s", definition.name, error)
            return
        if "refused" in found:
            raise UserError(f"volume {definition.name} cannot have the option purge: {found['refused']}")

    async def ask(self, volume: VolumeMount) -> Removal | None:
        """What the removal of a volume is about to leave to be purged; None for nothing.

        Raises UserError where somebody uses the data: on another node, or a volume here of which nothing is known.
        Where the server is away nobody is known, and the purge asks again.
        """
        definition = volume.definition
        if not definition.purge:
            return None
        if unread := await trio.to_thread.run_sync(self._state.unread):
            raise UserError(
                f"volume {definition.name} is not removed: its data would be deleted with it, and volume {unread[0]} "
                f"of this node may have that, too: {self._state.broken[unread[0]]}"
            )
        own = await trio.to_thread.run_sync(_own_leases, volume)
        if (other := self._other(definition)) is not None:
            _tell_of_other(definition, other)
            return Removal.now(keep=True, leases=own)
        found: dict[str, Any] = {}
        with trio.move_on_after(ASK_S):
            try:
                found = await self._job(definition, do="look", own=own)
            except UserError as error:
                log.info("volume %s: who uses its data is asked later: %s", definition.name, error)
        if "in_use" in found:
            raise UserError(
                f"volume {definition.name} is not removed, as its data would be deleted with it and is in use: "
                f"{found['in_use']}"
            )
        return Removal.now(server_ns=found.get("now_ns"), leases=own)

    async def run(self, definition: Definition, removal: Removal) -> None:
        """Deletes the data of a removed volume; returns when that is done, or given up for good."""
        pause_s, most_s = RETRY_S
        while True:
            try:
                done = None if removal.keep else await self._purge(definition, removal)
                if done is None and not removal.keep:
                    removal = replace(removal, keep=True)  # also where the next step fails, or this process ends
                    await trio.to_thread.run_sync(self._state.note, definition, removal)
                if done is None:
                    await self._job(definition, do="disown", own=removal.leases)
                break
            except UserError as error:
                log.error("the data of the removed volume %s is not purged yet: %s", definition.name, error)
            await trio.sleep(pause_s)
            pause_s = min(most_s, pause_s * 2)
        await trio.to_thread.run_sync(self._state.purged, definition)
        self.waiting.discard(definition.name)
        log.info("the data of the removed volume %s, %s, %s", definition.name, definition.place, done or "stays")

    async def clean_up(self, volume: VolumeMount) -> None:
        """Takes away what mounts of a removed volume without purge, that died, left of leases: else they expire."""
        if not (own := await trio.to_thread.run_sync(_own_leases, volume)):
            return
        try:
            await self._job(volume.definition, do="disown", own=own)
        except UserError as error:
            log.info("volume %s: its lease stays until it expires: %s", volume.definition.name, error)

    async def _purge(self, definition: Definition, removal: Removal) -> str | None:
        """What became of the data; None where it is somebody else's now. Raises UserError to be called again."""
        if unread := await trio.to_thread.run_sync(self._state.unread):
            raise UserError(f"volume {unread[0]} may have it, too: {self._state.broken[unread[0]]}")
        # From here until the end of the process no volume can be made there: no await in between.
        if (new := next(filter(definition.overlaps, self._making), None)) is not None:
            raise UserError(f"volume {new.name} is being made there")
        if (other := self._other(definition)) is not None:
            _tell_of_other(definition, other)
            return None
        self._running[definition.name] = definition
        try:
            times = {"not_after_ns": removal.server_ns, "removed_ns": removal.removed_ns}
            found = await self._job(definition, do="purge", own=removal.leases, **times)
        finally:
            del self._running[definition.name]
        if "in_use" not in found:
            return _outcome(definition, found)
        log.error(
            "the data of the removed volume %s is not purged, as it is in use: %s. It stays for good",
            definition.name,
            found["in_use"],
        )
        return None

    def _other(self, definition: Definition) -> Definition | None:
        """Another volume of this node that has some of the data of this one."""
        others: Iterable[Definition] = (volume.definition for volume in self._volumes.values())
        return next((one for one in others if one.name != definition.name and one.overlaps(definition)), None)

    async def _job(self, definition: Definition, **what: Any) -> dict[str, Any]:
        job = Job(volume=definition.name, everything=definition.purge_all, **what)
        return await jobs.run(definition, self._options, self._places, job)


def _own_leases(volume: VolumeMount) -> tuple[str, ...]:
    """Keys of leases that mounts of this very volume have or had: of the one that is ending, or one that died."""
    prefix = f"{volume.definition.prefix}/" if volume.definition.prefix else ""
    found = {str((volume.status.get("lease") or {}).get("key") or "")}
    try:
        if not volume.definition.ephemeral and (name := read_identity(volume.cache_directory)) is not None:
            found.add(lease_key(prefix, name))
    except OSError as error:
        log.info("volume %s: %s cannot be read: %s", volume.definition.name, volume.cache_directory, error.strerror)
    return tuple(sorted(found - {""}))


def _tell_of_other(definition: Definition, other: Definition) -> None:
    log.warning(
        "the data of the removed volume %s is not purged: volume %s has %s", definition.name, other.name, other.place
    )


def _outcome(definition: Definition, found: Mapping[str, Any]) -> str:
    if found.get("unowned"):
        log.warning(
            "the data of the removed volume %s is not purged: nothing in %s shows that the volume made it; purge=all "
            "deletes it all the same",
            definition.name,
            definition.place,
        )
        return "stays"
    kept = f"; {found['kept']} objects stay that were there before" if found.get("kept") else ""
    return f"is purged{kept}"
