"""Who holds a mount, asked of the kernel: Docker's mount IDs get lost and come twice, mount namespaces do not lie.

A container has the volume's mount in a mount namespace of its own; so a volume is in use as long as a namespace other
than this process's has its device number (field 3 of mountinfo). One process of each namespace is looked at: about 5 ms
for 11 namespaces.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import trio

from s3fuse import kernel

_PEERS = re.compile(r"(?:shared|master|propagate_from):(\d+)")


def held() -> set[str]:
    """The devices ("MAJOR:MINOR") of s3fuse mounts that stay when this namespace unmounts them (blocks).

    A copy that follows this namespace's own mount by propagation does not count: it goes when the mount goes. Services
    of systemd have such copies of everything. An unmount propagates as the mount did: from the mount that it is on to
    the peers and slaves of that. So a copy follows if what it is on has a peer group in common with what ours is on;
    the groups of the mount itself say nothing, a container's copy is a slave of ours where this host shares mounts.
    """
    ours: dict[str, set[str]] = {}
    found: set[str] = set()
    for device, above in devices(_mountinfo("self")):
        if device in ours and not above & ours[device]:  # bound to another path of this host
            found.add(device)
        ours.setdefault(device, above)
    seen = {os.readlink("/proc/self/ns/mnt")}
    for process in os.listdir("/proc"):
        if not process.isdigit():
            continue
        try:
            namespace = os.readlink(f"/proc/{process}/ns/mnt")
            if namespace in seen:
                continue
            content = _mountinfo(process)
        except OSError:  # it has ended; another process may have the same namespace
            continue
        if content:
            seen.add(namespace)
            found.update(device for device, above in devices(content) if not above & ours.get(device, set()))
    return found


def _mountinfo(process: str) -> str:
    return Path(f"/proc/{process}/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")


def devices(mountinfo: str) -> list[tuple[str, set[str]]]:
    """The device of each s3fuse mount in a mountinfo file, and the peer groups of the mount that it is on."""
    if kernel.FSTYPE not in mountinfo:
        return []
    mounts = {entry.number: entry for entry in kernel.parse_mountinfo(mountinfo)}
    ours = [entry for entry in mounts.values() if entry.fstype == kernel.FSTYPE]
    return [
        (entry.device, set(_PEERS.findall(mounts[entry.parent].propagation if entry.parent in mounts else "")))
        for entry in ours
    ]


class Holders:
    """What `held` said, shared by all volumes."""

    def __init__(self) -> None:
        self._held: set[str] = set()
        self._at = float("-inf")

    async def have(self, device: str, *, age_s: float = 0.0) -> bool:
        """Whether somebody else holds this device, as of at most `age_s` ago."""
        if time.monotonic() - self._at >= age_s:
            at = time.monotonic()
            self._held, self._at = await trio.to_thread.run_sync(held), at
        return device in self._held
