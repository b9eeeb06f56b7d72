"""Conditions from constructors: the forward pass of MONAI's network takes exactly these tensors."""

import json
import shutil

import pytest

from volcast.export.bundle import read_bundle
from volcast.export.bundle_conditions import described_conditions, network_conditions
from volcast.export.bundle_networks import plan_network
from volcast.runtime.default_artifact import BUNDLE
from volcast.runtime.quality import QualityBudget

UNET = {"spatial_dims": 2, "in_channels": 3, "out_channels": 3, "channels": [32], "attention_levels": [True]}


def arguments(target="DiffusionModelUNet", **changes):
    return plan_network("net", target, {**UNET, **changes}).arguments


def test_none_all_and_tokens():
    assert network_conditions(arguments(), 3) == ()
    maisi = {k: v for k, v in UNET.items() if k != "channels"} | {"num_channels": [32]}
    every = plan_network(
        "net",
        "DiffusionModelUNetMaisi",
        maisi
        | {
            "in_channels": 5,
            "with_conditioning": True,
            "cross_attention_dim": 6,
            "num_class_embeds": 4,
            "include_top_region_index_input": True,
            "include_bottom_region_index_input": True,
            "include_spacing_input": True,
        },
    )
    found = {c.name: (c.dtype, c.shape) for c in network_conditions(every.arguments, 3, tokens=77)}
    assert found == {
        "context": ("float32", (77, 6)),
        "class_labels": ("int64", ()),
        "top_region_index_tensor": ("float32", (4,)),
        "bottom_region_index_tensor": ("float32", (4,)),
        "spacing_tensor": ("float32", (3,)),
        "concat": ("float32", (2, "d0", "d1")),
    }


def test_refusals():
    with pytest.raises(ValueError, match="latent_shape has 4 channels, the UNet's in_channels=3"):
        network_conditions(arguments(), 4)
    with pytest.raises(ValueError, match="cross_attention_dim=None"):
        network_conditions(arguments(with_conditioning=True), 3)


CONTEXT = {"name": "context", "shape": [1, 4], "unconditional": -1}


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ([], "do not match the network's \\(context\\)"),
        ([CONTEXT, CONTEXT], "do not match"),
        ([{**CONTEXT, "name": "contxt"}], "do not match"),
        ([{**CONTEXT, "shape": [1, 5]}], r"context is float32\[1, 5\], the network takes float32\[1, 4\]"),
        ([{**CONTEXT, "shape": [4]}], "the network takes"),
        ([{**CONTEXT, "shape": ["tokens", 4]}], "the network takes"),
        ([{**CONTEXT, "dtype": "int64"}], "the network takes"),
        ([{**CONTEXT, "unconditional": float("nan")}], "conditions.0.unconditional"),
        ([{**CONTEXT, "note": 1}], "Extra inputs are not permitted"),
        (
            [{**CONTEXT, "fields": [{"name": "a", "minimum": 0, "maximum": 1, "default": 0}]}],
            "1 fields do not fill",
        ),
    ],
)
def test_volcast_json_must_fit_the_network(tmp_path, conditions, message):
    derived = network_conditions(arguments(with_conditioning=True, cross_attention_dim=4), 3)
    (tmp_path / "volcast.json").write_text(json.dumps({"conditions": conditions}))
    with pytest.raises(ValueError, match=message) as caught:
        described_conditions(tmp_path / "volcast.json", derived)
    assert "\n" not in str(caught.value)


def test_volcast_json_describes(tmp_path):
    derived = network_conditions(arguments(with_conditioning=True, cross_attention_dim=4), 3)
    (tmp_path / "volcast.json").write_text(json.dumps({"conditions": [{**CONTEXT, "shape": [77, 4]}]}))
    (described,) = described_conditions(tmp_path / "volcast.json", derived)
    assert (described.shape, described.unconditional) == ((77, 4), -1.0)


def test_conditions_of_another_network_are_left_out_where_one_was_chosen(tmp_path):
    notes = {"conditions": [CONTEXT], "labels": ["background", "organ"]}
    (tmp_path / "volcast.json").write_text(json.dumps(notes))
    assert described_conditions(tmp_path / "volcast.json", (), others=True) == ()
    with pytest.raises(ValueError, match="do not match the network's \\(none\\)"):
        described_conditions(tmp_path / "volcast.json", ())


def test_a_budget_of_quality_is_the_bundle_s(tmp_path):
    """`quality` in volcast.json goes into the manifest; a part that is left out keeps its default."""
    folder = shutil.copytree(BUNDLE, tmp_path / "bundle")
    assert read_bundle(folder).quality is None
    path = folder / "configs" / "volcast.json"
    notes = json.loads(path.read_text())
    path.write_text(json.dumps({**notes, "quality": {"ms_ssim": 0.95}}))
    assert read_bundle(folder).quality == QualityBudget(ms_ssim=0.95, frechet=1, real=1.1, diversity=0.9)
    path.write_text(json.dumps({**notes, "quality": {"ms_ssim": 2}}))
    with pytest.raises(ValueError, match="quality.ms_ssim"):
        read_bundle(folder)
