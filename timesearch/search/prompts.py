"""Prompts are text files: a set is a folder of them, chosen by name or by path.

`system.txt` opens every conversation, `user.txt` follows the preview, `next.txt` follows searched frames,
`correction.txt` answers a wrong tool call, `overflow.txt` asks for the answer when a budget is spent, and
`reanswer.txt` asks again from the searched frames alone. ``{name}`` marks what is filled in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from timesearch.base.errors import ItemError, RequestError
from timesearch.data.formats import holds_options
from timesearch.data.samples import LETTERS

_SETS = Path(__file__).parent / "prompt_sets"
_MARK = re.compile(r"\{(\w++)\}")
_NAMES = ("system", "user", "next", "correction", "overflow", "reanswer")


@dataclass(frozen=True)
class Prompts:
    """A set of prompt texts."""

    texts: dict[str, str]

    @classmethod
    def load(cls, name: str) -> Prompts:
        """Load the set `name` of this package, or the folder at that path.

        Raises:
            RequestError: there is no such set, or a text is missing.
        """
        folder = _SETS / name if (_SETS / name).is_dir() else Path(name)
        missing = [part for part in _NAMES if not (folder / f"{part}.txt").is_file()]
        if missing:
            known = ", ".join(sorted(path.name for path in _SETS.iterdir() if path.is_dir()))
            raise RequestError(f"prompt set {name!r} lacks {missing[0]}.txt: use one of {known}, or a whole folder")
        return cls({part: (folder / f"{part}.txt").read_text(encoding="utf-8").strip() for part in _NAMES})

    def render(self, part: str, **values: object) -> str:
        """Fill in a text; values are inserted as they are, braces in them included."""
        return _MARK.sub(lambda mark: str(values.get(mark[1], mark[0])), self.texts[part])

    @staticmethod
    def question(question: str, options: list[str]) -> str:
        """The question with its lettered options, a line each; one that holds them already, as it is.

        Raises:
            ItemError: `too_many_options`, more than there are letters.
        """
        if len(options) > len(LETTERS):
            raise ItemError(
                f"a question with {len(options)} options cannot be asked: there are {len(LETTERS)} letters for them",
                reason="too_many_options",
            )
        if holds_options(question, options):
            return question
        return "\n".join([question, *(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))])
