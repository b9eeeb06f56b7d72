"""Bundle -> networks, scheduler, conditions; the oracle is MONAI itself, built by hand from the same numbers."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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


ZOO = {
    "brats_3d_generative": ("ddim", 50, (4, 8, 12, 8), 1.0),
    "brats_3d": ("ddim", 50, (8, 8, 12, 8), 1.0),
    "brats_2d": ("ddim", 50, (1, 16, 24), 1.0),
    "brain_ldm": ("ddim", 50, (3, 8, 12, 8), 1.0),
    "maisi_rflow": ("rflow", 30, (4, 8, 16, 8), 0.75),
    "mednist_ddpm": ("ddpm", 1000, (1, 16, 16), 1.0),
}


@pytest.mark.parametrize("name", ZOO)
def test_published_bundles_are_read_and_run(zoo_bundle, name):
    bundle = zoo_bundle(name)
    scheduler = bundle.scheduler
    assert (scheduler.scheduler, scheduler.steps, bundle.latent_shape, bundle.scale_factor) == ZOO[name]
    assert (bundle.autoencoder is None) == (name == "mednist_ddpm")
    x = torch.randn(2, *bundle.latent_shape)
    inputs = {}
    for condition in bundle.conditions:
        if condition.name == "concat":
            x = torch.cat([x, torch.randn(2, condition.shape[0], *x.shape[2:])], 1)
        elif condition.dtype == "int64":
            inputs[condition.name] = torch.tensor([1, 2])
        else:
            inputs[condition.name] = torch.rand(2, *condition.shape)
    with torch.no_grad():
        eps = bundle.unet(x, timesteps=torch.tensor([7.0, 400.0]), **inputs)
        assert eps.shape == (2, *bundle.latent_shape) and eps.isfinite().all() and eps.std() > 0.01
        if bundle.autoencoder is not None:
            corner = x[:1, : bundle.latent_shape[0], :4, :4]
            volume = bundle.autoencoder.decode(corner[..., :4] if len(bundle.latent_shape) == 4 else corner)
            assert volume.shape[1] == 1 and volume.isfinite().all() and volume.std() > 1e-3


def test_conditions_of_published_bundles(zoo_bundle):
    named = {c.name: (c.dtype, c.shape) for c in zoo_bundle("brain_ldm").conditions}
    assert named == {"context": ("float32", (1, 4)), "concat": ("float32", (4, "d0", "d1", "d2"))}
    maisi = zoo_bundle("maisi_rflow")
    named = {c.name: (c.dtype, c.shape) for c in maisi.conditions}
    assert named == {"class_labels": ("int64", ()), "spacing_tensor": ("float32", (3,))}
    assert maisi.spacing_mm == (1.5, 1.5, 1.5)


def small(tmp_path, **changes):
    """A bundle of one tiny UNet; `changes` replace its config's keys, None takes one out."""
    config = {
        "network_def": {
            "_target_": "DiffusionModelUNet",
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": 1,
            "channels": [8, 8],
            "attention_levels": [False, False],
            "num_head_channels": 8,
            "norm_num_groups": 4,
            "num_res_blocks": 1,
        },
        "latent_shape": [1, 4, 4],
        "noise_scheduler": {"_target_": "DDIMScheduler"},
        "num_inference_steps": 10,
        "load": "$@network_def.load_state_dict(load_file(@bundle_root + '/models/unet.safetensors'))",
        **changes,
    }
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "configs").mkdir(exist_ok=True)
    (tmp_path / "models").mkdir(exist_ok=True)
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(config))
    arguments = {key: value for key, value in config["network_def"].items() if key != "_target_"}
    network = DiffusionModelUNet(**arguments)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "models" / "unet.safetensors")
    return tmp_path


REFUSED = {
    "latent_shape=.*--set latent_shape": {"latent_shape": [1, 4]},
    "latent_shape: the config has neither.*--set latent_shape": {"latent_shape": None},
    "multiples of 2": {"latent_shape": [1, 5, 4]},
    "UNet makes 1 channels": {"latent_shape": [2, 4, 4]},
    "scale_factor='\\$compute\\(\\)'.*'compute\\(\\)', which is not run.*--set scale_factor": {
        "scale_factor": "$compute()"
    },
    "scale_factor=nan": {"scale_factor": float("nan")},
    "spacing_mm=.*need 2": {"spacing_mm": [1.0, 1.0, 1.0]},
    "num_inference_steps=0": {"num_inference_steps": 0},
    "num_inference_steps=1001": {"num_inference_steps": 1001},
    "sets no steps.*--set num_inference_steps": {"num_inference_steps": None},
    "no load_state_dict.*--weights unet=FILE": {"load": "$@network_def.load_state_dict(fetch(@bundle_root))"},
    "outside the bundle.*--weights unet=FILE": {
        "load": "$@network_def.load_state_dict(load_file('/etc/passwd'))"
    },
    "no such file": {"load": "$@network_def.load_state_dict(load_file('models/other.safetensors'))"},
    "context_tokens=0": {"context_tokens": 0},
    "unet_weights_key=3: need the name": {"unet_weights_key": 3},
    "the autoencoder has latent_channels=3; .*--set autoencoder=KEY": {
        "vae": {"_target_": "AutoencoderKL", "spatial_dims": 2, "latent_channels": 3}
    },
    "the autoencoder has spatial_dims=3; ": {
        "vae": {"_target_": "AutoencoderKL", "spatial_dims": 3, "latent_channels": 1}
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_name_value_and_remedy(tmp_path, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_bundle(small(tmp_path, **REFUSED[message]))
    assert "\n" not in str(caught.value)


def test_settings_supply_what_cannot_be_read(tmp_path):
    folder = small(tmp_path, scale_factor="$compute()", latent_shape=None)
    chosen = {"scale_factor": 0.5, "latent_shape": [1, 8, 4], "noise_scheduler#clip_sample": False}
    bundle = read_bundle(folder, settings=chosen, weights={"unet": folder / "models" / "unet.safetensors"})
    assert (bundle.scale_factor, bundle.latent_shape, bundle.scheduler.clip_sample) == (0.5, (1, 8, 4), False)
    assert bundle.autoencoder is None and bundle.provenance["spacing_mm"] == "assumed 1 mm"


def test_plain_config_file_and_nan_weights(tmp_path):
    folder = small(tmp_path, noise="$torch.randn(1, 1, 4, 8)", latent_shape=None)
    file = (folder / "configs" / "inference.json").rename(folder / "unet.json")
    assert read_bundle(file).latent_shape == (1, 4, 8)
    weights = safetensors.torch.load_file(folder / "models" / "unet.safetensors")
    weights["out.0.bias"][3] = float("nan")
    safetensors.torch.save_file(weights, folder / "models" / "unet.safetensors")
    with pytest.raises(ValueError, match=r"unet.safetensors has NaN or Inf in out\.0\.bias; "):
        read_bundle(file)


def test_large_files_hashes_are_checked(tmp_path):
    folder = small(tmp_path)
    (folder / "large_files.yml").write_text(
        "large_files:\n- path: models/unet.safetensors\n  hash_val: '00'\n"
    )
    with pytest.raises(ValueError, match=r"its md5 is not 00 \(large_files.yml\)"):
        read_bundle(folder)


def spread(*values):
    return st.sampled_from(
        [*values, "$compute()", "@latent_shape", "%x", None, True, -1, 0, 2**70, float("nan"), "", [], {}]
    )


EDITS = {
    "latent_shape": spread([1, 4, 6], [1, 4, 4, 4], ["@channels", 4, 4], "$[1] + [4, 2 * 3]", [1, 4.0, 4]),
    "scale_factor": spread(
        0.5, "$1 / 2", "$torch.load('models/unet.safetensors')['s']", "$load_file('models/x.pt')['s']"
    ),
    "spacing_mm": spread([1, 2], [1.5, "@scale_factor"], [1, 2, 3]),
    "noise": spread("$torch.randn(1, 1, 4, 4)", "$torch.randn([1] + @latent_shape)", "$torch.randn(2)"),
    "num_inference_steps": spread(5, "$10 // 2", 2000),
    "context_tokens": spread(2),
    "unet_weights_key": spread("state_dict"),
    "noise_scheduler": spread({"_target_": "PNDMScheduler"}, {"_target_": "RFlowScheduler"}),
}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.fixed_dictionaries({}, optional=EDITS))
def test_fuzzed_values(tmp_path, edits):
    base = tmp_path / "base.json"
    if not base.exists():
        base.write_bytes((small(tmp_path) / "configs" / "inference.json").read_bytes())
    (tmp_path / "configs" / "inference.json").write_text(
        json.dumps({**json.loads(base.read_text()), **edits})
    )
    try:
        bundle = read_bundle(tmp_path)
    except ValueError as error:
        assert str(error).startswith(("[bundle] ", "[weights] ")) and "\n" not in str(error)
    else:
        assert bundle.latent_shape[0] == 1 and len(bundle.latent_shape) == 3
        assert all(type(size) is int and size > 0 and size % 2 == 0 for size in bundle.latent_shape[1:])
        assert bundle.scale_factor > 0 and len(bundle.spacing_mm) == 2
        assert 1 <= bundle.scheduler.steps <= 1000
