"""The README's example is run as it stands, on the bundled model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


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
    assert commands == {"export", "verify", "sample", "bench", "info"}
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile
