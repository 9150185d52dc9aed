"""When the next worker of a mount starts, and when there is no use in one. Pure: times are passed in."""

from __future__ import annotations

from collections import deque

#: So many deaths of workers within so long for one reason, and there will be no other one.
MOST_DEATHS = 5
#: The same for workers that were killed from outside while they served: there the reason is not in the worker.
MOST_KILLS = 100
WITHIN_S = 60.0
#: How long before the next one starts, so many times longer with each one that dies by itself: together longer than a
#: package takes to be upgraded, in the midst of which none can start.
FIRST_DELAY_S = 0.1
DELAY_GROWTH = 4
MOST_DELAY_S = 5.0


class Succession:
    """The deaths of one mount's workers. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.deaths = 0
        self.reason = ""  # of the last one
        self._recent: deque[tuple[float, str, bool]] = deque(maxlen=MOST_KILLS)

    def died(self, reason: str, now_s: float, *, killed: bool) -> float | None:
        """A worker is dead. Gives after how many seconds the next one is to start, None for never.

        `killed`: from outside, by SIGKILL, while it served.
        """
        self.deaths += 1
        self.reason = reason
        self._recent.append((now_s, reason, killed))
        recent = [by_itself for at, why, by_itself in self._recent if why == reason and now_s - at <= WITHIN_S]
        if len(recent) >= (MOST_KILLS if killed else MOST_DEATHS):
            return None
        if killed:
            return 0.0
        return float(min(MOST_DELAY_S, FIRST_DELAY_S * DELAY_GROWTH ** (len(recent) - 1)))
