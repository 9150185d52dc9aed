"""Names, keys, and what a listing shows."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3fuse import keys
from s3fuse.store.base import ObjectInfo, Page

ODD_NAMES = st.sampled_from(
    ["", ".", "..", "a", "b", "a\0", "é" * 127, "é" * 128, "x" * 255, "x" * 256, "\ud800", "\n"]
)
NAMES = ODD_NAMES | st.text(max_size=5)


def info(key: str) -> ObjectInfo:
    return ObjectInfo(key, 1, "etag", 0)


def is_name(name: str) -> bool:
    try:
        return keys.check_name(name.encode()) == name
    except (OSError, UnicodeEncodeError):
        return False


@given(st.binary(max_size=300) | ODD_NAMES.map(lambda name: name.encode(errors="surrogatepass")))
def test_a_name_can_be_made_if_and_only_if_it_is_shown(name: bytes) -> None:
    text = name.decode(errors="surrogateescape")
    makeable = True
    try:
        assert keys.check_name(name).encode() == name
    except OSError:
        makeable = False
    assert bool(keys.shown(Page((info(text),), (), None), "").files) == makeable


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (b"", errno.EINVAL),
        (b".", errno.EINVAL),
        (b"..", errno.EINVAL),
        (b"a/b", errno.EINVAL),
        (b"a\0b", errno.EINVAL),
        (b"\xff", errno.EILSEQ),
        (b"x" * 256, errno.ENAMETOOLONG),
        ("é".encode() * 128, errno.ENAMETOOLONG),
    ],
)
def test_names_that_cannot_be_made(name: bytes, number: int) -> None:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        keys.check_name(name)
    assert caught.value.errno == number


@pytest.mark.parametrize("letter", ["x", "é", "\U0001f600"])
def test_keys_are_at_most_1024_bytes(letter: str) -> None:
    width = len(letter.encode())
    prefix = "p" * (1023 - width) + "/"
    assert keys.join(prefix, letter) == prefix + letter
    with pytest.raises(OSError, match="too long") as caught:
        keys.join("q" + prefix, letter)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_temporary_keys_are_new_and_hidden() -> None:
    first, second = keys.temporary_key("mnt/"), keys.temporary_key("mnt/")
    assert first != second
    assert first.startswith(f"mnt/{keys.RESERVED}/")


@given(st.sampled_from(["", "dir/"]), st.lists(NAMES, unique=True), st.lists(NAMES, unique=True), st.booleans())
def test_every_entry_of_a_page_is_shown_or_counted(
    prefix: str, files: list[str], directories: list[str], marker: bool
) -> None:
    files = [name for name in files if name]
    objects = [info(prefix)] if marker else []
    objects += [info(prefix + name) for name in files]
    page = Page(tuple(objects), tuple(f"{prefix}{name}/" for name in directories), None)
    shown = keys.shown(page, prefix)
    assert shown.marker == (info(prefix) if marker else None)
    assert list(shown.directories) == [name for name in directories if is_name(name)]
    assert list(shown.files) == [name for name in files if is_name(name) and name not in shown.directories]
    assert all(entry.key == prefix + name for name, entry in shown.files.items())
    assert shown.hidden + len(shown.files) + len(shown.directories) == len(files) + len(directories)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", "text/plain"),
        ("A.JPEG", "image/jpeg"),
        ("page.html", "text/html"),
        ("x.tar.gz", "application/gzip"),
        ("data:text,a.png", "image/png"),
        ("Makefile", "application/octet-stream"),
        (".txt", "application/octet-stream"),
        ("x.unheard-of", "application/octet-stream"),
        ("dir/", "application/x-directory"),
    ],
)
def test_content_types(name: str, expected: str) -> None:
    assert keys.content_type(name) == expected


def test_conflict_names_say_who_and_when() -> None:
    assert keys.conflict_name("a.txt", "node/1", 86400.9) == "a.txt.conflict-node_1-19700102T000000Z"


@given(st.text(st.characters(codec="utf-8"), max_size=300), st.text(st.characters(codec="utf-8"), max_size=300))
def test_conflict_names_fit(name: str, host: str) -> None:
    name = name.replace("/", "").replace("\0", "") or "x"
    conflict = keys.conflict_name(name, host, 1e9)
    assert keys.check_name(conflict.encode()) == conflict
    kept, _, _ = conflict.rpartition(".conflict-")
    assert kept
    assert name.startswith(kept.split(".conflict-")[0])


@given(st.text(st.characters(codec="utf-8"), max_size=64))
def test_another_host_is_another_conflict_name(host: str) -> None:
    host = host.encode()[:64].decode(errors="ignore")
    assert keys.conflict_name("n", host, 0) != keys.conflict_name("n", host + "a", 0)
