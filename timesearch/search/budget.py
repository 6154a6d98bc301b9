"""What an episode takes: the frames of the preview, the sizes in which frames are shown, and tokens at most."""

from __future__ import annotations

import math

from timesearch.search.pool import from_end_to_end
from timesearch.search.protocol import Rules
from timesearch.settings import SearchSettings
from timesearch.video.probe import smart_size

TIME_TOKENS = 12
"""Text tokens around a frame, at most: its time and the markers of an image."""
TEXT_TOKENS = 2048
"""Text tokens of a prompt, at most: system text, tools, question and options."""


OWN_RULES = Rules()


def preview_plan(
    total: int, size: tuple[int, int], settings: SearchSettings, rules: Rules = OWN_RULES
) -> tuple[list[int], tuple[int, int]]:
    """Frames of the preview and their size: first as many frames as the budgets allow, then as large as they allow.

    Args:
        total: frames of the video.
        size: width and height of a cached frame in pixels.
        settings: `total_video_tokens`, `max_frames`, `min_tokens`, `max_tokens` and `patch` are used, as in the
            paper's configuration.
        rules: `spread`, `even`, `budget` and `size` are used.

    Returns:
        Increasing indices, each the middle of an equal share of the frames (or from the first to the last), and
        (width, height) in pixels. Where frames do not come at a steady rate, `FrameCache.evenly` says which ones are
        shown in the middles of the time.
    """
    smart = rules.size == "smart"
    whole = max(1, (size[0] // settings.patch) * (size[1] // settings.patch))
    least = settings.min_tokens if smart else min(settings.min_tokens, whole)
    budget = settings.total_video_tokens * (2 if rules.budget == "pair" else 1)
    count = max(1, min(total, settings.max_frames, budget // least))
    if rules.even:
        count = max(1, count - count % 2)
    if rules.spread == "ends":
        indices = [int(index) for index in from_end_to_end(total, count)]
    else:
        indices = [int((position + 0.5) * total / count) for position in range(count)]
    if smart:
        return indices, _smart(size, least, min(settings.max_tokens, budget / count), settings.patch)
    return indices, fit_size(size, min(settings.max_tokens, max(least, budget // count)), settings.patch)


def _smart(size: tuple[int, int], least: float, most: float, patch: int) -> tuple[int, int]:
    """Qwen's size of a frame, both sides rounded to whole patches, within vision tokens."""
    return smart_size(*size, patch, int(least * patch**2), int(most * patch**2))


def fit_size(size: tuple[int, int], tokens: int, patch: int) -> tuple[int, int]:
    """The largest size of about the same shape, in whole patches and at most `tokens` of them; never enlarged."""
    width, height = size
    if (width // patch) * (height // patch) <= tokens:
        return size
    scale = math.sqrt(tokens / (width * height))
    columns, rows = width * scale, height * scale
    choices = []
    for across in (math.floor(columns), math.ceil(columns)):
        for down in (math.floor(rows), math.ceil(rows)):
            fitted = min(max(across, 1), tokens)
            choices.append((fitted, min(max(down, 1), tokens // fitted)))
    across, down = max(choices, key=math.prod)
    return across * patch, down * patch


def filled_size(size: tuple[int, int], settings: SearchSettings, rules: Rules = OWN_RULES) -> tuple[int, int]:
    """Width and height in which a region of a picture of the source is shown: the largest of about its shape, in whole
    patches, enlarged where it is small, for details are what it is looked at for.

    Args:
        size: width and height of the region, in pixels.
        settings: `max_tokens` and `patch` are used.
        rules: `searched_tokens` is used.
    """
    most = (rules.searched_tokens or (0, settings.max_tokens))[1]
    long = most * settings.patch * 2
    scale = max(long / size[0], long / size[1])
    return fit_size((round(size[0] * scale), round(size[1] * scale)), most, settings.patch)


def searched_size(size: tuple[int, int], settings: SearchSettings, rules: Rules = OWN_RULES) -> tuple[int, int]:
    """Width and height in which a cached frame of `size` is shown when it was searched."""
    least, most = rules.searched_tokens or (settings.min_tokens, settings.max_tokens)
    if rules.size == "smart":
        return _smart(size, least, most, settings.patch)
    return fit_size(size, most, settings.patch)


def preview_frames(settings: SearchSettings) -> int:
    """Frames of a preview, at most."""
    return min(settings.max_frames, settings.total_video_tokens)


def searched_frames(settings: SearchSettings) -> int:
    """Frames that an episode searches, at most: the last turn is left for the answer."""
    return (settings.max_turns - 1) * settings.max_frames_per_turn


def prompt_tokens(settings: SearchSettings) -> int:
    """Tokens of a prompt, at most."""
    return settings.total_video_tokens + preview_frames(settings) * TIME_TOKENS + TEXT_TOKENS


def search_tokens(settings: SearchSettings) -> int:
    """Tokens of all searched frames of an episode, at most."""
    return searched_frames(settings) * (settings.max_tokens + TIME_TOKENS)


def completion_tokens(settings: SearchSettings) -> int:
    """Tokens of an episode after its prompt, at most."""
    return search_tokens(settings) + settings.max_turns * settings.max_new_tokens
