"""Composes the plugin: definitions, driver, socket; and ends it, which ends no mount."""

from __future__ import annotations

import logging
import signal
from typing import TYPE_CHECKING

import trio

from s3fuse import systemd
from s3fuse.errors import UserError
from s3fuse.volume import api
from s3fuse.volume.driver import Driver

if TYPE_CHECKING:
    from pathlib import Path

    from s3fuse.volume.definition import MountOptions
    from s3fuse.volume.naming import NameRule
    from s3fuse.volume.places import Places
    from s3fuse.volume.state import State

log = logging.getLogger(__name__)


async def serve(socket_path: Path, state: State, places: Places, options: MountOptions, rule: NameRule) -> None:
    """Serves Docker until SIGTERM or SIGINT. Raises UserError where it cannot begin."""
    try:
        places.base_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UserError(f"--base-dir {places.base_dir} cannot be used: {error.strerror}") from None
    with state.opened(), api.listener(socket_path) as where:
        async with trio.open_nursery() as nursery:
            driver = Driver(state, places, options, rule, nursery)
            await driver.restore()
            stopping = trio.Event()
            await nursery.start(_stop_when_told, stopping)
            systemd.tell("READY=1")
            log.info("serving Docker")
            await api.Server(driver.calls).serve(where, stopping)
            systemd.tell("STOPPING=1")
            nursery.cancel_scope.cancel()
    log.info("the plugin ends; volumes stay mounted")


async def _stop_when_told(stopping: trio.Event, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
        task_status.started()
        async for _ in received:
            stopping.set()
