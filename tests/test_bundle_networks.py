"""Networks of a config: parameter counts of published bundles, argument names old and new, refusals."""

from pathlib import Path

import pytest
import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

from volcast.export.bundle_networks import kind_of, plan_network
from volcast.export.bundle_plan import plan_bundle

CONFIGS = Path(__file__).parent / "configs"
# Millions of parameters, counted once on networks that were built by hand from the bundles' own code.
PARAMETERS = {
    "brats_3d": 189.3,
    "brats_2d": 15.4,
    "brain_ldm": 553.2,
    "maisi_rflow": 180.5,
    "mednist_ddpm": 4.6,
}


def millions(network):
    return sum(p.numel() for p in network.parameters()) / 1e6


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_networks_at_full_width(name):
    plan = plan_bundle(next(CONFIGS.glob(f"{name}.[jy]*")))
    unet = plan.unet.build(**({"include_fc": False} if name == "brats_2d" else {}))
    assert all(p.is_meta for p in unet.parameters())
    assert millions(unet) == pytest.approx(PARAMETERS[name], abs=0.06)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("DiffusionModelUNet", "DiffusionModelUNet"),
        ("monai.networks.nets.DiffusionModelUNet", "DiffusionModelUNet"),
        ("monai.networks.nets.diffusion_model_unet.DiffusionModelUNet", "DiffusionModelUNet"),
        ("generative.networks.nets.autoencoderkl.AutoencoderKL", "AutoencoderKL"),
        ("AutoencoderKlMaisi", "AutoencoderKlMaisi"),
        (
            "monai.apps.generation.maisi.networks.diffusion_model_unet_maisi.DiffusionModelUNetMaisi",
            "DiffusionModelUNetMaisi",
        ),
        ("scripts.net.DiffusionModelUNet", None),
        ("monai.networks.nets.UNet", None),
        ("os.system", None),
        ("DiffusionModelUNet\n", None),
    ],
)
def test_targets(target, name):
    kind = kind_of(target)
    assert (kind.network.__name__ if kind else None) == name


AUTOENCODER = {
    "spatial_dims": 2,
    "num_channels": [8, 16],
    "attention_levels": [False, True],
    "norm_num_groups": 4,
}


def test_old_argument_names_and_memory_options():
    given = {**AUTOENCODER, "num_res_blocks": 1, "use_checkpointing": True, "use_flash_attention": True}
    plan = plan_network("ae", "generative.networks.nets.AutoencoderKL", given)
    network = plan.build("cpu")
    assert isinstance(network, AutoencoderKL) and not network.use_checkpoint and not network.training
    wanted = AutoencoderKL(
        spatial_dims=2, channels=(8, 16), attention_levels=(False, True), norm_num_groups=4, num_res_blocks=1
    )
    assert {k: v.shape for k, v in network.state_dict().items()} == {
        k: v.shape for k, v in wanted.state_dict().items()
    }


def test_maisi_without_autocast_and_splits_is_the_same_function():
    given = {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 1,
        "num_res_blocks": [1, 1],
        "num_channels": [8, 8],
        "attention_levels": [False, False],
        "norm_num_groups": 4,
        "latent_channels": 2,
    }
    plan = plan_network(
        "ae", "AutoencoderKlMaisi", {**given, "norm_float16": True, "num_splits": 2, "dim_split": 1}
    )
    whole = plan.build("cpu")
    split = plan.kind.network(**given, num_splits=2, dim_split=1).eval()
    split.load_state_dict(whole.state_dict())
    z = torch.randn(1, 2, 8, 8, 8)
    with torch.no_grad():
        got, wanted = whole.decode(z), split.decode(z)
    # Each split convolves the same neighbourhoods; oneDNN may sum them in another order.
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


UNET = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": [32], "attention_levels": [False]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chanels": [1]}, "has no argument 'chanels'"),
        ({"in_channels": None}, r"net#in_channels=None: need int.*--set net#in_channels"),
        ({"channels": 32}, r"net#channels=32: need Sequence\[int\]"),
        ({"channels": [2**21]}, "net#channels"),
        ({"channels": [32] * 13}, "net#channels"),
        ({"num_channels": [32]}, "under its old and its new name"),
        ({"num_res_blocks": 10**9}, "net#num_res_blocks=1000000000"),
        ({"spatial_dims": 4}, "net#spatial_dims=4"),
        ({"with_conditioning": "yes"}, "net#with_conditioning='yes': need bool"),
        ({"norm_eps": float("nan")}, "net#norm_eps=nan"),
        ({"norm_num_groups": 7}, "DiffusionModelUNet refuses its arguments: "),
    ],
)
def test_refused_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        plan_network("net", "DiffusionModelUNet", {**UNET, **change}).build()


def test_missing_argument_and_unknown_target():
    with pytest.raises(ValueError, match="in_channels is missing; give it with --set net#in_channels"):
        plan_network("net", "DiffusionModelUNet", {k: v for k, v in UNET.items() if k != "in_channels"})
    with pytest.raises(
        ValueError, match="_target_='UNet' is not known; known: DiffusionModelUNet, AutoencoderKL"
    ):
        plan_network("net", "UNet", UNET)


def test_every_constructor_argument_has_a_rule():
    for name in ("DiffusionModelUNet", "AutoencoderKL", "DiffusionModelUNetMaisi", "AutoencoderKlMaisi"):
        kind = kind_of(name)
        required = {
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 1,
            "num_res_blocks": [1],
            "attention_levels": [True],
        }
        channels = "num_channels" if "Maisi" in name else "channels"
        plan = plan_network("n", name, {**required, channels: [32]})
        # MONAI's own defaults must pass the rules, or a config that spells them out would be refused.
        defaults = {key: value for key, value in plan.arguments.items() if key not in kind.fixed}
        assert plan_network("n", name, defaults).arguments == plan.arguments
    assert issubclass(kind_of("DiffusionModelUNet").network, DiffusionModelUNet)
