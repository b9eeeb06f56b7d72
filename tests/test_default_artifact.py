"""The bundled model's artifact: found in the cache, exported by another process when absent."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from volcast.runtime import default_artifact as module
from volcast.runtime.default_artifact import BUNDLE, default_artifact
from volcast.runtime.pipeline import load


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "volcast"


def exporting(monkeypatch: pytest.MonkeyPatch, artifact: Path | None) -> list[list[str]]:
    """Stands in for the export's process, which tests of `export` cover; notes the command."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if artifact is not None:
            shutil.copytree(artifact, command[-1])
        return subprocess.CompletedProcess(command, 0 if artifact else 2)

    monkeypatch.setattr(module.subprocess, "run", run)
    return commands


def test_it_is_exported_once(gaussian: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    commands = exporting(monkeypatch, gaussian)
    folder = default_artifact()
    assert folder.parent == cache and folder.name.startswith("hippocampus-")
    assert commands == [[sys.executable, "-m", "volcast", "export", str(BUNDLE), "-o", str(folder)]]
    assert "once" in capsys.readouterr().err
    assert default_artifact() == folder and len(commands) == 1
    assert load(engine="onnxruntime").spec.name == "gaussian"


def test_the_name_follows_the_bundle_and_the_version(cache: Path, tmp_path: Path, monkeypatch) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    monkeypatch.setattr(module, "BUNDLE", bundle)
    keys = []
    for text in ("a", "b"):
        (bundle / "weights").write_text(text)
        keys.append(module._key())
    monkeypatch.setattr(module.volcast, "__version__", "9.9", raising=False)
    keys.append(module._key())
    assert len(set(keys)) == 3


def test_a_failed_export_and_missing_packages_are_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporting(monkeypatch, None)
    with pytest.raises(ValueError, match=r"failed \(exit code 2\)"):
        default_artifact()
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "monai" else object())
    with pytest.raises(ValueError, match=r"needs monai: pip install 'volcast\[export\]'"):
        default_artifact()


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        default_artifact()
