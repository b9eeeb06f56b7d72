"""The step's cut for feature reuse: both programs on MONAI's networks, judged by DeepCache in eager float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deep_cache import DeepCache
from monai.networks.nets import ControlNet, DiffusionModelUNet
from test_passes import CROSS, SPATIAL, UNET, VARIANTS, assert_as_accurate, draw, randomise, unet_case
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from volcast.export.capture import capture
from volcast.export.graph import inputs
from volcast.export.networks import Control, Denoiser, plain_modules
from volcast.export.passes.hoist import Cut, hoist
from volcast.export.passes.phase_conv import phase_conv
from volcast.export.passes.reuse import reuse
from volcast.export.passes.single_token_attention import single_token_attention

Given = dict[str, Tensor]
DEEPER: dict[str, Any] = {
    "channels": (8, 8, 16), "num_res_blocks": (2, 1, 1), "attention_levels": (True, False, False), "num_head_channels": 8,
}  # fmt: skip


class SecondCall(nn.Module):
    """`forward(*first, *second)`: the network's output for `second`, its trunk held from `first`."""

    def __init__(self, network: Denoiser) -> None:
        super().__init__()
        self.network = network
        self.cache = DeepCache(network.unet)

    def forward(self, *given: Tensor) -> Any:
        half = len(given) // 2
        self.cache.reusing = False
        self.network(*given[:half])
        self.cache.reusing = True
        return self.network(*given[half:])


def cut(network: nn.Module, given: Given, multiple: int) -> Cut:
    dims = given["x"].ndim - 2
    free = {name: {0: "batch"} for name in given}
    for name in ("x", "hint", *SPATIAL):
        if name in free:
            free[name] |= {2 + axis: f"d{axis}" for axis in range(dims)}
    captured = capture(network, given, free, {f"d{axis}": multiple for axis in range(dims)})
    return hoist(phase_conv(single_token_attention(captured)))


def step_inputs(parts: Cut, given: Given) -> Given:
    """What the step and its parts take."""
    (rows,) = parts.schedule(given["timesteps"])
    found = dict(given, row=rows)
    if parts.prepare is not None:
        names = [name for name in inputs(parts.step) if name.startswith("constant")]
        found |= zip(names, parts.prepare(*(given[name] for name in inputs(parts.prepare))), strict=True)
    return found


def run(program: GraphModule, given: Given) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(program(*(given[name] for name in inputs(program))))


def check(network: Denoiser, first: Given, second: Given, multiple: int) -> None:
    """Another batch than at capture, at two timesteps and two x; the shallow program must be the eager second call."""
    parts = cut(network, {name: value[:2] for name, value in first.items()}, multiple)
    made = reuse(parts.step)
    one, two = step_inputs(parts, first), step_inputs(parts, second)
    out, feature = run(made.deep, one)
    assert torch.equal(out, run(parts.step, one)[0])
    assert feature.shape == (len(out), made.channels, *first["x"].shape[2:])
    (result,) = run(made.shallow, {**two, "feature": feature})
    assert not torch.allclose(result, run(parts.step, two)[0], rtol=1e-3)
    assert_as_accurate(result, SecondCall(network), (*first.values(), *second.values()))


CHOSEN = ["resblock_updown", "concatenated image", "SPADE"]


@pytest.mark.parametrize("variant", CHOSEN)
def test_the_parts_are_deep_cache(variant: str) -> None:
    unet, conditions = unet_case(variant)
    network = Denoiser(plain_modules(unet), tuple(conditions))
    spatial = (4, 8, 4)[: (UNET | VARIANTS[variant][0])["spatial_dims"]]
    first = {"x": draw((3, 3, *spatial)), "timesteps": torch.tensor([3.0, 400.0, 900.0])}
    for name, shape in conditions.items():
        first[name] = draw((3, *(shape[:1] + spatial if name in SPATIAL else shape)), name)
    check(network, first, {**first, "x": draw((3, 3, *spatial), "later"), "timesteps": torch.tensor([1.0, 300.0, 800.0])}, 2)  # fmt: skip


def test_three_levels_with_attention_at_the_top() -> None:
    network = Denoiser(randomise(DiffusionModelUNet(**{**UNET, **DEEPER, "spatial_dims": 2})), ())
    first = {"x": draw((3, 3, 8, 12)), "timesteps": torch.tensor([3.0, 400.0, 900.0])}
    check(network, first, {"x": draw((3, 3, 8, 12), "later"), "timesteps": torch.tensor([1.0, 300.0, 800.0])}, 4)  # fmt: skip


def test_a_controlnet_gives_its_first_residual() -> None:
    shared = {
        key: value for key, value in {**UNET, **CROSS, "spatial_dims": 2}.items() if key != "out_channels"
    }
    hints = {"conditioning_embedding_in_channels": 1, "conditioning_embedding_num_channels": (8,)}
    control = Control(network=randomise(ControlNet(**shared, **hints)), hint="hint")
    unet = randomise(DiffusionModelUNet(**shared, out_channels=3))
    network = Denoiser(unet, ("context", "hint"), [control])
    first = {"x": draw((3, 3, 4, 8)), "timesteps": torch.tensor([3.0, 400.0, 900.0])}
    first |= {"context": draw((3, 4, 5), "context"), "hint": draw((3, 1, 4, 8), "hint")}
    check(network, first, {**first, "x": draw((3, 3, 4, 8), "later")}, 2)


class Hourglass(nn.Module):
    """Networks that are no UNet of MONAI's form: how the two levels meet is `joined`."""

    def __init__(self, joined: str) -> None:
        super().__init__()
        self.joined = joined
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.down, self.both = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        h = self.first(x) + timesteps.reshape(-1, 1, 1, 1)
        up = functional.interpolate(self.down(h), scale_factor=2.0)
        if self.joined == "by a sum":
            h = h + up
        elif self.joined == "below":
            h = functional.interpolate(
                self.both(torch.cat([self.down(h), self.down(up)], 1)), scale_factor=2.0
            )
        else:
            h = self.both(torch.cat([up, h], 1)) + functional.interpolate(self.down(h), scale_factor=2.0)
        return self.last(h)


@pytest.mark.parametrize(
    ("joined", "message"),
    [
        ("by a sum", "no skip connection"),
        ("below", "no skip connection"),
        ("twice", "reads a smaller grid past it"),
    ],
)
def test_other_structures_are_refused(joined: str, message: str) -> None:
    parts = cut(
        randomise(Hourglass(joined)), {"x": draw((2, 3, 4, 8)), "timesteps": torch.tensor([3.0, 400.0])}, 2
    )
    with pytest.raises(ValueError, match=rf"\[reuse\] .*{message}.*; export without --reuse"):
        reuse(parts.step)


def test_one_level_is_refused() -> None:
    one = {"channels": (8,), "attention_levels": (False,), "num_head_channels": 8, "spatial_dims": 2}
    network = Denoiser(randomise(DiffusionModelUNet(**{**UNET, **one})), ())
    parts = cut(network, {"x": draw((2, 3, 4, 8)), "timesteps": torch.tensor([3.0, 400.0])}, 1)
    with pytest.raises(ValueError, match=r"\[reuse\] the network has one level.*; export without --reuse"):
        reuse(parts.step)
