"""export/monai_run: MONAI's inferers on the zoo's bundles against volcast's own loop over the same networks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from volcast import _core
from volcast.export.bundle import Bundle
from volcast.export.monai_run import MonaiRun, monai_scheduler, run_monai
from volcast.export.networks import Denoiser
from volcast.export.similarity import relative_l2
from volcast.export.verification import VOLUME
from volcast.runtime.noise import request_noise
from volcast.runtime.sampler import SamplerConfig, make_plan
from volcast.runtime.spec import SchedulerSpec

STEPS, SEED, SAMPLES = 5, 5, range(2)


def values(bundle: Bundle, seed: int) -> dict[str, np.ndarray]:
    """Conditions of two samples."""
    random, spatial = np.random.default_rng(seed), iter(bundle.latent_shape[1:])
    found = {}
    for condition in bundle.conditions:
        shape = [size if isinstance(size, int) else next(spatial) for size in condition.shape]
        drawn = random.random((2, *shape))
        found[condition.name] = np.floor(9 * drawn) if condition.dtype == "int64" else drawn
        found[condition.name] = found[condition.name].astype(condition.dtype)
    return found


def monai(bundle: Bundle, conditional: Mapping[str, Any], **more: Any) -> MonaiRun:
    return run_monai(
        bundle,
        lambda step: request_noise(SEED, SAMPLES, step, bundle.latent_shape),
        conditional,
        steps=STEPS,
        keep=[0, 3],
        **more,
    )


def ours(bundle: Bundle, conditional: Any, unconditional: Any = None, guidance: Any = None) -> tuple:
    """Latents at rows 0 and 3 and the network's outputs there, by branch, and the last latent."""
    config = SamplerConfig(steps=STEPS, compat="monai-1.6")
    plan = make_plan(bundle.scheduler, config, bundle.latent_shape[1:])
    denoiser = Denoiser(bundle.unet, list(conditional))
    seen: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}

    def network(step: int, x: np.ndarray, branch: _core.Branch) -> np.ndarray:
        given = conditional if branch is _core.Branch.CONDITIONAL else unconditional
        t = torch.full((2,), plan.timesteps[step], dtype=torch.float32)
        with torch.no_grad():
            out = denoiser(torch.from_numpy(x.copy()), t, *map(torch.from_numpy, given.values())).numpy()
        seen[step, "conditional" if given is conditional else "unconditional"] = (x.copy(), out)
        return out

    x = request_noise(SEED, SAMPLES, 0, bundle.latent_shape)
    _core.run(plan, x, network, np.full(2, SEED, np.uint64), np.arange(2, dtype=np.uint64), guidance=guidance)
    return plan, seen, x


def assert_same(bundle: Bundle, run: MonaiRun, found: tuple) -> None:
    plan, seen, x = found
    assert list(run.timesteps) == plan.timesteps.tolist()
    assert set(run.calls) == {0, 3}
    # MONAI's float32 tables of 1000 products are off by 1000 x 2^-24 = 6e-5, which its own steps amplify.
    for (step, branch), (latent, out) in seen.items():
        if step in run.calls:
            call = run.calls[step]
            assert call.t == plan.timesteps[step]
            assert relative_l2(call.x, latent) < VOLUME
            assert relative_l2(getattr(call, branch), out) < VOLUME
    assert relative_l2(run.z * np.float32(bundle.scale_factor), x) < VOLUME


@pytest.mark.parametrize("name", ["brats_2d", "brain_ldm", "maisi_rflow", "mednist_ddpm"])
def test_the_zoo_s_bundles(zoo_bundle: Any, name: str) -> None:
    bundle = zoo_bundle(name, **({"latent_shape": [3, 4, 8, 4]} if name == "brain_ldm" else {}))
    conditional = values(bundle, 0)
    done: list[int] = []
    run = monai(bundle, conditional, on_step=done.append)
    assert done == list(range(1, STEPS + 1))
    assert_same(bundle, run, ours(bundle, conditional))
    if bundle.autoencoder is None:
        assert np.array_equal(run.image, run.z)
    else:
        with torch.no_grad():
            assert np.array_equal(run.image, bundle.autoencoder.decode(torch.from_numpy(run.z)).numpy())


@pytest.mark.parametrize("keep", ["context", "both"])
def test_guidance(zoo_bundle: Any, keep: str) -> None:
    """A lone context goes through the inferer's own conditioning, several conditions do not; both are one formula."""
    channels = {"diffusion_def__in_channels": 3} if keep == "context" else {}
    bundle = zoo_bundle("brain_ldm", latent_shape=[3, 4, 8, 4], **channels)
    conditional = values(bundle, 1)
    # Weights of 0.05 hardly hear a context below 1.
    conditional["context"] *= 300
    assert list(conditional) == (["context"] if keep == "context" else ["context", "concat"])
    unconditional = {name: np.full_like(value, -1) for name, value in conditional.items()}
    run = monai(bundle, conditional, unconditional=unconditional, guidance=2.5)
    assert_same(bundle, run, ours(bundle, conditional, unconditional, 2.5))
    assert run.calls[3].unconditional is not None
    assert relative_l2(run.calls[3].conditional, run.calls[3].unconditional) > 10 * VOLUME


def test_a_lone_concat_goes_through_the_inferer(zoo_bundle: Any) -> None:
    bundle = zoo_bundle("brats_2d", network_def__in_channels=2)
    conditional = values(bundle, 2)
    assert list(conditional) == ["concat"]
    assert_same(bundle, monai(bundle, conditional), ours(bundle, conditional))


@pytest.mark.parametrize(
    "changed",
    [
        {"scheduler": "pndm", "skip_prk_steps": False, "set_alpha_to_one": False},
        {"scheduler": "pndm", "steps_offset": 1},
        {"scheduler": "ddpm", "variance_type": "fixed_large", "clip_sample": True},
        {"scheduler": "ddim", "clip_sample": True, "clip_sample_max": 0.5, "prediction_type": "sample"},
        {"noise_schedule": {"schedule": "cosine"}, "prediction_type": "v_prediction"},
        {"noise_schedule": {"schedule": "sigmoid_beta", "sig_range": 4.0}, "set_alpha_to_one": False},
    ],
    ids=lambda changed: " ".join(str(value) for value in changed.values()),
)
def test_every_setting_of_a_scheduler_reaches_monai(zoo_bundle: Any, changed: dict[str, Any]) -> None:
    bundle = replace(zoo_bundle("brats_2d"), scheduler=SchedulerSpec.model_validate(changed))
    assert_same(bundle, monai(bundle, {}), ours(bundle, {}))


def test_a_scheduler_that_monai_lacks() -> None:
    with pytest.raises(ValueError, match="scheduler=dpm-solver"):
        monai_scheduler(SchedulerSpec(scheduler="dpm-solver++"), 10, (8, 8, 8))
