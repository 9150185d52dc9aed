"""Cache directories without their mount: what they hold and what waits in them, and copying that out.

Nothing here needs a server, and nothing changes a journal: it is read from a copy, since opening it repairs it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import tempfile
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s3fuse import control
from s3fuse.cachedir import is_ours
from s3fuse.errors import UserError
from s3fuse.namespace.recovery import LOST, after_power_failure, lost_folders
from s3fuse.writing import poison, wal
from s3fuse.writing.checks import Damage, Segments
from s3fuse.writing.extents import Extents
from s3fuse.writing.journal import Journal
from s3fuse.writing.layers import BASE, is_held, resolve
from s3fuse.writing.lock import DirectoryLock
from s3fuse.writing.proof import UNPROVEN, held, prove
from s3fuse.writing.staging import reader

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from s3fuse.writing.checks import Read
    from s3fuse.writing.layers import Layer, Piece
    from s3fuse.writing.overlay import Overlay
    from s3fuse.writing.proof import Proof
    from s3fuse.writing.rows import NodeRow, StagedLayer

COPY_BYTES = 1 << 20


#: Which bytes of a file are in temporary objects of the bucket, one range a line: start, stop, key, offset in it.
PARKED_LIST = "parked"


@dataclass
class Cache:
    """One cache directory. `problem` says why more is not known; `waiting` has name, bytes and reason of each file."""

    directory: Path
    store: str = ""
    in_use: bool = False
    size_bytes: int = 0
    waiting_files: int = 0
    waiting: list[dict[str, Any]] = field(default_factory=list)
    unfinished_uploads: int = 0
    lost: list[str] = field(default_factory=list)
    problem: str = ""

    def why_kept(self) -> str:
        """Why it must not be removed; "" where nothing is lost by that."""
        if self.in_use:
            return "it is in use"
        if self.problem:
            return self.problem
        if self.waiting_files:
            return f"{self.waiting_files} changes wait for upload in it: mount its bucket again, or copy them out"
        if self.lost:
            return f"it has staged bytes that its journal lost track of, in {', '.join(self.lost)}"
        if self.unfinished_uploads:
            return "multipart uploads that it began are still to be aborted: mount its bucket again"
        return ""


def is_cache(directory: Path) -> bool:
    return (directory / wal.FILE).is_file() or ((directory / "lock").is_file() and (directory / "staging").is_dir())


def below(root: Path) -> list[Path]:
    """The cache directories in a folder, by name."""
    return sorted(path for path in root.iterdir() if is_cache(path)) if root.is_dir() else []


def look(directory: Path) -> Cache:
    """What is known of a cache directory. Raises UserError where it is none."""
    if not is_cache(directory):
        raise UserError(f"{directory} is no cache directory of s3fuse; see s3fuse cache list")
    cache = Cache(directory, size_bytes=_size_bytes(directory), lost=lost_folders(directory))
    try:
        with closing(DirectoryLock(directory)) as lock:
            _look_inside(cache, lock)
    except UserError:
        cache.in_use = True
        _ask_daemon(cache)
    return cache


def _size_bytes(directory: Path) -> int:
    total = 0
    for top, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(top, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def _ask_daemon(cache: Cache) -> None:
    for about in control.mounts():
        try:
            status = control.request(Path(about["mountpoint"]), "status")
        except (OSError, UserError):
            continue
        if status["cache"]["directory"] == str(cache.directory):
            cache.store = f"{status['endpoint']}/{status['bucket']}/{status['prefix']}"
            cache.waiting_files = status["pending"]["files"]
            cache.waiting = [
                {"name": item["name"], "bytes": item["bytes"], "reason": item["error"] or item["state"]}
                for item in status["pending"]["items"]
            ]
            return


def _look_inside(cache: Cache, lock: DirectoryLock) -> None:
    try:
        with _read(cache.directory, lock) as journal:
            cache.store = journal.store
            cache.unfinished_uploads = len(journal.uploads())
            proof = prove(journal, cache.directory / "staging")
            layers, refusals = _layers(journal, cache.directory, proof), journal.refusals()
            for row in journal.nodes():
                of_row = layers.get(row.number, [])
                staged_bytes = sum(staged.layer.extents.total_bytes for staged in of_row)
                damage = _doubt(row, proof) or _damage(cache.directory, row.number, of_row)
                reason = damage or refusals.get(row.number) or "waits for the next mount"
                name = row.key or f"{row.remote_key} (deleted)"
                cache.waiting.append({"name": name, "bytes": staged_bytes, "reason": reason})
            if proof.damage:
                cache.problem = (
                    f"{proof.damage}; mount its bucket again, which keeps all that is staged, or copy it out"
                )
        cache.waiting_files = len(cache.waiting)
    except (UserError, sqlite3.Error, ValueError) as error:
        cache.problem = f"its journal cannot be read: {error}"


@contextmanager
def _read(directory: Path, lock: DirectoryLock) -> Iterator[Journal]:
    """The journal, from a copy, with what it has lost (`Journal.lost`). Raises UserError and sqlite3.Error."""
    with tempfile.TemporaryDirectory(prefix="s3fuse-") as name:
        for part in (*(wal.FILE + suffix for suffix in ("", *wal.SUFFIXES)), wal.NOTE):
            if (directory / part).exists():
                shutil.copyfile(directory / part, Path(name, part))
        before = wal.Before(Path(name), lock)
        with closing(sqlite3.connect(Path(name, wal.FILE))) as database:
            try:
                (store,) = database.execute("SELECT store FROM identity").fetchone()
                index = wal.LogIndex(Path(name))
            except (sqlite3.Error, TypeError, FileNotFoundError) as error:
                raise UserError(f"{error}") from error
            with closing(index):
                lost, is_mixed = before.lost(index), before.is_mixed(index)  # closing the database takes the log away
        journal = Journal(Path(name), store)
        journal.lost, journal.is_mixed = lost, is_mixed
        try:
            yield journal
        finally:
            journal.close()


def _layers(journal: Journal, directory: Path, proof: Proof) -> dict[int, list[StagedLayer]]:
    """The layers as the next mount will take them."""
    layers = journal.layers()
    if journal.rebooted:
        layers = after_power_failure(layers, directory / "staging")
    for number in proof.unproven:
        layers[number] = [held(staged) for staged in layers.get(number, ())]
    return layers


def _doubt(row: NodeRow, proof: Proof) -> str:
    """What a damaged journal does not prove of a change; "" where it does."""
    if row in proof.wrong:
        return "damaged: the journal does not prove this change, and it will not be carried out"
    return f"damaged: {UNPROVEN}" if row.number in proof.unproven else ""


def _damage(directory: Path, number: int, layers: Sequence[StagedLayer]) -> str:
    """What is wrong with the staged bytes of a file, or missing of them; "" for nothing."""
    lost = poison.text((staged.layer for staged in layers), next((one.reason for one in layers if one.reason), ""))
    if lost:
        return lost
    for staged in layers:
        read = reader(directory / "staging", number, staged)
        for segment in staged.segments:
            if not segment.fits(read(segment.start, segment.stop)):
                return f"staged data is damaged: {Damage(segment.start, segment.stop)}"
    return ""


def remove(directory: Path) -> str:
    """Removes an unused cache directory in which nothing waits; gives why it stays, "" where it is gone.

    What is not s3fuse's stays, and its directory with it.
    """
    cache = look(directory)
    if cache.in_use:
        return cache.why_kept()
    with closing(DirectoryLock(directory)) as lock:
        cache = Cache(directory, lost=lost_folders(directory))  # a mount may have come and gone since
        _look_inside(cache, lock)
        if reason := cache.why_kept():
            return reason
        others = []
        for entry in sorted(directory.iterdir()):
            if not is_ours(entry.name):
                others.append(entry.name)
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        if others:
            return f"files that are not s3fuse's are in it ({others[0]}); its own are removed"
        directory.rmdir()
    return ""


# -- copying out


@dataclass(frozen=True)
class Copied:
    """What was done with one change. `whole`: everything that waited is in the destination."""

    name: str
    whole: bool
    text: str


def copy_out(directory: Path, destination: Path) -> Iterator[Copied]:
    """Copies what waits into a new or empty directory: file by file, with permissions and mtime, under its key.

    What it makes belongs to who runs this, so that no set-uid or set-gid bit is taken along. Raises UserError where the
    directory is in use, is no cache, or the destination has something in it; OSError.
    """
    if not is_cache(directory):
        raise UserError(f"{directory} is no cache directory of s3fuse; see s3fuse cache list")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination} is not an empty directory; choose another")
    with closing(DirectoryLock(directory)) as lock:
        destination.mkdir(parents=True, exist_ok=True, mode=0o700)  # directories are made open, whatever they were
        lost = ""
        try:
            with _read(directory, lock) as journal:
                proof = prove(journal, directory / "staging")
                yield from _copy_known(directory, destination, journal, proof)
                lost = proof.damage
        except (UserError, sqlite3.Error, ValueError) as error:
            lost = f"the journal cannot be read ({error})"
        for folder in lost_folders(directory):
            shutil.copytree(folder, destination / Path(folder).name)
            yield Copied(Path(folder).name, False, "staged bytes whose names the journal has lost, as they are")
        if lost:
            shutil.copytree(directory / "staging", destination / f"{LOST}staging")
            yield Copied(f"{LOST}staging", False, f"{lost}: all that is staged, as it is")


def _copy_known(directory: Path, destination: Path, journal: Journal, proof: Proof) -> Iterator[Copied]:
    """Everything that the journal names."""
    layers, overlays = _layers(journal, directory, proof), journal.overlays()
    for row in journal.nodes():
        if row in proof.wrong:  # its name may be as wrong
            yield Copied(row.key or row.remote_key or "", False, _doubt(row, proof))
            continue
        overlay = overlays.get(row.number)
        try:
            yield _copy_row(directory, destination, row, layers.get(row.number, []), overlay, journal.store)
        except (FileExistsError, NotADirectoryError):
            yield Copied(row.key or "", False, "something else has its name or its directory's there; not copied")


def _copy_row(
    directory: Path,
    destination: Path,
    row: NodeRow,
    layers: Sequence[StagedLayer],
    overlay: Overlay | None,
    store: str,
) -> Copied:
    if row.key is None:
        return Copied(row.remote_key or "", True, "was deleted; nothing to copy")
    name = row.key.rstrip("/")
    if not name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        return Copied(row.key, True, "attributes of the root; nothing to copy")
    path = destination / name
    if os.path.realpath(path.parent) != os.path.join(os.path.realpath(destination), os.path.dirname(name)).rstrip("/"):
        return Copied(row.key, False, "what should be its directory is a symlink; not copied")
    path.parent.mkdir(parents=True, exist_ok=True)
    if stat.S_ISDIR(row.mode):
        path.mkdir(exist_ok=True)
        return Copied(row.key, True, "directory")
    if stat.S_ISLNK(row.mode) and row.target is not None:
        os.symlink(row.target, os.fsencode(path))
        return Copied(row.key, True, "symlink")
    if not layers and row.remote_key is not None:
        return Copied(row.key, True, f"its bytes are in the bucket, as {row.remote_key} of {store}; nothing to copy")
    if not stat.S_ISREG(row.mode):
        return Copied(row.key, False, "special file; not copied")
    copied = _copy_file(directory, path, row, layers, overlay, store)
    if path.is_file():
        os.chmod(path, row.mode & 0o777)
        os.utime(path, ns=(row.atime_ns, row.mtime_ns))
    return copied


def _copy_file(
    directory: Path,
    path: Path,
    row: NodeRow,
    layers: Sequence[StagedLayer],
    overlay: Overlay | None,
    store: str,
) -> Copied:
    assert row.key is not None
    size = layers[-1].layer.size_bytes if layers else 0
    pieces = resolve([_as_known(staged.layer) for staged in layers], row.remote_size or 0, 0, size, overlay)
    needs_base = any(piece.source == BASE for piece in pieces)
    damage = _damage(directory, row.number, layers)
    parked = [(piece, piece.parked) for piece in pieces if piece.parked is not None]
    if not needs_base and not parked and not damage:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "r+b") as file:
            file.truncate(size)  # what nobody wrote is zeros, as it was on the mount
            for start, data in _known(directory, row.number, layers, pieces):
                os.pwrite(file.fileno(), data, start)
        return Copied(row.key, True, f"{size} bytes")
    folder = path.with_name(f"{path.name}.parts")
    folder.mkdir(mode=0o700)
    for start, data in _known(directory, row.number, layers, pieces):
        (folder / str(start)).write_bytes(data)
    for staged in layers:
        own = directory / "staging" / f"{row.number}.{staged.layer.generation}"
        if is_held(staged.layer) and own.exists():  # it may have more than the journal knows
            shutil.copyfile(own, folder / f"staged-{staged.layer.generation}")
    missing = f"the rest is in the bucket, {row.remote_key} version {row.remote_etag} of {store}" if needs_base else ""
    if parked:
        lines = [f"{piece.start} {piece.stop} {at.key} {piece.start - at.shift}\n" for piece, at in parked]
        (folder / PARKED_LIST).write_text("".join(lines))
        missing = f"{missing}; some is in objects of {store} that {PARKED_LIST} there lists".removeprefix("; ")
    text = "; ".join(filter(None, (missing, damage)))
    return Copied(
        row.key, False, f"not whole ({text}): its staged bytes are in {folder}, each file named by its offset"
    )


def _as_known(layer: Layer) -> Layer:
    """What the journal says of a layer, whether that is all or not."""
    return replace(layer, poisoned=Extents()) if is_held(layer) else layer


def _known(
    directory: Path, number: int, layers: Sequence[StagedLayer], pieces: Sequence[Piece]
) -> Iterator[tuple[int, bytes]]:
    """The staged bytes of a file as (offset, bytes), without those that are damaged."""
    readers: Mapping[int, tuple[Segments, Read]] = {
        index: (Segments(staged.segments), reader(directory / "staging", number, staged))
        for index, staged in enumerate(layers)
    }
    for source, start, stop, _ in pieces:
        if source < 0:
            continue
        segments, read = readers[source]
        for segment in segments:
            first, last = max(segment.start, start), min(segment.stop, stop)
            if first < last:
                try:
                    yield first, segments.read(first, last, read)
                except Damage:
                    continue
