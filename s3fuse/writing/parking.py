"""What one file has in temporary objects: those that make up its overlay, and those that are being sent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from s3fuse.writing.overlay import Overlay, Parked, Range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from s3fuse.journal.undo import Undo
    from s3fuse.writing.layers import Layer
    from s3fuse.writing.staging import Staging


@dataclass(eq=False)
class Temporary:
    """An object that may be in the bucket: it is as soon as `etag` is known, and carries `token`."""

    key: str
    token: str
    etag: str = ""
    size_bytes: int = 0


@dataclass(eq=False)
class Pack:
    """Ranges of the oldest layer that become one object, one after the other."""

    ranges: Sequence[tuple[int, int]]
    into: Temporary

    @property
    def size_bytes(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def placed(self) -> list[Range]:
        """Where each range is once the object is there."""
        found: list[Range] = []
        at = 0
        for start, stop in self.ranges:
            parked = Parked(self.into.key, self.into.etag, self.into.size_bytes, start - at)
            found.append(Range(start, stop, parked))
            at += stop - start
        return found


class ParkedFile:
    """The parked side of file `number`, as the journal knows it. `staging.abandon` gets objects that nobody needs."""

    def __init__(self, number: int, staging: Staging) -> None:
        self.number = number
        self.overlay: Overlay | None = None
        self.packs: list[Pack] = []  # what the oldest layer is being parked as; empty: it is not
        self.sending = False
        self._staging = staging
        self._journal = staging.journal
        self._objects: dict[str, Temporary] = {}

    def keep(self, undo: Undo) -> None:
        """Has a transaction that fails put back what is known."""
        undo.call(partial(self._put_back, self.overlay, self.packs, self.sending, dict(self._objects)))

    def _put_back(
        self, overlay: Overlay | None, packs: list[Pack], sending: bool, objects: dict[str, Temporary]
    ) -> None:
        self.overlay, self.packs, self.sending, self._objects = overlay, packs, sending, objects

    def begin(self, packs: list[Pack]) -> None:
        """Records the objects before the first of them is sent: a crash leaves none that nobody knows of."""
        with self._journal.transaction():
            self.keep(self._journal.undo)
            for pack in packs:
                self._objects[pack.into.key] = pack.into
                self._journal.put_temporary(self.number, pack.into.key, pack.into.token)
        self.packs = packs

    def done(self, layer: Layer) -> None:
        """Every pack of the layer is in the bucket: it becomes part of the overlay. Call inside a transaction."""
        before = self.overlay
        placed = sorted(found for pack in self.packs for found in pack.placed())
        below = layer.below_bytes
        under = before if before is not None else Overlay(below)
        self.overlay = under.with_layer(below, placed)
        self._journal.put_overlay(self.number, before, self.overlay)
        self.packs = []
        needed = self.overlay.objects()
        for temporary in [one for one in self._objects.values() if one.key not in needed]:
            self._drop(temporary)

    def restore(self, overlay: Overlay) -> None:
        """Takes what the journal has of an earlier process."""
        self.overlay = overlay
        for found in overlay:
            where = found.parked
            self._objects[where.key] = Temporary(where.key, "", where.etag, where.size_bytes)

    def journal_again(self) -> None:
        """Records it in a journal that knows nothing of it."""
        for temporary in self._objects.values():
            self._journal.put_temporary(self.number, temporary.key, temporary.token)
        if self.overlay is not None:
            self._journal.put_overlay(self.number, None, self.overlay)

    def clear(self) -> None:
        """Nothing of it is needed any more. What is being sent is abandoned when that has ended: see `sent`."""
        used = self.overlay is not None or self._objects
        self.overlay, self.packs = None, []
        if used and not self.sending:
            self.sent()

    def sent(self) -> None:
        """No request is under way any more."""
        self.sending = False
        if self.overlay is None and not self.packs:
            for temporary in list(self._objects.values()):
                self._drop(temporary)
            self._journal.drop_overlay(self.number)

    def _drop(self, temporary: Temporary) -> None:
        # In this order: whatever comes between, one of the two knows the object.
        self._staging.abandon(temporary)
        self._journal.drop_temporary(temporary.key)
        del self._objects[temporary.key]
