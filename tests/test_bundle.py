"""Bundle -> networks, scheduler, conditions; the oracle is MONAI itself, built by hand from the same numbers."""

from pathlib import Path

import safetensors.torch
import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from volcast.export.bundle import read_bundle
from volcast.runtime.spec import Ratio

HIPPOCAMPUS = Path(__file__).parents[1] / "src" / "volcast" / "models" / "hippocampus"


def test_default_bundle_is_the_network_that_monai_builds():
    bundle = read_bundle(HIPPOCAMPUS)
    unet = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=4,
        out_channels=4,
        num_res_blocks=1,
        channels=(64, 96, 96),
        attention_levels=(False, True, True),
        num_head_channels=(0, 32, 32),
        with_conditioning=True,
        cross_attention_dim=3,
    ).eval()
    unet.load_state_dict(safetensors.torch.load_file(HIPPOCAMPUS / "models" / "unet.safetensors"))
    autoencoder = AutoencoderKL(
        spatial_dims=3,
        latent_channels=4,
        channels=(32, 64, 64),
        num_res_blocks=(1, 2, 2),
        norm_num_groups=16,
        attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).eval()
    autoencoder.load_state_dict(
        safetensors.torch.load_file(HIPPOCAMPUS / "models" / "autoencoder.safetensors")
    )
    x, t, context = torch.randn(2, 4, 8, 12, 8), torch.tensor([321.0]), torch.rand(2, 1, 3)
    with torch.no_grad():
        assert torch.equal(bundle.unet(x, t, context), unet(x, t, context))
        assert torch.equal(bundle.autoencoder.decode(x), autoencoder.decode(x))
    assert not bundle.unet.training and {p.dtype for p in bundle.unet.parameters()} == {torch.float32}
    assert bundle.latent_shape == (4, 8, 12, 8) and bundle.spacing_mm == (1.0, 1.0, 1.0)
    assert bundle.scale_factor == 0.9760361313819885
    assert (bundle.scheduler.scheduler, bundle.scheduler.prediction_type, bundle.scheduler.steps) == (
        "ddim",
        "v_prediction",
        50,
    )
    fields = {field.name: field for field in bundle.conditions[0].fields}
    assert list(fields) == ["anterior", "posterior", "posterior_fraction"]
    assert bundle.conditions[0].unconditional == -1.0
    # metadata.json: anterior = 1536 a + 1054 mm^3, posterior = 1160 p + 993 mm^3
    ratio = fields["posterior_fraction"].default
    assert isinstance(ratio, Ratio)
    assert ratio.numerator == {"": 993, "posterior": 1160}
    assert ratio.denominator == {"": 993 + 1054, "posterior": 1160, "anterior": 1536}
