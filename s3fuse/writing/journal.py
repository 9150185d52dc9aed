"""The journal: everything that is acknowledged and not yet in the bucket, in one SQLite file (WAL).

A row of `node` is an inode that differs from the bucket: what it should be (`key`, attributes; key NULL = deleted)
and which object version it is now (`remote_*`, NULL = none); `maybe_at` is a key that an operation under way may have
written. `layer` says which bytes of a regular file are staged, and in which slot or file, with their checksum;
segments (see `checks`) beyond the first one are in `segment`, and in `poisoned` bytes of it that are lost. `upload` has
the multipart uploads begun and not known to be ended; `refusal` says why a change cannot be uploaded; `late` has
requests of an earlier process that may still be carried out. State, not history: replaying means bringing each row to
the bucket, in any order that `syncer` allows. Statements commit at once; a process crash loses none (WAL pages are in
the page cache), a power failure may lose the last ones unless `sync` returned.
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from s3fuse.journal.seals import of_row
from s3fuse.writing.checks import IN_DOUBT, Segment
from s3fuse.writing.durable import boot_id
from s3fuse.writing.extents import Extents
from s3fuse.writing.layers import ENDLESS, Layer
from s3fuse.writing.overlay import Overlay, Parked, Range
from s3fuse.writing.rows import HOMELESS, BegunUpload, FoundNode, NodeRow, StagedLayer
from s3fuse.writing.transactions import Transactions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from s3fuse.writing.checks import Step


def _head_checksum(number: int, generation: int, size: int, below: int, token: str, slot: int | None) -> int:
    """The checksum of the part of a layer's row that is not about its first segment."""
    return of_row((number, generation, size, below, slot), (token,))


class Journal(Transactions):
    """The journal of one cache directory."""

    _done = 0  # the last step that was recorded

    def __init__(self, directory: Path, store: str) -> None:
        super().__init__(directory, store)
        self._boot = boot_id()
        self._noted = False

    @property
    def rebooted(self) -> bool:
        """Whether the machine was started anew since `note_boot`: what was not synced may be lost."""
        (noted,) = self._execute("SELECT boot FROM identity").fetchone()
        return noted is not None and noted != self._boot

    def note_boot(self) -> None:
        """Notes that something is promised of what is synced from now on, and that `rebooted` was seen to."""
        if not self._noted:
            self._execute("UPDATE identity SET boot=?", (self._boot,))
            self._noted = True

    def put_node(self, row: NodeRow, seal: int | None = None) -> None:
        """Records an inode. `seal` is that of the last moment when its file was whole (see `seals`), None: never."""
        self._deferred.pop(row.number, None)
        self._execute(
            "INSERT OR REPLACE INTO node VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (*row, row.checksum(), seal),
        )

    def seal(self, number: int, seal: int) -> None:
        """Records that the file is whole now, with the next transaction."""
        self.defer(number, "UPDATE node SET seal=? WHERE number=?", (seal, number))

    def drop_node(self, number: int) -> None:
        self._deferred.pop(number, None)
        self._execute("DELETE FROM node WHERE number=?", (number,))

    def put_refusal(self, number: int, reason: str) -> None:
        """Records why an inode cannot be brought to the bucket, until `drop_refusal`; later, where that fails now."""
        with suppress(sqlite3.DatabaseError, OSError):
            self._execute("INSERT OR REPLACE INTO refusal VALUES (?,?)", (number, reason))

    def drop_refusal(self, number: int) -> None:
        self._execute("DELETE FROM refusal WHERE number=?", (number,))

    def refusals(self) -> dict[int, str]:
        """Every reason, by inode number."""
        return dict(self._execute("SELECT number, reason FROM refusal").fetchall())

    # -- staged bytes. A layer's row has one of its segments itself, the one that starts at `home`: so that a small
    # -- file is one row.

    def put_layer(self, staged: StagedLayer, number: int) -> int:
        """Records a layer with all its segments, of which none is recorded; gives its `home`."""
        layer, segments = staged.layer, staged.segments
        first = segments[0] if segments else Segment(0, 0, 0)
        head = (number, layer.generation, layer.floor_bytes, layer.below_bytes, staged.token, staged.slot)
        row = (*head, *first, _head_checksum(*head))
        if len(segments) <= 1:
            self._execute("INSERT OR REPLACE INTO layer VALUES (?,?,?,?,?,?,?,?,?,?,?)", row)
            return first.start if segments else HOMELESS
        with self.transaction():
            self._execute("INSERT OR REPLACE INTO layer VALUES (?,?,?,?,?,?,?,?,?,?,?)", row)
            self._insert(number, layer.generation, segments[1:])
        return first.start

    def replace_layer(self, staged: StagedLayer, number: int) -> int:
        """Records a layer with all its segments, whatever was known of it; gives its `home`."""
        with self.transaction():
            self.drop_layer(number, staged.layer.generation)
            home = self.put_layer(staged._replace(segments=staged.segments[:1]), number)
            self._insert(number, staged.layer.generation, staged.segments[1:])
        return home

    def _insert(self, number: int, generation: int, segments: list[Segment]) -> None:
        for segment in segments:
            self._execute("INSERT INTO segment VALUES (?,?,?,?,?,?)", (number, generation, *segment))

    def doubt_segments(self, number: int, generation: int, home: int, steps: list[Step]) -> None:
        """Records that segments are about to be overwritten: what is in them fits no checksum for a while."""
        with self.transaction():
            for step in steps:
                for segment in step.before if step.overwrites else ():
                    self._update(number, generation, home, segment._replace(crc=IN_DOUBT))

    def _update(self, number: int, generation: int, home: int, segment: Segment) -> None:
        """A segment now has another end and checksum."""
        values = (segment.stop, segment.crc, segment.synced, number, generation)
        if segment.start == home:
            self._execute("UPDATE layer SET stop=?, crc=?, synced=? WHERE number=? AND generation=?", values)
        else:
            condition = "number=? AND generation=? AND start=?"
            self._execute(f"UPDATE segment SET stop=?, crc=?, synced=? WHERE {condition}", (*values, segment.start))

    def change_segments(self, number: int, generation: int, home: int, steps: list[Step]) -> int:
        """Records what a write made of the segments of a layer; gives its `home` from now on."""
        if len(steps) == 1 and not steps[0].overwrites:
            return self._change(number, generation, home, steps[0])  # one statement, which commits by itself
        with self.transaction():
            for step in steps:
                home = self._change(number, generation, home, step)
        return home

    def _change(self, number: int, generation: int, home: int, step: Step) -> int:
        before, after, overwrites = step
        if not overwrites and before:
            self._update(number, generation, home, after[0])
            return home
        values = [(number, generation, segment.start) for segment in before]
        for value in values:
            self._execute("DELETE FROM segment WHERE number=? AND generation=? AND start=?", value)
        if any(segment.start == home for segment in before):
            home = after[0].start
            self._execute(
                "UPDATE layer SET start=?, stop=?, crc=?, synced=? WHERE number=? AND generation=?",
                (*after[0], number, generation),
            )
            after = after[1:]
        self._insert(number, generation, after)
        return home

    def note_synced(self, number: int, generation: int, home: int, segments: Iterable[Segment]) -> None:
        """Records that the bytes of segments are on the disk."""
        with self.transaction():
            for segment in segments:
                self._update(number, generation, home, segment)

    def cut_layer(self, staged: StagedLayer, number: int, home: int, cut: Segment | None) -> int:
        """Records that a layer has another size and no segments beyond it, `cut` a new end; gives its `home`."""
        layer = staged.layer
        whose = (number, layer.generation)
        row_crc = _head_checksum(*whose, layer.floor_bytes, layer.below_bytes, staged.token, staged.slot)
        with self.transaction():
            self._execute(
                "UPDATE layer SET size=?, below=?, row_crc=? WHERE number=? AND generation=?",
                (layer.floor_bytes, layer.below_bytes, row_crc, *whose),
            )
            self._execute(
                "DELETE FROM segment WHERE number=? AND generation=? AND start>=?", (*whose, layer.size_bytes)
            )
            if home >= layer.size_bytes:
                home = HOMELESS
                self._execute(
                    "UPDATE layer SET start=0, stop=0, crc=0, synced=0 WHERE number=? AND generation=?", whose
                )
            if cut is not None:
                self._update(*whose, home, cut)
        return home

    def drop_layer(self, number: int, generation: int) -> None:
        with self.transaction():
            self._execute("DELETE FROM layer WHERE number=? AND generation=?", (number, generation))
            self._execute("DELETE FROM segment WHERE number=? AND generation=?", (number, generation))

    def poison(self, number: int, generation: int, start: int, stop: int, reason: str) -> None:
        """Records that bytes of a layer are lost; neighbours become one range."""
        whose = (number, generation)
        with self.transaction():
            beside = self._execute(
                "DELETE FROM poisoned WHERE number=? AND generation=? AND start<=? AND stop>=? RETURNING start, stop",
                (*whose, stop, start),
            ).fetchall()
            first, last = min([start, *(s for s, _ in beside)]), max([stop, *(s for _, s in beside)])
            self._execute("INSERT INTO poisoned VALUES (?,?,?,?,?)", (*whose, first, last, reason))

    def heal(self, number: int, generation: int, start: int = 0, stop: int = ENDLESS) -> None:
        """Records that bytes of a layer are not lost any more."""
        whose = (number, generation)
        with self.transaction():
            cut = self._execute(
                "DELETE FROM poisoned WHERE number=? AND generation=? AND start<? AND stop>? "
                "RETURNING start, stop, reason",
                (*whose, stop, start),
            ).fetchall()
            for before, after, reason in cut:
                for first, last in ((before, start), (stop, after)):
                    if first < last:
                        self._execute("INSERT INTO poisoned VALUES (?,?,?,?,?)", (*whose, first, last, reason))

    # -- multipart uploads

    def put_upload(self, upload: BegunUpload) -> None:
        self._execute("INSERT OR REPLACE INTO upload VALUES (?,?,?,?)", upload)

    def drop_upload(self, upload_id: int) -> None:
        self._execute("DELETE FROM upload WHERE id=?", (upload_id,))

    def uploads(self) -> list[BegunUpload]:
        """Every row, oldest first."""
        return [BegunUpload(*row) for row in self._execute("SELECT * FROM upload ORDER BY id")]

    # -- reading it back

    def nodes(self) -> list[NodeRow]:
        """Every row; parents come before what is in them."""
        return [found.row for found in self.found_nodes()]

    def found_nodes(self) -> list[FoundNode]:
        """The same with what says whether they are right."""
        found = []
        for *values, row_crc, seal in self._execute("SELECT * FROM node ORDER BY key"):
            row = NodeRow(*values)
            found.append(FoundNode(row, row_crc in (None, row.checksum()), seal))
        return found

    def layers(self) -> dict[int, list[StagedLayer]]:
        """The layers of every file, oldest first, by inode number."""
        segments: dict[tuple[int, int], list[Segment]] = {}
        for number, generation, *values in self._execute("SELECT * FROM segment"):
            segments.setdefault((number, generation), []).append(Segment(*values))
        poisoned: dict[tuple[int, int], list[tuple[int, int, str]]] = {}
        for number, generation, start, stop, why in self._execute("SELECT * FROM poisoned"):
            poisoned.setdefault((number, generation), []).append((start, stop, why))
        found: dict[int, list[StagedLayer]] = {}
        for number, generation, size, below, token, slot, *first, row_crc in self._execute(
            "SELECT * FROM layer ORDER BY number, generation"
        ):
            is_right = row_crc in (None, _head_checksum(number, generation, size, below, token, slot))
            all_of_layer = [Segment(*first)] if any(first) else []
            all_of_layer += segments.get((number, generation), [])
            of_layer = [segment for segment in all_of_layer if segment.is_possible]
            is_right = is_right and len(of_layer) == len(all_of_layer)
            extents = Extents((segment.start, segment.stop) for segment in of_layer)
            layer = Layer(generation, extents, below, max(size, extents.end), floor_bytes=size)
            reason = ""
            for start, stop, why in poisoned.get((number, generation), ()):
                layer.poison(start, stop)
                reason = why
            home = first[0] if any(first) else HOMELESS
            found.setdefault(number, []).append(StagedLayer(layer, token, slot, of_layer, home, reason, is_right))
        return found

    # -- parked bytes: `temporary` has every object that may be there, `parked` what they hold of a file

    def put_temporary(self, number: int, key: str, token: str) -> None:
        self._execute("INSERT OR REPLACE INTO temporary VALUES (?,?,?)", (key, number, token))

    def drop_temporary(self, key: str) -> None:
        self._execute("DELETE FROM temporary WHERE key=?", (key,))

    def temporaries(self) -> list[tuple[str, int, str]]:
        """Key, inode number and token of each."""
        return list(self._execute("SELECT key, number, token FROM temporary"))

    def put_late(self, requests: Iterable[tuple[str, int, float]]) -> None:
        """Records what may still come instead of what was recorded: key, `Lateness` request, until (`time.time()`)."""
        with self.transaction():
            self._execute("DELETE FROM late")
            for request in requests:
                self._execute("INSERT INTO late VALUES (?,?,?)", request)

    def late(self) -> list[tuple[str, int, float]]:
        """What `put_late` has recorded."""
        return list(self._execute("SELECT key, request, until FROM late"))

    def put_overlay(self, number: int, before: Overlay | None, after: Overlay) -> None:
        """Records the overlay of a file, of which `before` is recorded."""
        old, new = set(before or ()), set(after)
        row_crc = after.checksum(number)
        self._execute("INSERT OR REPLACE INTO overlay VALUES (?,?,?)", (number, after.below_bytes, row_crc))
        gone = [(number, found.start) for found in old - new]
        for whose in gone:
            self._execute("DELETE FROM parked WHERE number=? AND start=?", whose)
        rows = [(number, found.start, found.stop, *found.parked) for found in new - old]
        for row in rows:
            self._execute("INSERT INTO parked VALUES (?,?,?,?,?,?,?)", row)

    def drop_overlay(self, number: int) -> None:
        self._execute("DELETE FROM overlay WHERE number=?", (number,))
        self._execute("DELETE FROM parked WHERE number=?", (number,))

    def overlays(self) -> dict[int, Overlay]:
        """The overlay of every file that has one, by inode number."""
        return {number: overlay for number, (overlay, _) in self.found_overlays().items()}

    def found_overlays(self) -> dict[int, tuple[Overlay, bool]]:
        """The same with whether they are right."""
        ranges: dict[int, list[Range]] = {}
        for number, start, stop, *where in self._execute("SELECT * FROM parked"):
            ranges.setdefault(number, []).append(Range(start, stop, Parked(*where)))
        found = {}
        for number, below, row_crc in self._execute("SELECT * FROM overlay"):
            overlay = Overlay(below, ranges.pop(number, []))
            found[number] = (overlay, row_crc in (None, overlay.checksum(number)))
        return found

    def strays(self) -> list[int]:
        """The numbers of files that rows are about which belong to no layer or overlay: something is not right."""
        layer = "SELECT 1 FROM layer WHERE layer.number={0}.number AND layer.generation={0}.generation"
        overlay = "SELECT 1 FROM overlay WHERE overlay.number={0}.number"
        found: list[int] = []
        for table, above in (("segment", layer), ("poisoned", layer), ("parked", overlay)):
            rows = self._execute(f"SELECT DISTINCT number FROM {table} WHERE NOT EXISTS ({above.format(table)})")
            found += [number for (number,) in rows]
        return found

    def drop_layers_without_node(self, but: Iterable[int] = ()) -> None:
        """Forgets what was staged for files that were unlinked while open, `but` for those that are open still."""
        kept = ",".join(str(int(number)) for number in but)
        for table in ("layer", "segment", "poisoned", "overlay", "parked"):
            self._execute(
                f"DELETE FROM {table} WHERE number NOT IN (SELECT number FROM node) AND number NOT IN ({kept})"
            )

    # -- steps of the session (`namespace.known`)

    def put_step(self, order: int) -> None:
        """Records that all steps up to this one are done, those of the transaction it is recorded in among them."""
        self.undo.attributes(self, ("_done",))
        self._done = order
        self._execute("INSERT OR REPLACE INTO step VALUES (1, ?)", (order,))

    def step(self) -> int:
        """The last step that is done."""
        found = self._execute("SELECT done FROM step").fetchone()
        return int(found[0]) if found else 0

    def rebuild(self, fill: Callable[[], None]) -> None:
        """Makes it anew; `fill` puts everything into it that memory has.

        Raises what `fill`, SQLite or the disk raises; the one before then stays in use.
        """
        self.make_anew(partial(self._refill, fill))

    def _refill(self, fill: Callable[[], None]) -> None:
        fill()
        if self._noted:
            self._noted = False
            self.note_boot()
        self.put_step(self._done)
