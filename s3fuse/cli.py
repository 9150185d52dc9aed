"""The command line: verbs and options. Exit codes are `errors.ExitCode`; every failure is one line on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s3fuse import __version__, config, control, daemon, kernel
from s3fuse.cachecmd import cache
from s3fuse.errors import ExitCode, UserError
from s3fuse.host.private import remove_new_log
from s3fuse.mountpoint import share
from s3fuse.options import (
    FilePath,
    GroupedCommand,
    Mode,
    Mountpoint,
    Seconds,
    Size,
    default_umask,
    from_fstab,
    grouped,
    parse_fstab,
    say,
)
from s3fuse.plugincmd import plugin, plugin_purge
from s3fuse.printable import printable
from s3fuse.servercmd import server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


WHERE = click.Choice(["local", "upload"])
LINKS = click.Choice(["refuse", "copy"])
#: What an inode may have: the last one means "none" to chown(2).
ID = click.IntRange(0, (1 << 32) - 2)
LEVELS = click.Choice(["debug", "info", "warning", "error"])
#: How long another process may take to go on with a mount.
RESTART_S = 60.0
#: What to do about a dead daemon's mount.
DEAD = "mount the bucket there again, which uploads what waits, or end it with s3fuse umount"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="s3fuse")
def cli() -> None:
    """An S3 bucket as a POSIX directory."""


server_option = grouped("Server and keys")
bucket_option = grouped("Meaning of calls")
limit_option = grouped("Local state and limits")
look_option = grouped("How it looks")
run_option = grouped("Running it")


@cli.command(cls=GroupedCommand)
@click.argument("bucket", metavar="[ALIAS/]BUCKET[/PREFIX]")
@click.argument("mountpoint", type=Mountpoint())
@server_option("--endpoint", metavar="URL", help="S3 server, e.g. http://127.0.0.1:9000.")
@server_option("--region", help="Region to sign for (us-east-1).")
@server_option("--profile", help="Section of the AWS credentials file.")
@server_option("--credentials-file", type=FilePath(), help="File with the keys; read again when it changes.")
@server_option("--ca-file", type=FilePath(), help="Certificate authority of the server.")
@server_option("--create-bucket", is_flag=True, help="Make the bucket if it does not exist.")
@limit_option("--cache-dir", type=FilePath(), help="Where the journal and staged files are kept.")
@limit_option("--cache-size", type=Size(), default="10GiB", show_default=True, help="Most disk for the cache.")
@limit_option("--memory", type=Size(), default="256MiB", show_default=True, help="Most memory for cached blocks.")
@limit_option("--dirty-size", type=Size(), help="Most staged bytes; writers wait (4GiB, with --ephemeral 256MiB).")
@limit_option("--ephemeral", is_flag=True, help="Keep everything in memory: a crash loses what is not uploaded.")
@limit_option("--max-requests", type=int, default=32, show_default=True, help="Most S3 requests at once.")
@bucket_option("--close", type=WHERE, default="local", show_default=True, help="Where data is when close(2) returns.")
@bucket_option("--fsync", type=WHERE, default="upload", show_default=True, help="Where data is when fsync(2) returns.")
@bucket_option("--hard-links", type=LINKS, default="refuse", show_default=True, help="What link(2) does.")
@bucket_option("--attr-ttl", type=Seconds(), default="1s", show_default=True, help="How old attributes may be.")
@bucket_option("--drain-timeout", type=Seconds(), default="5m", show_default=True, help="Longest wait when unmounting.")
@bucket_option("--read-only", is_flag=True, help="Refuse every change.")
@bucket_option("--suid/--nosuid", default=False, help="Honour set-uid files and file capabilities (default: no).")
@bucket_option("--dev/--nodev", default=False, help="Let devices be opened (default: no).")
@bucket_option("--exec/--noexec", default=True, help="Let programs be run (default: yes).")
@bucket_option("--noatime/--relatime", default=False, help="The kernel's flag; reading never changes atime here.")
@look_option("--uid", type=ID, default=os.geteuid, help="Owner of objects without metadata.")
@look_option("--gid", type=ID, default=os.getegid, help="Group of objects without metadata.")
@look_option("--umask", type=Mode(), default=default_umask, help="Bits to clear in the default modes.")
@look_option("--file-mode", type=Mode(), default="0666", help="Mode of files without metadata, before --umask.")
@look_option("--dir-mode", type=Mode(), default="0777", help="Mode of directories without metadata, before --umask.")
@look_option("--allow-other/--no-allow-other", default=lambda: os.geteuid() == 0, help="Let others in (root: on).")
@run_option("--nonempty", is_flag=True, help="Mount over a directory that is not empty.")
@run_option("--shared", is_flag=True, help="Prepare the mountpoint for containers: see README.")
@run_option("-f", "--foreground", is_flag=True, help="Stay in the foreground.")
@run_option("--restart-above", type=Size(), default="0", metavar="SIZE", help="Restart when memory exceeds this.")
@run_option("--log-file", type=FilePath(), help="Where the daemon writes its log.")
@run_option("--log-level", type=LEVELS, default="info", show_default=True, help="What the log holds.")
@run_option(
    "-o",
    "fstab",
    multiple=True,
    expose_value=False,
    callback=from_fstab,
    metavar="a,b=c",
    help="Any of these options, in fstab's form.",
)
def mount(bucket: str, mountpoint: Path, foreground: bool, shared: bool, **options: Any) -> None:
    """Mount a bucket; returns when the mount answers."""
    settings = config.MountConfig.from_options(bucket, mountpoint, options)
    log_file = settings.log_file or (None if foreground else _default_log(settings))
    log_is_new = log_file is not None and not os.path.lexists(log_file)
    daemon.set_up_logging(settings.log_level, log_file)
    try:
        if shared:
            share(mountpoint)
        if log_file is not None:
            _warn_of_open_keys(settings)
        _wait_for_drain(settings)
        settings = replace(settings, log_file=log_file)
        daemon.start_keeper(settings, daemon.WORKER, str(log_file), foreground=foreground, log_is_new=log_is_new)
    except UserError:
        remove_new_log(log_file, is_new=log_is_new)
        raise
    if not foreground:
        _tell_of_lost_bytes(mountpoint)


def _warn_of_open_keys(settings: config.MountConfig) -> None:
    """The log has it, too, where nobody may look."""
    from s3fuse import credentials

    with suppress(UserError):  # the daemon says it better
        for warning in credentials.open_key_files(settings):
            say(f"s3fuse: {warning}", err=True)


def _tell_of_lost_bytes(mountpoint: Path) -> None:
    with suppress(OSError, UserError):  # it may be unmounted already
        for folder in control.request(mountpoint, "status")["cache"]["lost"]:
            say(f"s3fuse: staged bytes that the journal lost track of are in {folder}; see s3fuse cache list", err=True)


def _default_log(settings: config.MountConfig) -> Path:
    """A daemon's log: beside the control socket, one file a mountpoint. Raises UserError."""
    control.make_runtime_dir()
    return control.socket_path(settings.mountpoint).with_suffix(".log")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A line that counts down on a terminal; nothing in a pipe."""
    from rich.console import Console
    from rich.markup import escape
    from rich.status import Status

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda message: None
        return
    shown = escape(printable(title))
    with Status(shown, console=console) as status:
        yield lambda left: status.update(f"{shown}: {left['files']} files, {left['bytes'] / 1e6:,.1f} MB to go")


def _wait_for_drain(settings: config.MountConfig) -> None:
    """Lets the daemon that had the cache directory before finish: a mount ended by umount(8) uploads after that.

    Raises UserError where that takes longer than the drain timeout.
    """
    if settings.ephemeral or not control.mounts():
        return
    from s3fuse import credentials

    directory = settings.cache_path(credentials.resolve(settings).endpoint)
    last = control.draining(directory)
    if last is None:
        return
    end = time.monotonic() + settings.drain_timeout_s
    where = f"{last['mountpoint']} was unmounted, and its daemon (pid {last['pid']})"
    say(f"s3fuse: {where} still uploads what is in {directory}; waiting for it", err=True)
    with _progress("waiting for uploads") as show:
        while (now := control.draining(directory)) is not None:
            show(now["pending"])
            if time.monotonic() > end:
                raise UserError(
                    f"{where} still has {now['pending']['files']} files of {directory} to upload; mount again later, "
                    f"or end that with: s3fuse umount --drain-timeout 0s {last['mountpoint']}"
                )
            control.wait_for_end(last["pid"], 0.25)
    control.wait_for_end(last["pid"], 30)


def _not_mounted(mountpoint: Path) -> UserError:
    """Why nobody has the control socket of this mountpoint."""
    entry = kernel.mount_entry(mountpoint)
    if entry is None or entry.fstype != kernel.FSTYPE:
        return UserError(f"{mountpoint} is not mounted by s3fuse; see s3fuse status")
    if kernel.is_dead(mountpoint):
        return UserError(f"the daemon of {mountpoint} is dead; {DEAD}")
    return UserError(
        f"the daemon of {mountpoint} is not to be found in {control.runtime_dir()}; if another user mounted it, ask as "
        f"that user, else end it with: umount {mountpoint}"
    )


def _no_answer(mountpoint: Path) -> UserError:
    return UserError(f"the daemon of {mountpoint} does not answer; see its log and s3fuse status")


def _list(items: list[dict[str, Any]]) -> None:
    for item in items:
        reason = printable(item["error"] or item["state"])
        say(f"  {printable(item['name'])} ({item['bytes']} bytes): {reason}", err=True)


@cli.command()
@click.argument("mountpoint", type=Mountpoint())
@click.option("--drain-timeout", type=Seconds(), help="Longest wait for uploads; the mount's own by default.")
def umount(mountpoint: Path, drain_timeout: float | None) -> None:
    """Upload what waits, then unmount; exit code 3 if something is left in the journal."""
    about = control.last_said(mountpoint)
    pid, ephemeral = about.get("pid"), about.get("ephemeral", False)
    try:
        with _progress(f"unmounting {mountpoint}") as show:
            result = control.request(
                mountpoint, "umount", on_progress=show, timeout_s=60, drain_timeout_s=drain_timeout
            )
    except TimeoutError:
        raise _no_answer(mountpoint) from None
    except (FileNotFoundError, ConnectionRefusedError):
        mounted = kernel.mount_entry(mountpoint) is not None
        raise (_detached(mountpoint, about) if mounted else _not_mounted(mountpoint)) from None
    except OSError:  # it ended while it was asked
        raise _detached(mountpoint, about) from None
    if pid is not None:
        control.wait_for_end(pid, 30)  # so that its cache directory is free
    if result["pending"]:
        left = "these are lost (--ephemeral)" if ephemeral else "these wait in the journal for the next mount"
        say(f"s3fuse: {mountpoint} is unmounted, but {left}:", err=True)
        _list(result["pending"])
        sys.exit(ExitCode.PENDING)


def _detached(mountpoint: Path, about: dict[str, Any]) -> UserError:
    """Detaches the mount of a dead daemon, and says what became of it. A living daemon's stays."""
    entry = kernel.mount_entry(mountpoint)
    if entry is not None:
        if entry.fstype != kernel.FSTYPE or not kernel.is_dead(mountpoint):
            return _not_mounted(mountpoint)
        try:
            kernel.unmount(mountpoint, lazy=True)
        except OSError as error:
            return UserError(f"{mountpoint} has no daemon and cannot be detached: {error.strerror}")
    gone = f"the daemon of {mountpoint} is dead and the mount detached"
    if about.get("ephemeral"):
        return UserError(f"{gone}; what it had not uploaded is lost (--ephemeral)", ExitCode.PENDING)
    left = _left_in(about.get("cache_directory"))
    if not left:
        return UserError(f"{gone}; nothing that it had taken waits for upload")
    return UserError(f"{gone}; {left}", ExitCode.PENDING)


def _left_in(directory: str | None) -> str:
    """What a dead daemon left in its cache directory, for people; "" where nothing waits there."""
    from s3fuse import caches

    unknown = "what it had not uploaded is in its journal: mount the bucket again to upload it"
    if directory is None or not caches.is_cache(Path(directory)):
        return unknown
    cache = caches.look(Path(directory))
    if cache.in_use or cache.problem:
        return unknown
    if not cache.why_kept():
        return ""
    items = "".join(f"\n  {printable(item['name'])} ({item['bytes']} bytes)" for item in cache.waiting[:20])
    more = f"\n  and {len(cache.waiting) - 20} more" if len(cache.waiting) > 20 else ""
    return f"this waits in {directory}; mount the bucket again to upload it:{items}{more}"


@cli.command()
@click.argument("mountpoint", type=Mountpoint())
def flush(mountpoint: Path) -> None:
    """Wait until everything written so far is in the bucket; exit code 1 and a list if the server does not take it."""
    try:
        with _progress(f"flushing {mountpoint}") as show:
            result = control.request(mountpoint, "flush", on_progress=show, timeout_s=60)
    except (FileNotFoundError, ConnectionRefusedError):
        raise _not_mounted(mountpoint) from None
    except OSError:
        raise _no_answer(mountpoint) from None
    if result["failed"]:
        say(f"s3fuse: these files of {mountpoint} are not in the bucket; they are kept and tried again:", err=True)
        _list(result["failed"])
        sys.exit(ExitCode.FAILED)


@cli.command()
@click.argument("mountpoint", type=Mountpoint())
@click.option("-o", "changed", multiple=True, metavar="a,b=c", help="Options of mount that are to change.")
@click.pass_context
def restart(ctx: click.Context, mountpoint: Path, changed: tuple[str, ...]) -> None:
    """Replace the mount's process by the version installed now; programs on the mount wait a moment."""
    changes = config.by_field(parse_fstab(ctx, mount, changed))
    paths = {name: str(value) for name, value in changes.items() if isinstance(value, Path)}
    try:
        before = control.request(mountpoint, "restart", timeout_s=60, changes=changes | paths)["worker_pid"]
        process = _wait_for_successor(mountpoint, before)
    except (FileNotFoundError, ConnectionRefusedError):
        raise _not_mounted(mountpoint) from None
    except OSError:
        raise _no_answer(mountpoint) from None
    say(f"{mountpoint} goes on in another process; it paused for {process['last_pause_s']:.2f} s", err=True)


def _wait_for_successor(mountpoint: Path, before: int) -> dict[str, Any]:
    """What the process after `before` says of itself. Raises UserError where that one stays."""
    end = time.monotonic() + RESTART_S
    while time.monotonic() < end:
        status = control.request(mountpoint, "status", timeout_s=60)
        refusal = status["process"]["last_refusal"]
        if refusal and status["worker_pid"] != before:
            raise UserError(f"{mountpoint} goes on with the options that it had: {refusal}")
        if refusal:
            raise UserError(f"no other process can go on with {mountpoint}: {refusal}")
        if status["worker_pid"] != before and status["process"]["last_pause_s"] is not None:
            return dict(status["process"])
        time.sleep(0.02)
    raise UserError(f"{mountpoint} has not been taken over within {RESTART_S:.0f} s; see its log")


@cli.command()
@click.argument("mountpoint", required=False, type=Mountpoint())
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
def status(mountpoint: Path | None, as_json: bool) -> None:
    """Show mounts, what waits for upload, and what the server can do."""
    found = _statuses(mountpoint)
    if mountpoint and not found:
        raise _not_mounted(mountpoint)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        from s3fuse.report import show_status

        show_status(found)
    if mountpoint and "pending" not in found[0]:
        sys.exit(ExitCode.FAILED)


def _statuses(mountpoint: Path | None) -> list[dict[str, Any]]:
    """What the daemons say of their mounts (or of this one alone); without "pending" where there is no answer."""
    found = []
    for about in control.mounts():
        if mountpoint is None or about["mountpoint"] == str(mountpoint):
            try:
                found.append(control.request(Path(about["mountpoint"]), "status"))
            except OSError as error:
                found.append({**about, "state": f"no answer: {error}"})
    known = {about["mountpoint"] for about in found}
    for entry in kernel.dead_mounts() if mountpoint is None or not found else ():
        if entry.mountpoint not in known and (mountpoint is None or entry.mountpoint == str(mountpoint)):
            bucket, _, prefix = entry.source.removeprefix("s3fuse#").partition("/")
            about = {"mountpoint": entry.mountpoint, "pid": None, "bucket": bucket, "prefix": prefix and f"{prefix}/"}
            found.append({**about, "endpoint": None, "state": f"dead; {DEAD}"})
    return found


cli.add_command(cache)
cli.add_command(plugin)
cli.add_command(plugin_purge)
cli.add_command(server)


def main() -> None:
    """Runs a verb; a UserError becomes its message and exit code."""
    try:
        cli.main(standalone_mode=False)
    except UserError as error:
        say(f"s3fuse: {error}", err=True, lines=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(ExitCode.FAILED)
