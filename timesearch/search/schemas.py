"""The JSON schema of a function: its name, its docstring (Google style) and its annotations.

Letter for letter what `transformers.utils.get_json_schema` makes of it, by which TRL describes tools in training, so
that a policy behind a server reads the same words (`tests/test_schemas.py` holds them together); but of few types, and
without transformers, so that a search needs no PyTorch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from timesearch.base.errors import RequestError

_TYPES: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    Any: {},
}
_SECTION = re.compile(r"^(Args|Returns|Raises):[ ]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:(.*)")


def json_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a function or, without its `self`, of a method.

    Raises:
        RequestError: a parameter has no annotation or one of another type, or the docstring does not tell of it.
    """
    name, parts = function.__name__, _parts(inspect.getdoc(function) or "")
    told = {argument: _line(lines) for argument, lines in _arguments(parts.get("Args", "")).items()}
    hints = get_type_hints(function)
    properties, required = {}, []
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument == "self":
            continue
        if argument not in hints or argument not in told:
            raise RequestError(f"the tool {name} needs a type and a line under Args for its argument {argument!r}")
        properties[argument] = {**_schema_of(hints[argument], name), "description": told[argument]}
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    described: dict[str, Any] = {"name": name, "description": parts["description"], "parameters": schema}
    if "return" in hints:
        described["return"] = _schema_of(hints["return"], name)
        if "Returns" in parts:
            described["return"]["description"] = parts["Returns"].strip()
    return {"type": "function", "function": described}


def _parts(doc: str) -> dict[str, str]:
    """A docstring's description and its sections, by their names."""
    description, *rest = _SECTION.split(doc.strip())
    return {"description": description.strip(), **dict(zip(rest[::2], rest[1::2], strict=True))}


def _arguments(section: str) -> dict[str, list[str]]:
    """The lines about each argument. One that looks like another argument goes on if it is indented deeper."""
    told: dict[str, list[str]] = {}
    indent, lines = None, [""]
    for line in section.split("\n"):
        begins = _ARGUMENT.match(line)
        if begins and not (indent is not None and len(begins[1]) > len(indent) and begins[1].startswith(indent)):
            indent, lines = begins[1], [begins[3]]
            told[begins[2]] = lines
        else:
            lines.append(line)
    return told


def _line(lines: list[str]) -> str:
    """What was wrapped over lines, on one."""
    return " ".join(part for line in lines if (part := line.strip()))


def _schema_of(hint: Any, name: str) -> dict[str, Any]:
    if hint in _TYPES:
        return dict(_TYPES[hint])
    origin, inner = get_origin(hint), get_args(hint)
    if origin is list:
        return {"type": "array", "items": _schema_of(inner[0], name)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(inner[1], name)}
    if origin is Literal and all(type(value) is str for value in inner):
        return {"type": "string", "enum": list(inner)}
    if origin in (Union, UnionType) and len(inner) == 2 and NoneType in inner:
        (other,) = (each for each in inner if each is not NoneType)
        return {**_schema_of(other, name), "nullable": True}
    raise RequestError(
        f"the tool {name} is annotated with {hint}: take str, int, float, bool, Literal, or lists of them"
    )
