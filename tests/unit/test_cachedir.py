"""Whose a cache directory is: it is made this user's alone, or refused with what mends it."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3fuse.cachedir import make_private
from s3fuse.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives things to other users")
OTHER = 65534


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """As an earlier version has left one that was made by hand."""
    folder = tmp_path / "a cache"
    for name in ("staging", "blocks", "lost-1"):
        (folder / name).mkdir(parents=True)
    for name in ("lock", "journal.sqlite", "journal.sqlite-wal", "staging/slab", "blocks/1", "lost-1/staged"):
        (folder / name).write_text("x")
        (folder / name).chmod(0o644)
    return folder


def modes(folder: Path) -> set[tuple[bool, int]]:
    return {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in (folder, *folder.rglob("*"))}


PRIVATE = {(True, 0o700), (False, 0o600)}


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o711, 0o700, 0o701, 0o555])
def test_what_an_earlier_version_made_is_made_private(cache: Path, mode: int) -> None:
    cache.chmod(mode)
    make_private(cache, is_new_mount=True)
    assert modes(cache) == PRIVATE
    make_private(cache, is_new_mount=True)


def test_one_that_is_new_or_empty(tmp_path: Path) -> None:
    make_private(tmp_path / "new", is_new_mount=True)
    (tmp_path / "empty").mkdir(mode=0o755)
    (tmp_path / "empty/lost+found").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to("empty")
    make_private(tmp_path / "link", is_new_mount=True)
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "empty/lost+found").stat().st_mode) == 0o755


def anothers(cache: Path) -> str:
    os.chown(cache, OTHER, OTHER)
    return f"cache directory {cache} belongs to user nobody .*: chown -R 0 '{cache}'"


def of_mode(mode: int) -> Callable[[Path], str]:
    def make(cache: Path) -> str:
        cache.chmod(mode)
        return rf"others may write to cache directory {cache} \(mode {mode:04o}\).*: chmod 700 '{cache}'"

    return make


def with_others(cache: Path) -> str:
    (cache / "photos").mkdir()
    return rf"others may read cache directory {cache}, in .*not s3fuse's \(photos\).*: chmod 700 '{cache}'"


def an_entry_of(name: str) -> Callable[[Path], str]:
    def make(cache: Path) -> str:
        os.chown(cache / name, OTHER, OTHER)
        return f"{cache}/.*{name} belongs to user nobody .*: chown -hR 0 '{cache}/{name}'"

    return make


def a_link_of_others(cache: Path) -> str:
    (cache / "staging/7.1").symlink_to("/etc/hostname")
    os.lchown(cache / "staging/7.1", OTHER, OTHER)
    return f"{cache}/staging/7.1 belongs to user nobody"


WRONG = [
    *(anothers, with_others, a_link_of_others),
    *map(of_mode, (0o777, 0o1777, 0o775, 0o720, 0o702)),
    *map(an_entry_of, ("journal.sqlite", "staging", "staging/slab", "blocks/1")),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_may_be_others_is_refused(
    cache: Path, wrong: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    text = wrong(cache)
    with pytest.raises(UserError, match=f"{text}.* or choose another with --cache-dir"):
        make_private(cache, is_new_mount=True)
    make_private(cache, is_new_mount=False)
    assert len(caplog.records) == 1, "a mount that runs goes on"


def test_links_are_not_followed(cache: Path, tmp_path: Path) -> None:
    for name in ("file", "folder"):
        (tmp_path / name).mkdir() if name == "folder" else (tmp_path / name).touch()
        (tmp_path / name).chmod(0o755)
        (cache / "staging" / name).symlink_to(tmp_path / name)
        (cache / f"journal.sqlite-{name}").symlink_to(tmp_path / name)
    make_private(cache, is_new_mount=True)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder")} == {0o755}


@given(
    st.lists(
        st.tuples(st.sampled_from(["journal.sqlite", "lock", "lost-a", "staging"]), st.integers(0, 0o7777)), max_size=4
    ),
    st.integers(0, 0o7777),
)
def test_nobody_else_reads_what_is_taken(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, int]], mode: int
) -> None:
    """Whatever the modes were: all is private, or the directory is refused."""
    cache = tmp_path_factory.mktemp("cache")
    for name, of_entry in entries:
        (cache / name).touch()
        (cache / name).chmod(of_entry)
    cache.chmod(mode)
    try:
        make_private(cache, is_new_mount=True)
    except UserError:
        assert mode & 0o022
    else:
        assert not any(path.stat().st_mode & 0o077 for path in (cache, *cache.iterdir()))
