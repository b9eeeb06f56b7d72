"""A reader for the `$` expressions of MONAI configs that never runs them.

An expression is parsed with `ast` and folded over literals, arithmetic and references. Calls that load weights,
draw noise or set timesteps are recognised and become the values below, which say what the call would have done.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

MAX_TEXT = 4_000
"""Characters of one expression."""
MAX_ITEMS = 1_000
"""Items of one list, tuple, dict; a string may have ten times as many characters."""
REFERENCE = re.compile(r"@(#+|(?:::)+)?(\w+(?:(?:#|::)\w+)*)")
_PLACEHOLDER = "_volcast_reference_"


class Unreadable(ValueError):
    """The value stands in the config but cannot be read without running code."""


@dataclass(frozen=True)
class Component:
    """A dict with `_target_`, by its id in the config; never instantiated here."""

    id: str


@dataclass(frozen=True)
class WeightFile:
    """What `torch.load(path)` or `load_file(path)` returns; `keys` are the subscripts applied to it."""

    path: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loader:
    """`@network.load_state_dict` or `@network.load_old_state_dict`, not called yet."""

    network: str


@dataclass(frozen=True)
class Load:
    """A call that loads `source` into the network of that id."""

    network: str
    source: WeightFile


@dataclass(frozen=True)
class Noise:
    """`torch.randn(shape)`: batch axis included."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Timesteps:
    """`@scheduler.set_timesteps(steps)`."""

    scheduler: str
    steps: int


Value = Any
_SYMBOLS = (Component, WeightFile, Loader, Load, Noise, Timesteps)
# Device, dtype and mode do not change what a value is: the network is rebuilt in float32 on the CPU.
_SEEN_THROUGH = {"to", "cuda", "cpu", "float", "half", "eval", "detach", "clone", "contiguous", "item"}
_READERS = {"torch.load", "load_file", "safetensors.torch.load_file"}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_CASTS: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "round": round,
}
_ABBREVIATED = 60


def is_number(value: Value) -> bool:
    """Whether the value is an int or a float and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def evaluate(expression: str, lookup: Callable[[str], Value]) -> Value:
    """The value of a config's string without its leading `$`; `lookup` resolves an id, relative marks included.

    Raises `Unreadable` for whatever is outside the safe set, and for values past the bounds on size.
    """
    if len(expression) > MAX_TEXT:
        raise Unreadable(f"has {len(expression)} characters, more than {MAX_TEXT}")
    references: list[str] = []

    def keep(match: re.Match[str]) -> str:
        references.append(match.group(0)[1:])
        return f"{_PLACEHOLDER}{len(references) - 1}"

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in someone's string is not the reader's concern
            tree = ast.parse(REFERENCE.sub(keep, expression).strip(), mode="eval")
        return _Folder(references, lookup).fold(tree.body)
    except Unreadable:
        raise
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise Unreadable(f"is not an expression that can be read ({type(error).__name__})") from None
    except (TypeError, ArithmeticError, LookupError) as error:
        raise Unreadable(f"has no value ({type(error).__name__})") from None


class _Folder:
    """One pass over one expression's tree."""

    def __init__(self, references: list[str], lookup: Callable[[str], Value]) -> None:
        self._references = references
        self._lookup = lookup

    def fold(self, node: ast.expr) -> Value:
        method = getattr(self, f"_fold_{type(node).__name__.lower()}", None)
        if method is None:
            self._refuse(node)
        return _bounded(method(node))

    def _refuse(self, node: ast.AST) -> NoReturn:
        text = ast.unparse(node)
        text = re.sub(rf"{_PLACEHOLDER}(\d+)", lambda m: "@" + self._references[int(m.group(1))], text)
        text = text if len(text) <= _ABBREVIATED else text[: _ABBREVIATED - 3] + "..."
        raise Unreadable(f"needs {text!r}, which is not run")

    def _fold_constant(self, node: ast.Constant) -> Value:
        if isinstance(node.value, bytes | complex) or node.value is ...:
            self._refuse(node)
        if isinstance(node.value, str) and _PLACEHOLDER in node.value:
            self._refuse(node)
        return node.value

    def _fold_name(self, node: ast.Name) -> Value:
        if not node.id.startswith(_PLACEHOLDER):
            self._refuse(node)
        return self._lookup(self._references[int(node.id.removeprefix(_PLACEHOLDER))])

    def _fold_list(self, node: ast.List) -> Value:
        return [self.fold(item) for item in node.elts]

    def _fold_tuple(self, node: ast.Tuple) -> Value:
        return tuple(self.fold(item) for item in node.elts)

    def _fold_dict(self, node: ast.Dict) -> Value:
        result = {}
        for key, value in zip(node.keys, node.values, strict=True):
            name = self.fold(key) if key is not None else self._refuse(node)
            if not isinstance(name, str | int | float):
                self._refuse(node)
            result[name] = self.fold(value)
        return result

    def _fold_joinedstr(self, node: ast.JoinedStr) -> Value:
        parts = []
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                if part.format_spec is not None or part.conversion != -1:
                    self._refuse(node)
                part = part.value
            value = self.fold(part)
            if not isinstance(value, str | int | float):
                self._refuse(node)
            parts.append(str(value))
        return "".join(parts)

    def _fold_unaryop(self, node: ast.UnaryOp) -> Value:
        value = self.fold(node.operand)
        if isinstance(node.op, ast.Not) and not isinstance(value, _SYMBOLS):
            return not value
        if isinstance(node.op, ast.USub | ast.UAdd) and is_number(value):
            return -value if isinstance(node.op, ast.USub) else value
        self._refuse(node)

    def _fold_binop(self, node: ast.BinOp) -> Value:
        left, right = self.fold(node.left), self.fold(node.right)
        operation = _ARITHMETIC.get(type(node.op))
        numbers = is_number(left) and is_number(right)
        joined = (
            isinstance(node.op, ast.Add)
            and type(left) is type(right)
            and isinstance(left, str | list | tuple)
        )
        repeated = (
            isinstance(node.op, ast.Mult) and isinstance(left, str | list | tuple) and type(right) is int
        )
        if operation is None or not (numbers or joined or repeated):
            self._refuse(node)
        if repeated and len(left) * right > MAX_ITEMS:
            raise Unreadable(f"repeats {len(left)} items {right} times, past {MAX_ITEMS}")
        return operation(left, right)

    def _fold_boolop(self, node: ast.BoolOp) -> Value:
        for item in node.values:
            value = self.fold(item)
            if isinstance(value, _SYMBOLS):
                self._refuse(node)
            if bool(value) != isinstance(node.op, ast.And):
                break
        return value

    def _fold_compare(self, node: ast.Compare) -> Value:
        left = self.fold(node.left)
        for kind, item in zip(node.ops, node.comparators, strict=True):
            right = self.fold(item)
            scalar = all(value is None or isinstance(value, str | int | float) for value in (left, right))
            comparison = _COMPARISONS.get(type(kind))
            if comparison is None or not scalar:
                self._refuse(node)
            if not comparison(left, right):
                return False
            left = right
        return True

    def _fold_ifexp(self, node: ast.IfExp) -> Value:
        test = self.fold(node.test)
        if isinstance(test, _SYMBOLS):
            self._refuse(node)
        return self.fold(node.body if test else node.orelse)

    def _fold_subscript(self, node: ast.Subscript) -> Value:
        value = self.fold(node.value)
        if isinstance(node.slice, ast.Slice):
            bounds = [
                None if b is None else self.fold(b)
                for b in (node.slice.lower, node.slice.upper, node.slice.step)
            ]
            if not isinstance(value, str | list | tuple) or any(
                type(b) not in (int, type(None)) for b in bounds
            ):
                self._refuse(node)
            return value[slice(*bounds)]
        index = self.fold(node.slice)
        if isinstance(value, WeightFile) and isinstance(index, str):
            return replace(value, keys=(*value.keys, index))
        if isinstance(value, dict) and isinstance(index, str | int | float):
            return value[index]
        if isinstance(value, str | list | tuple) and isinstance(index, int):
            return value[index]
        self._refuse(node)

    def _fold_attribute(self, node: ast.Attribute) -> Value:
        if self._foreign(node):
            self._refuse(node)
        value = self.fold(node.value)
        if isinstance(value, Component) and node.attr in {"load_state_dict", "load_old_state_dict"}:
            return Loader(value.id)
        self._refuse(node)

    def _foreign(self, node: ast.expr) -> bool:
        """Whether a chain of attributes and calls starts at a name of Python's, such as `torch` or `open`."""
        while isinstance(node, ast.Attribute | ast.Call):
            node = node.value if isinstance(node, ast.Attribute) else node.func
        return isinstance(node, ast.Name) and not node.id.startswith(_PLACEHOLDER)

    def _fold_call(self, node: ast.Call) -> Value:
        name = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
        if name in _READERS:
            path = self._argument(node, "f", "filename")
            return WeightFile(path) if isinstance(path, str) else self._refuse(node)
        if name in {"torch.randn", "torch.rand"}:
            return self._noise(node)
        if name in _CASTS or name in {
            "len",
            "min",
            "max",
            "list",
            "tuple",
            "torch.tensor",
            "torch.as_tensor",
        }:
            return self._builtin(name, node)
        if isinstance(node.func, ast.Attribute):
            if node.func.attr in _SEEN_THROUGH:
                value = self.fold(node.func.value)
                return value if isinstance(value, _SYMBOLS) or is_number(value) else self._refuse(node)
            if node.func.attr == "set_timesteps":
                return self._timesteps(node.func.value, node)
        if self._foreign(node.func):
            self._refuse(node)
        loader = self.fold(node.func)
        source = self._argument(node, "state_dict", "old_state_dict") if isinstance(loader, Loader) else None
        if not isinstance(source, WeightFile):
            self._refuse(node)
        return Load(loader.network, source)

    def _argument(self, node: ast.Call, *names: str) -> Value:
        """The first argument; the others (map_location, strict, device) stay unread."""
        for argument in node.args[:1]:
            return self.fold(argument)
        for keyword in node.keywords:
            if keyword.arg in names:
                return self.fold(keyword.value)
        self._refuse(node)

    def _noise(self, node: ast.Call) -> Noise:
        sizes = [self.fold(argument) for argument in node.args] or [self._argument(node, "size")]
        shape = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else tuple(sizes)
        if not shape or any(type(size) is not int for size in shape):
            self._refuse(node)
        return Noise(shape)

    def _timesteps(self, scheduler: ast.expr, node: ast.Call) -> Timesteps:
        owner, steps = self.fold(scheduler), self._argument(node, "num_inference_steps")
        if not isinstance(owner, Component) or type(steps) is not int:
            self._refuse(node)
        return Timesteps(owner.id, steps)

    def _builtin(self, name: str, node: ast.Call) -> Value:
        values = [self.fold(argument) for argument in node.args]
        first = values[0] if values else self._refuse(node)
        if name in {"min", "max"}:
            items = values if len(values) > 1 else first
            if not isinstance(items, list | tuple) or not items or not all(map(is_number, items)):
                self._refuse(node)
            return min(items) if name == "min" else max(items)
        if name.startswith("torch."):
            return first if is_number(first) or isinstance(first, WeightFile) else self._refuse(node)
        if name == "float" and isinstance(first, WeightFile):
            return first
        if len(values) != 1 or node.keywords:
            self._refuse(node)
        if name == "len" and isinstance(first, str | list | tuple):
            return len(first)
        if name in {"list", "tuple"} and isinstance(first, str | list | tuple):
            return list(first) if name == "list" else tuple(first)
        if name in _CASTS and (first is None or isinstance(first, str | int | float)):
            return _CASTS[name](first)
        self._refuse(node)


def _bounded(value: Value) -> Value:
    if isinstance(value, int) and abs(value) >= 2**63:
        raise Unreadable("makes a number past 64 bits")
    limit = 10 * MAX_ITEMS if isinstance(value, str) else MAX_ITEMS
    if isinstance(value, str | list | tuple | Mapping) and len(value) > limit:
        raise Unreadable(f"makes {len(value)} items, more than {limit}")
    return value
