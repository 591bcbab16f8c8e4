"""Filter of rows: a comparison of their columns, such as `relevance_min >= 3 and "chart" in source`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from solo_vlm.data.sample import SampleError
from solo_vlm.utils.errors import SoloError

_MISSING = frozenset({"na", "n/a", "#n/a", "<na>", "nan", "-nan", "null", "none"})
"""Words that stand for a missing number or truth value in tables of text."""

_TRUTHS = {"true": True, "false": False}


def _alike(left: Any, right: Any) -> tuple[Any, Any]:
    """Return both, and a text beside a number or a truth value as one, as CSV files have them."""
    if isinstance(left, str) is isinstance(right, str):
        return left, right
    text, other = (left, right) if isinstance(left, str) else (right, left)
    value = _read(text, other)
    return (value, other) if text is left else (other, value)


def _read(text: str, other: Any) -> Any:
    """Return a text as a value of the other's kind; None if it says that there is none."""
    if not isinstance(other, int | float):
        raise TypeError(f"{type(other).__name__} and str are never equal")
    word = text.strip().lower()
    if word in _MISSING:
        return None
    if isinstance(other, bool):
        if word in _TRUTHS:
            return _TRUTHS[word]
        raise TypeError(f"{text!r} is neither true nor false: compare it")
    try:
        return float(text)
    except ValueError as error:
        raise TypeError(f"{text!r} is no number to compare with {other}") from error


def _compares(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], bool | None]:
    def compared(left: Any, right: Any) -> bool | None:
        left, right = _alike(left, right)
        return None if left is None or right is None else bool(compare(left, right))

    return compared


def _orders(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], bool | None]:
    """Order two texts as numbers if both are, because 9.50 is less than 10.00."""
    compared = _compares(compare)

    def ordered(left: Any, right: Any) -> bool | None:
        if isinstance(left, str) and isinstance(right, str):
            with suppress(TypeError):
                left, right = _read(left, 0), _read(right, 0)
        return None if left is None or right is None else compared(left, right)

    return ordered


_is_equal = _compares(operator.eq)


def _is_in(item: Any, items: Any) -> bool | None:
    if isinstance(items, str):
        return item in items
    return _combined(False, [_is_equal(item, each) for each in items if each is not None])


def _is_not_in(item: Any, items: Any) -> bool | None:
    found = _is_in(item, items)
    return None if found is None else not found


_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool | None]] = {
    ast.Lt: _orders(operator.lt),
    ast.LtE: _orders(operator.le),
    ast.Gt: _orders(operator.gt),
    ast.GtE: _orders(operator.ge),
    ast.Eq: _is_equal,
    ast.NotEq: _compares(operator.ne),
    ast.In: _is_in,
    ast.NotIn: _is_not_in,
}
_ALLOWED = "comparisons, and, or, not, in, is None, len(), numbers, strings and names of columns"


@dataclass(frozen=True)
class RowFilter:
    """Expression that is true for the rows to keep.

    As in SQL, a comparison with a missing value is neither true nor false, and such rows are left out;
    `is None` asks for it.

    Args:
        expression: Comparisons of columns and constants, in Python's syntax.

    Raises:
        SoloError: The expression is something else.
    """

    expression: str

    def __post_init__(self) -> None:
        for node in ast.walk(self._tree):
            _check(node, self.expression)

    @cached_property
    def _tree(self) -> ast.expr:
        try:
            return ast.parse(self.expression.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise SoloError(f"filter {self.expression!r} is not an expression: {error}") from error

    @property
    def columns(self) -> frozenset[str]:
        """Columns that the expression names."""
        functions = {node.func for node in ast.walk(self._tree) if isinstance(node, ast.Call)}
        names = (node for node in ast.walk(self._tree) if isinstance(node, ast.Name))
        return frozenset(node.id for node in names if node not in functions)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Return whether to keep a row.

        Raises:
            SampleError: The values cannot be compared ("filter").
        """
        try:
            return _truth(_value(self._tree, row)) is True
        except (TypeError, ValueError) as error:
            raise SampleError("filter", f"{self.expression}: {error}") from error


def _check(node: ast.AST, expression: str) -> None:
    """Raise SoloError for anything but the supported parts of an expression."""
    match node:
        case ast.BoolOp() | ast.And() | ast.Or() | ast.Not() | ast.USub() | ast.Load() | ast.cmpop():
            return
        case ast.UnaryOp(op=ast.Not() | ast.USub()) | ast.Name() | ast.Tuple() | ast.List():
            return
        case ast.Constant(value=str() | int() | float() | None):
            return
        case ast.Call(func=ast.Name(id="len"), args=[_], keywords=[]):
            return
        case ast.Compare(ops=operators, comparators=others):
            tests = [op for op in operators if isinstance(op, ast.Is | ast.IsNot)]
            nones = [isinstance(other, ast.Constant) and other.value is None for other in others]
            if not tests or (len(operators) == 1 and all(nones)):
                return
    raise SoloError(f"filter {expression!r}: {ast.unparse(node)} is not supported, only {_ALLOWED}")


def _value(node: ast.expr, row: Mapping[str, Any]) -> Any:
    """Return the value of a checked expression; None if it is unknown."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            value = row.get(name)
            return value if value == value else None  # NaN is pandas' None
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return [_value(item, row) for item in items]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            truth = _truth(_value(operand, row))
            return None if truth is None else not truth
        case ast.UnaryOp(operand=operand):
            value = _value(operand, row)
            return None if value is None else -value
        case ast.Call(args=[item]):
            value = _value(item, row)
            return None if value is None else len(value)
        case ast.BoolOp(op=op, values=values):
            return _combined(isinstance(op, ast.And), [_truth(_value(value, row)) for value in values])
        case ast.Compare(left=left, ops=operators, comparators=others):
            sides = [_value(side, row) for side in (left, *others)]
            pairs = zip(sides, operators, sides[1:], strict=False)
            return _combined(True, [_compared(*pair) for pair in pairs])
    raise TypeError(ast.unparse(node))


def _compared(left: Any, op: ast.cmpop, right: Any) -> bool | None:
    if isinstance(op, ast.Is | ast.IsNot):
        return (left is None) is isinstance(op, ast.Is)
    return None if left is None or right is None else _COMPARISONS[type(op)](left, right)


def _truth(value: Any) -> bool | None:
    """Return the truth of a condition: a number, or a truth value, which may be text; no other text."""
    if isinstance(value, str):
        value = _read(value, True)
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise TypeError(f"a {type(value).__name__} is no condition: compare it")
    return bool(value)


def _combined(is_and: bool, values: list[bool | None]) -> bool | None:
    """Return the three-valued conjunction or disjunction of values, of which None is unknown."""
    decisive = [value for value in values if value is not None and value is not is_and]
    if decisive:
        return not is_and
    return None if None in values else is_and
