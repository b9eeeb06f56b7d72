"""Every pass, alone and together, on every form of MONAI's networks, judged by the network in float64.

Tolerance (policy of one place): a pass may err at most twice what MONAI's own float32 run errs against float64, plus
one rounding of the output: the passes reorder float32 sums of the same length, nothing else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet, SPADEDiffusionModelUNet
from torch import Tensor, nn
from torch.fx import GraphModule

from volcast.export.capture import capture
from volcast.export.graph import count_flops, count_nodes, inputs
from volcast.export.networks import Decoder, Denoiser, Encoder, plain_modules
from volcast.export.passes.hoist import hoist
from volcast.export.passes.phase_conv import phase_conv, phase_weight
from volcast.export.passes.single_token_attention import single_token_attention

UNET: dict[str, Any] = {
    "spatial_dims": 3, "in_channels": 3, "out_channels": 3, "num_res_blocks": 1, "channels": (8, 16),
    "attention_levels": (False, True), "norm_num_groups": 8, "num_head_channels": (0, 8),
}  # fmt: skip
CROSS = {"with_conditioning": True, "cross_attention_dim": 5}
MAISI = {
    "num_channels": UNET["channels"],
    "include_spacing_input": True,
    "include_top_region_index_input": True,
}

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "self-attention": ({}, {}),
    "2D": ({"spatial_dims": 2}, {}),
    "resblock_updown": ({"resblock_updown": True}, {}),
    "no out_proj, combined linear": ({"include_fc": False, "use_combined_linear": True}, {}),
    "flash attention": ({"use_flash_attention": True}, {}),
    "upcast attention": ({"upcast_attention": True}, {}),
    "one context token": (CROSS, {"context": (1, 5)}),
    "one context token, flash, two layers": (
        {**CROSS, "use_flash_attention": True, "transformer_num_layers": 2}, {"context": (1, 5)}),
    "four context tokens": (CROSS, {"context": (4, 5)}),
    "2D, four context tokens": ({**CROSS, "spatial_dims": 2}, {"context": (4, 5)}),
    "class labels": ({"num_class_embeds": 4}, {"class_labels": ()}),
    "MAISI, class labels, added in place": ({**MAISI, "num_class_embeds": 4}, {"class_labels": (), "spacing_tensor": (3,), "top_region_index_tensor": (4,)}),
    "SPADE": ({"label_nc": 3, "spade_intermediate_channels": 8}, {"seg": (3, 4, 8, 4)}),
    "concatenated image": ({"in_channels": 5}, {"concat": (2, 4, 8, 4)}),
}  # fmt: skip


SPATIAL = ("concat", "seg")


def randomise(network: nn.Module) -> nn.Module:
    """Fresh MONAI networks end in zeroed convolutions: every parameter gets a value, norms stay near one."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.05 if parameter.ndim < 2 else 1.0 / parameter[0].numel() ** 0.5
        parameter.data = noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return network.eval().requires_grad_(False)


def draw(shape: tuple[int, ...], name: str = "x") -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if name == "class_labels":
        return torch.randint(0, 4, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def unet_case(variant: str) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
    arguments, conditions = VARIANTS[variant]
    arguments = {**UNET, **arguments}
    if "num_channels" in arguments:
        del arguments["channels"]
    kind = SPADEDiffusionModelUNet if "label_nc" in arguments else DiffusionModelUNet
    kind = DiffusionModelUNetMaisi if "num_channels" in arguments else kind
    return randomise(kind(**arguments)), conditions


def assert_as_accurate(result: Tensor, network: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        own = network(*arguments)
        wide = network.double()(*(a.double() if a.is_floating_point() else a for a in arguments))
    network.float()
    assert wide.norm() > 0.1, "the network outputs nothing: this test would prove nothing"
    error, own_error = (result.double() - wide).norm(), (own.double() - wide).norm()
    assert error <= 2 * own_error + torch.finfo(torch.float32).eps * wide.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cut_denoiser_is_the_denoiser(variant: str) -> None:
    unet, conditions = unet_case(variant)
    network = Denoiser(plain_modules(unet), tuple(conditions))
    dims = (UNET | VARIANTS[variant][0])["spatial_dims"]
    spatial = (4, 8, 4)[:dims]

    def arguments(batch: int, sizes: tuple[int, ...]) -> dict[str, Tensor]:
        given = {"x": draw((batch, 3, *sizes)), "timesteps": torch.linspace(3, 900, batch)}
        for name, shape in conditions.items():
            given[name] = draw((batch, *(shape[:1] + sizes if name in SPATIAL else shape)), name)
        return given

    free = {name: {0: "batch"} for name in arguments(2, spatial)}
    for name in ("x", *SPATIAL):
        if name in free:
            free[name] |= {2 + axis: f"d{axis}" for axis in range(dims)}
    captured = capture(network, arguments(2, spatial), free, {f"d{axis}": 2 for axis in range(dims)})
    cut = hoist(phase_conv(single_token_attention(captured)))

    assert count_nodes(cut.step) < count_nodes(captured)
    assert (cut.prepare is not None) == any(name != "concat" for name in conditions)
    # Another batch and another size than at capture, both free.
    for batch, sizes in ((2, spatial), (3, (8, 4, 6)[:dims])):
        given = arguments(batch, sizes)
        (rows,) = cut.schedule(given["timesteps"])
        crossing = dict(given, row=rows)
        if cut.prepare is not None:
            prepared = cut.prepare(*(given[name] for name in inputs(cut.prepare)))
            crossing |= zip(
                (name for name in inputs(cut.step) if name.startswith("constant")), prepared, strict=True
            )
        with torch.no_grad():
            (result,) = cut.step(*(crossing[name] for name in inputs(cut.step)))
        assert_as_accurate(result, network, tuple(given.values()))


def test_one_context_token_leaves_no_cross_attention_in_the_step() -> None:
    unet, _ = unet_case("one context token")
    captured = capture(
        Denoiser(unet, ("context",)),
        {"x": draw((2, 3, 4, 4, 4)), "timesteps": torch.tensor([1.0, 2.0]), "context": draw((2, 1, 5))},
        {"x": {0: "batch"}, "timesteps": {0: "batch"}, "context": {0: "batch"}},
        {},
    )

    def softmaxes(graph: GraphModule) -> int:
        return sum("softmax" in str(node.target) for node in graph.graph.nodes)

    cut = hoist(single_token_attention(captured))
    assert softmaxes(cut.step) == softmaxes(captured) // 2
    assert list(inputs(cut.step)) == ["x", "row", "constants"]


def test_hoist_wants_its_inputs_by_name() -> None:
    class Named(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return y * 2

    graph = capture(Named(), {"y": draw((2, 3))}, {}, {})
    with pytest.raises(ValueError, match=r"\[hoist\] the graph has inputs \['y'\]: it needs 'x'"):
        hoist(graph)


def test_what_has_no_batch_axis_waits_for_the_step() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
            return x * timesteps[:, None] + torch.mean(timesteps)

    free = {"x": {0: "batch"}, "timesteps": {0: "batch"}}
    cut = hoist(capture(Mean(), {"x": draw((2, 3)), "timesteps": draw((2,))}, free, {}))
    x, timesteps = draw((4, 3)), draw((4,), "t")
    torch.testing.assert_close(cut.step(x, *cut.schedule(timesteps))[0], Mean()(x, timesteps))


@pytest.mark.parametrize("way", ["added to one row", "three keys"])
def test_attention_that_only_looks_like_one_key_stays(way: str) -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
            if way == "three keys":  # one query: the softmax runs over the queries
                return torch.softmax(q[:, :1] @ k.transpose(1, 2), dim=1) @ k + q[:, :1]
            return torch.softmax(q @ k[:, :1].transpose(1, 2), dim=-1) @ k[:, :1] + bias

    examples = {"q": draw((2, 6, 4)), "k": draw((2, 3, 4), "k"), "bias": draw((4,), "b")}
    result = single_token_attention(capture(Attention(), examples, {}, {}))(*examples.values())
    torch.testing.assert_close(result[0], Attention()(*examples.values()))


@pytest.mark.parametrize("alias", ["chunk", "dropout", "movedim", "squeeze"])
def test_writing_through_an_alias_is_refused(alias: str) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            a = {
                "chunk": lambda: y.chunk(2, 1)[0],
                "dropout": lambda: torch.nn.functional.dropout(y, 0.5, training=False),
                "movedim": lambda: y.movedim(0, 1),
                "squeeze": lambda: y.squeeze(),
            }[alias]()
            a += 1
            return y + 0

    with pytest.raises(ValueError, match=r"\[capture\] aten.add_.Tensor writes into"):
        capture(Writes(), {"x": draw((2, 4))}, {}, {})


def test_a_network_that_cannot_be_captured_is_named() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ValueError, match=r"\[capture\] Branches: torch.export failed"):
        capture(Branches(), {"x": draw((2, 3))}, {}, {})


def test_writing_into_what_others_read_is_refused() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            row = y[0]
            y += 1
            return row + y

    with pytest.raises(ValueError, match=r"\[capture\] aten.add_.Tensor writes into aten.mul.Tensor"):
        capture(Writes(), {"x": draw((2, 3))}, {}, {})


def autoencoder(variant: str) -> tuple[nn.Module, int]:
    dims = 2 if variant == "2D" else 3
    arguments: dict[str, Any] = {
        "spatial_dims": dims, "in_channels": 1, "out_channels": 1, "num_res_blocks": (1, 1),
        "attention_levels": (False, False), "latent_channels": 3, "norm_num_groups": 8,
        "with_encoder_nonlocal_attn": variant == "non-local attention",
        "with_decoder_nonlocal_attn": variant == "non-local attention",
        "use_convtranspose": variant == "transposed convolution",
    }  # fmt: skip
    if variant.startswith("MAISI"):
        splits = {"num_splits": 2, "norm_float16": False, "save_mem": False}
        return randomise(AutoencoderKlMaisi(num_channels=(8, 16), **arguments, **splits)), dims
    return randomise(AutoencoderKL(channels=(8, 16), **arguments)), dims


@pytest.mark.parametrize("variant", ["3D", "2D", "non-local attention", "transposed convolution", "MAISI"])
def test_decode_is_decode(variant: str) -> None:
    network, dims = autoencoder(variant)
    original = Decoder(network)
    plain = Decoder(plain_modules(network))
    free = {"z": {0: "batch", **{2 + axis: f"d{axis}" for axis in range(dims)}}}
    captured = capture(plain, {"z": draw((2, 3, 8, 4, 6)[: 2 + dims])}, free, {})
    optimised = phase_conv(captured)
    for shape in ((2, 3, 8, 4, 6), (1, 3, 12, 8, 10)):
        z = draw(shape[: 2 + dims])
        with torch.no_grad():
            (image,) = optimised(z)
        assert_as_accurate(image, original if variant != "MAISI" else plain, (z,))
        if variant == "MAISI":  # its own slab-wise form, in float32: equal to the rounding of its longer sums
            with torch.no_grad():
                torch.testing.assert_close(image, original(z), rtol=1e-4, atol=1e-4)
    saved = 1 - count_flops(optimised, [z]) / count_flops(captured, [z])
    assert saved > 0.1 if variant in ("3D", "2D", "non-local attention") else saved == 0


@pytest.mark.parametrize("variant", ["3D", "2D", "non-local attention"])
def test_encode_is_encode(variant: str) -> None:
    network, dims = autoencoder(variant)
    free = {"image": {0: "batch", **{2 + axis: f"o{axis}" for axis in range(dims)}}}
    multiples = {f"o{axis}": 2 for axis in range(dims)}
    captured = capture(Encoder(network), {"image": draw((2, 1, 8, 8, 12)[: 2 + dims])}, free, multiples)
    image = draw((3, 1, 4, 12, 8)[: 2 + dims])
    with torch.no_grad():
        z_mu, z_sigma = captured(image)
        wanted_mu, wanted_sigma = network.encode(image)
    # The same float32 operators in the same order: equal but for the threads' blocking.
    torch.testing.assert_close(z_mu, wanted_mu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z_sigma, wanted_sigma, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_phase_weight_is_exact_in_float64(dims: int) -> None:
    weight, x = draw((4, 3, *[3] * dims)).double(), draw((2, 3, 5, 4, 6)[: 2 + dims], "v").double()
    convolve = torch.nn.functional.conv2d if dims == 2 else torch.nn.functional.conv3d
    transpose = torch.nn.functional.conv_transpose2d if dims == 2 else torch.nn.functional.conv_transpose3d
    wanted = convolve(torch.nn.functional.interpolate(x, scale_factor=2.0), weight, padding=1)
    result = transpose(x, phase_weight(weight), stride=2, padding=1)
    # 27 terms of order one, each rounded once: well under 100 eps.
    torch.testing.assert_close(result, wanted, rtol=0, atol=100 * torch.finfo(torch.float64).eps)
