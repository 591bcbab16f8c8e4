"""Rendering of untrusted chat templates, bounded in time, memory and output.

Jinja's sandbox keeps a template from files and modules, but not from loops without end or strings of
gigabytes. Here every loop step, call of a macro and new value is charged to a budget that grows with the
input; references to the input are free. Operations whose result may be much larger than their operands are
checked before they run.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache, wraps
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE_CHARACTERS = 1 << 20

# One unit is about one character of text.
_BUDGET = 1 << 24
_BUDGET_PER_CHARACTER = 64  # of the input
_STEP = 64
_ITEM = 8
_SCANNED = 16  # characters that are searched or compared per unit
_MAX_GROWTH = 1 << 24
_MAX_BITS = 1 << 16
_COPIED_BYTES = 8  # per unit, of the longest of concatenated texts: templates collect a chat in one text

_GROWING = {"center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust"}
_GROWING |= {"tojson", "translate", "zfill"}
# Filters that return items of their input rather than text.
_SELECTING = {"attr", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length"}
_SELECTING |= {"list", "map", "max", "min", "random", "reject", "rejectattr", "reverse", "select"}
_SELECTING |= {"selectattr", "sort", "unique"}
_COMPARING = {"==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le"}
_COMPARING |= {"lessthan", "lower", "lt", "ne", "upper"}
# No chat needs them, and their cost is hard to bound.
_REMOVED_FILTERS = ("batch", "filesizeformat", "pprint", "slice", "sum", "urlize", "wordwrap", "xmlattr")
_REMOVED_GLOBALS = ("cycler", "joiner", "lipsum")
_CHARGES = (
    "charge",
    "concat_values",
    "referenced",
    "scanned",
    "stepped",
)  # methods that the parsed template calls
_OF_JINJA = ("_block_vars", "_loop_vars")  # arguments that it adds to calls
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\*|\d{4})")  # "%5000d", "%*d"
_WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*\d{4}")  # "{:5000}"


class TemplateLimitError(TemplateRuntimeError):
    """Template that exceeds the limits on time or memory."""


def render(
    source: str,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool,
    special_tokens: dict[str, Any],
) -> str:
    """Render a chat template as transformers does, within limits.

    Args:
        source: Jinja source of the template.
        messages: Messages of the chat; values that are not plain data become placeholders.
        add_generation_prompt: End with the prompt for the assistant's next answer.
        special_tokens: Names and texts of the tokenizer's special tokens.

    Raises:
        TemplateLimitError: The template exceeds the limits.
        Exception: The template rejects the chat, or is broken.
    """
    chat = json.dumps(
        [{key: value for key, value in message.items() if value is not None} for message in messages],
        default=lambda value: f"<{type(value).__name__}>",
    )
    environment, template = _compile(source)
    given = json.loads(chat)
    environment.start(_BUDGET + _BUDGET_PER_CHARACTER * len(chat), given)
    return template.render(
        messages=given,
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **special_tokens,
    )


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Sandbox that charges the operations of a rendering to a budget per thread."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, model: ImmutableSandboxedEnvironment) -> None:
        super().__init__(
            trim_blocks=model.trim_blocks,
            lstrip_blocks=model.lstrip_blocks,
            extensions=[type(extension) for extension in model.extensions.values()],
            finalize=self.charged,
        )
        tests: dict[str, Any] = model.tests
        self.tests = tests | {name: self._bounded_test(tests[name]) for name in _COMPARING}
        self.globals = {name: value for name, value in model.globals.items() if name not in _REMOVED_GLOBALS}
        self.filters = {
            name: self._bounded_filter(name, function)
            for name, function in model.filters.items()
            if name not in _REMOVED_FILTERS
        }
        self._rendering = threading.local()

    def start(self, budget: int, given: Any = ()) -> None:
        """Begin a rendering of given values in this thread."""
        self._rendering.left = budget
        self._rendering.given = {id(value) for value in _with_contents(given)}

    def charge(self, units: int) -> None:
        """Subtract units from the budget of this thread."""
        left = getattr(self._rendering, "left", _BUDGET) - units
        self._rendering.left = left
        if left < 0:
            raise TemplateLimitError("the template takes too many steps, or makes too much text")

    def charged(self, value: Any, free: Collection[int] = ()) -> Any:
        """Charge for a value and its content, except values with free IDs; return the value."""
        waiting = [value]
        while waiting:
            one = waiting.pop()
            if id(one) in free:
                continue
            if isinstance(one, str | bytes):
                self.charge(len(one))
            elif isinstance(one, dict | list | tuple | set | Namespace):
                content = _content(one)
                self.charge(_ITEM * (1 + len(content)))
                waiting += content
        return value

    def scanned(self, value: Any, deep: bool = True) -> Any:
        """Charge for searching or comparing a value; return the value."""
        if isinstance(value, str | bytes):
            self.charge(len(value) // _SCANNED)
        elif isinstance(value, dict | list | range | set | tuple):
            self.charge(_ITEM * len(value))
            for one in () if isinstance(value, range) or not deep else _content(value):
                self.scanned(one)
        return value

    def stepped(self, value: Any) -> Any:
        """Charge for a step of a loop or an iterator; return the value."""
        self.charge(_STEP)
        return value

    def referenced(self, value: Any) -> Any:
        """Charge for a value, except for what refers to the input; return the value."""
        return self.charged(value, getattr(self._rendering, "given", ()))

    def concat_values(self, *values: Any) -> str:
        """Concatenate values as the operator `~` does."""
        texts = [value if isinstance(value, str) else str(self.charged(value)) for value in values]
        self._charge_concatenation(texts)
        return "".join(texts)

    def _charge_concatenation(self, texts: Sequence[str]) -> None:
        longest = max(texts, key=len)
        self.charge(sum(map(len, texts)) - len(longest) + sys.getsizeof(longest) // _COPIED_BYTES)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Run `+`, `*`, `**` or `%` if the result is not too large."""
        if operator == "*":
            _check_growth(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _MAX_BITS:
                raise TemplateLimitError("the template computes too large a number")
        elif operator == "%" and isinstance(left, str):
            _check_width(_WIDE_PERCENT, left)
            self.charged(right)
        result = super().call_binop(context, operator, left, right)
        if operator == "+" and isinstance(result, list | tuple):
            # Templates append to lists in loops: what the list already holds was charged when it was added.
            self.charge(_ITEM * len(result))
            return result
        if operator == "+" and isinstance(result, str):
            self._charge_concatenation((left, right))
            return result
        return self.referenced(result)

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """Call a function or method if the result is not too large."""
        name = getattr(function, "__name__", "")
        if name in _CHARGES and getattr(function, "__self__", None) is self:
            return function(*args)
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        receiver = getattr(method, "__self__", None)
        given = {key: value for key, value in options.items() if key not in _OF_JINJA}
        self.scanned(receiver, deep=name in ("count", "index"))
        if isinstance(receiver, str) and name in _GROWING:
            if name.startswith("format"):
                _check_width(_WIDE_BRACES, receiver)
            args = self._measured(receiver, args, given)
        elif function in (dict, Namespace):
            self.referenced([*args, *given.values()])
        elif not isinstance(function, Macro):  # which only passes its arguments on
            self.charged([*args, *given.values()])
        return self.referenced(super().call(context, function, *args, **options))

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        has_context = hasattr(function, "jinja_pass_arg")

        @wraps(function)
        def bounded(*args: Any, **options: Any) -> Any:
            context, values = args[:has_context], args[has_context:]
            if name == "format":
                _check_width(_WIDE_PERCENT, str(values[0]))
            if name in _GROWING:
                values = self._measured("", values, options)
            elif name not in _SELECTING:
                self.charged([*values, *options.values()])
            for value in () if name in ("count", "length") else values:
                self.scanned(value, deep=False)
            result = function(*context, *values, **options)
            return map(self.stepped, result) if hasattr(result, "__next__") else self.referenced(result)

        return bounded

    def _bounded_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        has_context = hasattr(function, "jinja_pass_arg")

        @wraps(function)
        def bounded(*args: Any) -> Any:
            for value in args[has_context:]:
                self.scanned(value)
            return function(*args)

        return bounded

    def _measured(self, receiver: str, args: Sequence[Any], options: dict[str, Any]) -> tuple[Any, ...]:
        """Refuse arguments whose product is too large; return them, iterators as lists."""
        listed = tuple(list(arg) if hasattr(arg, "__next__") else arg for arg in args)
        sizes = sorted(self._size(value) for value in (receiver, *listed, *options.values()))
        if sizes[-1] * (sizes[-2] if len(sizes) > 1 else 1) > _MAX_GROWTH:
            raise TemplateLimitError("the template makes too large a text")
        return listed

    def _size(self, value: Any) -> int:
        if isinstance(value, bool):
            return 1
        if isinstance(value, int):
            return abs(value)
        before = self._rendering.left
        self.charged(value)
        return before - self._rendering.left

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        metered = _Meter().visit(super()._parse(source, name, filename))
        return metered.set_environment(self)


class _Meter(NodeTransformer):
    """Transformer that adds the charges to a parsed template."""

    def visit_For(self, node: Any) -> Any:
        self._with_step(node)
        if node.test is not None:
            node.test = _call("stepped", node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        return self._with_step(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        return self._with_step(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("concat_values", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _call("referenced", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        sides: list[Any] = [node, *node.ops]
        for side in sides:
            if not isinstance(side.expr, nodes.Const):
                side.expr = _call("scanned", side.expr)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        return self._new_container(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        return self._new_container(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        return self._new_container(node) if node.ctx == "load" else node

    def _new_container(self, node: Any) -> nodes.Expr:
        self.generic_visit(node)
        is_constant = not any(node.find_all((nodes.Name, nodes.Call, nodes.Filter)))
        return node if is_constant else _call("referenced", node)

    def _with_step(self, node: Any) -> Any:
        static = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        step = nodes.ExprStmt(_call("charge", nodes.Const(_STEP + static)))
        node.body.insert(0, step.set_lineno(node.lineno))
        return node


@lru_cache(maxsize=16)
def _compile(source: str) -> tuple[_BoundedEnvironment, Any]:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if len(source) > MAX_SOURCE_CHARACTERS:
        raise TemplateLimitError(f"the template has {len(source):,} characters")
    environment = _BoundedEnvironment(_compile_jinja_template("").environment)
    environment.start(_BUDGET)  # constants are computed during compilation
    return environment, environment.from_string(source)


def _call(method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)


def _content(value: Any) -> Any:
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    return [*value.keys(), *value.values()] if isinstance(value, dict) else value


def _with_contents(value: Any) -> Iterator[Any]:
    """Yield a value and everything in it."""
    waiting = [value]
    while waiting:
        yield (one := waiting.pop())
        if isinstance(one, dict | list):
            waiting += _content(one)


def _check_width(pattern: re.Pattern[str], text: str) -> None:
    if pattern.search(text):
        raise TemplateLimitError("the template formats too wide a field")


def _check_growth(left: Any, right: Any) -> None:
    sizes = [
        len(value) if isinstance(value, str | bytes | list | tuple) else value for value in (left, right)
    ]
    is_repetition = any(isinstance(value, str | bytes | list | tuple) for value in (left, right))
    if is_repetition and all(isinstance(size, int) for size in sizes) and sizes[0] * sizes[1] > _MAX_GROWTH:
        raise TemplateLimitError("the template repeats a value too often")
    if all(isinstance(value, int) and value.bit_length() > _MAX_BITS for value in (left, right)):
        raise TemplateLimitError("the template computes too large a number")


__all__ = ["MAX_SOURCE_CHARACTERS", "TemplateLimitError", "render"]
