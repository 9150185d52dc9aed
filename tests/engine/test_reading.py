"""Reading whole trees: small files come ahead of their readers, and large listings stay good while they are walked."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tests.engine.rig import until

if TYPE_CHECKING:
    import pytest

    from tests.engine.rig import Bench, Clock

FILES = 40


async def upload_files(bench: Bench, folders: int = 1) -> dict[str, bytes]:
    """Small files with contents of their own, in folders, and one that is too large to come ahead."""
    contents = {f"d{folder}/f{number:03}": b"%d-%d" % (folder, number) * 500
                for folder in range(folders) for number in range(FILES)}  # fmt: skip
    for key, data in contents.items():
        await bench.upload(key, data, mode="33188")
    return contents


async def test_small_files_come_before_they_are_read(bench: Bench) -> None:
    contents = await upload_files(bench, folders=2)
    rig = await bench.rig()
    for folder in ("d0", "d1"):
        await rig.ls(folder)
    bench.counted()
    for number, (key, data) in enumerate(contents.items()):
        assert await rig.cat(key) == data
        if number == 4:
            await until(lambda: bench.store.requests["get"] > 8)  # as far as so little memory allows
    assert bench.counted() == {"get": len(contents)}  # none twice


async def test_reading_in_no_order_fetches_what_is_read(bench: Bench) -> None:
    contents = await upload_files(bench)
    rig = await bench.rig()
    await rig.ls("d0")
    bench.counted()
    for key in random.Random(3).sample(sorted(contents), 6):
        assert await rig.cat(key) == contents[key]
    assert bench.counted()["get"] <= 12


async def test_a_file_that_changes_before_it_is_read_is_read_as_it_is_then(bench: Bench, clock: Clock) -> None:
    contents = await upload_files(bench)
    rig = await bench.rig()
    keys = sorted(contents)
    for key in keys[:3]:
        await rig.cat(key)
    await until(lambda: rig.core.blocks.used_bytes > 5 * (128 << 10))
    await bench.upload(keys[3], b"another")
    await rig.write(keys[4], b"ours")
    clock.advance(2000)
    assert await rig.cat(keys[3]) == b"another"
    assert (await rig.cat(keys[4]))[:8] == b"ours" + contents[keys[4]][4:8]


async def test_a_listing_that_took_long_is_good_for_longer(
    bench: Bench, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = await upload_files(bench)
    rig = await bench.rig(ttl_s=1.0)
    merge = rig.core.directories._merge
    page = merge.page

    def slow(*arguments: object) -> object:
        clock.advance(3)
        return page(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(merge, "page", slow)
    await rig.ls("d0")
    bench.counted()
    clock.advance(10)
    assert len(await rig.ls("d0")) == FILES
    for key in contents:
        await rig.core.directories.refresh(await rig.walk(key))
    counted = bench.counted()
    assert counted.get("head", 0) == 0
    assert counted.get("list", 0) <= 1  # of the root, for d0 itself
    clock.advance(10)
    await rig.ls("d0")
    assert bench.counted()["list"] >= 1
