"""The bundled model's artifact: found in the cache, exported by another process when absent."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_layering import ALLOWED

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


def test_the_name_follows_all_that_an_export_may_import() -> None:
    assert {folder.name for folder in module.SOURCES} == ALLOWED["export"]
    assert all((folder / "__init__.py").is_file() for folder in module.SOURCES)


def test_the_name_follows_the_bundle_the_version_and_the_sources(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, sources = tmp_path / "bundle", tmp_path / "export"
    (sources / "passes").mkdir(parents=True)
    bundle.mkdir()
    monkeypatch.setattr(module, "BUNDLE", bundle)
    monkeypatch.setattr(module, "SOURCES", (sources,))
    keys = []
    for path in (bundle / "weights", sources / "artifact.py", sources / "passes" / "fold.py"):
        for text in ("a", "b"):
            path.write_text(text)
            keys.append(module._key())
            assert module._key() == keys[-1]
    monkeypatch.setattr(module.volcast, "__version__", "9.9", raising=False)
    keys.append(module._key())
    assert len(set(keys)) == 7


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
