"""`s3fuse status` for people."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from s3fuse.printable import printable


def show_status(mounts: list[dict[str, Any]]) -> None:
    """Prints each mount as a block of facts."""
    console = Console(markup=False, highlight=False, emoji=False)
    if not mounts:
        console.print("nothing is mounted")
    for mount in mounts:
        table = Table(
            title=Text(printable(mount["mountpoint"])),
            title_justify="left",
            show_header=False,
            box=None,
            padding=(0, 2),
        )
        table.add_column()
        table.add_column(overflow="fold")
        for name, value in _facts(mount):
            table.add_row(name, Text(printable(value)))
        console.print(table)


def _facts(mount: dict[str, Any]) -> list[tuple[str, str]]:
    bucket, state = f"{mount['bucket']}/{mount['prefix']}", mount["state"]
    facts = [
        ("bucket", f"{bucket} at {mount['endpoint']}" if mount["endpoint"] else bucket),
        ("state", f"{state}, pid {mount['pid']}" if mount["pid"] else state),
    ]
    if "log" in mount:  # what an earlier version says of a mount has none, and nobody says it of a dead one
        facts.append(("log", mount["log"]))
    if "pending" not in mount:
        return facts
    pending, cache, able = mount["pending"], mount["cache"], mount["capabilities"]
    facts.append(("to upload", f"{pending['files']} files, {pending['bytes']:,} bytes"))
    facts += [("", f"{i['name']}: {i['error'] or i['state']}") for i in pending["items"][:20]]
    # The daemon may be of an earlier version, which did not say what staged bytes take.
    staged = f"{cache.get('held_bytes', cache['staged_bytes']):,} of {cache['dirty_limit_bytes']:,} bytes"
    waiting = cache.get("waiting_writers", 0)
    facts.append(("staged", f"{staged}; {waiting} writes wait for room" if waiting else staged))
    facts.append(("memory", f"{cache['memory_bytes']:,} of {cache['memory_limit_bytes']:,} bytes"))
    facts.append(
        ("disk", f"{cache['disk_bytes']:,} of {cache['disk_limit_bytes']:,} bytes, {cache['disk_hits']:,} hits")
    )
    kept = "kept in memory only: a crash loses what is not uploaded"
    facts.append(("cache", kept if cache.get("ephemeral") else cache["directory"]))
    facts += [("", f"staged bytes of which the journal lost track: {folder}") for folder in cache.get("lost", ())]
    facts.append(("server", f"{able['server']}, {_server(mount['server'])}"))
    facts.append(("conflicts", f"checked: {able['conflict_check']}"))
    facts += _deletes(able, mount)
    facts += [("conflict", text) for text in mount["conflicts"]]
    facts += _process(mount.get("process", {}))
    if mount["hidden_keys"]:
        facts.append(("hidden keys", str(mount["hidden_keys"])))
    if mount.get("unreadable_entries"):
        text = "of listings are left out: the server says impossible things of them; see the log"
        facts.append(("entries", f"{mount['unreadable_entries']} {text}"))
    lease = mount.get("lease") or {}
    if lease.get("problem"):
        facts.append(("other nodes", f"do not know of this mount, and may delete what is here: {lease['problem']}"))
    if mount["last_error"]:
        facts.append(("last error", mount["last_error"]))
    server = mount["server"]
    if server["last_error"]:
        facts.append(("server's error", f"{_time(server['last_error_at'])}: {server['last_error']}"))
    return facts


def _deletes(able: dict[str, Any], mount: dict[str, Any]) -> list[tuple[str, str]]:
    if "delete_check" not in able:  # the daemon is of an earlier version
        return []
    done = mount["deletes"]
    told = f"{done['conditional'] + done['looked_before']:,} done, {done['left']:,} left as others had changed them"
    return [("deletes", f"checked: {able['delete_check']}; {told}")]


def _process(process: dict[str, Any]) -> list[tuple[str, str]]:
    facts = []
    if process.get("restarts"):
        text = f"{process['restarts']}"
        if process["deaths"]:
            text += f", {process['deaths']} of them after a death (the last: {process['last_death']})"
        if process["last_pause_s"] is not None:
            text += f"; the last pause: {process['last_pause_s']:.2f} s"
        facts.append(("restarts", text))
    if process.get("given_up"):
        facts.append(("given up", f"{process['given_up']}; calls fail, and what waits is uploaded"))
    if process.get("weaker"):
        facts.append(("if it dies", process["weaker"]))
    return facts


def _server(server: dict[str, Any]) -> str:
    state = f"{server['state']} since {_time(server['since'])}"
    return f"{state}, needs {server['needs']}" if server["needs"] else state


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
