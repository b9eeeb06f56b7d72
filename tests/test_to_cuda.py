"""`volcast build --target cuda`: device programs that run, stored whole, and every network of the zoo."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from onnx_oracle import BUDGET, check_outputs, onnx_outputs, program_inputs, relative
from safetensors.torch import load_file
from torch import Tensor

from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle
from volcast.export.cuda_report import as_text
from volcast.export.device_passes.fuse_attention import fuse_attention
from volcast.export.device_passes.fuse_layout import fuse_layout
from volcast.export.draft import Draft
from volcast.export.lower import lower
from volcast.export.to_cuda import build_cuda, device_draft, stored_weights
from volcast.runtime.artifact import MANIFEST, read_artifact
from volcast.runtime.atomic import sha256
from volcast.runtime.device.executor import Executor
from volcast.runtime.device.program import PROGRAMS, WEIGHTS, DevicePrograms, Operation, read_programs
from volcast.runtime.spec import Precision, SchedulerSpec

ZOO = ["brats_3d_generative", "brats_3d", "brats_2d", "brain_ldm", "maisi_rflow", "mednist_ddpm"]
RAW = {"transpose", "reshape", "softmax", "matmul", "einsum", "expand"}
CPU = torch.device("cpu")


def run(programs: DevicePrograms, folder: Path, name: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """A stored program on the CPU, in the types in which the engine gives it its inputs."""
    program, stored = programs.programs[name], load_file(folder / WEIGHTS)
    weights = {key: stored[f"{name}/{key}"] for key in program.weights()}
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[programs.precision]
    given = {key: value.to(dtype if value.ndim > 2 else torch.float32) for key, value in inputs.items()}
    specs = {key: (tuple(value.shape), value.dtype) for key, value in given.items()}
    executor = Executor(program, weights, specs, CPU)
    for key, value in given.items():
        offset = program.offsets.get(key)
        executor.inputs[key].copy_(value if offset is None else value + weights[offset])
    executor.run()
    return [executor.outputs[key] for key in program.outputs]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small 2D model in pixel space, exported. Copy it before a change."""
    unet = DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=1, channels=(8, 16), norm_num_groups=4,
        attention_levels=(False, True), num_head_channels=8,
    ).eval().requires_grad_(False)  # fmt: skip
    return exported(unet, tmp_path_factory.mktemp("small") / "artifact")


def exported(unet: DiffusionModelUNet, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    bundle = Bundle(
        name="small", unet=unet, autoencoder=None, scheduler=SchedulerSpec(), scale_factor=1.0,
        latent_shape=(1, 8, 8), spacing_mm=(1.0, 1.0), conditions=(), provenance={},
    )  # fmt: skip
    export_bundle(bundle, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("precision", list(Precision))
def test_what_is_stored_runs(small: Path, tmp_path: Path, precision: Precision) -> None:
    told: list[tuple[int, int]] = []
    built = build_cuda(small, tmp_path / "cuda", precision=precision, progress=lambda *one: told.append(one))
    assert told == [(0, 1), (1, 1)]
    assert sorted(path.name for path in (tmp_path / "cuda").iterdir()) == [PROGRAMS, WEIGHTS]
    assert read_programs(tmp_path / "cuda", sha256(small / MANIFEST)) == built
    stored = load_file(tmp_path / "cuda" / WEIGHTS)
    assert stored.keys() == {f"step/{name}" for name in built.programs["step"].weights()}
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    for name, value in stored.items():
        assert value.dtype == (torch.float32 if value.ndim == 1 else dtypes[precision]), name

    spec = read_artifact(small)
    for batch, large in ((1, "0"), (2, "1")):
        inputs = program_inputs(spec, spec.programs["step"], batch, large)
        (wanted,) = onnx_outputs(small / "step.onnx", inputs)
        (result,) = run(built, tmp_path / "cuda", "step", inputs)
        # Each launch rounds its result once more; their errors grow at most in proportion to their number.
        rounding = torch.finfo(dtypes[precision]).eps / 2
        allowed = BUDGET if precision is Precision.FP32 else len(built.programs["step"].operations) * rounding
        assert relative(result, wanted) < allowed


def test_half_precision_weights_are_rounded_once(small: Path) -> None:
    draft = device_draft(small / "step.onnx")
    stored = stored_weights(draft, Precision.BF16)
    for name, value in stored.items():
        assert torch.equal(value, draft.weights[name].to(value.dtype)), name


def test_what_comes_from_vectors_alone_stays_float32() -> None:
    """A product of the condition meets float32; the same kind of product on tokens meets the precision."""
    draft = Draft(
        inputs=("x", "row"), outputs=("out", "y"), shapes={"x": (None, None, 8), "row": (None, 8)},
        operations=(
            Operation(kind="columns", inputs=("row",), outputs=("c",), settings={"start": 0, "stop": 4}),
            Operation(kind="linear", inputs=("c", "w", "b"), outputs=("y",)),
            Operation(kind="linear", inputs=("x", "v"), outputs=("out",)),
        ),
        weights={"w": torch.ones(4, 4), "b": torch.ones(4), "v": torch.ones(8, 8)},
    )  # fmt: skip
    dtypes = {name: value.dtype for name, value in stored_weights(draft, Precision.FP16).items()}
    assert dtypes == {"w": torch.float32, "b": torch.float32, "v": torch.float16}


def test_a_weight_that_overflows_is_named() -> None:
    draft = Draft(
        inputs=("x",), outputs=("out",), shapes={"x": (None, None, 4)}, weights={"heavy": torch.full((4, 4), 1e5)},
        operations=(Operation(kind="linear", inputs=("x", "heavy"), outputs=("out",)),),
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"^\[build\] weight heavy reaches 100000: too large for fp16; use --precision "
    ):
        stored_weights(draft, Precision.FP16)
    assert stored_weights(draft, Precision.BF16)["heavy"].dtype == torch.bfloat16


def test_a_folder_is_replaced_only_if_it_was_built_before(small: Path, tmp_path: Path) -> None:
    place = tmp_path / "cuda"
    build_cuda(small, place, precision=Precision.FP32)
    before = (place / WEIGHTS).read_bytes()
    with pytest.raises(
        ValueError, match=r"^\[build\] .*cuda exists: remove it, choose another name, or pass --force$"
    ):
        build_cuda(small, place)
    assert (place / WEIGHTS).read_bytes() == before
    assert build_cuda(small, place, replace=True).precision == "fp16"
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("keep")
    with pytest.raises(
        ValueError, match=r"^\[build\] .*mine holds no programs\.json, something else: it is not replaced"
    ):
        build_cuda(small, other, replace=True)
    assert (other / "notes.txt").read_text() == "keep"


def test_an_artifact_without_device_operations_is_left_as_it_was(gaussian: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gaussian"
    shutil.copytree(gaussian, folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        ValueError, match=r"^\[build\] \w+ \w+: no device operation: .* \(--engine onnxruntime\)$"
    ):
        build_cuda(folder)
    assert sorted(folder.rglob("*")) == before


def test_tensors_that_the_manifest_does_not_describe_are_refused(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(small, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["programs"]["step"]["outputs"][0]["shape"][1] = 2
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"^\[build\] step\.onnx: out has shape .* where the manifest says .*export it"
    ):
        build_cuda(folder)
    assert not (folder / "engines").exists()


def test_the_report_counts_every_operation(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(small, folder)
    built = build_cuda(folder)
    first, onnx, device, last = as_text(built, folder / "engines" / "cuda").splitlines()
    spec, operations = read_artifact(folder), built.programs["step"].operations
    views = sum(one.kind in ("columns", "tokens", "volume") for one in operations)
    launched = len(operations) - views
    assert first.endswith(f"ONNX operators, {launched} launched operations, {views} views")
    assert int(first.split()[1]) >= spec.programs["step"].nodes
    for line, count in ((onnx, int(first.split()[1])), (device, launched)):
        assert sum(int(part.split()[0]) for part in line.split(maxsplit=1)[1].split(", ")) == count
    assert "4 attention" in device
    assert last.startswith(f"{folder / 'engines' / 'cuda'}: small in fp16, weights ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_network_of_the_zoo(zoo_artifact: Any, tmp_path: Path, name: str) -> None:
    """Lowered, laid out, fused, through all passes: the same numbers after each; then built in half precision."""
    folder = zoo_artifact(name)
    spec = read_artifact(folder)
    names = [one for one in ("step", "decode", "encode") if one in spec.programs]
    for one in names:
        program = spec.programs[one]  # type: ignore[index]
        path = folder / program.file
        raw = lower(path)
        laid = fuse_layout(raw)
        fused = fuse_attention(laid)
        drafts = (raw, laid, fused, device_draft(path))
        # Two sizes of the step and both batches; the autoencoder costs more.
        for batch, large in ((1, "0"), (2, "12")) if one == "step" else ((2, "1"),):
            inputs = program_inputs(spec, program, batch, large)
            outputs = onnx_outputs(path, inputs)
            for draft in drafts:
                check_outputs(draft, inputs, outputs)
        kinds = Counter(operation.kind for operation in fused.operations)
        assert not RAW & kinds.keys()
        assert kinds["attention"] == sum(operation.kind == "softmax" for operation in raw.operations)
    built = build_cuda(folder, tmp_path / "cuda", precision=Precision.FP16)
    assert list(built.programs) == names
