"""`s3fuse plugin`: the Docker volume plugin."""

from __future__ import annotations

import os
from pathlib import Path

import click

from s3fuse import config, daemon
from s3fuse.options import FilePath, GroupedCommand, Seconds, grouped

place_option = grouped("Where things are")
volume_option = grouped("Volumes")
run_option = grouped("Running it")


@click.command(cls=GroupedCommand)
@place_option(
    "--socket",
    "socket_path",
    type=FilePath(),
    default="/run/docker/plugins/s3fuse.sock",
    show_default=True,
    help="Where Docker finds the plugin; not with LISTEN_FDS.",
)
@place_option(
    "--base-dir",
    type=FilePath(),
    default="/var/lib/s3fuse/mounts",
    show_default=True,
    help="Where volumes are mounted.",
)
@place_option(
    "--state-dir",
    type=FilePath(),
    default="/var/lib/s3fuse/volumes",
    show_default=True,
    help="Where the definitions of volumes are kept.",
)
@place_option("--cache-root", type=FilePath(), help="Where the cache directories of volumes are (/var/cache/s3fuse).")
@place_option(
    "--credentials-dir",
    "credentials_dirs",
    type=FilePath(),
    multiple=True,
    default=("/etc/s3fuse/credentials", "/run/secrets"),
    show_default=True,
    help="Where the files are that volumes name by `credentials`; may be given several times.",
)
@place_option(
    "--allow-dir",
    "allowed_dirs",
    type=FilePath(),
    multiple=True,
    help="Where volumes may name files of their own (cache-dir, ca-file) beside --cache-root and the usual places of "
    "certificates; may be given several times.",
)
@volume_option("--endpoint", metavar="URL", help="S3 server of volumes that name none.")
@volume_option("--credentials", metavar="NAME", help="Credentials of volumes that name none.")
@volume_option(
    "--name-rule",
    metavar="BUCKET[/PREFIX]",
    default="{name}",
    show_default=True,
    help="Where the data of a volume is that names no bucket.",
)
@volume_option(
    "--linger", "linger_s", type=Seconds(), default="10s", show_default=True, help="How long unused mounts stay."
)
@volume_option(
    "--stale",
    "stale_s",
    type=Seconds(),
    default="1m",
    show_default=True,
    help="When a user who left without a word is forgotten.",
)
@volume_option(
    "--unmount-timeout",
    "unmount_s",
    type=Seconds(),
    default="44s",
    show_default=True,
    help="How long the last Unmount waits for uploads, which go on; Docker gives it 60s.",
)
@volume_option(
    "--drain",
    type=Seconds(),
    default="5m",
    show_default=True,
    help="Longest wait for uploads when a mount is told to end.",
)
@run_option("--log-file", type=FilePath(), help="Where the log goes instead of stderr.")
@run_option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What the log holds.",
)
@click.pass_context
def plugin(
    context: click.Context,
    socket_path: Path,
    base_dir: Path,
    state_dir: Path,
    cache_root: Path | None,
    credentials_dirs: tuple[Path, ...],
    allowed_dirs: tuple[Path, ...],
    endpoint: str | None,
    credentials: str | None,
    name_rule: str,
    linger_s: float,
    stale_s: float,
    unmount_s: float,
    drain: float,
    log_file: Path | None,
    log_level: str,
) -> None:
    """Run the Docker volume plugin until told to end; the volumes stay mounted."""
    import trio

    from s3fuse.credentials import check_endpoint
    from s3fuse.volume.definition import MountOptions
    from s3fuse.volume.naming import NameRule
    from s3fuse.volume.places import Places
    from s3fuse.volume.plugin import serve
    from s3fuse.volume.state import State

    if endpoint:
        check_endpoint("--endpoint", endpoint)
    # A bucket is never taken for an alias of mc.
    os.environ["MC_CONFIG_DIR"] = "/nonexistent"
    daemon.set_up_logging(log_level, log_file)
    places = Places(
        base_dir=Path(os.path.realpath(base_dir)),  # as the kernel names what is mounted there
        cache_root=cache_root or config.cache_root(),
        credentials_dirs=credentials_dirs,
        allowed_dirs=allowed_dirs,
        linger_s=linger_s,
        stale_s=stale_s,
        unmount_s=unmount_s,
    )
    defaults = {
        "umask": "000",  # a new volume is for everybody, until an image or a program gives it an owner
        "hard-links": "copy",  # images have some, and a refusal would end `docker run`
        "drain-timeout": f"{drain:g}s",
        "endpoint": endpoint,
        "credentials": credentials,
    }
    options = MountOptions(_mount_command(context), {name: value for name, value in defaults.items() if value})
    trio.run(serve, socket_path, State(state_dir), places, options, NameRule(name_rule))


@click.command(hidden=True, context_settings={"ignore_unknown_options": True})
@click.argument("job")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def plugin_purge(context: click.Context, job: str, arguments: tuple[str, ...]) -> None:
    """Do something about the data of a volume with purge: JOB, options as of `s3fuse mount`, then BUCKET[/PREFIX]."""
    import json

    import trio

    from s3fuse.volume.jobs import Job
    from s3fuse.volume.purge import run

    with _mount_command(context).make_context("mount", [*arguments, "/"]) as parsed:
        options = dict(parsed.params)
    bucket, mountpoint = options.pop("bucket"), options.pop("mountpoint")
    del options["foreground"], options["shared"]
    daemon.set_up_logging("error", None)
    settings = config.MountConfig.from_options(bucket, mountpoint, options)
    click.echo(json.dumps(trio.run(run, settings, Job.parse(job))))


def _mount_command(context: click.Context) -> click.Command:
    group = context.find_root().command
    command = group.get_command(context, "mount") if isinstance(group, click.Group) else None
    assert command is not None
    return command
