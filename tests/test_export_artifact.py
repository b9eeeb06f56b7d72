"""Bundles of the zoo, read from their configs with random weights, become artifacts that agree with MONAI."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler

from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle
from volcast.export.kernel_launches import use_launches
from volcast.export.networks import Denoiser, plain_modules
from volcast.export.to_cubin import artifact_uses
from volcast.runtime import artifact as artifacts
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.noise import request_noise
from volcast.runtime.pipeline import load
from volcast.runtime.programs import Programs
from volcast.runtime.quality import QualityBudget
from volcast.runtime.spec import ArtifactSpec, ConditionSpec, Precision, SchedulerSpec

ZOO = ["brats_3d", "brats_2d", "brain_ldm", "maisi_rflow"]


def relative(result: np.ndarray, wanted: torch.Tensor) -> float:
    exact = wanted.double().numpy()
    assert np.linalg.norm(exact) > 0.1, "the network outputs nothing: this test would prove nothing"
    return float(np.linalg.norm(result - exact) / np.linalg.norm(exact))


def check_kernel_uses(artifact: Path, spec: ArtifactSpec) -> None:
    """Every norm, softmax and phase convolution of the graphs is found, with launches or a reason."""
    uses = artifact_uses(artifact, spec, 1)
    nodes = Counter(
        (program, node.op_type)
        for program in {"step", "decode", "encode"} & spec.programs.keys()
        for node in onnx.load(artifact / f"{program}.onnx", load_external_data=False).graph.node
    )
    found = Counter((use.program, use.operation) for use in uses)
    for program in {program for program, _ in nodes}:
        heads = found[program, "output_head"]
        assert found[program, "group_norm"] + heads == nodes[program, "GroupNormalization"] > 0
        assert found[program, "attention"] == nodes[program, "Softmax"]
        assert found[program, "upsample_convolution"] == nodes[program, "ConvTranspose"]
        assert found[program, "input_head"] <= 1 and heads <= 1
    for use in uses:
        try:
            assert use_launches(use, torch.float16, 90)
        except ValueError as error:
            # The narrowed networks have channels and heads that a contract refuses.
            assert re.search(r"multiple of|need", str(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_zoo_bundles_export_and_agree_with_monai(zoo_bundle: Any, zoo_artifact: Any, name: str) -> None:
    bundle, folder = zoo_bundle(name), zoo_artifact(name)
    spec = artifacts.read_artifact(folder)
    check_kernel_uses(folder, spec)
    # MAISI adds its conditions to the time embedding: what follows depends on both and stays in the step.
    share = 1 if name == "maisi_rflow" else 0.85
    assert spec.programs["step"].nodes < share * spec.programs["step"].nodes_before

    programs = Programs(folder, spec, open_engine("onnxruntime"))
    generator = torch.Generator().manual_seed(1)
    sizes = bundle.latent_shape[1:]
    x = torch.randn((2, *bundle.latent_shape), generator=generator)
    timesteps = torch.tensor([10.0, 900.0])
    given: dict[str, torch.Tensor] = {}
    for condition in bundle.conditions:
        shape = [sizes[int(size[1:])] if isinstance(size, str) else size for size in condition.shape]
        value = torch.rand((2, *shape), generator=generator)
        given[condition.name] = (100 * value).long() if condition.dtype == "int64" else value

    arrays = {key: value.numpy() for key, value in given.items()}
    crossing = {
        "x": x.numpy(),
        "row": programs.call("schedule", {"timesteps": timesteps.numpy()})["rows"],
        **arrays,
    }
    if "prepare" in spec.programs:
        wanted = [tensor.name for tensor in spec.programs["prepare"].inputs]
        crossing |= programs.call("prepare", {key: arrays[key] for key in wanted})
    inputs = [tensor.name for tensor in spec.programs["step"].inputs]
    result = programs.call("step", {key: crossing[key] for key in inputs})["out"]
    with torch.no_grad():
        expected = Denoiser(bundle.unet, tuple(given))(x, timesteps, *given.values())
    # The budget for one step in float32.
    assert relative(result, expected) < 1e-4

    image = programs.call("decode", {"z": x.numpy()})["image"]
    with torch.no_grad():
        decoded = plain_modules(bundle.autoencoder).decode(x)
        mean = plain_modules(bundle.autoencoder).encode(decoded)[0]
    assert relative(image, decoded) < 1e-4
    assert relative(programs.call("encode", {"image": decoded.numpy()})["z_mu"], mean) < 1e-4


def test_class_labels_reach_the_network(tmp_path: Path) -> None:
    unet = DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=1, channels=(8, 16), norm_num_groups=8,
        attention_levels=(False, False), num_class_embeds=4, num_head_channels=8,
    ).eval().requires_grad_(False)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    labels = ConditionSpec(name="class_labels", dtype="int64", shape=(), minimum=0, maximum=3)
    bundle = Bundle(
        name="classes", unet=unet, autoencoder=None, scheduler=SchedulerSpec(), scale_factor=1.0,
        latent_shape=(1, 8, 8), spacing_mm=(1.0, 1.0), conditions=(labels,), provenance={},
        quality=QualityBudget(ms_ssim=0.9),
    )  # fmt: skip
    export_bundle(bundle, tmp_path / "artifact")
    model = load(tmp_path / "artifact", engine="onnxruntime")
    assert model.spec.quality == QualityBudget(ms_ssim=0.9)
    made = model.sample(steps=1, condition={"class_labels": 1}, compat="monai-1.6").array
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    scheduler.set_timesteps(1)
    noise = torch.from_numpy(request_noise(0, range(1), 0, (1, 8, 8)))
    out = unet(noise, scheduler.timesteps.float(), class_labels=torch.tensor([1]))
    wanted = scheduler.step(out, int(scheduler.timesteps[0]), noise)[0]
    assert relative(made[None, None], wanted) < 1e-4
    for label in (4, -7):
        with pytest.raises(ValueError, match=r"class_labels reaches from .*: need 0.*3"):
            model.sample(steps=1, condition={"class_labels": label})


@pytest.mark.parametrize("batch", [(0, 4), (4, 2), (1, 10**6)])
def test_an_empty_batch_range_is_refused_before_any_work(tmp_path: Path, batch: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"\[export\] batch=.*: need 1 <= smallest <= largest <= 4096"):
        export_bundle(None, tmp_path / "artifact", batch=batch)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    with pytest.raises(ValueError, match="exists"):
        export_bundle(None, tmp_path / "artifact")  # type: ignore[arg-type]


def test_precisions_are_the_manifests() -> None:
    assert [precision.value for precision in Precision] == ["fp32", "fp16", "bf16"]
