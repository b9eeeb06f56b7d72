"""The engines' benchmark on a small artifact: who ran, who could not and why. Nothing asserts on speed."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from volcast.benchmarks.engines import ENGINES, labelled, main


@pytest.fixture
def stored_in_fp16(gaussian: Path, tmp_path: Path) -> Path:
    """The same model by its manifest, so its volumes are the same bits."""
    folder = tmp_path / "fp16"
    shutil.copytree(gaussian, folder)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"precision": "fp16"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_every_engine_has_a_row_or_a_reason(
    gaussian: Path, stored_in_fp16: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is here")
    output = tmp_path / "r.jsonl"
    chosen = ["onnxruntime", "tensorrt"]
    main([gaussian, stored_in_fp16], engine=chosen, steps=2, repeats=2, threads=1, limit=300, output=output)
    record = json.loads(output.read_text())
    by_name = {engine["name"]: engine for engine in record["engines"]}
    assert list(by_name) == [f"volcast {engine} {label}" for label in ("fp32", "fp16") for engine in chosen]
    for name, engine in by_name.items():
        if "tensorrt" in name:
            assert "pip install" in engine["reason"] and engine["cold_s"] is None
            continue
        assert engine["reason"] is None and engine["relative_l2"] == 0
        assert engine["volume_s"]["count"] == 2 and engine["device_mib"]["maximum"] == 0
        # Its process, its import and its programs come before its first volume.
        assert engine["cold_s"] > engine["volume_s"]["minimum"] > 0
    assert by_name["volcast onnxruntime fp32"]["over_volcast"]["median"] == 1
    assert str(tmp_path) not in output.read_text()
    printed = capfd.readouterr().out
    assert "| onnxruntime fp32 |" in printed and "| onnxruntime fp16 |" in printed
    assert "\n- tensorrt fp32, tensorrt fp16: [tensorrt] it is not installed; pip install" in printed


def test_what_cannot_be_compared_is_refused(gaussian: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two artifacts of one precision"):
        labelled([gaussian, gaussian])
    other = tmp_path / "other"
    shutil.copytree(gaussian, other)
    manifest = json.loads((other / "manifest.json").read_text()) | {"precision": "fp16", "name": "another"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="another and gaussian are two models"):
        labelled([gaussian, other])
    with pytest.raises(ValueError, match=r"engine=\['nonsense'\], repeats=1: need some of onnxruntime, "):
        main([gaussian], engine=["nonsense"], steps=2, repeats=1, threads=1, limit=300, output=None)
    assert ENGINES[0] == "onnxruntime"
