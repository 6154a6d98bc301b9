"""Chat templates of foreign models, rendered with a bound on what they may do.

A chat template is a program. The sandbox of jinja keeps it away from Python's internals, but lets it loop for ever,
fill the memory with one multiplication, and call any method of what it is given, an image's `save` among them.
`BoundedEnvironment` closes that: a template sees plain data alone, and each loop, call, filter and operator takes from
a budget of work that is the same on every machine, so that a good template never fails because the machine is busy.
`bound_templates` puts it in the place of transformers' own environment, and so it holds wherever a conversation is
rendered in this process: by an engine, by TRL, for an export.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import BuiltinMethodType
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from timesearch.base.errors import RequestError

MAX_TEMPLATE = 2**16
"""Characters of a template. The longest that TRL ships has 20 thousand."""
WORK = 2**21
"""Work of one rendering: a round of a loop, a call, an item, or eight characters of text. A conversation of a hundred
turns takes some thousands; all of it is gone through in a few seconds."""
MAX_TEXT = 2**20
"""Characters of one text that a template makes."""
MAX_ITEMS = 2**18
"""Items of one list or mapping that a template handles, those inside of it included."""
_MAX_DEPTH = 64
_MAX_PADDING = 100

_PADDING = frozenset(
    {
        "batch",
        "center",
        "expandtabs",
        "indent",
        "join",
        "ljust",
        "rjust",
        "round",
        "slice",
        "to_bytes",
        "tojson",
        "zfill",
    }
)
"""Filters and methods that a number, or the text between two items, makes long."""
_LOOKING = frozenset({"count", "d", "default", "defined", "first", "last", "length", "mapping", "none", "sequence"})
"""Filters and tests that take the same time for any value."""
_LEFT_OUT = frozenset({"format", "pprint", "striptags", "urlize", "wordwrap", "xmlattr"})
"""Filters whose work cannot be told from their arguments; no published template uses one."""
_PLAIN = (str, int, float, list, tuple, dict, range, Namespace, LoopContext, Macro, Undefined)
"""What a template may look into."""


class _Work(threading.local):
    """What is left of the budget of the rendering in this thread."""

    left = WORK


class _BoundedTemplate(Template):
    """A template each rendering of which begins with the whole budget."""

    def new_context(self, *args: Any, **kwargs: Any) -> Any:
        self.environment.work.left = WORK  # type: ignore[attr-defined]
        return super().new_context(*args, **kwargs)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja's sandbox in which a rendering can neither last, nor grow, nor reach anything but plain data.

    A rendering that does too much raises RequestError; a template that asks for what it may not, jinja's SecurityError.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    template_class = _BoundedTemplate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.work = _Work()
        self.optimized = False  # what is computed while compiling is computed outside the budget
        self.finalize = pass_context(lambda _, value: self._weigh(value))
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]

    def compile(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Compile a template, with whatever filters it has by now."""
        if isinstance(source, str) and len(source) > MAX_TEMPLATE:
            raise RequestError(f"a chat template of {len(source)} characters is refused: {MAX_TEMPLATE} are enough")
        tables: tuple[dict[str, Any], ...] = (self.filters, self.tests)
        for table in tables:
            for name, function in table.items():
                if not hasattr(function, "metered"):
                    table[name] = self._metered(name, function)
        for name in _LEFT_OUT:
            self.filters.pop(name, None)
        # Names that no template can write.
        self.filters |= {"work done": self._take, "weighed": self._weigh, "weighed alone": self._weigh_alone}
        return super().compile(source, *args, **kwargs)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Metering().visit(source), *args, **kwargs)

    def _take(self, work: int) -> bool:
        self.work.left -= work
        if self.work.left < 0:
            raise RequestError("the chat template does more work than any conversation needs: take another model")
        return True

    def _weigh(self, value: Any) -> Any:
        """`value`, after the work of going through it was taken."""
        self._take(_size(value))
        return value

    def _weigh_alone(self, value: Any) -> Any:
        """`value`, after the work of going through it, but not into it, was taken."""
        self._take(1 + (len(value) if isinstance(value, list | tuple) else _size(value)))
        return value

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._admit(name, [*args, *kwargs.values()])
            return self._weigh(function(*args, **kwargs)) if name not in _LOOKING else function(*args, **kwargs)

        metered.metered = True  # type: ignore[attr-defined]
        return metered

    def _admit(self, name: str, operands: list[Any]) -> None:
        """Take the work of a filter, test or method from the budget before it is done.

        Raises:
            RequestError: it makes too much of little.
        """
        if name in _LOOKING:
            self._take(1)
            return
        for operand in operands:
            self._weigh(operand)
        if name in _PADDING:
            texts = [operand for operand in operands if isinstance(operand, str)]
            separator = min(map(len, texts)) if name == "join" and len(texts) > 1 else len(texts[0]) if texts else 0
            numbers = [operand for operand in operands[1:] if isinstance(operand, int)]
            if (name == "join" and separator > _MAX_PADDING) or any(number > _MAX_PADDING for number in numbers):
                raise _too_large()
        if name == "replace":
            text, *others = [len(operand) for operand in operands if isinstance(operand, str)] or [0]
            if text * max(others, default=0) > 64 * MAX_TEXT:
                raise _too_large()

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a macro or a function; what a method of plain data makes is weighed before and after."""
        # Jinja hands the variables of loops and blocks along under names that no template can write.
        given = [*args, *(value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars"))]
        if isinstance(__obj, Macro | LoopContext):
            __self._take(1)
        elif isinstance(__obj, BuiltinMethodType):
            __self._admit(__obj.__name__, [__obj.__self__, *given])
        else:
            __self._admit("", given)
        return __self._weigh_made(super().call(__context, __obj, *args, **kwargs))

    def _weigh_made(self, value: Any) -> Any:
        return value if isinstance(value, Namespace) else self._weigh(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Add, multiply, raise or divide numbers, and add or repeat texts and lists."""
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("a chat template may not format text by %")
        if operator == "*":
            self._take(1)
            for repeated, times in ((left, right), (right, left)):
                many = isinstance(repeated, str | bytes | list | tuple) and isinstance(times, int)
                if many and len(repeated) * times > (MAX_TEXT if isinstance(repeated, str | bytes) else MAX_ITEMS):
                    raise _too_large()
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 128:
            raise _too_large()
        return self._weigh(super().call_binop(context, operator, left, right))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether an attribute belongs to plain data: an image in a message, say, does not."""
        return isinstance(obj, _PLAIN) and attr != "translate" and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """Refuse `str.format`, whose fields can ask for any width."""
        if isinstance(value, BuiltinMethodType) and value.__name__ in ("format", "format_map"):
            raise SecurityError("a chat template may not format text by str.format")
        return None


def _too_large() -> RequestError:
    return RequestError("the chat template makes a value that is too large: take another model")


def _size(value: Any) -> int:
    """Work of going through a value and all that is in it.

    Raises:
        RequestError: it is larger than a template may handle.
    """
    items, text = 1, 0
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        inner: Any = ()
        if isinstance(one, str | bytes):
            text += len(one)
        elif isinstance(one, dict):
            items += 2 * len(one)
            inner = (*one.keys(), *one.values())
        elif isinstance(one, list | tuple | set | frozenset):
            items += len(one)
            inner = one
        elif isinstance(one, range):
            items += len(one)
        elif isinstance(one, Namespace) or (isinstance(one, int) and one.bit_length() > 64):
            raise _too_large()
        if items > MAX_ITEMS or text > MAX_TEXT or depth > _MAX_DEPTH:
            raise _too_large()
        waiting += [(part, depth + 1) for part in inner]
    return items + text // 8


class _Metering(NodeTransformer):
    """Puts the meters into a template: a round of a loop and a call of a macro take work, and what Python would go
    through by itself (comparisons, slices, joined texts, new lists and mappings) is weighed."""

    def _metered_body(self, node: Any) -> Any:
        self.generic_visit(node)
        written = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        taken = _filter(nodes.Const(1 + written // 8), "work done")
        node.body.insert(0, nodes.ExprStmt(taken).set_lineno(node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(_filter(nodes.Const(1), "work done"), node.test)
        return node

    visit_For = visit_Macro = visit_CallBlock = _metered_body

    def visit_Compare(self, node: nodes.Compare, *_: Any) -> Any:
        self.generic_visit(node)
        node.expr = _filter(node.expr, "weighed")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "weighed")
        return node

    def visit_Concat(self, node: nodes.Concat, *_: Any) -> Any:
        self.generic_visit(node)
        node.nodes = [_filter(part, "weighed") for part in node.nodes]
        return _filter(node, "weighed")

    def visit_Getitem(self, node: nodes.Getitem, *_: Any) -> Any:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filter(node.node, "weighed alone")
        return node

    def _made(self, node: Any, *_: Any) -> Any:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _filter(node, "weighed")

    visit_List = visit_Tuple = visit_Dict = _made


def _filter(node: Any, name: str) -> nodes.Filter:
    made = nodes.Filter(node, name, [], [], None, None)
    made.set_lineno(node.lineno or 1)
    return made


def bound_templates() -> None:
    """From now on, let transformers render chat templates in a `BoundedEnvironment`."""
    from transformers.utils import chat_template_utils

    if chat_template_utils.ImmutableSandboxedEnvironment is not BoundedEnvironment:
        chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
        chat_template_utils._compile_jinja_template.cache_clear()  # those compiled before
