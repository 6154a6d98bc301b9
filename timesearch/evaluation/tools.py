"""Which tools the episodes of a method used, how often, and how often one led to the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timesearch.data.messages import Exchange, exchanges
from timesearch.data.samples import Prediction

_MOST_TOOLS = 50
"""Tools that are counted: a policy may call what there is not, by ever new names."""
_NAME_CHARS = 80


@dataclass
class ToolUse:
    """Counts of one tool over the episodes of a method."""

    calls: int = 0
    episodes: int = 0
    """Those that called it."""
    first: int = 0
    """Those that called it before any other tool."""
    found: int = 0
    """Frames, pictures and lines that it returned."""
    judged: int = 0
    """Calls in episodes that have a ground truth."""
    hits: int = 0
    """Those of them that returned something at the time of the ground truth."""


class Tools:
    """The use of each tool, counted episode by episode.

    Args:
        near: seconds from a time of the ground truth that count as at it.
    """

    def __init__(self, near: float) -> None:
        self._near = near
        self.episodes = 0
        self.use: dict[str, ToolUse] = {}

    def add(self, prediction: Prediction, truth: Sequence[float], spans: Sequence[tuple[float, float]]) -> None:
        """Count an episode whose ground truth is at these times, and in these spans (s)."""
        self.episodes += 1
        seen: set[str] = set()
        for exchange in exchanges(prediction.prediction):
            name = exchange.call.name[:_NAME_CHARS] if exchange.call else ""
            if not name or (name not in self.use and len(self.use) == _MOST_TOOLS):
                continue
            use = self.use.setdefault(name, ToolUse())
            use.calls += 1
            use.episodes += name not in seen
            use.first += not seen
            use.found += len(exchange.evidence)
            seen.add(name)
            if truth or spans:
                use.judged += 1
                use.hits += self._hits(exchange, truth, spans)

    def _hits(self, exchange: Exchange, truth: Sequence[float], spans: Sequence[tuple[float, float]]) -> bool:
        times = [each.seconds for each in exchange.evidence if each.seconds is not None]
        return any(
            any(abs(time - moment) <= self._near for moment in truth)
            or any(start - self._near <= time <= end + self._near for start, end in spans)
            for time in times
        )

    def metrics(self) -> dict[str, dict[str, Any]]:
        """By tool: calls an episode, shares of the episodes that used it and that used it first, pieces found a call,
        and the share of its calls that hit (None where no call was judged)."""
        return {
            name: {
                "calls_mean": use.calls / self.episodes,
                "use_rate": use.episodes / self.episodes,
                "first_rate": use.first / self.episodes,
                "found_mean": use.found / use.calls,
                "hit_rate": use.hits / use.judged if use.judged else None,
            }
            for name, use in sorted(self.use.items())
        }
