"""ControlNets and label maps as a config describes them: what fits, what is refused, and how labels become channels."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_bundles import AUTOENCODER, CROSS, LABELS, SCHEDULER, UNET, controlnet, spade

from volcast.export.bundle_masks import Masks, plan_masks
from volcast.export.bundle_plan import BundlePlan, plan_bundle


def plan(folder: Path, networks: dict[str, Any], *controlnets: str, **options: Any) -> BundlePlan:
    config = copy.deepcopy(networks) | {"noise_scheduler": SCHEDULER, "num_inference_steps": 3}
    (folder / "inference.json").write_text(json.dumps(config))
    return plan_bundle(folder / "inference.json", controlnets=controlnets, **options)


def masks(found: BundlePlan, labels: list[str] = []) -> Masks:  # noqa: B006
    return plan_masks(found.unet, found.autoencoder, found.controls, labels)


MAISI = {
    **{("num_channels" if key == "channels" else key): value for key, value in UNET.items() if key != "out_channels"},
    "_target_": "monai.apps.generation.maisi.networks.controlnet_maisi.ControlNetMaisi",
    "conditioning_embedding_in_channels": 8, "conditioning_embedding_num_channels": [8, 8],
}  # fmt: skip


def test_each_network_gets_a_condition_of_its_own(tmp_path: Path) -> None:
    networks = {
        "network_def": spade(UNET), "autoencoder_def": AUTOENCODER, "a": controlnet(UNET, 3, [8]),
        "b": controlnet(UNET, 1, [8]), "c": MAISI, "d": controlnet(UNET, 1, [8]),
    }  # fmt: skip
    found = masks(plan(tmp_path, networks, "a", "b", "c", "d"), LABELS)
    image = ("o0", "o1", "o2")
    shapes = {one.name: (one.dtype, one.shape, one.maximum, one.labels) for one in found.conditions}
    assert shapes == {
        "mask": ("int64", image, 2, tuple(LABELS)), "mask_2": ("int64", image, 2, tuple(LABELS)),
        "hint": ("float32", (1, *image), None, ()), "mask_3": ("int64", image, 255, ()),
        "hint_2": ("float32", (1, *image), None, ()), "controlnet_scale": ("float32", (4,), None, ()),
    }  # fmt: skip
    assert found.hints == ("mask_2", "hint", "mask_3", "hint_2")
    assert [field.name for field in found.conditions[-1].fields] == [f"{hint}_scale" for hint in found.hints]
    assert torch.equal(found.encodings["mask_2"], torch.eye(3))
    # MAISI's binarize_labels: label 178 = 2 + 16 + 32 + 128, lowest bit first.
    assert found.encodings["mask_3"][178].tolist() == [0, 1, 0, 0, 1, 1, 0, 1]


def test_without_an_autoencoder_a_mask_has_the_latent_s_size(tmp_path: Path) -> None:
    (mask,) = masks(plan(tmp_path, {"network_def": spade(UNET)})).conditions
    assert (mask.shape, mask.labels, mask.maximum) == (("d0", "d1", "d2"), (), 2)
    assert masks(plan(tmp_path, {"network_def": UNET}), LABELS).conditions == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"channels": [8, 24]},
            r"control_def#channels=\[8, 24\]: network_def has \[8, 16\]; give a ControlNet",
        ),
        ({"num_res_blocks": [2, 1]}, r"control_def#num_res_blocks=\[2, 1\]: network_def has \[1, 1\]"),
        ({"in_channels": 3}, "control_def#in_channels=3: network_def has 2"),
        (CROSS, "control_def#cross_attention_dim=5: network_def has None"),
        ({"num_class_embeds": 4}, "control_def#num_class_embeds=4: network_def has None"),
        ({"channel": 4}, "control_def: ControlNet has no argument 'channel'"),
    ],
)
def test_a_controlnet_that_is_no_copy_of_the_unet(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    networks = {"network_def": UNET, "control_def": controlnet(UNET, 3, [8], **changes)}
    with pytest.raises(ValueError, match=message) as error:
        plan(tmp_path, networks, "control_def")
    assert "\n" not in str(error.value)


def test_what_is_no_controlnet(tmp_path: Path) -> None:
    networks = {"network_def": UNET, "control_def": controlnet(UNET, 3, [8])}
    for id in ("network_def", "nothing", "noise_scheduler"):
        with pytest.raises(
            ValueError, match=f"--controlnet {id}: no ControlNet of the config; there: control_def"
        ):
            plan(tmp_path, networks, id)
    with pytest.raises(ValueError, match="control_def is given twice"):
        plan(tmp_path, networks, "control_def", "control_def")
    with pytest.raises(ValueError, match=r"need unet=FILE or autoencoder=FILE or control_def=FILE"):
        plan(tmp_path, networks, "control_def", weights={"controlnet": tmp_path})
    assert (
        plan(tmp_path, networks, "control_def", weights={"control_def": tmp_path}).controls[0].id
        == "control_def"
    )


def test_labels_that_fit_nothing(tmp_path: Path) -> None:
    both = {"network_def": spade(UNET), "autoencoder_def": spade(AUTOENCODER, label_nc=4)}
    with pytest.raises(ValueError, match="need the 3 and 4 of network_def and autoencoder_def"):
        masks(plan(tmp_path, both))
    with pytest.raises(ValueError, match="need the 3 of network_def .label_nc."):
        masks(plan(tmp_path, {"network_def": spade(UNET)}), LABELS[:2])
    networks = {"network_def": UNET, "control_def": controlnet(UNET, 5, [8])}
    with pytest.raises(ValueError, match="no ControlNet has 3 channels"):
        masks(plan(tmp_path, networks, "control_def"), LABELS)
