"""`s3fuse cache`: list, clean, recover."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from s3fuse import config
from s3fuse.errors import ExitCode, UserError
from s3fuse.options import FilePath, say
from s3fuse.printable import printable

if TYPE_CHECKING:
    from pathlib import Path


@click.group()
def cache() -> None:
    """What cache directories hold, which are unused, what waits in them for upload."""


def _chosen(directories: tuple[Path, ...]) -> list[Path]:
    from s3fuse import caches

    return [path.absolute() for path in directories] or caches.below(config.cache_root())


@cache.command("list")
@click.argument("directories", nargs=-1, type=FilePath(), metavar="[DIR]...")
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def list_caches(directories: tuple[Path, ...], as_json: bool) -> None:
    """List cache directories: those below the cache root, or these."""
    from s3fuse import caches

    found = [caches.look(path) for path in _chosen(directories)]
    if as_json:
        click.echo(json.dumps([{**asdict(one), "directory": str(one.directory)} for one in found], indent=2))
        return
    if not found:
        say(f"no cache directories in {config.cache_root()}")
    for one in found:
        state = "in use" if one.in_use else "unused"
        size = f"{one.size_bytes:,} bytes, {one.waiting_files} changes wait"
        say(f"{one.directory}: {one.store or 'unknown bucket'}, {state}, {size}")
        for item in one.waiting:
            say(f"  {printable(item['name'])} ({item['bytes']} bytes): {printable(item['reason'])}")
        for folder in one.lost:
            say(f"  staged bytes that the journal lost track of: {folder}")
        if one.problem:
            say(f"  {one.problem}")


@cache.command()
@click.argument("directories", nargs=-1, type=FilePath(), metavar="[DIR]...")
def clean(directories: tuple[Path, ...]) -> None:
    """Remove cache directories that are unused and hold nothing that waits; the others stay, with the reason."""
    from s3fuse import caches

    kept = False
    for path in _chosen(directories):
        reason = caches.remove(path)
        if reason:
            kept = True
            say(f"s3fuse: {path} stays: {reason}", err=True)
        else:
            say(f"removed {path}")
    if kept and directories:
        sys.exit(ExitCode.FAILED)


@cache.command()
@click.argument("directory", type=FilePath(), metavar="DIR")
@click.argument("destination", type=FilePath(), metavar="DEST")
def recover(directory: Path, destination: Path) -> None:
    """Copy what waits in DIR for upload into DEST; DIR stays as it is, and no server is asked."""
    from s3fuse import caches

    whole = True
    try:
        for copied in caches.copy_out(directory.absolute(), destination.absolute()):
            say(f"{printable(copied.name)}: {copied.text}", err=not copied.whole)
            whole = whole and copied.whole
    except OSError as error:
        raise UserError(f"copying to {destination} failed: {error}") from error
    if not whole:
        sys.exit(ExitCode.FAILED)
