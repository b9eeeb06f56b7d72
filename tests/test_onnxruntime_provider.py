"""ONNX Runtime's execution providers: a missing one is named, and none hands a network to the CPU unasked."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import onnxruntime
import pytest

import volcast
from volcast.runtime import engine_onnxruntime
from volcast.runtime.artifact import read_artifact
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.engine_name import EngineName
from volcast.runtime.engine_onnxruntime import OnnxRuntimeEngine
from volcast.runtime.onnxruntime_provider import PROVIDERS, Provider

SIZES = {"batch": 1, "steps": 3, "d0": 4, "d1": 2, "d2": 6}


def test_every_provider_is_an_engine() -> None:
    assert {name for name in get_args(EngineName) if name.startswith("onnxruntime-")} == PROVIDERS.keys()


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_missing_provider_says_how_to_get_it(name: str) -> None:
    provider = PROVIDERS[name]
    if provider.name in onnxruntime.get_available_providers() or _installed(provider):
        pytest.skip(f"{provider.name} is here")
    with pytest.raises(
        ValueError, match=rf"^\[engine\] {name}: this ONNX Runtime .* has no {provider.name}; pip "
    ) as e:
        open_engine(name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_memory_limit_is_refused_with_the_engine_that_keeps_one(name: str) -> None:
    other = {
        "onnxruntime-cuda": "cuda",
        "onnxruntime-tensorrt": "tensorrt",
        "onnxruntime-tensorrt-rtx": "tensorrt-rtx",
    }
    with pytest.raises(
        ValueError,
        match=rf"^\[engine\] memory_limit=2GiB: {name} keeps none: .*; use --engine {other.get(name, 'openvino')}$",
    ):
        open_engine(name, 1, "2GiB")


def test_a_provider_that_cannot_take_a_network_is_refused(
    gaussian: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure's provider runs calls to its service alone: everything else would go to the CPU."""
    azure = Provider(name="AzureExecutionProvider", device="GPU", install="", unlimited="")
    if azure.name not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no provider that takes nothing")
    monkeypatch.setitem(engine_onnxruntime.PROVIDERS, "onnxruntime-azure", azure)
    engine, programs = OnnxRuntimeEngine(1, "onnxruntime-azure"), read_artifact(gaussian).programs
    with pytest.raises(
        ValueError, match=r"^\[engine\] onnxruntime-azure cannot take step.onnx: .*CPU.*; use another"
    ):
        engine.open(gaussian / "step.onnx", programs["step"], SIZES)
    # What runs once a request stays on the host.
    rows = engine.open(gaussian / "schedule.onnx", programs["schedule"], SIZES)(
        {"timesteps": np.zeros(3, np.float32)}
    )
    assert rows["rows"].shape == (3, 2)


def test_the_openvino_plug_in(gaussian: Path) -> None:
    pytest.importorskip("onnxruntime_ep_openvino")
    if "GenuineIntel" not in Path("/proc/cpuinfo").read_text():
        with pytest.raises(
            ValueError, match=r"onnxruntime_ep_openvino knows no device .* use another engine"
        ):
            open_engine("onnxruntime-openvino", 1)
        return
    model = volcast.load(gaussian, engine="onnxruntime-openvino", threads=1)
    volume, plain = (
        model.sample(steps=4),
        volcast.load(gaussian, engine="onnxruntime", threads=1).sample(steps=4),
    )
    assert volume.report is not None and volume.report.engine == model.engine.name == "onnxruntime-openvino"
    # A step rounds three times, four steps and the average of two channels: values are of order one.
    np.testing.assert_allclose(volume.array, plain.array, atol=16 * 2.0**-24 * np.abs(plain.array).max())


def _installed(provider: Provider) -> bool:
    return provider.plugin is not None and engine_onnxruntime.find_spec(provider.plugin) is not None
