"""A user's own clone of the TimeSearch-R repository, read into a protocol: this project holds none of its sentences.

The files are parsed and never run: module constants, class attributes and f-strings of known values are read, an
environment variable counts as not set. Where each piece stands in the clone:

| text | file | what |
| --- | --- | --- |
| `user.txt`, `user.multiple_choice.txt` | `time_r1/prompt/v4.py` | the constants with a field `question` |
| `next.txt` | `time_r1/prompt/tool_response.py` | the constant with a field `timestamps` |
| `correction.txt` | `time_r1/environment/video_env.py` | the constant of an invalid call |
| `tools.json` | `time_r1/utils/video_tools.py` | `description` and `parameters` of the tool's class |
| `system.txt` | `time_r1/dataset/lazy_dataset.py` | the constant of the system text |
| `reanswer_system.txt`, `reanswer.txt` | `time_r1/trainer/grpo_trainer_env.py` | texts of the visual trace |
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from timesearch.base.errors import RequestError
from timesearch.base.exclusive import contents, exclusive
from timesearch.base.files import atomic_path
from timesearch.dialects.qwen import describe_tools, schema_line
from timesearch.search.protocol import Rules

RULES = Rules(
    dialect="first_tag",
    tools="text",
    template="own",
    options="inline",
    duration="row",
    preview="video",
    spread="ends",
    even=True,
    budget="pair",
    size="smart",
    searched_frames=2048,
    searched_tokens=(128, 256),
    times="index",
    window="covering",
    query="optional",
    arguments="mended",
    calls_per_turn=1,
    unreadable="ends",
    silent="ends",
    last_turn="searches",
    last_call="next",
    context="fails",
    reanswer_frames="by_call",
    unsearched="one_frame",
    reanswer_reply="raw",
)
"""How the released agent plays, found by running its own code."""

_TOOL = "seek_video_frames"
_FIELDS = {"question": "question", "duration": "duration", "timestamps": "times"}
"""Fields of the clone's texts, and what a protocol calls them."""
_MAX_BYTES = 2**20
"""Of one file of the clone; its longest has a tenth."""
_MAX_DEPTH = 50
"""Expressions inside each other, of what is read."""
_MAX_CHARS = 100_000
"""Of one text."""


class MissingError(RequestError):
    """Pieces that the clone does not have where they are looked for, a sentence each."""

    def __init__(self, *pieces: str) -> None:
        super().__init__("; ".join(pieces))
        self.pieces = pieces


def import_protocol(clone: Path, out: Path) -> list[Path]:
    """Write the protocol of a clone as a folder.

    Args:
        clone: the clone's folder.
        out: the folder of the protocol; it must be empty or not there.

    Returns:
        The files that were written.

    Raises:
        RequestError: `clone` is no folder, `out` is not empty, or pieces are missing: a sentence each, and nothing is
            written.
    """
    if not clone.is_dir():
        raise RequestError(f"{clone} is no folder: name your clone of the TimeSearch-R repository")
    files = _pieces(clone)
    with exclusive(out):
        if any(contents(out)):
            raise RequestError(f"{out} is not empty: name another folder by --out")
        for name, text in files.items():
            with atomic_path(out / name) as partial:
                partial.write_bytes(text.encode())
    return [out / name for name in files]


def _pieces(clone: Path) -> dict[str, str]:
    """The files of the protocol by name; all that is missing is named at once."""
    files: dict[str, str] = {}
    missing: list[str] = []
    readers: list[Callable[[Path], dict[str, str]]] = [_user, _next, _correction, _system, _tools, _reanswer]
    for read in readers:
        try:
            files |= read(clone)
        except RequestError as error:
            missing.append(str(error))
    if missing:
        raise MissingError(*dict.fromkeys(missing))
    rules = yaml.safe_dump(RULES.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    return {**files, "protocol.yaml": f"# Rules of the released agent; docs/protocols.md explains each.\n{rules}"}


def _user(clone: Path) -> dict[str, str]:
    module = _Module(clone, "time_r1/prompt/v4.py")
    asking = {name: text for name, text in module.texts() if "{question}" in text}
    chosen = [name for name in asking if "CHOICE" in name.upper()]
    open_ended = [name for name in asking if name not in chosen]
    if len(chosen) != 1 or len(open_ended) != 1:
        raise module.missing(
            "two constants with a field {question}, one of them named for multiple choice", list(asking)
        )
    return {
        "user.txt": module.template(asking[open_ended[0]], "question", "duration"),
        "user.multiple_choice.txt": module.template(asking[chosen[0]], "question", "duration"),
    }


def _next(clone: Path) -> dict[str, str]:
    module = _Module(clone, "time_r1/prompt/tool_response.py")
    found = {name: text for name, text in module.texts() if "{timestamps}" in text}
    if len(found) != 1:
        raise module.missing("one constant with a field {timestamps}", list(found))
    return {"next.txt": module.template(*found.values(), "timestamps")}


def _correction(clone: Path) -> dict[str, str]:
    module = _Module(clone, "time_r1/environment/video_env.py")
    return {"correction.txt": module.plain(module.named("INVALID"), "problem")}


def _system(clone: Path) -> dict[str, str]:
    module = _Module(clone, "time_r1/dataset/lazy_dataset.py")
    text = module.plain(module.named("SYSTEM"), "tools")
    return {"system.txt": f"{text}\n{describe_tools(['{tools}'])}"}


def _tools(clone: Path) -> dict[str, str]:
    module = _Module(clone, "time_r1/utils/video_tools.py")
    found = []
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef):
            attributes = dict(_assigned(node.body))
            if "description" in attributes and "parameters" in attributes:
                found.append((_registered(node) or module.value(attributes.get("name")), attributes))
    named = [attributes for name, attributes in found if name == _TOOL]
    if len(named) != 1:
        listed = [str(name) for name, _ in found]
        raise module.missing(f"one class of the tool {_TOOL} with description and parameters", listed)
    description, parameters = (module.value(named[0][name]) for name in ("description", "parameters"))
    if not isinstance(description, str) or not isinstance(parameters, dict):
        raise module.missing(f"description and parameters of {_TOOL} as text and as a mapping", [])
    function = {"name": _TOOL, "description": description, "parameters": parameters}
    line = schema_line({"type": "function", "function": function})
    return {"tools.json": json.dumps([{"line": line, "tool": _TOOL}], ensure_ascii=False, indent=1) + "\n"}


def _reanswer(clone: Path) -> dict[str, str]:
    module = _Module(clone, "time_r1/trainer/grpo_trainer_env.py")
    functions = [node for node in module.tree.body if isinstance(node, ast.FunctionDef) and "visual_trace" in node.name]
    if len(functions) != 1:
        raise module.missing("one function that builds the visual trace", [node.name for node in functions])
    system, question = [], []
    for node in ast.walk(functions[0]):
        if not isinstance(node, ast.Dict):
            continue
        entries = {
            key.value: value
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant) and isinstance(key.value, str)
        }
        if module.value(entries.get("role")) == "system":
            system.append(module.value(entries.get("content")))
        if module.value(entries.get("type")) == "text" and "text" in entries:
            question.append(module.value(entries["text"], fields=("question",)))
    system = [text for text in system if isinstance(text, str)]
    question = [text for text in question if isinstance(text, str) and "{question}" in text]
    if len(system) != 1:
        raise module.missing("one system text in the function that builds the visual trace", system)
    if len(question) != 1:
        raise module.missing("one text with the question in the function that builds the visual trace", question)
    return {"reanswer_system.txt": system[0], "reanswer.txt": question[0]}


class _Module:
    """A file of the clone, parsed.

    Raises:
        MissingError: it is not there, not in the clone, too large, or no Python in UTF-8.
    """

    def __init__(self, clone: Path, name: str) -> None:
        self.name = name
        self.tree = _parsed(clone, name)
        self._constants = dict(_assigned(self.tree.body))

    def missing(self, what: str, found: list[str]) -> MissingError:
        """What to say of a piece that is not there, or there several times."""
        listed = f" (found: {', '.join(repr(name[:60]) for name in found[:5])})" if found else ""
        return MissingError(f"{self.name} does not hold {what}{listed}: take a clone of the released state")

    def texts(self) -> Iterator[tuple[str, str]]:
        """The module's constants that are texts."""
        for name, node in self._constants.items():
            if isinstance(text := self.value(node), str):
                yield name, text

    def named(self, word: str) -> str:
        """The one text constant with a word in its name."""
        found = {name: text for name, text in self.texts() if word in name.upper()}
        if len(found) != 1:
            raise self.missing(f"one text constant with {word} in its name", list(found))
        return next(iter(found.values()))

    def plain(self, text: str, filled: str) -> str:
        """A text that the clone takes as it is, if nothing in it would be filled in here."""
        if f"{{{filled}}}" in text:
            raise MissingError(f"{self.name} has a text with {{{filled}}} in it, which a protocol would fill in")
        return text

    def template(self, text: str, *fields: str) -> str:
        """A text for `str.format` as one of a protocol, byte for byte but for the names of its fields."""
        parts: list[str] = []
        try:
            for literal, field, form, conversion in Formatter().parse(text):
                parts.append(literal)
                if field is None:
                    continue
                if field not in fields or form or conversion:
                    raise ValueError(f"a field {field[:40]!r} that is none of {', '.join(fields)}")
                parts.append(f"{{{_FIELDS[field]}}}")
        except ValueError as error:
            raise MissingError(f"{self.name} has a text that cannot be filled in: {error}") from error
        if any(f"{{{ours}}}" in literal for literal in parts[::2] for ours in _FIELDS.values()):
            raise MissingError(f"{self.name} has a text with braces that a protocol would fill in")
        return "".join(parts)

    def value(self, node: ast.expr | None, fields: tuple[str, ...] = (), depth: int = 0) -> Any:
        """What an expression of known values is; None where it is anything else.

        Args:
            node: the expression.
            fields: names that stand for themselves in f-strings, as ``{name}``.
            depth: expressions around it.
        """
        if depth > _MAX_DEPTH:
            return None
        inner: tuple[tuple[str, ...], int] = (fields, depth + 1)
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str | int | float | bool) else None
        if isinstance(node, ast.Name):
            return self.value(self._constants.get(node.id), *inner)
        if isinstance(node, ast.Dict) and all(_is_text(key) for key in node.keys):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            values = [self.value(value, *inner) for value in node.values]
            return None if None in values else dict(zip(keys, values, strict=True))
        if isinstance(node, ast.List | ast.Tuple):
            values = [self.value(value, *inner) for value in node.elts]
            return None if None in values else values
        if isinstance(node, ast.JoinedStr):
            return self._joined([self._piece(part, *inner) for part in node.values])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined([self.value(side, *inner) for side in (node.left, node.right)])
        if isinstance(node, ast.Call):
            return self._called(node, *inner)
        return None

    def _piece(self, part: ast.expr, fields: tuple[str, ...], depth: int) -> Any:
        """A part of an f-string."""
        if not isinstance(part, ast.FormattedValue):
            return self.value(part, fields, depth)
        if part.conversion != -1 or part.format_spec is not None:
            return None
        if isinstance(part.value, ast.Name) and part.value.id in fields:
            return f"{{{part.value.id}}}"
        value = self.value(part.value, fields, depth)
        return None if value is None else str(value)

    def _joined(self, parts: list[Any]) -> str | None:
        whole = all(isinstance(part, str) for part in parts)
        return "".join(parts) if whole and sum(map(len, parts)) <= _MAX_CHARS else None

    def _called(self, node: ast.Call, fields: tuple[str, ...], depth: int) -> Any:
        """A number made of a number, and what an environment variable is where it is not set."""
        if isinstance(node.func, ast.Name) and node.func.id == "int" and len(node.args) == 1:
            value = self.value(node.args[0], fields, depth)
            digits = str(value)
            return int(digits) if len(digits) < 10 and digits.isascii() and digits.isdecimal() else None
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "getenv") and len(node.args) == 2:
            return self.value(node.args[1], fields, depth)
        return None


def _parsed(clone: Path, name: str) -> ast.Module:
    """The syntax tree of a file of the clone."""
    path, root = clone / name, clone.resolve()
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root):
            raise MissingError(f"{name} leads out of {clone}: put the file itself there")
        if not real.is_file():
            raise MissingError(f"{name} is no file in {clone}")
        if real.stat().st_size > _MAX_BYTES:
            raise MissingError(f"{name} is larger than {_MAX_BYTES} bytes: it is not the file that is looked for")
        return ast.parse(real.read_bytes().decode())
    except (OSError, RuntimeError) as error:
        raise MissingError(f"{name} is missing in {clone}, or cannot be read: name the clone's own folder") from error
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise MissingError(f"{name} is no Python in UTF-8 that can be read") from error


def _assigned(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    """Names and expressions of the plain assignments among statements."""
    for node in body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = getattr(node, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and isinstance(value, ast.expr):
                yield target.id, value


def _registered(node: ast.ClassDef) -> str | None:
    """The name under which a class is registered by a decorator."""
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and decorator.args and _is_text(decorator.args[0]):
            return str(getattr(decorator.args[0], "value", ""))
    return None


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
