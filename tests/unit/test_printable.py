"""Foreign text where people read it: names and what servers say obey nobody, forge no line, and are short."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from s3fuse import caches, cli, control, daemon, report
from s3fuse.errors import StoreError, UserError
from s3fuse.printable import MOST_CHARS, printable
from s3fuse.volume import api

NASTY = "a\x1b[2J\x07\r\n2026-11-30 00:00:00,000 ERROR s3fuse: forged\u202e\u2066\u200bx\x9b\ud800\x00"
texts = st.text(st.characters()) | st.just(NASTY) | st.text(st.sampled_from("a\x1b\x07\n\u202e\ud800"), max_size=5000)


def is_plain(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("d/file name.txt", "d/file name.txt"),
        ("\u00fc \u65e5\u672c \U0001f600", "\u00fc \u65e5\u672c \U0001f600"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x07\x00\x7f\x9b", r"\x07\x00\x7f\x9b"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("\u200b\u2028\ufeff", r"\u200b\u2028\ufeff"),
        ("\udcff", r"\udcff"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    shown = printable("begin " + "x" * 200_000 + " end")
    assert len(shown) < MOST_CHARS + 60
    assert shown.startswith("begin ")
    assert shown.endswith(" end")
    assert "199,010 characters left out" in shown


@given(texts, st.integers(200, 2000), st.booleans())
def test_any_text(text: str, most_chars: int, lines: bool) -> None:
    shown = printable(text, most_chars, lines=lines)
    assert is_plain(shown)
    assert lines or shown.isprintable()
    assert len(shown) <= 10 * (most_chars + 60)
    assert printable(shown, len(shown), lines=lines) == shown


@given(texts)
def test_errors_of_stores(text: str) -> None:
    assert str(StoreError(text)).isprintable()
    assert len(str(StoreError(text))) <= 10 * (MOST_CHARS + 60)


def test_a_message_is_one_line_of_the_log(tmp_path: Path) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        daemon.set_up_logging("info", tmp_path / "log")
        log = logging.getLogger("s3fuse.test")
        log.info("the key %s", NASTY)
        log.info("x" * 300_000)
        try:
            raise RuntimeError(NASTY)
        except RuntimeError:
            log.exception("failed")
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
    text = (tmp_path / "log").read_text()
    assert is_plain(text)
    assert len(text) < 10_000
    lines = text.splitlines()
    assert [line.split(" ")[2] for line in lines if line.startswith("20")] == ["INFO", "INFO", "ERROR"]
    assert [line for line in lines if not line.startswith(("20", "  "))] == ["Traceback (most recent call last):"]


STATUS: dict[str, Any] = {
    "mountpoint": NASTY,
    "pid": 1,
    "bucket": NASTY,
    "prefix": NASTY,
    "endpoint": NASTY,
    "state": NASTY,
    "log": NASTY,
    "pending": {
        "files": 1,
        "bytes": 1,
        "items": [{"name": NASTY, "error": NASTY * 100, "state": "waiting", "bytes": 1}],
    },
    "capabilities": {"server": NASTY, "conflict_check": NASTY},
    "cache": {
        **dict.fromkeys(("staged_bytes", "dirty_limit_bytes", "memory_bytes", "memory_limit_bytes"), 0),
        **dict.fromkeys(("disk_bytes", "disk_limit_bytes", "disk_hits"), 0),
        "directory": NASTY,
        "lost": [NASTY],
    },
    "server": {"state": "up", "since": 0, "needs": NASTY, "last_error": NASTY, "last_error_at": 0},
    "conflicts": [NASTY],
    "hidden_keys": 1,
    "last_error": NASTY * 1000,
}


def test_status(capsys: pytest.CaptureFixture[str]) -> None:
    report.show_status([STATUS])
    shown = capsys.readouterr().out
    assert is_plain(shown)
    assert "\\x1b" in shown
    assert not any(line.startswith("2026") for line in shown.splitlines())
    assert len(shown) < 100_000


@pytest.mark.parametrize("verb", ["flush", "umount"])
def test_what_flush_and_umount_list(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [{"name": NASTY, "bytes": 1, "error": NASTY, "state": "waiting"}]
    monkeypatch.setattr(control, "last_said", lambda mountpoint: {})
    monkeypatch.setattr(control, "request", lambda *_, **__: {"failed": items, "pending": items})
    monkeypatch.setattr("sys.argv", ["s3fuse", verb, "/tmp/\x1b[2J"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert is_plain(shown)
    assert len(shown.splitlines()) == 2


@pytest.mark.parametrize("text", [NASTY, "x" * 200_000], ids=["nasty", "long"])
def test_failures(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise UserError(f"it failed: {StoreError(text)}")

    monkeypatch.setattr(control, "request", fail)
    monkeypatch.setattr("sys.argv", ["s3fuse", "flush", "/tmp"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert is_plain(shown)
    assert len(shown.splitlines()) == 1
    assert len(shown) < 5000


def test_cache_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = caches.Cache(
        Path(f"/tmp/{NASTY}"),
        store=NASTY,
        waiting=[{"name": NASTY, "bytes": 1, "reason": NASTY}],
        lost=[NASTY],
        problem=NASTY,
    )
    monkeypatch.setattr(caches, "look", lambda path: found)
    monkeypatch.setattr(caches, "remove", lambda path: NASTY)
    monkeypatch.setattr(caches, "copy_out", lambda directory, to: [caches.Copied(NASTY, True, NASTY)])
    for arguments in (["list"], ["clean"], ["recover", str(tmp_path / "to")]):
        monkeypatch.setattr("sys.argv", ["s3fuse", "cache", arguments[0], str(tmp_path), *arguments[1:]])
        with suppress(SystemExit):
            cli.main()
        out, err = capsys.readouterr()
        assert is_plain(out + err)
        assert r"\x1b" in out + err


def test_json_has_the_true_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = [{"name": "a\x1b\n\u202e", "bytes": 1, "reason": "it"}]
    monkeypatch.setattr(caches, "look", lambda path: caches.Cache(tmp_path, waiting=waiting))
    monkeypatch.setattr("sys.argv", ["s3fuse", "cache", "list", "--json", str(tmp_path)])
    cli.main()
    shown = capsys.readouterr().out
    assert is_plain(shown)
    assert json.loads(shown)[0]["waiting"] == waiting


async def test_answers_to_docker() -> None:
    async def refuse(arguments: dict[str, Any]) -> dict[str, Any]:
        raise UserError(f"first line\nthe bucket {StoreError(NASTY * 1000)}")

    async def fail(arguments: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError(NASTY)

    logging.getLogger("s3fuse.volume.api").disabled = True
    try:
        for call in (refuse, fail):
            answer = await _ask(call)
            assert is_plain(answer["Err"])
            assert len(answer["Err"]) < 12_000
            assert "\n2026" not in answer["Err"]
    finally:
        logging.getLogger("s3fuse.volume.api").disabled = False


async def _ask(call: api.Call) -> dict[str, Any]:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(api.Server({"/call": call})._connection, theirs)  # type: ignore[arg-type]
        await ours.send_all(b"POST /call HTTP/1.1\r\nHost: \r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        received = b""
        while data := await ours.receive_some():
            received += data
    return dict(json.loads(received.partition(b"\r\n\r\n")[2]))


def test_verbs_print_through_one_function() -> None:
    """What is not JSON goes through `options.say`, or rich with `printable` cells (`report`)."""
    folder = Path(cli.__file__).parent
    raw = [
        f"{path.name}: {line.strip()}"
        for path in folder.rglob("*.py")
        for line in path.read_text().splitlines()
        if "click.echo(" in line and "json.dumps" not in line
    ]
    assert [line.partition(":")[0] for line in sorted(raw)] == ["options.py", "servercmd.py"], raw
