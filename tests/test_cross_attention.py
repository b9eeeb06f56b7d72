"""Attention over the tokens of a context on the CUDA engine, in every precision; judged by MONAI in float64."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate
from monai.networks.nets import DiffusionModelUNet
from safetensors.torch import load_file

from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle
from volcast.export.similarity import relative_l2
from volcast.export.to_cuda import DTYPES, build_cuda
from volcast.runtime.artifact import MANIFEST, read_artifact
from volcast.runtime.atomic import sha256
from volcast.runtime.device.executor import Executor
from volcast.runtime.device.memory import Spec
from volcast.runtime.device.program import WEIGHTS, read_programs
from volcast.runtime.engine_cuda import CudaEngine
from volcast.runtime.pipeline import load
from volcast.runtime.programs import Programs
from volcast.runtime.spec import ConditionSpec, Precision, SchedulerSpec

TOKENS, WIDTH = 5, 12
SIDE = 8


@pytest.fixture(scope="module")
def unet() -> DiffusionModelUNet:
    network = DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=1, channels=(16,), norm_num_groups=4,
        attention_levels=(True,), num_head_channels=8, with_conditioning=True, cross_attention_dim=WIDTH,
    ).eval().requires_grad_(False)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # As a trained network's: products keep their size, norms scale by about 1.
        fan = parameter.shape[1:].numel() if parameter.ndim > 1 else 16
        parameter.data = noise / fan**0.5 + float(parameter.ndim == 1 and bool((parameter == 1).all()))
    return network


@pytest.fixture(scope="module")
def artifact(unet: DiffusionModelUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy it before a change."""
    context = ConditionSpec(name="context", shape=(TOKENS, WIDTH), unconditional=0.0)
    bundle = Bundle(
        name="small", unet=unet, autoencoder=None, scheduler=SchedulerSpec(), scale_factor=1.0,
        latent_shape=(1, SIDE, SIDE), spacing_mm=(1.0, 1.0), conditions=(context,), provenance={},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("cross") / "artifact"
    export_bundle(bundle, folder)
    return folder


@pytest.fixture(scope="module", params=list(Precision))
def built(request: pytest.FixtureRequest, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(str(request.param)) / "artifact"
    shutil.copytree(artifact, folder)
    build_cuda(folder, precision=request.param)
    return folder


def precision_of(folder: Path) -> Precision:
    return Precision(folder.parent.name[:4])


@pytest.mark.slow
def test_one_call_of_the_network(unet: DiffusionModelUNet, built: Path) -> None:
    """As near to float64 as MONAI's own network is in the precision, its weights rounded to it."""
    spec, dtype = read_artifact(built), DTYPES[precision_of(built)]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, SIDE, 2 * SIDE, generator=generator).to(dtype)
    context = torch.randn(2, TOKENS, WIDTH, generator=generator).to(dtype)
    t = torch.tensor([10.0, 700.0])
    theirs = {
        kind: copy.deepcopy(unet).to(kind)(x.to(kind), t.to(kind), context.to(kind))
        for kind in (dtype, torch.float64)
    }
    programs = Programs(built, spec, CudaEngine("cpu"))
    given = {"x": x.float().numpy(), "context": context.float().numpy(), "timesteps": t.numpy()}
    row = programs.call("schedule", given)["rows"]
    constants = programs.call("prepare", given)
    out = programs.call("step", {**given, "row": row, **constants})["out"]
    assert_as_accurate(torch.from_numpy(out).to(dtype), theirs[dtype], theirs[torch.float64])


@pytest.mark.slow
def test_guided_samples(built: Path, artifact: Path) -> None:
    """The trajectory is ONNX Runtime's in float32, and a sample's bits are the same alone and in a batch."""
    precision = precision_of(built)
    model, oracle = load(built, CudaEngine("cpu")), load(artifact, "onnxruntime", 1)
    context = np.random.default_rng(2).standard_normal((2, TOKENS, WIDTH)).astype(np.float32)
    conditions = [{"context": one} for one in context]
    settings = {"steps": 3, "guidance": 1.5}
    both = list(model.sample_many(2, 4, batch=2, condition=conditions, **settings))
    for number, (one, alone, theirs) in enumerate(zip(
        both, model.sample_many(2, 4, condition=conditions, **settings),
        oracle.sample_many(2, 4, condition=conditions, **settings), strict=True,
    )):  # fmt: skip
        np.testing.assert_array_equal(one.array, alone.array, err_msg=str(number))
        # 100 operators a call of the network round independently, each by half an eps; guidance makes |1.5| + |-0.5| of it.
        rounding = torch.finfo(DTYPES[precision]).eps / 2 * np.sqrt(100 * 3)
        assert relative_l2(one.array, theirs.array) < 2 * rounding
    assert relative_l2(both[0].array, both[1].array) > 1e-2, "the context changes nothing"


@pytest.mark.slow
def test_keys_and_values_have_the_tokens_type(built: Path) -> None:
    """On tensors without memory, as the fused forms take them: attention reads one type, from one cast."""
    precision = precision_of(built)
    program = read_programs(built / "engines" / "cuda", sha256(built / MANIFEST)).programs["step"]
    stored = load_file(built / "engines" / "cuda" / WEIGHTS)
    weights = {name: stored[f"step/{name}"].to("meta") for name in program.weights()}
    columns = {tensor.name: tensor.shape[-1] for tensor in read_artifact(built).programs["step"].inputs}
    dtype = DTYPES[precision]
    inputs: dict[str, Spec] = {
        "x": ((2, 1, 64, 96), dtype), "row": ((2, int(columns["row"])), torch.float32),
        "constants": ((2, int(columns["constants"])), torch.float32),
    }  # fmt: skip
    bound = Executor(program, weights, inputs, torch.device("meta"), impl="triton")
    attentions = [call for call in bound.calls if call.operation.kind == "attention"]
    lengths = set()
    for call in attentions:
        q, k, v = (x for x in call.inputs if x is not None)
        assert q.dtype == k.dtype == v.dtype == call.outputs[0].dtype == dtype
        lengths.add((q.shape[1], k.shape[1], v.shape[1]))
    assert len(attentions) == 8 and lengths == {(64 * 96,) * 3, (64 * 96, TOKENS, TOKENS)}
    assert [call.operation.inputs for call in bound.calls if call.operation.kind == "cast"] == [
        ("constants", "x")
    ]
    assert bound.peak_bytes() > bound.plan.bytes  # every launch was described
