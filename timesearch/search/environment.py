"""What TRL needs of a search: its `environment_factory` makes objects with a `reset` and with tools as methods.

TRL 1.16 lists the functions on an environment's class as tools, `reset` and `get_reward` left out; an attribute that
holds an object is no tool. So the environment holds a `Search`, and its class gets one method for each tool offered.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from timesearch.data.messages import Block
from timesearch.search.search import Search
from timesearch.search.tools import method_of, offered

Timer = Callable[[], AbstractContextManager[None]]
PREVIEW_FRAMES = "preview_frames"
"""Field of a row that has a preview of its own length."""


class SearchEnvironment:
    """One rollout's search. `environment_factory` makes the class that has its tools.

    Args:
        make_search: makes the search.
        timer: opened around all that reads a video.
    """

    def __init__(self, make_search: Callable[[], Search], timer: Timer) -> None:
        self.search = make_search()
        self.timer = timer

    def reset(self, **row: Any) -> list[Block]:
        """Open the video of a sample (its fields are `row`) and show it coarsely: content of the user message."""
        with self.timer():
            self.search.open(row)
            return self.search.preview(row.get(PREVIEW_FRAMES))


def environment_factory(
    make_search: Callable[[], Search], tools: list[str], timer: Timer = nullcontext
) -> Callable[[], SearchEnvironment]:
    """What `GRPOTrainer` takes as `environment_factory`.

    Args:
        make_search: makes a search that offers `tools`.
        tools: names of the tools.
        timer: opened around all that reads a video.
    """
    methods = {tool.__name__: method_of(tool) for tool in offered(tools)}
    return partial(type("SearchEnvironment", (SearchEnvironment,), methods), make_search, timer)
