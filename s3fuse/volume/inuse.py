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

from s3fuse.kernel import FSTYPE

_PEERS = re.compile(r"(?:shared|master):(\d+)")
_FSTYPE = FSTYPE.encode()


def held() -> set[str]:
    """The devices ("MAJOR:MINOR") of s3fuse mounts that another mount namespace has (blocks).

    A copy that follows this namespace's own mount by propagation does not count: it goes when the mount goes. Services
    of systemd have such copies of everything.
    """
    ours: dict[str, set[str]] = {}
    for device, peers in devices(Path("/proc/self/mountinfo").read_bytes()):
        ours.setdefault(device, set()).update(peers)
    found: set[str] = set()
    seen = {os.readlink("/proc/self/ns/mnt")}
    for process in os.listdir("/proc"):
        if not process.isdigit():
            continue
        try:
            namespace = os.readlink(f"/proc/{process}/ns/mnt")
            if namespace in seen:
                continue
            content = Path(f"/proc/{process}/mountinfo").read_bytes()
        except OSError:  # it has ended; another process may have the same namespace
            continue
        if content:
            seen.add(namespace)
            found.update(device for device, peers in devices(content) if not peers & ours.get(device, set()))
    return found


def devices(mountinfo: bytes) -> list[tuple[str, set[str]]]:
    """Device and peer groups of each s3fuse mount in a mountinfo file (format: proc(5))."""
    found = []
    for line in mountinfo.split(b"\n"):
        if _FSTYPE not in line:
            continue
        fields = line.split(b" ")
        dash = fields.index(b"-", 6)
        if fields[dash + 1] == _FSTYPE:
            found.append((fields[2].decode(), set(_PEERS.findall(b" ".join(fields[6:dash]).decode()))))
    return found


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
