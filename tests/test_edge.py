"""docs/edge.md: its commands exist with their options, and its figures are those that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from volcast.__main__ import COMMANDS, _Lazy
from volcast.benchmarks.edge import as_text
from volcast.benchmarks.engine_report import as_markdown
from volcast.export.pack_targets import TARGETS
from volcast.runtime.engine_name import EngineName
from volcast.runtime.pack import PackTarget

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "edge.md").read_text(encoding="utf-8")
COMMAND = re.compile(r"^(?:\S+/)?volcast (\w+)(.*)$", re.MULTILINE)


def last(name: str) -> dict[str, Any]:
    lines = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8").splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def test_its_commands_exist_with_their_options() -> None:
    group = typer.main.get_command(typer.Typer(cls=_Lazy, callback=lambda: None))
    shown = COMMAND.findall("\n".join(re.findall(r"```\n(.*?)```", DOCUMENT, re.DOTALL)))
    assert {name for name, _ in shown} >= {"export", "build", "pack", "info", "sample"}
    for name, rest in shown:
        assert name in COMMANDS
        command = group.get_command(None, name)  # type: ignore[attr-defined, arg-type]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"(?<= )--?[a-z][a-z\-]*", rest)) <= known, f"volcast {name}{rest}"


def test_its_targets_are_all_there_are() -> None:
    listed = re.findall(r"^\| `([a-z][a-z\-]*)`[^|]*\| ([^|]*) \|", DOCUMENT, re.MULTILINE)
    engines = {target: re.findall(r"--engine ([a-z\-]+)", what) for target, what in listed}
    assert engines == {target: [packed.engine] if packed.engine else [] for target, packed in TARGETS.items()}
    assert set(get_args(PackTarget)) == TARGETS.keys()
    assert {packed.engine for packed in TARGETS.values()} <= {"", *get_args(EngineName)}


@pytest.mark.parametrize("text", [as_text(last("edge.jsonl")), as_markdown(last("engines.jsonl"))])
def test_its_figures_were_measured(text: str) -> None:
    assert text in DOCUMENT
    assert "@@" not in DOCUMENT, "a placeholder was left"
