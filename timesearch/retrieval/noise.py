"""What a query scores where nothing answers it: the level above which a best score means something.

An encoder gives any query some score with any frame; how high depends on the encoder, the query, the frames and how
many there are. So that level is measured, among the frames that are searched. `PROMPTS` are fifty short descriptions of
things of all kinds, most of which a given video does not show: what they get is what something gets that is not there.

A query is answered where its best score exceeds the lower of two levels. One is absolute: what the best frame of each
prompt scores. The other goes by how far that stands out of the mean of all frames, for some queries score low or high
with everything. Each is the median over the prompts and three of their robust standard deviations (1.4826 times the
median absolute deviation), which prompts that happen to be shown hardly move.

An encoder trained by SigLIP's loss has a level of its own: the score that it takes for even odds of a match. For a
query that the encoder understands, that takes the place of the second level; understood is what it embeds alike however
it is put (`WORDINGS`). What an encoder never learned to read lies anywhere, and scores high with something by chance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from timesearch.retrieval.selection import widen

if TYPE_CHECKING:
    from timesearch.retrieval.encoder import Encoder

PROMPTS: tuple[str, ...] = (
    "a giraffe at a water hole",
    "an astronaut in a space station",
    "a plate of sushi",
    "a violin on a chair",
    "a lighthouse in a storm",
    "a surgeon in an operating room",
    "a penguin colony",
    "a chess board",
    "a hot air balloon",
    "a steam locomotive",
    "an X-ray of a hand",
    "a wedding cake",
    "a submarine",
    "a camel caravan in a desert",
    "a football goal",
    "a newborn baby",
    "a stained glass window",
    "a tractor in a field",
    "a volcano erupting",
    "a jellyfish",
    "a knitted jumper",
    "a rocket launch",
    "a bowl of soup",
    "a snowboarder in the air",
    "a court room",
    "a bee on a flower",
    "a chandelier",
    "an elephant in a river",
    "a pair of scissors",
    "a subway station",
    "a windmill",
    "a microscope",
    "a fireworks display",
    "a sheep being shorn",
    "a saxophone player",
    "a dinosaur skeleton",
    "a bridge in fog",
    "a dentist's chair",
    "a cactus",
    "a printed circuit board",
    "a waterfall",
    "a bull fight",
    "a tennis racket",
    "a pizza oven",
    "a spider web",
    "a ballet dancer",
    "a traffic jam at night",
    "a treasure map",
    "a coral reef",
    "a hospital bed",
)
WORDINGS = ("{}", "a {}", "the {}", "one {}", "I see a {}", "find the {}")
_ALIKE = 0.96
"""Mean cosine of the wordings of a query that is understood. Of the pocket encoder's own words it is 0.97 and more, of
nineteen in twenty others less (`benchmarks/library.py`)."""
_ARTICLES = ("a ", "an ", "the ")
_DEVIATIONS = 3.0
_TO_SIGMA = 1.4826
"""Of a normal distribution, the standard deviation over the median absolute deviation."""
_BLOCK = 1024


def encode_prompts(encoder: Encoder) -> np.ndarray:
    """The prompts as (P, D) float32 unit rows."""
    return encoder.encode_text(PROMPTS)


def measure(features: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """What each prompt scores among some frames, (2, P) float32: the best, and the mean.

    Args:
        features: (N, D) unit rows of any float type.
        prompts: (P, D) float32 unit rows.
    """
    best, total = np.full(len(prompts), -1.0, np.float32), np.zeros(len(prompts))
    for first in range(0, len(features), _BLOCK):
        scores = widen(features[first : first + _BLOCK]) @ prompts.T
        np.maximum(best, scores.max(axis=0), out=best)
        total += scores.sum(axis=0)
    return np.stack([best, total / max(1, len(features))]).astype(np.float32)


def joined(measured: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """What each prompt scores among the frames of several videos together, (2, P).

    Args:
        measured: (V, 2, P), each video's.
        frames: (V,) how many frames each has.
    """
    return np.stack([measured[:, 0].max(axis=0), np.average(measured[:, 1], axis=0, weights=frames)])


def noise_level(measured: np.ndarray, mean: float, match: float | None = None) -> float:
    """The score that a query has to exceed among some frames.

    Args:
        measured: (2, P), as `measure` gives it of these frames.
        mean: of the query's scores with them.
        match: as `match_level` gives it of the query.
    """
    best, means = np.asarray(measured, np.float64)
    return min(_high(best), mean + _high(best - means) if match is None else match)


@runtime_checkable
class Sigmoid(Protocol):
    """An encoder that was trained by SigLIP's loss."""

    @property
    def even_odds(self) -> float | None:
        """The cosine at which it takes a text and an image for a match or for none with even odds; None if unknown."""
        ...


def match_level(encoder: Encoder, query: str) -> float | None:
    """The score from which the encoder itself calls a frame an answer; None where it has no level, or no word of it."""
    level = encoder.even_odds if isinstance(encoder, Sigmoid) else None
    if level is None:
        return None
    article = next((article for article in _ARTICLES if query.lower().startswith(article)), "")
    rows = encoder.encode_text([wording.format(query[len(article) :]) for wording in WORDINGS])
    cosines = rows @ rows.T
    alike = (float(cosines.sum()) - len(rows)) / (len(rows) * (len(rows) - 1))
    return level if alike >= _ALIKE else None


def _high(values: np.ndarray) -> float:
    """What hardly any of some values exceeds, told by most of them."""
    centre = float(np.median(values))
    return centre + _DEVIATIONS * _TO_SIGMA * float(np.median(np.abs(values - centre)))
