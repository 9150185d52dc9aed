"""Who uses a volume, as far as Docker says: mount IDs, and what the kernel's word makes of them.

An ID counts until its Unmount comes. It also stops counting some time after the last container has gone, for Unmounts
get lost; and an ID that no container was ever seen with counts longer, as Docker may be copying, which shows nowhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

#: Stands for users of a mount that was there before this process.
ADOPTED = ""
#: How many times longer an ID counts that no container was seen with.
UNSEEN = 10


@dataclass
class Use:
    """One mount ID. `seen`: a container held the mount since; `gone_at`: when none did any more, after that."""

    at: float
    seen: bool = False
    gone_at: float | None = None

    def is_stale(self, now: float, stale_s: float) -> bool:
        if self.seen:
            return self.gone_at is not None and now - self.gone_at >= stale_s
        return now - self.at >= stale_s * UNSEEN


class Uses:
    """The IDs of one volume. Times are `time.monotonic()` seconds."""

    def __init__(self) -> None:
        self.by_id: dict[str, Use] = {}
        #: When something about them changed last.
        self.last_at = time.monotonic()

    def __bool__(self) -> bool:
        return bool(self.by_id)

    def begin(self, identity: str) -> None:
        """A Mount with this ID is answered; the same one may come twice (`docker cp`)."""
        self.last_at = time.monotonic()
        self.by_id[identity] = Use(self.last_at)

    def adopt(self) -> None:
        """The mount was there before this process: whoever uses it, if anybody, said so to an earlier one."""
        self.last_at = time.monotonic()
        self.by_id[ADOPTED] = Use(self.last_at, seen=True, gone_at=self.last_at)

    def end(self, identity: str) -> Use | None:
        self.last_at = time.monotonic()
        return self.by_id.pop(identity, None)

    @property
    def is_last_gone(self) -> bool:
        """Whether no ID is left that Docker still has to say goodbye with."""
        return not self.by_id.keys() - {ADOPTED}

    def age_s(self) -> float:
        """How old the newest is; 0 where there is none."""
        now = time.monotonic()
        return now - max((use.at for use in self.by_id.values()), default=now)

    def note(self, *, held: bool) -> None:
        """What the kernel says now."""
        for use in self.by_id.values():
            if held:
                use.seen, use.gone_at = True, None
            elif use.seen and use.gone_at is None:
                use.gone_at = time.monotonic()

    def forget_stale(self, stale_s: float) -> bool:
        """Forgets all, where every one of them is stale; True if so."""
        now = time.monotonic()
        if not self.by_id or not all(use.is_stale(now, stale_s) for use in self.by_id.values()):
            return False
        self.by_id.clear()
        return True
