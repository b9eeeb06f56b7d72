"""A MONAI config (json or yaml) as data: settings on top, `@` references followed, `$` expressions read safely."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from volcast.export.bundle_expression import REFERENCE, Component, Unreadable, Value, evaluate

MAX_BYTES = 2**20
MAX_NODES = 100_000
MAX_DEPTH = 48
_Model = TypeVar("_Model", bound=BaseModel)


def read_data(path: Path) -> tuple[dict[str, Any], str]:
    """The dict in a json or yaml file and the file's sha256. ValueError names the file and what is wrong."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"[bundle] {path}: {error.strerror}; name a json or yaml config") from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"[bundle] {path}: more than {MAX_BYTES} bytes, not a config")
    try:
        data = json.loads(raw) if path.suffix == ".json" else yaml.safe_load(raw)
        _check_size(data)
    # PyYAML's constructors leak these for odd scalars such as `!!int x` and `!!bool x`
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(
            f"[bundle] {path}: {one_line(error) or type(error).__name__}; write valid json or yaml"
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(
            f"[bundle] {path}: {one_line(error) or type(error).__name__}; write valid yaml"
        ) from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"[bundle] {path}: holds no mapping of names to values; write one")
    return data, hashlib.sha256(raw).hexdigest()


def validated(model: type[_Model], data: Any, where: str) -> _Model:
    """`model` made from data; pydantic's first complaint becomes one line that starts with `where`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        value = "" if first["type"] == "missing" or not place else f"={shown(first['input'])}"
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"[bundle] {where}: {place}{value}: {one_line(message)}") from None


class Config:
    """Read access to one config; ids are `a#b#0` or `a::b::0` as in MONAI's ConfigParser."""

    def __init__(self, data: Mapping[str, Any], settings: Mapping[str, Any], known: frozenset[str]) -> None:
        """`settings` replace keys by id; a new top-level key must be one of `known`."""
        self._data: dict[str, Any] = copy.deepcopy(dict(data))
        self._values: dict[str, Value] = {}
        self._open: list[str] = []
        for id, value in settings.items():
            self._set(id, value, known)

    def __contains__(self, id: str) -> bool:
        """Whether there is a value at that id; null counts as none."""
        try:
            return self.raw(id) is not None
        except Unreadable:
            return False

    def has_key(self, id: str) -> bool:
        """Whether the config says anything at that id, null too."""
        try:
            self.raw(id)
        except Unreadable:
            return False
        return True

    def raw(self, id: str) -> Any:
        """What the config says at that id, unread. Unreadable if there is no such id."""
        value: Any = self._data
        for part in split(id):
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and len(part) < 9 and int(part) < len(value):
                value = value[int(part)]
            else:
                raise Unreadable(f"@{id}: the config has no such key")
        return value

    def get(self, id: str) -> Value:
        """The value at that id, references and expressions read; a dict with `_target_` stays a `Component`."""
        id = "#".join(split(id))
        if id in self._values:
            return self._values[id]
        if id in self._open:
            raise Unreadable(f"@{id} refers to itself")
        if len(self._open) >= MAX_DEPTH:
            raise Unreadable(f"@{id}: more than {MAX_DEPTH} references in a chain")
        self._open.append(id)
        try:
            self._values[id] = self._resolve(self.raw(id), id)
        finally:
            self._open.pop()
        return self._values[id]

    def need(self, id: str, remedy: str = "") -> Value:
        """As `get`; what cannot be read becomes a one-line ValueError with the key and the remedy."""
        try:
            return self.get(id)
        except Unreadable as error:
            text = f"={shown(self.raw(id))}" if id in self else ""
            remedy = remedy or f"give its value with --set {'#'.join(split(id))}=..."
            raise ValueError(f"[bundle] {id}{text}: {error}; {remedy}") from None

    def arguments(self, component: str) -> dict[str, Value]:
        """The constructor arguments of a component: its keys without MONAI's own `_..._`."""
        keys = list(self.raw(component))
        unnamed = [key for key in keys if not isinstance(key, str)]  # YAML takes any
        if unnamed:
            raise ValueError(f"[bundle] {component}#{unnamed[0]}: need text for the name of an argument")
        keys = [key for key in keys if not re.fullmatch(r"_\w+_", key)]
        return {key: self.need(f"{component}#{key}") for key in keys}

    def targets(self) -> dict[str, str]:
        """`_target_` of every top-level component, by id."""
        found = {}
        for id, value in self._data.items():
            target = value.get("_target_") if isinstance(value, dict) else None
            if isinstance(target, str):
                found[id] = target
        return found

    def every_target(self) -> dict[str, str]:
        """The same of components inside lists and other components too, such as handlers and transforms."""
        found = {}
        for id, value in self._values_by_id():
            target = value.get("_target_") if isinstance(value, dict) else None
            if isinstance(target, str):
                found[id] = target
        return found

    def expressions(self) -> Iterator[tuple[str, str]]:
        """Every `$` string of the config with its id, in order; those inside lists and dicts too."""
        return (
            (id, value)
            for id, value in self._values_by_id()
            if isinstance(value, str) and value.startswith("$")
        )

    def _values_by_id(self) -> Iterator[tuple[str, Any]]:
        """Whatever the config holds with its id, in order."""
        stack: list[tuple[str, Any]] = list(reversed(self._data.items()))
        while stack:
            id, value = stack.pop()
            yield id, value
            children = (
                value.items()
                if isinstance(value, dict)
                else enumerate(value)
                if isinstance(value, list)
                else ()
            )
            stack.extend(reversed([(f"{id}#{key}", child) for key, child in children]))

    def _set(self, id: str, value: Any, known: frozenset[str]) -> None:
        *parents, last = split(id)
        holder: Any = self._data
        if parents:
            if "#".join(parents) not in self:
                raise ValueError(f"[bundle] --set {id}: the config has no {'#'.join(parents)!r}")
            holder = self.raw("#".join(parents))
        if isinstance(holder, list) and last.isdecimal() and len(last) < 9 and int(last) < len(holder):
            holder[int(last)] = copy.deepcopy(value)
        elif isinstance(holder, dict) and (parents or last in holder or last in known):
            holder[last] = copy.deepcopy(value)
        else:
            names = (
                sorted({*self._data, *known})
                if not parents
                else sorted(holder)
                if isinstance(holder, dict)
                else []
            )
            raise ValueError(
                f"[bundle] --set {id}: no such key; known: {one_line(', '.join(map(str, names)), 400)}"
            )

    def _resolve(self, value: Any, id: str) -> Value:
        if isinstance(value, str):
            return self._resolve_text(value, id)
        if isinstance(value, list):
            return [self._resolve(item, f"{id}#{n}") for n, item in enumerate(value)]
        if isinstance(value, dict):
            if "_target_" in value:
                return Component(id)
            return {key: self._resolve(item, f"{id}#{key}") for key, item in value.items()}
        return value

    def _resolve_text(self, value: str, id: str) -> Value:
        if value.startswith("%"):
            raise Unreadable("macros (%) are not followed")
        if value.startswith("$"):
            return evaluate(value[1:], lambda reference: self._follow(reference, id))
        if REFERENCE.fullmatch(value):
            return self._follow(value[1:], id)
        return value

    def _follow(self, reference: str, id: str) -> Value:
        """`reference` as it stands after `@`; leading separators count levels up from `id` (MONAI's relative ids)."""
        name = reference.replace("::", "#")
        level = len(name) - len(name.lstrip("#"))
        parts = split(id)
        if level > len(parts):
            raise Unreadable(f"@{reference} leaves the config")
        return self.get("#".join([*(parts[:-level] if level else []), name.lstrip("#")]))


def split(id: str) -> list[str]:
    """The parts of an id such as `network_def#channels#0`."""
    return id.replace("::", "#").split("#")


def _check_size(data: Any) -> None:
    stack = [(data, 0)]
    nodes = 0
    while stack:
        value, depth = stack.pop()
        nodes += 1
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_NODES} values or {MAX_DEPTH} levels")
        if isinstance(value, dict | list):
            children = value.values() if isinstance(value, dict) else value
            if isinstance(value, dict) and any(
                isinstance(key, str) and not key.isprintable() for key in value
            ):
                raise ValueError("a key holds control characters")
            stack.extend((child, depth + 1) for child in children)


def one_line(text: object, limit: int = 200) -> str:
    """The text with its whitespace collapsed, shortened."""
    short = " ".join(str(text).split())
    return short if len(short) <= limit else short[: limit - 3] + "..."


def shown(value: object) -> str:
    """A short repr for messages. References can make small configs huge when written out, so never `str` a value."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxstring, brief.maxother = 3, 80, 80
    return one_line(brief.repr(value), 100)
