"""The harness's own parts: what it counts, what it computes, what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from bench import page, processes
from bench.inputs import SIZES, Inputs, files_of
from bench.proxy import counting, kind
from bench.results import Cell, Ratio, Results, Row, disagreements
from bench.run import BucketView, Sample
from bench.scenario import offsets
from bench.scenarios import SCENARIOS
from bench.systems import Broken, Place, systems
from bench.table import best_text, cell_text, failures, number, ratio_text, traffic_text
from tests.fuse.harness import s3_client

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import Server


def cell(*seconds: float) -> Cell:
    return Cell([Sample(value) for value in seconds])


def results(**rows: dict[str, Cell]) -> Results:
    return Results(
        machine={"cores": 2, "cpu": "a", "memory_bytes": 1 << 30, "kernel": "6", "python": "3", "load_at_start": 0.5},
        systems={"s3fuse": "s3fuse", "s3fs": "s3fs", "juicefs": "JuiceFS"},
        versions={"s3fuse": "s3fuse 0", "s3fs": "s3fs 1", "juicefs": "juicefs 1"},
        options={"size": "smoke", "runs": 3, "latency_ms": 0.0, "big_bytes": 6 << 20, "names": 5000},
        rows=[Row(name, "scenario", "raw", cells) for name, cells in rows.items()],
        skipped={"goofys": "goofys is not on this machine"},
    )


# -- numbers


def test_a_measure_that_failed_once_has_no_time() -> None:
    broken = Cell([Sample(1.0), Sample(2.0)], ["it broke"])
    assert broken.median_s is None
    assert cell_text(broken) == "failed"
    row = Row("m", "s", "raw", {"s3fuse": cell(1.0), "s3fs": broken, "juicefs": cell(4.0)})
    assert row.best_peer(["s3fs", "juicefs"]) == "juicefs"
    assert row.ratio("s3fs") is None
    assert ratio_text(None) == "—"


def test_the_best_peer_has_the_shortest_median() -> None:
    row = Row("m", "s", "raw", {"s3fuse": cell(2, 4, 3), "s3fs": cell(1, 9, 8), "juicefs": cell(6, 5, 7)})
    assert row.best_peer(["s3fs", "juicefs"]) == "juicefs"
    assert row.ratio("juicefs") == Ratio(0.5, 2 / 7, 4 / 5)
    assert best_text(row, results()) == "0.5 (0.286–0.8) JuiceFS"


def test_a_row_without_any_peer_has_no_best() -> None:
    row = Row("m", "s", "raw", {"s3fuse": cell(1)})
    assert row.best_peer([]) is None
    assert best_text(row, results()) == "—"


def test_disagreements_name_the_measure_and_both_ratios() -> None:
    one = results(read={"s3fuse": cell(1, 1.1), "s3fs": cell(1, 1.1)}, same={"s3fuse": cell(1), "s3fs": cell(2)})
    other = results(read={"s3fuse": cell(3, 3.1), "s3fs": cell(1, 1.1)}, same={"s3fuse": cell(1), "s3fs": cell(2)})
    (line,) = disagreements(one, other)
    assert line.startswith("read: 1.00 (")
    assert line.endswith("times s3fs")


def test_results_survive_json(tmp_path: Path) -> None:
    sample = Sample(1.5, 0.2, 1000, {"get": 3}, 10, 20, 30)
    found = results(read={"s3fuse": Cell([sample], []), "s3fs": Cell([], ["no"])})
    found.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == found


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1234"), (12.345, "12.3"), (0.01234, "0.0123")])
def test_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_traffic_is_told_per_byte_asked_for() -> None:
    sample = Sample(1, requests=Counter(get=2, list=5), sent_bytes=1 << 20, received_bytes=1 << 20, asked_bytes=1 << 20)
    assert traffic_text(sample) == "list 5 get 2; 2 MiB, 2 per byte asked"
    assert traffic_text(replace(sample, requests={}, asked_bytes=0)) == "none; 2 MiB"


# -- the page


def test_the_page_has_every_measure_and_what_failed(tmp_path: Path) -> None:
    found = results(
        read={"s3fuse": cell(1, 2, 3), "s3fs": cell(2, 3, 4), "raw": cell(1)},
        write={"s3fuse": cell(1), "s3fs": Cell([], ["the disk was full"])},
    )
    text = page.render(found, tmp_path, note="A remark.").read_text()
    assert "A remark." in text
    assert "| read | 2 (1–3) | 3 (2–4) | — | 0.667 (0.25–1.5) s3fs | 2 (1–3) raw |" in text
    assert "* write: s3fs failed: the disk was full" in text
    assert "* goofys: not measured, goofys is not on this machine" in text
    assert "big 6 MiB, names 5,000" in text
    assert (tmp_path / "ratios.svg").read_text().lstrip().startswith("<?xml")
    assert Results.load(tmp_path / "results.json") == found


# -- inputs and workloads


def test_inputs_are_the_same_each_time(tmp_path: Path) -> None:
    size = SIZES["smoke"]
    one, other = (Inputs(tmp_path / name, size) for name in ("a", "b"))
    for inputs in (one, other):
        inputs.folder.mkdir()
    assert one.big.read_bytes() == other.big.read_bytes()
    assert one.big.stat().st_size == size.big_bytes
    assert one.small == other.small
    assert len(one.small) == size.small_files
    assert len(files_of(one.tree)) == size.tree_files
    assert offsets(1 << 20, 50) == offsets(1 << 20, 50)
    assert len(set(offsets(1 << 20, 50))) == 50


def test_names_of_measures_are_unique_and_raw_limits_have_their_work() -> None:
    measures = [measure for scenario in SCENARIOS for measure in scenario.measures]
    assert len({measure.name for measure in measures}) == len(measures) >= 25
    assert all((measure.limit == "raw") == (measure.raw is not None) for measure in measures)


def test_every_system_has_what_it_needs() -> None:
    found = systems()
    assert next(iter(found)) == "s3fuse"
    assert {"s3fs", "rclone", "juicefs", "geesefs", "mountpoint-s3", "goofys"} <= found.keys()
    assert found["s3fuse"].present
    assert not replace(found["s3fuse"], binary="no-such-program").present


def test_a_mount_command_that_fails_says_so(tmp_path: Path) -> None:
    system = replace(systems()["s3fuse"], mount=["sh", "-c", "echo it is broken >&2; exit 3"])
    place = Place(system, tmp_path / "p", "bucket", {"endpoint": "http://x", "access_key": "a", "secret_key": "s"})
    with pytest.raises(Broken, match="mount ended with 3: it is broken"):
        place.mount()
    place.kill()


# -- what is counted


@pytest.mark.parametrize(
    ("request_line", "headers", "expected"),
    [
        ("GET /b?list-type=2&prefix=a", {}, "list"),
        ("GET /b/?prefix=", {}, "list"),
        ("GET /b?location=", {}, "other"),
        ("GET /b/k/l", {}, "get"),
        ("HEAD /b", {}, "other"),
        ("HEAD /b/k", {}, "head"),
        ("PUT /b", {}, "other"),
        ("PUT /b/k", {}, "put"),
        ("PUT /b/k", {"x-amz-copy-source": "b/o"}, "copy"),
        ("PUT /b/k?partNumber=1&uploadId=u", {}, "part"),
        ("PUT /b/k?partNumber=1&uploadId=u", {"x-amz-copy-source": "b/o"}, "part-copy"),
        ("POST /b/k?uploads=", {}, "begin"),
        ("POST /b/k?uploadId=u", {}, "complete"),
        ("POST /b?delete=", {}, "delete-many"),
        ("DELETE /b/k", {}, "delete"),
        ("OPTIONS /b", {}, "other"),
    ],
)
def test_requests_have_kinds(request_line: str, headers: dict[str, str], expected: str) -> None:
    assert kind(*request_line.split(" "), headers) == expected


def test_the_proxy_counts_requests_and_bytes(minio_server: Server, bucket_name: str, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "data").write_bytes(data)
    with counting(minio_server.endpoint) as proxy, s3_client(minio_server) as direct:
        direct.make_bucket(bucket_name)
        with s3_client(replace(minio_server, endpoint=proxy.endpoint)) as client:
            before = proxy.counts()
            client.fput_object(bucket_name, "k", str(tmp_path / "data"))
            client.fget_object(bucket_name, "k", str(tmp_path / "back"))
            client.remove_object(bucket_name, "k")
            found = proxy.counts().since(before)
    assert (tmp_path / "back").read_bytes() == data
    assert found.requests - Counter(other=1) == {"put": 1, "head": 1, "get": 1, "delete": 1}  # it asks for the region
    assert len(data) < found.sent_bytes < len(data) + 10_000
    assert len(data) < found.received_bytes < len(data) + 10_000


def test_processes_are_found_by_their_mark() -> None:
    command = "import os,sys; sum(range(3_000_000)); print(flush=True); sys.stdin.read()"
    environment = {**os.environ, processes.MARK: "mark-of-a-test"}
    with subprocess.Popen(
        [sys.executable, "-c", command], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert processes.marked("mark-of-a-test") == [process.pid]
        assert processes.cpu_s([process.pid]) > 0
        processes.reset_peak([process.pid])
        assert processes.peak_bytes([process.pid]) > 1 << 20
        process.communicate()
    assert processes.wait_for_end("mark-of-a-test", 10)


def test_what_is_not_in_the_bucket_is_told(
    minio_server: Server, bucket_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.run._DURABLE_S", 0.0)
    with s3_client(minio_server) as client:
        client.make_bucket(bucket_name)
        view = BucketView(client, bucket_name)
        view.wait_for({})
        with pytest.raises(Broken, match="1 of 1 files are not in the bucket"):
            view.wait_for({"a": 1})


def test_failures_are_listed_with_their_reason() -> None:
    found = results(read={"s3fuse": cell(1), "juicefs": Cell([], ["no space"])})
    assert failures(found) == ["read: JuiceFS failed: no space"]
    assert json.dumps(found.options)
