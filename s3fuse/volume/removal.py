"""When a volume was removed: what is written at its place after that is not the removed volume's."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from s3fuse.writing.durable import boot_id

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class Removal:
    """A removal whose data is still to be purged.

    `server_ns` is its time by the server's clock, None where the server did not answer then. The rest is by this
    host's clocks: `elapsed` time since the start `boot` of the machine is not changed by whoever sets the clock.
    `leases` are keys of the volume's own leases. `keep`: only the owner's mark is to go.
    """

    server_ns: int | None = None
    wall_ns: int = 0
    boot: str = ""
    elapsed_ns: int = 0
    leases: tuple[str, ...] = ()
    keep: bool = False

    @classmethod
    def now(cls, **more: Any) -> Removal:
        """A removal at this moment."""
        return cls(wall_ns=time.time_ns(), boot=boot_id(), elapsed_ns=_elapsed_ns(), **more)

    @property
    def removed_ns(self) -> int:
        """When it was, by CLOCK_BOOTTIME of now: negative where that was before the machine started."""
        if self.boot == boot_id():
            return self.elapsed_ns
        return _elapsed_ns() - max(0, time.time_ns() - self.wall_ns)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Removal:
        """Raises TypeError, ValueError."""
        return cls(**{**content, "leases": tuple(map(str, content.get("leases", ())))})


def _elapsed_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
