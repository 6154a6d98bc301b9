"""A protocol: the words in which a policy is spoken to, and the rules by which an episode is played.

A policy plays as well as it was trained only in the words and by the rules that it was trained on. Both are a folder,
chosen by name or by path (`search.prompts`):

- texts: `system.txt` opens every conversation, `user.txt` follows the preview, `next.txt` follows searched frames,
  `correction.txt` answers a wrong tool call, `overflow.txt` asks for the answer when a budget is spent, and
  `reanswer.txt` asks again from the searched frames alone, after `reanswer_system.txt` where there is one. A text
  ``NAME.TYPE.txt`` is that of one type of question (`user.multiple_choice.txt`). ``{name}`` marks what is filled in;
- `protocol.yaml`: what differs from `Rules`. With it in the folder, texts are kept byte for byte; without it the folder
  is a mere set of prompts, played by the rules of this project, whose texts lose the space around them;
- `tools.json`: how tools are described, line by line, where their own docstrings do not (`BoundTool`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from timesearch.base.errors import ItemError, RequestError
from timesearch.base.files import json_digest
from timesearch.base.untrusted import UntrustedError, parse_json
from timesearch.data.formats import holds_options
from timesearch.data.samples import LETTERS, QuestionType
from timesearch.settings import Section, read_yaml

_FOLDERS = Path(__file__).parent / "prompt_sets"
_MARK = re.compile(r"\{(\w++)\}")
_NAMES = ("system", "user", "next", "correction", "overflow", "reanswer")
_MAX_BYTES = 2**20
"""Of one file of a protocol. The longest prompt of a published agent takes a few thousand."""

Template = Literal["tools", "own"]


class Rules(Section):
    """`protocol.yaml`: the rules of an episode. Defaults are this project's own, by which it trains."""

    dialect: str | None = Field(None, description="how turns are written and read; null: as search.dialect says")
    tools: Literal["template", "text"] | None = Field(
        None, description="tools described by the chat template, or in the system text; null: as search.protocol says"
    )
    template: Template = Field(
        "tools", description="chat template: the checkpoint's own, or Qwen3-VL's where its own shows no tools"
    )
    options: Literal["appended", "inline"] = Field(
        "appended", description="'inline': a question holds its options in whatever form; they follow one that does not"
    )
    duration: Literal["end", "row"] = Field(
        "end", description="{duration}: time of the last frame, as 12.5s; or the row's number, else frames / rate"
    )
    preview: Literal["images", "video"] | None = Field(
        None, description="timed images, or one video block and then the text; null: as infer.preview says"
    )
    spread: Literal["middles", "ends"] = Field(
        "middles", description="preview frames: middles of equal shares, or evenly from the first to the last"
    )
    even: bool = Field(False, description="an even number of preview frames")
    budget: Literal["frame", "pair"] = Field(
        "frame", description="search.total_video_tokens counts each frame of the preview, or each pair once"
    )
    size: Literal["largest", "smart"] = Field(
        "largest", description="largest size in whole patches, or Qwen's: both sides rounded, small frames enlarged"
    )
    searched_frames: int | None = Field(
        None, ge=2, description="frames of a video that are searched at most, evenly chosen; null: all"
    )
    searched_tokens: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        None, description="vision tokens of a searched frame, least and most; null: up to search.max_tokens"
    )
    times: Literal["shown", "index"] = Field(
        "shown", description="time of a frame: that from which it is shown, or its number / nominal rate"
    )
    window: Literal["inside", "covering"] = Field(
        "inside", description="frames inside a window; or from floor(start x rate) to ceil(end x rate), both included"
    )
    query: Literal["needed", "optional"] = Field(
        "needed", description="without a query: a correction, or frames evenly from the window"
    )
    arguments: Literal["corrected", "mended"] = Field(
        "corrected", description="'mended': unknown ones are ignored, unreadable ones count as not given"
    )
    calls_per_turn: int = Field(8, ge=1, description="calls of a turn that are carried out at most")
    unreadable: Literal["corrected", "ends"] = Field("corrected", description="a call that cannot be read")
    silent: Literal["asked", "ends"] = Field("asked", description="a turn that neither calls nor answers")
    last_turn: Literal["answers", "searches"] = Field(
        "answers", description="whether the last of search.max_turns is left for the answer, or may search too"
    )
    last_call: Literal["overflow", "next"] = Field("overflow", description="the text after the last call's frames")
    context: Literal["makes_room", "fails"] = Field(
        "makes_room", description="where frames do not fit into the context: fewer are shown, or the episode fails"
    )
    reanswer_frames: Literal["by_time", "by_call"] = Field(
        "by_time",
        description="frames of the re-answer: each once in order of time; or as calls found them, with what was said "
        "to calls that failed",
    )
    unsearched: Literal["incomplete", "one_frame"] = Field(
        "incomplete",
        description="an episode whose calls found nothing: has no re-answer, or one from a frame that an arbitrary "
        "query finds",
    )
    reanswer_reply: Literal["answer", "raw"] = Field(
        "answer", description="what is scored of the re-answer: what its tags hold, or all that was written"
    )

    @property
    def asks(self) -> bool:
        """Whether some rule says `overflow.txt`."""
        return self.silent == "asked" or self.last_call == "overflow" or self.context == "makes_room"


@dataclass(frozen=True)
class BoundTool:
    """A tool in the words of a protocol: an entry of `tools.json`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    line: str
    """its JSON schema as it stands in the prompt, byte for byte"""
    tool: str
    """name of the tool of this project that carries it out"""
    arguments: dict[str, str] = field(default_factory=dict)
    """argument as the policy writes it, and the tool's; others keep their names"""

    @property
    def schema(self) -> dict[str, Any]:
        """The line, read."""
        value: dict[str, Any] = parse_json(self.line)
        return value

    @property
    def name(self) -> str:
        """The name by which the policy calls it."""
        return str(self.schema["function"]["name"])


@dataclass(frozen=True)
class SearchProtocol:
    """Texts, rules and descriptions of tools; `digest` tells one protocol from another."""

    texts: dict[str, str]
    rules: Rules
    tools: tuple[BoundTool, ...] = ()

    @classmethod
    def load(cls, name: str) -> SearchProtocol:
        """Load the protocol `name` of this package, or the folder at that path.

        Raises:
            RequestError: there is no such protocol, a text is missing, or a file of it cannot be read.
        """
        folder = protocol_folder(name)
        path = folder / "protocol.yaml"
        verbatim = _is_there(path)
        rules = _checked(Rules, read_yaml(path), path) if verbatim else Rules()
        texts = _texts(folder, verbatim)
        needed = [part for part in _NAMES if part != "overflow" or rules.asks]
        missing = [part for part in needed if part not in texts]
        if missing:
            raise RequestError(
                f"protocol {name!r} lacks {missing[0]}.txt: use one of {_known()}, or a whole folder (search.prompts)"
            )
        return cls(texts, rules, _tools(folder / "tools.json"))

    @property
    def digest(self) -> str:
        """Of all that the folder holds."""
        return json_digest(
            {
                "texts": self.texts,
                "rules": self.rules.model_dump(mode="json"),
                "tools": [asdict(tool) for tool in self.tools],
            }
        )

    def text(self, part: str, kind: str = "") -> str:
        """A text as it is: that of questions of type `kind`, where it has one of its own."""
        return self.texts.get(f"{part}.{kind}", self.texts[part])

    def render(self, part: str, kind: str = "", **values: object) -> str:
        """Fill in a text; values are inserted as they are, braces in them included."""
        return _MARK.sub(lambda mark: str(values.get(mark[1], mark[0])), self.text(part, kind))

    def question(self, question: str, options: Sequence[str]) -> str:
        """The question with its options, by the rule `options`.

        Raises:
            ItemError: `too_many_options`.
        """
        return lettered(question, options, inline=self.rules.options == "inline")


def protocol_folder(name: str) -> Path:
    """Where the files of the protocol `name` of this package lie, or those of the folder at that path.

    Raises:
        RequestError: there is neither.
    """
    folder = _FOLDERS / name if (_FOLDERS / name).is_dir() else Path(name)
    if not folder.is_dir():
        raise RequestError(
            f"there is no protocol {name!r} (search.prompts): use one of {_known()}, or a folder such as `timesearch "
            "protocol import` writes"
        )
    return folder


def _known() -> str:
    return ", ".join(sorted(path.name for path in _FOLDERS.iterdir() if path.is_dir()))


def lettered(question: str, options: Sequence[str], inline: bool = False) -> str:
    """The question with its lettered options, a line each; one that holds them already, as it is.

    Args:
        question: the question.
        options: its options, without letters.
        inline: whether it counts as held that all options are somewhere in the question.

    Raises:
        ItemError: `too_many_options`, more than there are letters.
    """
    if len(options) > len(LETTERS):
        raise ItemError(
            f"a question with {len(options)} options cannot be asked: there are {len(LETTERS)} letters for them",
            reason="too_many_options",
        )
    if holds_options(question, list(options)) or (inline and all(option in question for option in options)):
        return question
    return "\n".join([question, *(f"{LETTERS[i]}. {option}" for i, option in enumerate(options))])


def _texts(folder: Path, verbatim: bool) -> dict[str, str]:
    """The texts of a folder by their names without ``.txt``."""
    variants = [f"{part}.{kind}" for part in _NAMES for kind in get_args(QuestionType)]
    texts = {}
    for name in (*_NAMES, "reanswer_system", *variants):
        path = folder / f"{name}.txt"
        if not _is_there(path):
            continue
        try:
            texts[name] = path.read_bytes().decode() if verbatim else path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise RequestError(f"{path} is not UTF-8 text: write it so") from error
    return texts


def _tools(path: Path) -> tuple[BoundTool, ...]:
    """The tools that `path` describes."""
    if not _is_there(path):
        return ()
    try:
        read = parse_json(path.read_bytes())
    except UntrustedError as error:
        raise RequestError(f"{path} cannot be read ({error}): it is a JSON list of line, tool and arguments") from error
    tools = _checked(tuple[BoundTool, ...], read, path)
    for bound in tools:
        try:
            named = bound.name
        except (UntrustedError, KeyError, TypeError):
            named = ""
        if not named:
            raise RequestError(f"{path}: the line of {bound.tool} is no JSON schema of a function with a name")
    if len({bound.name for bound in tools}) < len(tools):
        raise RequestError(f"{path} gives two tools one name: leave one out")
    return tools


def _is_there(path: Path) -> bool:
    """Whether a protocol has this file.

    Raises:
        RequestError: what is there is no file, or larger than a text or rule can be.
    """
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        raise RequestError(f"{path} is no file: put the text or the rules themselves there")
    if path.stat().st_size > _MAX_BYTES:
        raise RequestError(f"{path} is larger than {_MAX_BYTES} bytes: a text or rule of a protocol is short")
    return True


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _checked(kind: Any, value: Any, path: Path) -> Any:
    """`value` as the type `kind`, or a sentence on what of it is wrong."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200] or "its content"
        raise RequestError(f"{path}: {where}: {first['msg']}") from error
