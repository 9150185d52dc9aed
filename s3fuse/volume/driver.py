"""Docker's volume driver: each call of the protocol, answered from memory. Only Mount and Unmount wait for a mount."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import trio

from s3fuse.errors import ExitCode, UserError
from s3fuse.volume import process
from s3fuse.volume.inuse import Holders
from s3fuse.volume.mounts import VolumeMount
from s3fuse.volume.naming import check_name
from s3fuse.volume.purges import Purges

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from s3fuse.volume.api import Call
    from s3fuse.volume.definition import Definition, MountOptions
    from s3fuse.volume.naming import NameRule
    from s3fuse.volume.places import Places
    from s3fuse.volume.removal import Removal
    from s3fuse.volume.state import State

log = logging.getLogger(__name__)


class Driver:
    """All volumes of this node. `nursery` runs a task for each mount."""

    def __init__(
        self, state: State, places: Places, options: MountOptions, rule: NameRule, nursery: trio.Nursery
    ) -> None:
        self._state = state
        self._places = places
        self._options = options
        self._rule = rule
        self._nursery = nursery
        self._holders = Holders()
        self._volumes: dict[str, VolumeMount] = {}
        #: Removed volumes whose mount is still ending, or whose data is still being purged.
        self._leaving: dict[str, trio.Event] = {}
        self._purges = Purges(state, options, places, self._volumes)
        #: Changes to the definitions come one after the other.
        self._changing = trio.Lock()

    @property
    def calls(self) -> Mapping[str, Call]:
        """What to do for each path of the protocol."""
        return {
            "/Plugin.Activate": self._activate,
            "/VolumeDriver.Capabilities": self._capabilities,
            "/VolumeDriver.Create": self._create,
            "/VolumeDriver.Remove": self._remove,
            "/VolumeDriver.Mount": self._mount,
            "/VolumeDriver.Unmount": self._unmount,
            "/VolumeDriver.Path": self._path,
            "/VolumeDriver.Get": self._get,
            "/VolumeDriver.List": self._list,
        }

    async def restore(self) -> None:
        """Knows all volumes again. Adopts their mounts, and mounts those in whose cache something waits, behind it."""
        volumes, purges = await trio.to_thread.run_sync(self._state.load)
        for definition in volumes:
            self._add(definition)
        for definition, removal in purges:
            self._leave(self._made(definition), removal)
        log.info("%d volumes are known", len(volumes))
        self._start(self._owe)

    def _start(self, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
        """Runs something beside the requests; if it fails, volumes and requests go on."""

        async def run() -> None:
            try:
                await work(*arguments)
            except Exception:
                log.exception("%s failed", work.__name__)

        self._nursery.start_soon(run)

    async def _owe(self) -> None:
        """Has volumes mounted in whose cache directory something waits from before."""
        restored = list(self._volumes.values())
        mounted = await trio.to_thread.run_sync(lambda: [volume.is_there() for volume in restored])
        resting = [v for v, there in zip(restored, mounted, strict=True) if not there and not v.definition.ephemeral]
        found = await process.waiting_in([volume.cache_directory for volume in resting])
        for volume in restored:
            facts = found.get(str(volume.cache_directory), {})
            left = int(facts.get("waiting_files", 0)) if volume in resting else 0
            if left:
                log.info("volume %s: %d changes wait for upload", volume.definition.name, left)
            volume.owe(left)

    def _made(self, definition: Definition) -> VolumeMount:
        return VolumeMount(definition, self._options, self._places, self._holders)

    def _add(self, definition: Definition) -> VolumeMount:
        volume = self._volumes[definition.name] = self._made(definition)
        self._start(self._run, volume, self._leaving.get(definition.name))
        return volume

    async def _run(self, volume: VolumeMount, after: trio.Event | None) -> None:
        if after is not None:  # an earlier volume of the name
            await after.wait()
        await volume.run()

    # -- the protocol

    async def _activate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"Implements": ["VolumeDriver"]}

    async def _capabilities(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"Capabilities": {"Scope": "global"}}

    async def _create(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same again is no change; something else under the name is refused."""
        name, given = _name(arguments), arguments.get("Opts") or {}
        check_name(name)
        if name in self._state.broken:
            raise UserError(f"volume {name}: {self._state.broken[name]}")
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        definition = self._options.define(name, given, self._rule, now)
        self._places.arguments(definition, self._options)
        async with self._purges.making(definition):
            if name not in self._volumes:
                await self._purges.own(definition)
            async with self._changing:
                self._purges.check_name(name)  # it may have been removed meanwhile
                known = self._volumes.get(name)
                if known is None:
                    await trio.to_thread.run_sync(self._state.save, definition)
                    self._add(definition).owe(0)
                    log.info("volume %s is made: %s", name, definition.place)
                elif not known.definition.same_as(definition):
                    raise UserError(
                        f"volume {name} exists with other options ({_options(known.definition)}); remove it first, or "
                        "choose another name",
                        ExitCode.USAGE,
                    )
        return {}

    async def _remove(self, arguments: dict[str, Any]) -> dict[str, Any]:
        volume = self._volume(arguments)
        await volume.check_removable()
        removal = await self._purges.ask(volume)
        async with self._changing:
            if self._volume(arguments) is not volume:
                raise UserError(f"volume {volume.definition.name} was made anew meanwhile; try again")
            await volume.check_removable()  # a container may have begun meanwhile
            await trio.to_thread.run_sync(self._state.remove, volume.definition, removal)
            del self._volumes[volume.definition.name]
        log.info("volume %s is removed", volume.definition.name)
        self._leave(volume, removal, running=True)
        return {}

    async def _mount(self, arguments: dict[str, Any]) -> dict[str, Any]:
        volume = self._volume(arguments)
        await volume.acquire(str(arguments.get("ID", "")))
        return {"Mountpoint": str(volume.mountpoint)}

    async def _unmount(self, arguments: dict[str, Any]) -> dict[str, Any]:
        await self._volume(arguments).release(str(arguments.get("ID", "")))
        return {}

    async def _path(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"Mountpoint": str(self._volume(arguments).mountpoint)}

    async def _get(self, arguments: dict[str, Any]) -> dict[str, Any]:
        volume = self._volume(arguments)
        volume.refresh()
        return {"Volume": {**_entry(volume), "Status": _status(volume, self._options.effective(volume.definition))}}

    async def _list(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"Volumes": [_entry(volume) for volume in self._volumes.values()]}

    def _volume(self, arguments: dict[str, Any]) -> VolumeMount:
        name = _name(arguments)
        if name in self._state.broken:
            raise UserError(f"volume {name}: {self._state.broken[name]}")
        if name not in self._volumes:
            raise UserError(f"no such volume: {name[:300]}")
        return self._volumes[name]

    # -- removed volumes

    def _leave(self, volume: VolumeMount, removal: Removal | None, *, running: bool = False) -> None:
        """Ends the mount of a removed volume, cleans its cache up and purges its data if that was asked for."""
        name = volume.definition.name
        if removal is not None:
            self._purges.waiting.add(name)
        before = self._leaving.get(name)
        self._leaving[name] = left = trio.Event()
        volume.retire()
        if not running:
            self._start(self._run, volume, before)
        self._start(self._finish, volume, left, removal)

    async def _finish(self, volume: VolumeMount, left: trio.Event, removal: Removal | None) -> None:
        await volume.retired.wait()
        definition = volume.definition
        if removal is not None:
            await self._purges.run(definition, removal)
        else:
            await self._purges.clean_up(volume)
        if not definition.ephemeral and volume.cache_directory.is_dir():
            try:
                await process.run("cache", "clean", str(volume.cache_directory))
            except UserError as error:  # something waits in it: nobody's data is thrown away
                log.warning("volume %s is removed, but %s", definition.name, error)
        if self._leaving.get(definition.name) is left:
            del self._leaving[definition.name]
        left.set()


def _name(arguments: dict[str, Any]) -> str:
    return str(arguments.get("Name", ""))


def _options(definition: Definition) -> str:
    return ", ".join(f"{key}={value}" for key, value in definition.options.items()) or f"bucket={definition.bucket}"


def _entry(volume: VolumeMount) -> dict[str, Any]:
    return {
        "Name": volume.definition.name,
        "Mountpoint": str(volume.mountpoint),
        "CreatedAt": volume.definition.created_at,
    }


def _status(volume: VolumeMount, options: Mapping[str, str]) -> dict[str, Any]:
    """What `docker volume inspect` shows of a volume: what it is, and how it is."""
    said = volume.status
    pending = said.get("pending") or {"files": volume.left_files, "bytes": 0}
    return {
        "bucket": volume.definition.bucket,
        "prefix": volume.definition.prefix,
        "endpoint": said.get("endpoint") or options.get("endpoint"),
        "options": dict(options),
        "state": volume.state,
        "pid": volume.pid,
        "mount_ids": len(volume.uses.by_id),
        "pending_files": pending["files"],
        "pending_bytes": pending["bytes"],
        "conflicts": len(said.get("conflicts") or ()),
        "server": (said.get("server") or {}).get("state"),
        "last_error": volume.last_error,
        "log": volume.log_file,
    }
