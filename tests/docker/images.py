"""Images made of one busybox and what a test wants in them, without a registry: tar files for `docker import`."""

from __future__ import annotations

import io
import re
import shutil
import stat
import subprocess
import tarfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

#: cap_net_raw+ep as the kernel keeps it.
CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00" + bytes(12)
_TIME_S = 1_600_000_000.25


def busybox() -> Path | None:
    """The statically linked busybox (Debian's busybox-static)."""
    found = shutil.which("busybox")
    return Path(found) if found else None


@dataclass(frozen=True)
class Entry:
    """One entry of an image's tree. `kind` is a type of tarfile; `data` a file's bytes or a link's target."""

    path: str
    kind: bytes = tarfile.REGTYPE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    data: bytes = b""
    mtime_s: float = _TIME_S
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)

    def header(self) -> tarfile.TarInfo:
        info = tarfile.TarInfo(self.path)
        info.type, info.mode, info.uid, info.gid = self.kind, self.mode, self.uid, self.gid
        info.mtime = self.mtime_s  # type: ignore[assignment]  # a fraction makes it a PAX record
        info.devmajor, info.devminor = self.device
        info.pax_headers = {f"SCHILY.xattr.{name}": value.decode() for name, value in self.xattrs.items()}
        if self.kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info.linkname = self.data.decode()
        elif self.kind == tarfile.REGTYPE:
            info.size = len(self.data)
        return info


def folder(path: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Entry:
    return Entry(path, tarfile.DIRTYPE, mode, uid, gid)


def copy_up_tree() -> list[Entry]:
    """What copy-up has to bring into a volume on /data: every kind of file."""
    plain = Entry("data/plain", data=b"plain\n", uid=33, gid=33, mode=0o640)
    return [
        folder("data", 0o1770, 33, 33),
        plain,
        replace(plain, path="data/twin", kind=tarfile.LNKTYPE, data=b"data/plain"),
        Entry("data/suid", data=b"#!/bin/sh\n", mode=0o4755),
        Entry("data/empty", mode=0o600, uid=1000, gid=1000),
        Entry("data/large", data=bytes(range(256)) * 12_000, mode=0o444),
        Entry("data/named", data=b"xattr\n", xattrs={"user.note": b"kept"}),
        Entry("data/ping", data=b"\x7fELF", mode=0o755, xattrs={"security.capability": CAPABILITY}),
        Entry("data/link", tarfile.SYMTYPE, 0o777, data=b"plain"),
        Entry("data/dangling", tarfile.SYMTYPE, 0o777, data=b"/nowhere/at all"),
        Entry("data/fifo", tarfile.FIFOTYPE, 0o622, 1000),
        Entry("data/null", tarfile.CHRTYPE, 0o666, device=(1, 3)),
        folder("data/private", 0o700, 33, 33),
        Entry("data/private/deep", data=b"deep\n", mode=0o604, uid=1000, gid=33),
        folder("data/hollow", 0o2755, 1000, 1000),
        Entry("data/name with blank and ü", data=b"odd\n"),
    ]


def program(path: str, source: Path) -> list[Entry]:
    """A program of this machine, and what it is linked with."""
    said = subprocess.run(["ldd", source], capture_output=True, text=True, check=False).stdout
    libraries = [Path(name) for name in re.findall(r"(/\S+) \(0x", said)]
    entries = [Entry(path, data=source.read_bytes(), mode=0o755)]
    return entries + [Entry(str(name).lstrip("/"), data=name.read_bytes(), mode=0o755) for name in libraries]


def many_files(count: int) -> list[Entry]:
    """A tree on /data of `count` small files with owners and modes."""
    folders = [folder("data", 0o755, 33, 33), *(folder(f"data/d{n}", 0o750, 33, 33) for n in range(count // 100))]
    return folders + [
        Entry(f"data/d{n // 100}/f{n}", data=b"%d\n" % n, uid=33, gid=33, mode=0o600 + n % 64) for n in range(count)
    ]


def tar(entries: Iterable[Entry]) -> bytes:
    """The tar file of an image: busybox with its applets, /tmp, and these entries."""
    program = busybox()
    assert program is not None
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    base = [
        folder("bin"),
        folder("etc"),
        folder("tmp", 0o1777),
        Entry("bin/busybox", data=program.read_bytes(), mode=0o755),
        Entry("etc/passwd", data=b"root:x:0:0::/:/bin/sh\nweb:x:33:33::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n"),
        *(Entry(f"bin/{name}", tarfile.SYMTYPE, 0o777, data=b"busybox") for name in applets if name != "busybox"),
    ]
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in [*base, *entries]:
            archive.addfile(entry.header(), io.BytesIO(entry.data if entry.kind == tarfile.REGTYPE else b""))
    return output.getvalue()


def listing(entries: Iterable[Entry], top: str) -> dict[str, str]:
    """What `LISTING` says of these entries below `top` where all was kept."""
    kinds = {
        tarfile.REGTYPE: stat.S_IFREG,
        tarfile.LNKTYPE: stat.S_IFREG,
        tarfile.DIRTYPE: stat.S_IFDIR,
        tarfile.SYMTYPE: stat.S_IFLNK,
        tarfile.FIFOTYPE: stat.S_IFIFO,
        tarfile.CHRTYPE: stat.S_IFCHR,
    }
    found = {}
    originals = {entry.path: entry for entry in entries}
    for path, named in originals.items():
        entry = originals[named.data.decode()] if named.kind == tarfile.LNKTYPE else named
        about = f"{kinds[entry.kind] | entry.mode:x} {entry.uid}:{entry.gid}"
        about += f" {len(entry.data)} {entry.mtime_s:.0f}" if entry.kind == tarfile.REGTYPE else ""
        found["." if path == top else path.removeprefix(f"{top}/")] = about
    return found


#: For a container: a line `PATH|MODE UID:GID` of each entry below the folder $1, of files with size and mtime.
LISTING = """
cd "$1"
find . -type f -exec stat -c '%n|%f %u:%g %s %Y' {} +
find . ! -type f -exec stat -c '%n|%f %u:%g' {} +
"""


def parse_listing(text: str) -> dict[str, str]:
    return dict(line.removeprefix("./").split("|") for line in text.splitlines())
