"""When the next worker starts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from s3fuse.succession import MOST_DEATHS, MOST_DELAY_S, MOST_KILLS, WITHIN_S, Succession


def test_a_killed_worker_is_followed_at_once() -> None:
    succession = Succession()
    assert [succession.died("killed", at, killed=True) for at in range(20)] == [0.0] * 20
    assert (succession.deaths, succession.reason) == (20, "killed")


def test_one_that_dies_by_itself_is_followed_later_each_time_and_then_no_more() -> None:
    succession = Succession()
    delays = [succession.died("broken", at, killed=False) for at in range(MOST_DEATHS)]
    assert delays[-1] is None
    assert delays[:-1] == sorted(set(delays[:-1]))  # type: ignore[type-var]
    assert sum(delays[:-1]) > 5.0  # type: ignore[arg-type]


def test_deaths_long_ago_do_not_count() -> None:
    succession = Succession()
    assert None not in [succession.died("broken", at * WITHIN_S, killed=False) for at in range(50)]


def test_only_deaths_of_one_reason_count() -> None:
    succession = Succession()
    assert None not in [succession.died(f"reason {at}", at, killed=False) for at in range(50)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.floats(0, 30)), max_size=300))
def test_it_never_ends_early_nor_goes_on_for_ever(deaths: list[tuple[str, bool, float]]) -> None:
    succession, now, seen = Succession(), 0.0, []
    for reason, killed, later in deaths:
        now += later
        seen.append((now, reason))
        delay = succession.died(reason, now, killed=killed)
        same = sum(why == reason and now - at <= WITHIN_S for at, why in seen[-MOST_KILLS:])
        assert (delay is None) == (same >= (MOST_KILLS if killed else MOST_DEATHS))
        assert delay is None or 0 <= delay <= MOST_DELAY_S
