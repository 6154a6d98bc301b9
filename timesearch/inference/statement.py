"""What an answer rests on, said with every answer: on the command line, on the page, by the API and to agents.

It is no claim of the model's: the frames are those that its search showed it, the verdict is its own answer when it
sees nothing but them, and what it did not look at is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from timesearch.data.messages import exchanges
from timesearch.data.samples import Prediction
from timesearch.retrieval.noise import encode_prompts, match_level, measure, noise_level
from timesearch.retrieval.selection import relevance_of
from timesearch.rewards import accuracy
from timesearch.search.search import Search
from timesearch.video.frames import FrameCache


class Support(BaseModel):
    """A frame or words that a search found."""

    model_config = ConfigDict(frozen=True)

    seconds: float | None = Field(description="when it is shown or said; null for words without a time")
    frame: int | None = Field(None, description="index in the frame cache; null for words")
    words: str | None = Field(None, description="what is said; null for a frame")


class Statement(BaseModel):
    """What an answer rests on."""

    video: str = Field(description="name of the video that answers; empty where none does")
    support: list[Support] = Field(
        default_factory=list, description="all that the search found, in order of time; empty: the answer is a guess"
    )
    alone: str | None = Field(None, description="the answer from the support alone; null where there was none")
    agrees: bool | None = Field(
        None, description="whether that is the same answer; null where nothing was found or nothing answered"
    )
    looked_at: float = Field(0.0, ge=0, le=1, description="share of the video's time whose frames were looked at")
    unseen: tuple[float, float] | None = Field(
        None, description="[start, end] in seconds of the longest stretch of which no frame was looked at"
    )
    in_vain: list[str] = Field(
        default_factory=list,
        description="what was searched for without success: nothing was found, or nothing better than things that are "
        "not there score",
    )
    others: list[str] = Field(
        default_factory=list, description="names of videos that were asked before, and gave no answer that agreed"
    )

    @property
    def places(self) -> dict[str, list[float]]:
        """Times (s) of what supports the answer, each once, in order: of frames, `seen`, and of words, `said`; without
        those of which there are none."""
        times: dict[str, set[float]] = {"seen": set(), "said": set()}
        for each in self.support:
            if each.seconds is not None:
                times["seen" if each.words is None else "said"].add(each.seconds)
        return {how: sorted(found) for how, found in times.items() if found}

    @property
    def holds(self) -> bool:
        """Whether the answer is one, and follows from what was found alone."""
        return bool(self.support) and self.agrees is True

    def sentences(self) -> list[str]:
        """The statement in words, for people and agents."""
        if not self.video:
            said = ["No video of the library answers."]
        elif not self.support:
            said = ["Nothing was found: this is a guess from the preview."]
        elif self.agrees is None:
            said = [f"{self._where()}."]
        else:
            verdict = (
                "the same answer" if self.agrees else f"another answer, {self.alone}" if self.alone else "no answer"
            )
            said = [f"{self._where()}; from this alone: {verdict}."]
        if self.video:
            said.append(f"{share(self.looked_at)} of the video was looked at{self._rest()}.")
        if self.in_vain:
            said.append(f"Searched in vain: {'; '.join(self.in_vain)}.")
        if self.others:
            said.append(f"Asked before, without an answer that agreed: {'; '.join(self.others)}.")
        return said

    def _where(self) -> str:
        where = " and ".join(f"{how} at {_times(times)}" for how, times in self.places.items())
        return where.capitalize() or "Found in what is said"

    def _rest(self) -> str:
        return "" if self.unseen is None else f", and nothing from {self.unseen[0]:.1f}s to {self.unseen[1]:.1f}s"


def _times(seconds: Sequence[float]) -> str:
    return ", ".join(f"{time:.1f}s" for time in seconds)


def share(part: float) -> str:
    """A share in per cent, never 0 or 100 by rounding."""
    percent = 100 * part
    if 0 < percent < 1:
        return "less than 1%"
    return f"{min(99, round(percent)) if percent < 100 else 100}%"


def state(prediction: Prediction, search: Search, video: str) -> Statement:
    """What the answer of an episode rests on.

    Args:
        prediction: the episode.
        search: as the episode left it.
        video: what the video is called to whoever asked.
    """
    found = [each for exchange in exchanges(prediction.prediction) for each in exchange.evidence]
    once = dict.fromkeys(Support(seconds=each.seconds, frame=each.frame, words=each.text) for each in found)
    support = sorted(once, key=lambda each: math.inf if each.seconds is None else each.seconds)
    answer, again = prediction.predicted_answer, prediction.reanswer
    agrees = None
    if support and answer is not None:
        agrees = again is not None and accuracy(again, answer, prediction.type) > 0.5
    if not search.videos:
        return Statement(video=video, support=support, alone=again, agrees=agrees)
    frames = search.video.frames
    seen = {frames.nearest(seconds) for seconds in prediction.preview_seconds}
    seen |= {each.frame for each in support if each.frame is not None}
    looked_at, unseen = coverage(frames, sorted(seen))
    return Statement(
        video=video,
        support=support,
        alone=again,
        agrees=agrees,
        looked_at=looked_at,
        unseen=unseen,
        in_vain=_in_vain(prediction, search),
    )


def coverage(frames: FrameCache, seen: Sequence[int]) -> tuple[float, tuple[float, float] | None]:
    """The share of a video's time for which some frames are on the screen, and the longest stretch without any (s).

    Args:
        frames: the frame cache.
        seen: increasing indices.
    """
    begin = frames.timestamps
    end = np.append(begin[1:], max(frames.end, float(begin[-1]) + 1 / frames.meta["fps"]))
    total = float(end[-1] - begin[0])
    picked = np.asarray(seen, np.int64)
    looked = float((end[picked] - begin[picked]).sum()) / total
    starts = np.concatenate([begin[:1], end[picked]])
    ends = np.concatenate([begin[picked], end[-1:]])
    longest = int(np.argmax(ends - starts))
    gap = (float(starts[longest]), float(ends[longest]))
    return min(1.0, looked), gap if gap[1] - gap[0] > 1e-6 else None


def _in_vain(prediction: Prediction, search: Search) -> list[str]:
    """The queries that found nothing, or no frame above the level of what is not there."""
    features = search.video.features.features
    noise: np.ndarray | None = None
    vain: dict[str, None] = {}
    for exchange in exchanges(prediction.prediction):
        query = exchange.call.arguments.get("query") if exchange.call is not None else None
        if not isinstance(query, str) or not query.strip():
            continue
        indices = sorted({each.frame for each in exchange.evidence if each.frame is not None})
        if not exchange.evidence:
            vain[query] = None
        elif indices:
            if noise is None:
                noise = measure(features, encode_prompts(search.encoder))
            scores = np.nan_to_num(relevance_of(features, search.encoder.encode_text([query])[0]), nan=-1.0)
            level = noise_level(noise, float(scores.mean()), match_level(search.encoder, query))
            if not float(scores[indices].max()) > level:
                vain[query] = None
    return list(vain)
