"""ControlNets and SPADE networks exported, against MONAI's own networks and inferers, every parameter random.

Budgets are `verify`'s (verification.py derives them): float32 sums in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mask_bundles import AUTOENCODER, CROSS, LABELS, UNET, controlnet, spade, write_bundle

from volcast.export.artifact import export_bundle
from volcast.export.verify import verify
from volcast.runtime.pipeline import load

FLAT = UNET | {"spatial_dims": 2}
UPDOWN = UNET | CROSS | {"resblock_updown": True}
RNG = np.random.default_rng(0)


def labels(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, len(LABELS), shape)


CASES: dict[str, tuple[dict[str, Any], list[int], dict[str, Any], dict[str, Any]]] = {
    "2D: SPADE in both networks, a ControlNet that sees an image": (
        {"network_def": spade(FLAT), "autoencoder_def": spade(AUTOENCODER | {"spatial_dims": 2}),
         "controlnet_def": controlnet(FLAT, 1, [8, 8])},
        [2, 8, 12], {}, {"mask": labels(16, 24), "hint": RNG.standard_normal((1, 16, 24)), "hint_scale": 1.5}),
    # The second hint is of the latent's size, to which the label map is shrunk.
    "3D: two ControlNets with weights that see label maps, one of them the context too": (
        {"network_def": UPDOWN, "autoencoder_def": AUTOENCODER, "organs_def": controlnet(UPDOWN, 3, [8, 8]),
         "vessels_def": controlnet(UPDOWN, 3, [8], with_conditioning=False, cross_attention_dim=None)},
        [2, 4, 6, 4], {"labels": LABELS},
        {"mask": labels(8, 12, 8), "mask_2": labels(8, 12, 8)[::-1], "mask_scale": 0.6, "mask_2_scale": 1.4,
         "context": RNG.standard_normal((1, 5))}),
    "3D: SPADE and a context": (
        {"network_def": spade(UPDOWN)}, [2, 4, 6, 4], {"labels": LABELS},
        {"mask": labels(4, 6, 4), "context": RNG.standard_normal((1, 5))}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_masks_and_hints_act_as_in_monai(case: str, tmp_path: Path) -> None:
    networks, latent_shape, keys, condition = CASES[case]
    bundle = write_bundle(tmp_path / "bundle", networks, latent_shape, **keys)
    spec = export_bundle(bundle, tmp_path / "artifact", batch=(1, 2))
    found = verify(
        tmp_path / "artifact", bundle, engine="onnxruntime", threads=1, steps=2, condition=condition,
    )  # fmt: skip
    assert found.passed, found.as_text()
    # What depends on the mask alone has left the step: its tensors come in, no label map does.
    assert not {"mask", "mask_2", "hint"} & {tensor.name for tensor in spec.programs["step"].inputs}

    # Every mask, hint and scale matters, a hundred times beyond float32's rounding; also to one sample of a batch.
    model = load(tmp_path / "artifact", "onnxruntime", threads=1)
    volume = model.sample(steps=2, condition=condition).array
    largest = np.abs(volume).max()
    for name, value in condition.items():
        if name == "context":
            continue
        other = condition | {name: np.roll(value, 1, axis=-1) if np.ndim(value) else 0.0}
        pair = [one.array for one in model.sample_many(2, steps=2, batch=2, condition=[condition, other])]
        assert np.abs(model.sample(steps=2, condition=other).array - volume).max() > 1e-4 * largest, name
        np.testing.assert_allclose(pair[0], volume, atol=1e-6 * largest, rtol=0)


def test_maisi_s_controlnet_as_the_zoo_has_it(make_zoo_bundle: Any, tmp_path: Path) -> None:
    """Labels as bits, class labels and spacing beside them, and MAISI's residuals added in place: the last one reaches
    the middle block as well (diffusion_model_unet_maisi.py). Without the autoencoder, which has tests of its own."""
    levels = {
        "num_channels": [32, 64],
        "attention_levels": [False, True],
        "num_head_channels": [0, 32],
        "num_res_blocks": 1,
    }
    narrow = {
        f"{net}__{key}": value
        for net in ("diffusion_unet_def", "controlnet_def")
        for key, value in levels.items()
    }
    bundle = make_zoo_bundle(
        tmp_path, "maisi_rflow", ["controlnet_def"], autoencoder=None, latent_shape=[4, 4, 6, 4], **narrow
    )
    export_bundle(bundle, tmp_path / "artifact", batch=(1, 2))
    mask = np.random.default_rng(1).integers(0, 256, bundle.latent_shape[1:])
    condition = {"mask": mask, "mask_scale": 0.9, "class_labels": 1, "spacing_tensor": [150, 150, 150]}
    found = verify(
        tmp_path / "artifact", bundle, engine="onnxruntime", threads=1, steps=2, condition=condition
    )
    assert found.passed, found.as_text()
    model = load(tmp_path / "artifact", "onnxruntime", threads=1)
    volume, other = (
        model.sample(steps=1, condition=condition | {"mask": one}).array for one in (mask, mask ^ 128)
    )
    assert np.abs(other - volume).max() > 1e-4 * np.abs(volume).max()
