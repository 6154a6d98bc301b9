"""Tools said in other words: what the base policy of the hop world learns to read a tool's schema from.

A policy that has met one schema alone treats it as one long name, and is lost once a docstring is edited, a server
renders it otherwise, or another tool stands beside it. Here the name of a tool, those of its arguments and what its
description says are drawn anew, and the calls of an episode are written as its schema has them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from timesearch.data.messages import Message, parse_turn, text_of
from timesearch.dialects.qwen import write_turn
from timesearch.search.tools import schema_of, search_subtitles, seek_video_frames

NAMES = ("seek_video_frames", "find_frames", "search_video", "look_up_frames", "get_moments")
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "query": ("query", "text", "what", "description"),
    "start_time": ("start_time", "from_time", "begin", "start"),
    "end_time": ("end_time", "to_time", "until", "stop"),
    "num_frames": ("num_frames", "count", "frames", "limit"),
}
"""Other names of each argument of `seek_video_frames`, its own first."""
_SEEKING = (
    ("Find", "Search", "Get", "Look up", "Return", "Show", "Retrieve"),
    ("the frames", "frames", "moments", "pictures", "the images"),
    ("of the video", "in the video", "from the whole video", "of a long video"),
    ("that match", "that show", "which fit", "nearest to", "described by"),
    ("a description.", "a text.", "some words.", "a short query.", "what you ask for."),
    ("", " A window of time may be given.", " Times are in seconds.", " Use it as often as needed."),
)
_SAID: dict[str, tuple[tuple[str, ...], ...]] = {
    "query": (("What", "The thing that", "A text of what"), ("the frames should show.", "to look for.", "is wanted.")),
    "start_time": (("Start", "Beginning", "First moment"), ("of the window in seconds.", "in seconds.", "to look at.")),
    "end_time": (("End", "Last moment"), ("of the window in seconds; -1 for all.", "in seconds.", "to look at.")),
    "num_frames": (("How many", "Number of", "At most so many"), ("frames to return.", "frames.", "pictures.")),
}
"""What is said of each argument, part by part."""
_SYLLABLE = (
    ("", "b", "c", "ch", "d", "f", "g", "h", "l", "m", "n", "p", "pr", "qu", "r", "s", "st", "t", "th", "tr", "v"),
    ("a", "e", "ea", "i", "io", "o", "ou", "u", "y"),
    ("", "", "ck", "d", "ll", "m", "n", "ng", "nt", "r", "rs", "s", "t", "tch"),
)
"""Parts of words of no meaning: they stand for all that the tokenizer has not met."""


def phrases() -> list[str]:
    """All that a reworded schema may say, for a tokenizer to learn."""
    parts = [part for choices in (_SEEKING, *_SAID.values()) for some in choices for part in some]
    names = [*NAMES, *(name for names in ARGUMENTS.values() for name in names)]
    other = schema_of(search_subtitles)["function"]
    described = [other["description"], *(each["description"] for each in other["parameters"]["properties"].values())]
    return [*parts, *(f'"{name}"' for name in names), f'"{other["name"]}"', '"num_lines"', *described]


@dataclass(frozen=True)
class Wording:
    """The tools as an episode is told of them."""

    tools: list[dict[str, Any]]
    name: str = NAMES[0]
    """of the tool that seeks frames"""
    arguments: dict[str, str] | None = None
    """their names here, by their own; None where they are as they were"""

    def say(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with each call written by these names."""
        if self.name == NAMES[0] and self.arguments is None:
            return list(messages)
        return [self._said(message) for message in messages]

    def _said(self, message: Message) -> Message:
        if message["role"] == "tool":
            return {**message, "name": self.name}
        turn = parse_turn(text_of(message)) if message["role"] == "assistant" else None
        if turn is None or not turn.calls:
            return message
        names = self.arguments or {}
        calls = [{names.get(name, name): value for name, value in call.arguments.items()} for call in turn.calls]
        written = write_turn(turn.thought or "", *({"name": self.name, "arguments": call} for call in calls))
        return {**message, "content": written}


def draw_wording(rng: np.random.Generator, tools: Sequence[dict[str, Any]]) -> Wording:
    """The tools in words drawn by chance: often as they are, alone or beside one that is of no use.

    A third of the others is described in words of no meaning: what is not understood is to be passed over.
    """
    draw = rng.random()
    shown = list(tools)
    if rng.random() < 0.2:
        shown.insert(int(rng.integers(len(shown) + 1)), schema_of(search_subtitles))
    if draw < 0.4:
        return Wording(shown)
    strange, renamed = draw >= 0.8, 0.6 <= draw < 0.8 or draw >= 0.9
    place = shown.index(schema_of(seek_video_frames))
    schema = copy.deepcopy(shown[place])
    function = schema["function"]
    function.pop("return", None)  # a server may leave it out
    properties = function["parameters"]["properties"]
    function["description"] = _strange_text(rng, 16) if strange else _drawn(rng, _SEEKING)
    for name, described in properties.items():
        described["description"] = _strange_text(rng, 7) if strange else _drawn(rng, _SAID[name])
    shown[place] = schema
    if not renamed:
        return Wording(shown)
    names = {name: str(rng.choice(others)) for name, others in ARGUMENTS.items()}
    function["name"] = str(rng.choice(NAMES))
    function["parameters"]["properties"] = {names[name]: described for name, described in properties.items()}
    function["parameters"]["required"] = [names[name] for name in function["parameters"]["required"]]
    return Wording(shown, function["name"], names)


def _drawn(rng: np.random.Generator, parts: Sequence[Sequence[str]]) -> str:
    return " ".join(str(rng.choice(some)).strip() for some in parts).strip()


@cache
def _known_words() -> list[str]:
    return sorted({word for phrase in phrases() for word in phrase.split() if word.isalpha()})


def _strange_word(rng: np.random.Generator) -> str:
    return "".join(str(rng.choice(some)) for _ in range(int(rng.integers(1, 4))) for some in _SYLLABLE)


def _strange_text(rng: np.random.Generator, most: int) -> str:
    """Up to so many words of which some have no meaning, with a capital, and some commas and full stops."""
    known, share = _known_words(), rng.uniform(0.4, 1.0)
    words = [
        (_strange_word(rng) if rng.random() < share else str(rng.choice(known)))
        + str(rng.choice(["", ",", ".", ";"], p=[0.85, 0.08, 0.05, 0.02]))
        for _ in range(int(rng.integers(2, most + 1)))
    ]
    return f"{' '.join(words).rstrip(',.;').capitalize()}."
