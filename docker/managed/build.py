"""Makes the folder that `docker plugin create` takes, of this Python and what is installed for it: no network.

PYTHON docker/managed/build.py FOLDER      where PYTHON is the one that s3fuse is installed for
docker plugin create s3fuse FOLDER
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

#: Parts of the standard library that a daemon has no use for.
_LEFT_OUT = (
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "lib2to3",
    "site-packages",
    "dist-packages",
)
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def distributions(name: str) -> set[str]:
    """A distribution and all that it needs, without extras."""
    found: set[str] = set()
    left = [name]
    while left:
        name = left.pop()
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        if name not in found:
            found.add(name)
            left += [re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in required if "extra ==" not in text]
    return found


def copy(source: Path, rootfs: Path, place: Path | None = None) -> None:
    """Copies a file to the same path below `rootfs`, or to `place` there; links become files."""
    target = rootfs / str(place or source).lstrip("/")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def copy_python(rootfs: Path) -> Path:
    """The interpreter and its standard library, where they are; gives the interpreter's path."""
    interpreter = Path(os.path.realpath(sys.executable))
    copy(interpreter, rootfs)
    library = Path(sysconfig.get_path("stdlib"))
    ignore = shutil.ignore_patterns("__pycache__", "*.a", "config-*", *_LEFT_OUT)
    copied = rootfs / str(library).lstrip("/")
    shutil.copytree(library, copied, ignore=ignore)
    customize = copied / "sitecustomize.py"
    customize.unlink(missing_ok=True)
    customize.write_text('import sys\n\nsys.path.append("/app")\n')
    return interpreter


def copy_packages(app: Path) -> None:
    """s3fuse and what it needs."""
    for name in distributions("s3fuse") - {"s3fuse"}:
        for file in importlib.metadata.files(name) or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                copy(Path(str(file.locate())), app, Path(file))
    package = importlib.util.find_spec("s3fuse")
    assert package is not None
    assert package.origin is not None
    shutil.copytree(Path(package.origin).parent, app / "s3fuse", ignore=shutil.ignore_patterns("__pycache__"))


def copy_libraries(rootfs: Path) -> None:
    """What the interpreter and all extension modules are linked with, the loader too."""
    programs = [
        path for path in rootfs.rglob("*") if path.is_file() and (".so" in path.name or os.access(path, os.X_OK))
    ]
    for program in programs:
        done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
        for found in re.findall(r"(/\S+) \(0x", done.stdout):
            if rootfs not in Path(found).parents:
                copy(Path(found), rootfs)


def main(folder: Path) -> None:
    rootfs = folder / "rootfs"
    if rootfs.exists():
        sys.exit(f"{rootfs} exists: remove it, or name another folder")
    interpreter = copy_python(rootfs)
    copy_packages(rootfs / "app")
    copy_libraries(rootfs)
    for name in ("etc", "tmp", "run", "proc", "sys", "dev", "mnt/volumes", "run/docker/plugins", "state"):
        (rootfs / name).mkdir(parents=True, exist_ok=True)
    (rootfs / "etc/passwd").write_text("root:x:0:0:root:/:/bin/false\n")
    if _CERTIFICATES.exists():
        copy(_CERTIFICATES, rootfs)
    template = Path(__file__).with_name("config.json").read_text()
    (folder / "config.json").write_text(template.replace("PYTHON", str(interpreter)))
    size = sum(path.lstat().st_size for path in rootfs.rglob("*"))
    print(f"{folder}: {size / 1e6:.0f} MB; next: docker plugin create s3fuse {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
