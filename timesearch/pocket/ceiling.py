"""What can be known from the frames of an episode: the ceiling of its answer, where the video's generator knows it."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

from timesearch.base.errors import RequestError
from timesearch.pocket.filesystem import parse_url
from timesearch.pocket.hops import HopScene, Question, is_from_hops


def knowable(source: str | None, question: str, seconds: Collection[float]) -> float | None:
    """The chance that the best guess is right of one who reads some frames perfectly and knows how the world is made.

    Args:
        source: URL of the video.
        question: about it.
        seconds: times of the frames.

    Returns:
        `timesearch.pocket.hops.Question.best_guess`; None of what is no question of the hop world.
    """
    if not is_from_hops(source):
        return None
    asked = _questions(str(source)).get(question)
    return asked.best_guess(seconds) if asked else None


@lru_cache(maxsize=64)
def _questions(url: str) -> dict[str, Question]:
    try:
        scene = parse_url(url)
    except RequestError:
        return {}
    return scene.by_text if isinstance(scene, HopScene) else {}
