"""The README's example is run as it stands, on the bundled model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from volcast.__main__ import COMMANDS
from volcast.benchmarks.kernel_report import as_markdown
from volcast.benchmarks.network_report import as_markdown as networks_as_markdown
from volcast.runtime.artifact import read_artifact
from volcast.runtime.interface import NEGATIVE, inputs, outputs

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"


def test_the_example_runs(default_cache: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    environment = {**os.environ, "XDG_CACHE_HOME": str(default_cache)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1)[1] == "(32, 48, 32) (1.0, 1.0, 1.0)\n"
    assert (tmp_path / "hippocampus.nii.gz").stat().st_size > 100_000


def test_every_file_and_command_it_names_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    root = README.parent
    assert "@@" not in text, "a placeholder was left"
    for name in re.findall(r"\]\(([^)h][^)]*)\)", text) + re.findall(r"^\| `(\w+)/`", text, re.MULTILINE):
        assert (root / name).exists(), name
    commands = set(re.findall(r"^    volcast (\w+)", text, re.MULTILINE))
    assert commands == set(COMMANDS)
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_the_kernel_example_runs() -> None:
    text = (DOCS / "kernels.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {
        "x": torch.randn(1, 4, 4, 4, 64).movedim(-1, 1),
        "weight": torch.ones(64),
        "bias": torch.zeros(64),
        "time_embedding": torch.randn(1, 64),
    }
    exec(code, names)  # noqa: S102
    assert names["y"].shape == (1, 64, 4, 4, 4)


def test_the_kernels_table_is_what_was_measured() -> None:
    results = README.parent / "benchmarks" / "results" / "kernels.jsonl"
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert as_markdown(lines) in (DOCS / "kernels.md").read_text(encoding="utf-8")


def test_the_served_tensors_are_those_of_the_bundled_model(default_artifact_folder: Path) -> None:
    spec = read_artifact(default_artifact_folder)
    own = {name for one in spec.conditions for name in (one.name, *(field.name for field in one.fields))}
    own |= {NEGATIVE + name for name in own}
    tensors = [one for one in (*inputs(spec), *outputs(spec)) if one.name not in own]
    rows = re.findall(
        r"^\| `\w+` \| \w+ \[.*$", (DOCS / "serving.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert rows == [f"| `{one.name}` | {one.dtype} {list(one.shape)} | {one.text} |" for one in tensors]


def test_the_networks_table_is_what_was_counted() -> None:
    results = README.parent / "benchmarks" / "results" / "networks.jsonl"
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert networks_as_markdown(lines) in (DOCS / "cuda.md").read_text(encoding="utf-8")
