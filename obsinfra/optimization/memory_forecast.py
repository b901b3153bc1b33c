"""When memory will run out if it goes on as it does: a line through the last minutes of use.

The host-memory guard feeds it, once a second. Plain arithmetic; knows neither devices nor metrics.
"""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 300.0
"""The trend looks back this far."""

LEAST_SECONDS = 30.0
"""And at least this far: the first steps of a run always allocate."""

FAR_SECONDS = 86_400.0
"""A day or more is not told apart from never."""


class MemoryForecast:
    """Seconds until memory is exhausted, from samples of use and limit.

    A growth counts as a trend if both halves of the window grow: memory that was taken once does not.
    """

    def __init__(self, window_seconds: float = WINDOW_SECONDS, least_seconds: float = LEAST_SECONDS) -> None:
        self._window, self._least = window_seconds, least_seconds
        self._points: deque[tuple[float, float]] = deque(maxlen=4096)
        self._limit = 0.0

    def see(self, at: float, used_bytes: float, limit_bytes: float) -> None:
        """A sample. `at` is monotonic seconds."""
        points = self._points
        points.append((at, used_bytes))
        while points[0][0] < at - self._window:
            points.popleft()
        self._limit = limit_bytes

    def forget(self) -> None:
        """What was no longer speaks of what will be, e.g. after memory was given back."""
        self._points.clear()

    def bytes_per_second(self) -> float:
        """The growth; 0 without a trend."""
        points = list(self._points)
        if len(points) < 8 or points[-1][0] - points[0][0] < self._least:
            return 0.0
        middle = len(points) // 2
        halves = _slope(points[:middle]), _slope(points[middle:])
        return max(0.0, _slope(points)) if min(halves) > 0.0 else 0.0

    def seconds_left(self) -> float:
        """Until use reaches the limit at the present growth, at most `FAR_SECONDS`."""
        growth = self.bytes_per_second()
        if growth <= 0.0:
            return FAR_SECONDS
        return min(FAR_SECONDS, max(0.0, self._limit - self._points[-1][1]) / growth)


def _slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line."""
    count = len(points)
    mean_at = sum(at for at, _ in points) / count
    mean_used = sum(used for _, used in points) / count
    spread = sum((at - mean_at) ** 2 for at, _ in points)
    if spread == 0.0:
        return 0.0
    return sum((at - mean_at) * (used - mean_used) for at, used in points) / spread
