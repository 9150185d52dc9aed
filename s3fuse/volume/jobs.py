"""What the plugin has done about the data of volumes with `purge`, each time by a process of its own (see `purge`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from s3fuse.volume import process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s3fuse.volume.definition import Definition, MountOptions
    from s3fuse.volume.places import Places


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done about the data of a volume.

    `do`: "own" puts the owner's mark, "look" asks whether the data could be purged, "purge" deletes it, "disown" takes
    only the mark and the volume's leases away. `own` are the keys of those. Either `not_after_ns` is the time of the
    removal by the server's clock, or `removed_ns` by this host's CLOCK_BOOTTIME.
    """

    do: str
    volume: str
    everything: bool = False
    own: Sequence[str] = ()
    not_after_ns: int | None = None
    removed_ns: int = 0

    def words(self) -> str:
        """The job as one argument of a command."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, words: str) -> Job:
        """What `words` gave."""
        return cls(**json.loads(words))


async def run(definition: Definition, options: MountOptions, places: Places, job: Job) -> dict[str, Any]:
    """Has a job done, and gives what came of it. Raises UserError, as while the server is away.

    "in_use" says who uses the data, "refused" why the volume cannot have the option, "no_bucket" that there is none.
    """
    arguments = [*places.arguments(definition, options), "--", definition.place]
    found: dict[str, Any] = json.loads(await process.run("plugin-purge", job.words(), *arguments))
    return found
