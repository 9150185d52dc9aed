"""Looks after the cache directory while it is in use: what others damage there is put right from memory, or told."""

from __future__ import annotations

import logging
import sqlite3
from functools import partial
from typing import TYPE_CHECKING

import trio

from s3fuse.errors import UserError
from s3fuse.namespace.recovery import rewrite

if TYPE_CHECKING:
    from s3fuse.namespace.changes import Changes
    from s3fuse.writing.leftovers import Uploads
    from s3fuse.writing.staging import Staging

log = logging.getLogger(__name__)

EVERY_S = 1.0
WAL_BYTES = 8 << 20
#: Free slots of the slab that keep their blocks while anything is staged: the next small files take no new ones.
KEPT_SLOTS = 64


async def keep_up(changes: Changes, staging: Staging, uploads: Uploads) -> None:
    """Keeps the journal's log short and its files and the staging files in place, until cancelled."""
    told = ""
    while True:
        await trio.sleep(EVERY_S)
        try:
            mend(changes, staging, uploads)
            await staging.slab.give_back(KEPT_SLOTS if staging.staged_bytes else 0)
            changes.journal.keep_room()
            if changes.journal.is_long(WAL_BYTES):
                await trio.to_thread.run_sync(changes.journal.checkpoint)
        except (OSError, sqlite3.Error, UserError) as error:
            if told != str(error):
                told = str(error)
                log.error("the cache directory %s cannot be kept in order: %s", changes.journal.directory, error)


def mend(changes: Changes, staging: Staging, uploads: Uploads) -> None:
    """Puts back what was taken away. Raises OSError, sqlite3.Error and UserError."""
    journal = changes.journal
    if journal.keep_directory():
        log.error("somebody removed the cache directory %s or its lock; it is taken anew", journal.directory)
    for name in staging.mend():
        log.error("somebody removed %s from %s; it is put back", name, staging.directory)
    damage = journal.damage()
    if damage:
        journal.rebuild(partial(rewrite, changes, uploads))
        log.error("the journal in %s was damaged (%s); it is written anew, nothing is lost", journal.directory, damage)
