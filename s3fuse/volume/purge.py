"""Deletes the data of a volume: what its owner asked for with `purge=true`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from s3fuse import credentials
from s3fuse.errors import ExitCode, NoSuchBucket, Refused, StoreError, UserError
from s3fuse.store.s3 import S3Store

if TYPE_CHECKING:
    from s3fuse.config import MountConfig


async def purge(config: MountConfig) -> None:
    """Deletes all objects of the place, and the uploads that were begun there. Raises UserError."""
    where = credentials.resolve(config)
    store = S3Store(where.endpoint, config.bucket, where.provider, region=where.region, ca_file=config.ca_file)
    try:
        await _empty(store, config.prefix)
    except NoSuchBucket:
        return
    except StoreError as error:
        raise UserError(f"{config.bucket}/{config.prefix} at {where.endpoint}: {error}", ExitCode.REFUSED) from None
    finally:
        with trio.move_on_after(5, shield=True):
            await store.aclose()


async def _empty(store: S3Store, prefix: str) -> None:
    await store.probe()  # where directories' metadata is kept elsewhere, that goes too
    for upload in await store.list_uploads(prefix):
        await store.multipart_abort(upload.key, upload.upload_id)
    while keys := [one.key for one in (await store.list_page(prefix, delimiter="")).objects]:
        for key, reason in (await store.delete_many(keys)).items():
            raise Refused(f"{key} is not deleted: {reason}", key)
