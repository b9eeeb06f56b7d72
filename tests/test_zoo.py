"""Every generative config of MONAI's model zoo and tutorials that other tests do not export, against MONAI (docs/zoo.md).

Each becomes an artifact, and `verify` compares network, autoencoder and volume with MONAI running the bundle, within the
budgets that verification.py derives. BraTS, UKB's and MAISI's: test_export_artifact.py, test_maisi.py; GANs:
test_generator_model.py; ControlNets and SPADE: test_masks.py; tokens: test_token_model.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets import VQVAE
from test_slab_decode import BUDGET, check
from zoo_bundles import Published

from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle, read_bundle
from volcast.export.bundle_plan import plan_bundle
from volcast.export.verify import verify
from volcast.runtime.artifact import read_artifact
from volcast.runtime.pipeline import load

RNG = np.random.default_rng(0)
CONTEXT = RNG.standard_normal((77, 1024)).astype(np.float32)
ZOO: dict[str, tuple[Published, dict[str, Any], float | None]] = {
    "mednist_ddpm": (
        Published(config="mednist_ddpm", settings={
            "image_dim": 16, "network_def#channels": [32, 64], "network_def#attention_levels": [False, True],
            "network_def#num_head_channels": 32,
        }), {}, None),
    "cxr": (
        Published(config="cxr", generative=True, settings={
            "latent_shape": [3, 8, 8], "context_tokens": 77, "autoencoder_def#num_channels": [32, 32],
            "autoencoder_def#attention_levels": [False, False], "diffusion_def#num_channels": [32, 64],
            "diffusion_def#attention_levels": [False, True], "diffusion_def#num_head_channels": [0, 64],
            "autoencoder_def#num_res_blocks": 1, "diffusion_def#num_res_blocks": 1,
        }), {"context": CONTEXT}, None),
    "2d_ldm": (
        Published(config="ldm_2d", settings={
            "diffusion_train#patch_size": [32, 64], "autoencoder_def#channels": [32, 32, 32],
            "diffusion_def#channels": [32, 64], "diffusion_def#attention_levels": [False, True],
            "diffusion_def#num_head_channels": [0, 32], "autoencoder_def#num_res_blocks": 1, "diffusion_def#num_res_blocks": 1,
        }), {}, None),
    "3d_ldm": (
        Published(config="ldm_3d", generative=True, settings={
            "diffusion_train#patch_size": [16, 32, 16], "autoencoder_def#num_channels": [32, 32, 32],
            "diffusion_def#num_channels": [32, 64], "diffusion_def#attention_levels": [False, True],
            "diffusion_def#num_head_channels": [0, 64], "autoencoder_def#num_res_blocks": 1, "diffusion_def#num_res_blocks": 1,
        }), {}, None),
    "2d_ddpm": (
        Published(config="ddpm_2d", settings={
            "latent_shape": [1, 16, 16], "network_def#channels": [32, 64, 64], "network_def#num_head_channels": 64,
        }), {}, None),
    "3d_ddpm": (
        Published(config="ddpm_3d", settings={
            "latent_shape": [1, 8, 12, 8], "network_def#channels": [32, 64], "network_def#attention_levels": [False, True],
            "network_def#num_head_channels": [0, 64], "network_def#num_res_blocks": 1,
        }), {}, None),
    "classifier_free_guidance": (
        Published(config="class_guided_2d", settings={
            "latent_shape": [1, 16, 16], "network_def#channels": [32, 32], "network_def#attention_levels": [False, True],
            "network_def#num_head_channels": 32,
        }), {"context": [[1.0]]}, None),
    "2d_diffusion_autoencoder": (
        Published(config="diffusion_autoencoder_2d", settings={
            "latent_shape": [1, 16, 16], "network_def#channels": [32, 64], "network_def#attention_levels": [False, True],
        }), {"context": RNG.standard_normal((64, 1))}, None),
}  # fmt: skip
VQVAE_LATENTS = Published(config="vqvae_ldm_3d", settings={
    "latent_shape": [4, 4, 6, 4], "vqvae_def#channels": [16, 16], "vqvae_def#num_res_channels": 16,
    "vqvae_def#embedding_dim": 4, "vqvae_def#num_embeddings": 32, "network_def#channels": [32, 64],
    "network_def#in_channels": 4, "network_def#out_channels": 4,
})  # fmt: skip


@pytest.fixture(scope="module")
def vqvae_folder(shared_folder: Any, generative_keys: Any) -> Path:
    """A bundle with a VQVAE as its latent space under `bundle`, and its artifact."""

    def make(folder: Path) -> None:
        bundle = VQVAE_LATENTS.read(folder / "bundle", generative_keys)
        export_bundle(bundle, folder / "artifact", batch=(1, 2))

    return shared_folder("vqvae", make)


@pytest.fixture
def vqvae_bundle(vqvae_folder: Path) -> Bundle:
    root = vqvae_folder / "bundle"
    weights = {role: root / f"{role}.pt" for role in ("unet", "autoencoder")}
    return read_bundle(root, settings=VQVAE_LATENTS.settings, weights=weights)


@pytest.mark.parametrize("name", ZOO)
def test_configs_are_exported_and_agree_with_monai(name: str, tmp_path: Path, generative_keys: Any) -> None:
    published, condition, guidance = ZOO[name]
    bundle = published.read(tmp_path / "bundle", generative_keys)
    export_bundle(bundle, tmp_path / "artifact", batch=(1, 2))
    check_agrees(tmp_path / "artifact", bundle, condition, guidance)


def check_agrees(folder: Path, bundle: Bundle, condition: dict[str, Any], guidance: float | None) -> None:
    found = verify(
        folder, bundle, engine="onnxruntime", threads=1, steps=2, condition=condition, guidance=guidance
    )
    assert found.passed, found.as_text()
    assert {check.name for check in found.checks if check.budget is not None} >= {
        "volume",
        "network, step 1, t=999",
    }


def test_a_vqvae_as_latent_space_agrees_with_monai(vqvae_folder: Path, vqvae_bundle: Bundle) -> None:
    check_agrees(vqvae_folder / "artifact", vqvae_bundle, {}, None)


def test_a_vqvae_quantises_what_it_decodes(vqvae_folder: Path, vqvae_bundle: Bundle) -> None:
    """As MONAI's latent inferer, which never decodes a latent that is no code; its encoder gives codes too."""
    vqvae = vqvae_bundle.autoencoder
    assert isinstance(vqvae, VQVAE)
    model = load(vqvae_folder / "artifact", "onnxruntime", threads=1)
    z = RNG.standard_normal((2, *vqvae_bundle.latent_shape)).astype(np.float32)
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


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_vqvae_decodes_in_slabs(vqvae_folder: Path, engine: str) -> None:
    """Each vector is taken to its code by itself; the decoder has no norms, so its slabs need rows around them alone."""
    slabs = read_artifact(vqvae_folder / "artifact").slabs
    assert slabs is not None and not any(one.whole or one.moments for one in slabs.segments)
    check(vqvae_folder / "artifact", (3, 4, 5), (1, 5, 0), 1, engine)
    check(vqvae_folder / "artifact", (7, 2, 3), (2,), 3, engine)


def test_a_vqvae_keeps_a_memory_limit(vqvae_folder: Path) -> None:
    """In a process of its own: a decode that does not fit is done in slabs, and the peak stays below the limit."""
    code = f"""
import numpy as np
from volcast.runtime.memory import PeakMemory
from volcast.runtime.pipeline import load
folder = {str(vqvae_folder / "artifact")!r}
z = np.random.default_rng(0).standard_normal((1, 4, 32, 24, 32)).astype(np.float32)
try:
    load(folder, "onnxruntime", 1, 1).decode(z)
except ValueError as error:
    least = int(str(error).split("at least ")[1].split()[0])
model = load(folder, "onnxruntime", 1, least * 106 // 100)
peak = PeakMemory()
kept = model.decode(z)
assert peak.bytes() <= least * 106 // 100, (peak.bytes(), least)
whole = load(folder, "onnxruntime", 1)
peak = PeakMemory()
wanted = whole.decode(z)
assert peak.bytes() > least * 5 // 4, (peak.bytes(), least)
assert np.linalg.norm(kept - wanted) < {BUDGET} * np.linalg.norm(wanted)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
