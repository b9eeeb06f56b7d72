"""GenerativeModels' keys and combined projections: forward passes agree with MONAI's network.

The renames are written a second time in conftest.py, in the other direction; what GM computed (proj_attn unused) is
MONAI's network with an identity `out_proj`.
"""

from pathlib import Path

import pytest
import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

from volcast.export.weights_keys import is_generative, load_weights, to_monai

UNET = {
    "spatial_dims": 3,
    "in_channels": 2,
    "out_channels": 2,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "num_head_channels": 8,
    "norm_num_groups": 4,
    "num_res_blocks": 1,
}
CONDITIONED = {"with_conditioning": True, "cross_attention_dim": 3}
FILE = Path("model.pt")


def randomise(network):
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1)
    return network.eval()


def run(network, conditioned=False):
    x = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return (
            network(x, torch.tensor([3.0]), torch.ones(1, 2, 3))
            if conditioned
            else network(x, torch.tensor([3.0]))
        )


@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("conditioned", [False, True])
def test_generative_unet(generative_keys, conditioned, updown):
    arguments = {**UNET, "resblock_updown": updown, **(CONDITIONED if conditioned else {})}
    reference = randomise(DiffusionModelUNet(**arguments))
    if not conditioned:
        for name, module in reference.named_modules():
            if name.endswith("out_proj"):
                module.weight.data, module.bias.data = (
                    torch.eye(len(module.bias)),
                    torch.zeros(len(module.bias)),
                )
    source = DiffusionModelUNet(**arguments, include_fc=conditioned)
    source.load_state_dict({k: v for k, v in reference.state_dict().items() if k in source.state_dict()})
    old = generative_keys(source.state_dict())
    assert is_generative(old) and not is_generative(reference.state_dict())
    with torch.device("meta"):
        network = DiffusionModelUNet(**arguments, include_fc=conditioned)
    loaded = load_weights(network, old, FILE, "unet")
    got, wanted = run(loaded, conditioned), run(reference, conditioned)
    # x @ I is exact; only the order of sums inside the linear could differ, and by a few units in the last place.
    assert wanted.std() > 1e-3 and (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not loaded.training and not any(p.requires_grad or p.is_meta for p in loaded.parameters())


def test_generative_autoencoder(generative_keys):
    arguments = {"spatial_dims": 2, "channels": (8, 16), "attention_levels": (False, True), "norm_num_groups": 4,
                 "num_res_blocks": 1, "latent_channels": 2, "include_fc": False}  # fmt: skip
    reference = randomise(AutoencoderKL(**arguments))
    old = generative_keys(reference.state_dict())
    assert old.keys() != reference.state_dict().keys()
    with torch.device("meta"):
        network = AutoencoderKL(**arguments)
    loaded = load_weights(network, {f"{k}": v for k, v in old.items()}, FILE, "autoencoder")
    with torch.no_grad():
        z = torch.randn(1, 2, 4, 4)
        assert torch.equal(loaded.decode(z), reference.decode(z))
        assert torch.equal(
            loaded.encode(torch.ones(1, 1, 8, 8))[0], reference.encode(torch.ones(1, 1, 8, 8))[0]
        )


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("combined", [False, True])
def test_combined_projections_both_ways(combined, conditioned):
    arguments = {**UNET, **(CONDITIONED if conditioned else {})}
    reference = randomise(DiffusionModelUNet(**arguments, use_combined_linear=combined))
    with torch.device("meta"):
        other = DiffusionModelUNet(**arguments, use_combined_linear=not combined)
    loaded = load_weights(other, reference.state_dict(), FILE, "unet")
    got, wanted = run(loaded, conditioned), run(reference, conditioned)
    # One matrix product of 3C columns or three of C: the same sums, possibly in another order.
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_half_precision_weights_become_float32():
    reference = randomise(DiffusionModelUNet(**UNET))
    half = {key: value.half() for key, value in reference.state_dict().items()}
    loaded = load_weights(DiffusionModelUNet(**UNET), half, FILE, "unet")
    assert all(torch.equal(v, half[k].float()) for k, v in loaded.state_dict().items())


def broken(change):
    state = randomise(DiffusionModelUNet(**UNET)).state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("conv_in.conv.bias"), "has no conv_in.conv.bias; .*--weights unet=FILE"),
        (lambda s: [s.pop(k) for k in list(s)[:5]], "and 2 more; "),
        (lambda s: s.update(extra=torch.ones(1)), "has unexpected extra; "),
        (
            lambda s: s.update({"out.0.bias": torch.ones(3)}),
            r"has shapes out.0.bias \(3,\) instead of \(8,\)",
        ),
        (lambda s: s["out.0.bias"].fill_(float("inf")), "has NaN or Inf in out.0.bias"),
        (
            lambda s: s.update({"out.0.bias": torch.ones(8, dtype=torch.int64)}),
            "no floating-point numbers in out.0.bias",
        ),
        (
            lambda s: s.update({"out.0.bias": torch.full((8,), 1e300, dtype=torch.float64)}),
            "has NaN or Inf in out.0.bias",
        ),
    ],
)
def test_wrong_weights_are_named(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(DiffusionModelUNet(**UNET), broken(change), FILE, "unet")
    assert "\n" not in str(caught.value)


def test_two_tensors_for_one_name_are_refused():
    weight = torch.ones(4, 4)
    state = {"middle_block.attention.to_q.weight": weight, "middle_block.attention.attn.to_q.weight": weight}
    with pytest.raises(ValueError, match="two tensors are both"):
        to_monai(state, ["middle_block.attention.attn.to_q.weight"])
