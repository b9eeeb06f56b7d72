"""The bundled model's ONNX programs as other tools see them: valid, inferable, optimisable, norms in one piece."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from torch import nn

from volcast.export.bundle import read_bundle
from volcast.runtime.artifact import read_artifact
from volcast.runtime.default_artifact import BUNDLE
from volcast.runtime.engine_onnxruntime import OnnxRuntimeEngine

PROGRAMS = ("schedule", "prepare", "step", "decode", "encode")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_valid(default_artifact_folder: Path, name: str) -> None:
    path = default_artifact_folder / f"{name}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21}
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert {value.name for value in inferred.graph.value_info} >= {
        name for node in model.graph.node for name in node.output
    } - {value.name for value in model.graph.output}


@pytest.mark.parametrize("name", PROGRAMS)
def test_onnx_runtime_optimises_a_program_fully(
    default_artifact_folder: Path, tmp_path: Path, name: str
) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        default_artifact_folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
    )
    assert onnx.load(tmp_path / "optimised.onnx").graph.node


def test_without_norms_nothing_computes_with_sizes(default_artifact_folder: Path, tmp_path: Path) -> None:
    """Else a provider without GroupNormalization would hand the sizes to the CPU."""
    program = read_artifact(default_artifact_folder).programs["decode"]
    sizes = {"batch": 1, "d0": 4, "d1": 4, "d2": 8}
    engine = OnnxRuntimeEngine(1)
    path = default_artifact_folder / program.file
    plain = engine.without_norms(path, program, sizes, tmp_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert "Conv" in kinds and not kinds & {"GroupNormalization", "Shape", "Gather", "Cast"}
    z = np.random.default_rng(0).standard_normal((1, 4, 4, 4, 8)).astype(np.float32)
    found, wanted = session.run(None, {"z": z})[0], engine.open(path, program, sizes)({"z": z})["image"]
    # Norms of the same operators; some hundred roundings from input to output.
    assert np.linalg.norm(found - wanted) < 200 * 2.0**-24 * np.linalg.norm(wanted)


def test_every_norm_of_the_networks_stays_one_operator(default_artifact_folder: Path) -> None:
    bundle = read_bundle(BUNDLE)
    assert bundle.autoencoder is not None
    networks = {
        "step": bundle.unet,
        "decode": bundle.autoencoder.decoder,
        "encode": bundle.autoencoder.encoder,
    }
    for name, network in networks.items():
        kinds = Counter(
            node.op_type for node in onnx.load(default_artifact_folder / f"{name}.onnx").graph.node
        )
        norms = sum(isinstance(module, nn.GroupNorm) for module in network.modules())
        assert kinds["GroupNormalization"] == norms > 0, name
        assert not kinds.keys() & {"InstanceNormalization", "ReduceMean", "Sqrt"}, name
