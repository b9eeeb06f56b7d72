"""Every generative config of MONAI's model zoo and tutorials that other tests do not export, against MONAI (docs/zoo.md).

Each becomes an artifact, and `verify` compares network, autoencoder and volume with MONAI running the bundle, within the
budgets that verification.py derives. BraTS, UKB's and MAISI's: test_export_artifact.py, test_maisi.py; GANs:
test_generator_model.py; ControlNets and SPADE: test_masks.py; tokens: test_token_model.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import VQVAE
from zoo_bundles import Published

from volcast.export.artifact import export_bundle
from volcast.export.bundle_plan import plan_bundle
from volcast.export.verify import verify
from volcast.runtime.pipeline import load

RNG = np.random.default_rng(0)
CONTEXT = RNG.standard_normal((77, 1024)).astype(np.float32)
ZOO: dict[str, tuple[Published, dict[str, Any], float | None]] = {
    "mednist_ddpm": (
        Published(config="mednist_ddpm", settings={
            "image_dim": 16, "network_def#channels": [32, 64, 64], "network_def#num_head_channels": 32,
        }), {}, None),
    "cxr": (
        Published(config="cxr", generative=True, settings={
            "latent_shape": [3, 8, 8], "context_tokens": 77, "autoencoder_def#num_channels": [32, 32, 32, 32],
            "diffusion_def#num_channels": [32, 64, 64], "diffusion_def#num_head_channels": [0, 64, 64],
            "autoencoder_def#num_res_blocks": 1, "diffusion_def#num_res_blocks": 1,
        }), {"context": CONTEXT}, None),
    "2d_ldm": (
        Published(config="ldm_2d", settings={
            "diffusion_train#patch_size": [32, 64], "autoencoder_def#channels": [32, 32, 32],
            "diffusion_def#channels": [32, 32, 64, 64], "autoencoder_def#num_res_blocks": 1, "diffusion_def#num_res_blocks": 1,
        }), {}, None),
    "3d_ldm": (
        Published(config="ldm_3d", generative=True, settings={
            "diffusion_train#patch_size": [16, 32, 16], "autoencoder_def#num_channels": [32, 32, 32],
            "diffusion_def#num_channels": [32, 64, 64], "autoencoder_def#num_res_blocks": 1, "diffusion_def#num_res_blocks": 1,
        }), {}, None),
    "2d_ddpm": (
        Published(config="ddpm_2d", settings={
            "latent_shape": [1, 16, 16], "network_def#channels": [32, 64, 64], "network_def#num_head_channels": 64,
        }), {}, None),
    "3d_ddpm": (
        Published(config="ddpm_3d", settings={
            "latent_shape": [1, 8, 12, 8], "network_def#channels": [32, 32, 64], "network_def#num_head_channels": [0, 0, 64],
            "network_def#num_res_blocks": 1,
        }), {}, None),
    "classifier_free_guidance": (
        Published(config="class_guided_2d", settings={
            "latent_shape": [1, 16, 16], "network_def#channels": [32, 32, 32], "network_def#num_head_channels": 32,
        }), {"context": [[1.0]]}, None),
    "2d_diffusion_autoencoder": (
        Published(config="diffusion_autoencoder_2d", settings={
            "latent_shape": [1, 16, 16], "network_def#channels": [32, 64, 64],
        }), {"context": RNG.standard_normal((64, 1))}, None),
    "VQVAE as latent space": (
        Published(config="vqvae_ldm_3d", settings={
            "latent_shape": [4, 4, 6, 4], "vqvae_def#channels": [16, 16], "vqvae_def#num_res_channels": 16,
            "vqvae_def#embedding_dim": 4, "vqvae_def#num_embeddings": 32, "network_def#channels": [32, 64],
            "network_def#in_channels": 4, "network_def#out_channels": 4,
        }), {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_configs_are_exported_and_agree_with_monai(name: str, tmp_path: Path, generative_keys: Any) -> None:
    published, condition, guidance = ZOO[name]
    bundle = published.read(tmp_path / "bundle", generative_keys)
    export_bundle(bundle, tmp_path / "artifact", batch=(1, 2))
    found = verify(
        tmp_path / "artifact",
        bundle,
        engine="onnxruntime",
        threads=1,
        steps=2,
        condition=condition,
        guidance=guidance,
    )
    assert found.passed, found.as_text()
    assert {check.name for check in found.checks if check.budget is not None} >= {
        "volume",
        "network, step 1, t=999",
    }


def test_a_vqvae_quantises_what_it_decodes(tmp_path: Path, generative_keys: Any) -> None:
    """As MONAI's latent inferer, which never decodes a latent that is no code; its encoder gives codes too."""
    published = ZOO["VQVAE as latent space"][0]
    bundle = published.read(tmp_path / "bundle", generative_keys)
    assert isinstance(bundle.autoencoder, VQVAE)
    export_bundle(bundle, tmp_path / "artifact", batch=(1, 2))
    model = load(tmp_path / "artifact", "onnxruntime", threads=1)
    z = RNG.standard_normal((2, *bundle.latent_shape)).astype(np.float32)
    vqvae = bundle.autoencoder
    with torch.no_grad():
        wanted = vqvae.decode_stage_2_outputs(torch.from_numpy(z)).numpy()
        unquantised = vqvae.decode(torch.from_numpy(z)).numpy()
    decoded = model.decode(z)
    size = np.abs(wanted).max()
    assert np.abs(decoded - wanted).max() < 1e-5 * size < 1e-2 * np.abs(unquantised - wanted).max()
    codes = vqvae.quantizer.quantizer.embedding.weight.detach().numpy()
    vectors = np.moveaxis(model.encode(decoded), 1, -1).reshape(-1, 1, codes.shape[1])
    # Each vector is one of the codes, times the scale factor of 1.
    assert np.abs(vectors - codes).max(-1).min(-1).max() == 0


def test_tutorial_configs_say_latent_and_schedule_in_their_own_way(tmp_path: Path) -> None:
    """generation/3d_ldm/inference.py: DDPMScheduler(scaled_linear_beta, clip_sample by default), a quarter of the patch."""
    plan = plan_bundle(Path(__file__).parent / "configs" / "ldm_3d.json")
    scheduler = plan.scheduler
    assert (scheduler.scheduler, scheduler.steps, scheduler.clip_sample) == ("ddpm", 1000, True)
    assert scheduler.noise_schedule.schedule == "scaled_linear_beta"
    assert (scheduler.noise_schedule.beta_start, scheduler.noise_schedule.beta_end) == (0.0015, 0.0195)
    settings = {"num_inference_steps": 50, "NoiseScheduler#beta_end": 0.02}
    scheduler = plan_bundle(Path(__file__).parent / "configs" / "ldm_3d.json", settings=settings).scheduler
    assert (scheduler.steps, scheduler.noise_schedule.beta_end) == (50, 0.02)
    for given, words in (
        ({"NoiseScheduler": 3}, "NoiseScheduler=3: need num_train_timesteps and betas"),
        ({"NoiseScheduler#eta": 3}, "option eta=3 is not implemented"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            plan_bundle(Path(__file__).parent / "configs" / "ldm_3d.json", settings=given)
