"""Whole programs after all device passes: the numbers of ONNX Runtime, and what is left to launch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from accuracy import assert_as_accurate
from torch import Tensor, nn

from volcast.export.draft import Draft
from volcast.export.draft_run import run_draft
from volcast.export.lower import lower
from volcast.export.to_cuda import device_draft
from volcast.runtime.artifact import read_artifact
from volcast.runtime.spec import ArtifactSpec, ProgramSpec

ZOO = ["brats_2d", "brain_ldm", "maisi_rflow"]
NETWORKS = {"step": "unet", "decode": "decoder", "encode": "encoder"}
FUSED = ("group_norm", "layer_norm")


def given(spec: ArtifactSpec, program: ProgramSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = {axis.name: axis.multiple for axis in spec.axes} | {"batch": 2}
    sizes |= {name: 2 * size for name, size in sizes.items() if name.endswith("1")}
    shapes = {one.name: [sizes.get(size, size) for size in one.shape] for one in program.inputs}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def check_numbers(path: Path, spec: ArtifactSpec, program: ProgramSpec, draft: Draft) -> None:
    """As close to ONNX Runtime as the raw operations are."""
    feeds = given(spec, program)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    results = zip(run_draft(draft, feeds), run_draft(lower(path), feeds), wanted, strict=True)
    for fused, raw, theirs in results:
        assert_as_accurate(fused, raw, torch.from_numpy(theirs).double())


def check_norms(draft: Draft) -> None:
    """No elementwise launch does what a norm beside it could."""
    for one in draft.operations:
        if one.kind != "pointwise":
            continue
        steps = [step[0] for step in json.loads(one.settings["program"])]
        makers = {draft.producer[name].kind for name in one.inputs if name in draft.producer}
        assert "silu" not in steps or not makers & set(FUSED), one
        for reader in draft.consumers.get(one.outputs[0], ()):
            assert reader.kind not in FUSED or reader.inputs[0] != one.outputs[0] or set(steps) != {"add"}, (
                one
            )


def biases(draft: Draft) -> int:
    """Convolutions that the executor follows with a launch for their bias."""
    return sum(one.kind == "convolution" and len(one.inputs) > 2 for one in draft.operations)


def kinds(draft: Draft) -> Counter[str]:
    return Counter(one.kind for one in draft.operations)


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.GroupNorm) for module in network.modules())


def test_the_bundled_model(default_artifact_folder: Path) -> None:
    spec = read_artifact(default_artifact_folder)
    drafts = {}
    for name in NETWORKS:
        program = spec.programs[name]
        drafts[name] = device_draft(default_artifact_folder / program.file)
        check_numbers(default_artifact_folder / program.file, spec, program, drafts[name])
        check_norms(drafts[name])
    step, decode, encode = (kinds(drafts[name]) for name in NETWORKS)
    views = {"columns", "tokens", "volume"}
    assert {kind: count for kind, count in step.items() if kind not in views} == {
        "input_head": 1, "convolution": 24, "group_norm": 29, "output_head": 1, "upsample_convolution": 2,
        "linear": 55, "layer_norm": 14, "attention": 7,
        # Of seven GEGLUs; of the residual blocks' and transformers' sums that no norm reads first.
        "pointwise": 7 + 5,
    }  # fmt: skip
    assert decode == {
        "linear": 2, "input_head": 1, "convolution": 10, "group_norm": 10, "output_head": 1,
        "upsample_convolution": 2, "pointwise": 3,
    }  # fmt: skip
    assert encode == {
        "input_head": 1, "convolution": 12, "group_norm": 10, "output_head": 1, "linear": 3, "pad": 2, "pointwise": 4,
    }  # fmt: skip
    # A downsampled volume is read by norms, and by the way up as the second part of a concatenation.
    assert [biases(drafts[name]) for name in NETWORKS] == [2, 0, 0]
    assert set(drafts["step"].offsets) == {"row", "constants"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_s_models(zoo_bundle: Any, zoo_artifact: Any, name: str) -> None:
    bundle, folder = zoo_bundle(name), zoo_artifact(name)
    spec = read_artifact(folder)
    networks = {"step": bundle.unet} | (
        {}
        if bundle.autoencoder is None
        else {part: getattr(bundle.autoencoder, NETWORKS[part]) for part in ("decode", "encode")}
    )
    for part, network in networks.items():
        program = spec.programs[part]
        path = folder / program.file
        draft = device_draft(path)
        check_numbers(path, spec, program, draft)
        check_norms(draft)
        found = kinds(draft)
        assert found["group_norm"] + found["output_head"] == norms(network)
        assert found["output_head"] == found["input_head"] == 1
        assert not found.keys() & {"transpose", "softmax", "einsum", "matmul", "transposed_convolution"}
        assert biases(draft) <= 3
        # GEGLUs, and what no norm reads first: before a change of size, a head, an output.
        extra = found["layer_norm"] // 2 + 7
        assert found["pointwise"] <= extra, found
