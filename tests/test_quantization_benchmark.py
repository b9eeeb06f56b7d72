"""The int8 benchmark: what it runs and counts. Nothing asserts on speed."""

import json
import shutil
from pathlib import Path

import onnx
import typer
from quantization_network import network
from typer.testing import CliRunner

from volcast.benchmarks.layer_profile import layer_profile
from volcast.benchmarks.quantization import as_text, main, race
from volcast.export.qdq import activations, layers, quantized
from volcast.runtime.artifact import digests
from volcast.runtime.spec import ArtifactSpec


def artifact(gaussian: Path, folder: Path, model: onnx.ModelProto) -> Path:
    """The gaussian artifact with `model` as its decoder, 4 channels to 4 channels."""
    shutil.copytree(gaussian, folder)
    for value, name in ((model.graph.input[0], "z"), (model.graph.output[0], "image")):
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [name if each == value.name else each for each in names]
        value.name = name
    onnx.save(model, folder / "decode.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    shape = ["batch", 4, "d0", "d1", "d2"]
    for side, name in (("inputs", "z"), ("outputs", "image")):
        manifest["programs"]["decode"][side] = [{"name": name, "dtype": "float32", "shape": shape}]
    manifest |= {"latent_shape": [2, 4, 4, 4], "files": digests(folder)}
    manifest["provenance"]["quantization_data"] = "made up"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_both_artifacts_run_and_openvino_s_kernels_are_integer_where_they_should(
    gaussian: Path, tmp_path: Path
) -> None:
    plain = network()
    chosen = layers(plain, residuals=True)
    rounded = quantized(plain, chosen, dict.fromkeys(activations(chosen), 4.0))
    folders = (artifact(gaussian, tmp_path / "fp32", plain), artifact(gaussian, tmp_path / "int8", rounded))
    line = race(folders, "decode", "openvino", 1, None, 2, 3)
    assert line["sizes"] == {"d0": 4, "d1": 4, "d2": 4, "batch": 2}
    assert line["fp32_ms"]["count"] == line["speedup"]["count"] == 3
    assert "decode  openvino    1 threads, batch 2, latent 4x4x4" in as_text(line)

    spec = ArtifactSpec.model_validate_json((folders[1] / "manifest.json").read_text())
    program = spec.programs["decode"]
    kernels = layer_profile(folders[1] / program.file, program, line["sizes"], 1, 2)
    convolutions = [each for each in kernels if each.kind.startswith("Convolution")]
    # The first and the last compute in float32, the four between them, one of them transposed, in integers.
    integer = sum(each.layers for each in convolutions if each.kernel.lower().endswith("i8"))
    single = sum(each.layers for each in convolutions if each.kernel.endswith("f32"))
    assert (integer, single) == (4, 2), convolutions
    assert kernels == sorted(kernels, key=lambda each: -each.milliseconds)

    app = typer.Typer()
    app.command()(main)
    output = tmp_path / "result.jsonl"
    given = [
        *map(str, folders),
        "--program",
        "decode",
        "--engine",
        "onnxruntime",
        "--threads",
        "1",
        "--repeats",
        "2",
    ]
    done = CliRunner().invoke(app, [*given, "-o", str(output)])
    assert done.exit_code == 0, done.output
    (written,) = map(json.loads, output.read_text().splitlines())
    assert written["benchmark"] == "quantization" and written["data"] == "made up"
    assert written["engine"] == "onnxruntime" and "fp32_kernels" not in written
    assert written["environment"]["threads"] == 1
