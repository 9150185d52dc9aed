"""`s3fuse server`: the embedded S3 server, for trying things out."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import click

from s3fuse import config
from s3fuse.errors import UserError
from s3fuse.options import FilePath

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.option("--data-dir", type=FilePath(), help="Where objects and keys are kept.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, help="Port of the S3 endpoint; a free one by default."
)
def server(data_dir: Path | None, port: int) -> None:
    """Run the embedded S3 server on loopback until interrupted."""
    import trio

    from s3fuse.server import embedded_server

    folder = data_dir or config.cache_root() / "server"

    async def run() -> None:
        code = None
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async with embedded_server(folder, port=port) as running, trio.open_nursery() as nursery:
                settings = folder / "server.env"
                part = folder / "server.env.part"
                part.touch(0o600)
                part.write_text(
                    f"export MINIO_ENDPOINT={running.endpoint}\nexport MINIO_ACCESS_KEY={running.access_key}\n"
                    f"export MINIO_SECRET_KEY={running.secret_key}\n"
                )
                part.replace(settings)
                click.echo(f"S3 server at {running.endpoint}; its address and keys: . {settings}")

                async def watch() -> None:
                    nonlocal code
                    code = await running.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(watch)
                async for _ in received:
                    break
                nursery.cancel_scope.cancel()
            settings.unlink(missing_ok=True)
        if code is not None:
            raise UserError(f"the S3 server ended by itself with code {code}; see {folder / 'server.log'}")

    trio.run(run)
