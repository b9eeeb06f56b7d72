"""Which component and which file a bundle means; configs mutated by the thousand, with a canary that no code may wake."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volcast.export.bundle_plan import plan_bundle
from volcast.runtime.default_artifact import BUNDLE
from volcast.runtime.spec import SchedulerSpec

CONFIGS = Path(__file__).parent / "configs"
FILES = {
    "brats_3d": ("model.pt", (), "model_autoencoder.pt", ()),
    "brain_ldm": ("model.pt", (), "autoencoder.pt", ()),
    "maisi_rflow": ("diff_unet_ckpt_epoch19350.pt", ("unet_state_dict",), "autoencoder_epoch273.pt", ()),
    "mednist_ddpm": ("model.pt", (), None, ()),
}


def config(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


def write(folder, data, name="inference.json"):
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "configs" / name).write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_files_of_published_bundles(name):
    source = next(CONFIGS.glob(f"{name}.[jy]*"))
    plan = plan_bundle(source)
    unet, unet_keys, autoencoder, autoencoder_keys = FILES[name]
    path, keys = plan.weight_file("unet", plan.unet)
    assert (path, keys) == (CONFIGS.parent / "models" / unet, unet_keys)
    if autoencoder is None:
        assert plan.autoencoder is None
    else:
        path, keys = plan.weight_file("autoencoder", plan.autoencoder)
        assert (path, keys) == (CONFIGS.parent / "models" / autoencoder, autoencoder_keys)


def test_maisis_second_set_can_be_chosen(tmp_path):
    plan = plan_bundle(
        write(tmp_path, config("maisi_rflow")),
        settings={
            "unet": "mask_generation_diffusion_unet",
            "autoencoder": "mask_generation_autoencoder_def",
            "scheduler": "mask_generation_noise_scheduler",
            "num_inference_steps": 1000,
        },
    )
    assert plan.unet.id == "mask_generation_diffusion_def"
    assert plan.weight_file("unet", plan.unet)[0].name == "mask_generation_diffusion_unet.pt"
    assert plan.autoencoder.arguments["out_channels"] == 125
    assert plan.scheduler.scheduler == "ddpm"
    assert plan_bundle(tmp_path, settings={"autoencoder": None}).autoencoder is None


def test_steps_a_setting_then_set_timesteps_then_the_key(tmp_path):
    folder = write(tmp_path, change(num_inference_steps=30))
    assert plan_bundle(folder).scheduler.steps == 50
    assert plan_bundle(folder, settings={"num_inference_steps": 7}).scheduler.steps == 7
    folder = write(tmp_path, change(num_inference_steps=30, set_timesteps=None))
    assert plan_bundle(folder).scheduler.steps == 30


def test_own_weights_replace_the_bundles(tmp_path):
    own = {"unet": tmp_path / "own.safetensors"}
    plan = plan_bundle(write(tmp_path, config("maisi_rflow")), weights=own)
    assert plan.weight_file("unet", plan.unet) == (own["unet"], ())
    plan = plan_bundle(tmp_path, weights=own, settings={"unet_weights_key": "ema"})
    assert plan.weight_file("unet", plan.unet) == (own["unet"], ("ema",))


def change(**edits):
    data = config("brats_3d")
    for key, value in edits.items():
        if value is None:
            del data[key]
        else:
            data[key] = value
    return data


SCHEDULER = {"_target_": "DDIMScheduler"}


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (change(network_def=None), {}, "no diffusion network .*known: DiffusionModelUNet"),
        (
            change(network_def={"_target_": "monai.networks.nets.UNet"}),
            {},
            "network_def: monai.networks.nets.UNet",
        ),
        (change(noise_scheduler=None), {}, "no scheduler; known: DDPMScheduler"),
        (
            change(noise_scheduler=None, a=SCHEDULER, b=SCHEDULER),
            {},
            "several .* scheduler: a, b; .*--set scheduler=KEY",
        ),
        (change(), {"settings": {"unet": "gone"}}, "--set unet=gone: no component .*network_def"),
        (change(), {"settings": {"unet": "autoencoder_def"}}, "AutoencoderKL is no unet"),
        (
            change(),
            {"settings": {"latnet_shape": [1]}},
            "--set latnet_shape: no such key; known: .*latent_shape",
        ),
        (change(), {"weights": {"vae": Path("f")}}, "--weights vae=...: need unet=FILE or autoencoder=FILE"),
        (
            change(autoencoder_def=None),
            {"weights": {"autoencoder": Path("f")}},
            "--weights autoencoder=...: the config has no autoencoder",
        ),
        (change(spatial_dims="$dims()"), {}, r"spatial_dims='@spatial_dims': needs 'dims\(\)'.*--set"),
        (change(network_def=None, net="%other.json::net"), {}, "no diffusion network"),
    ],
)
def test_refusals(tmp_path, data, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        plan_bundle(write(tmp_path, data), **options)
    assert "\n" not in str(caught.value)


def test_two_files_for_one_network_are_asked_about(tmp_path):
    data = change(again="$@network_def.load_state_dict(torch.load('models/other.pt'))")
    plan = plan_bundle(write(tmp_path, data))
    with pytest.raises(ValueError, match="again loads another file.*--weights unet=FILE"):
        plan.weight_file("unet", plan.unet)


def test_yaml_and_metadata(tmp_path):
    with pytest.raises(ValueError, match="no configs/inference.json or .*--config FILE"):
        plan_bundle(tmp_path)
    write(tmp_path, {"name": "BraTS", "version": "1.2"}, "metadata.json")
    (tmp_path / "configs" / "inference.yaml").write_text(yaml.safe_dump(config("brats_3d")))
    provenance = plan_bundle(tmp_path).provenance
    assert (provenance["bundle"], provenance["bundle_version"], provenance["config"]) == (
        "BraTS",
        "1.2",
        "inference.yaml",
    )
    assert provenance["monai_version"] == "1.6.1"


HOSTILE = [
    "$__import__('os').mkdir('canary')",
    "$().__class__.__mro__[1].__subclasses__()",
    "$[c for c in ().__class__.__base__.__subclasses__()]",
    "$(lambda: __import__('os').mkdir('canary'))()",
    "$exec('import os; os.mkdir(\"canary\")')",
    "$@network_def.load_state_dict(torch.load(__import__('os').mkdir('canary')))",
    "$torch.load('/dev/zero')",
    "$'a' * 10 ** 12",
    "$9 ** 9 ** 9 ** 9",
    "%configs/metadata.json::name",
    "@network_def",
    "@noise_scheduler#schedule",
    "@latent_shape#0",
    "@#in_channels",
    "@##channel",
    "$@latent_shape + @latent_shape",
    "../../../../etc/passwd",
    "\ud800",
    "a\nb",
    "",
]
VALUES = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.lists(st.integers(-2, 70), max_size=4),
    st.dictionaries(
        st.sampled_from(["_target_", "a", "spatial_dims"]), st.sampled_from([*HOSTILE, "AutoencoderKL", 3])
    ),
)
SMALL = change(
    autoencoder_def=None,
    load_autoencoder=None,
    latent_channels=1,
    latent_shape=[1, 4, 4, 4],
    network_def={
        **config("brats_3d")["network_def"],
        "channels": [32, 32],
        "num_res_blocks": 1,
        "attention_levels": [False, True],
        "num_head_channels": [0, 8],
    },
)


def places(value, here=()):
    yield here
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from places(child, (*here, key))


PLACES = [place for place in places(SMALL) if place]
EDITS = st.lists(
    st.tuples(st.sampled_from(PLACES), st.sampled_from(["set", "drop", "rename"]), VALUES),
    min_size=1,
    max_size=4,
)


def edited(edits):
    data = copy.deepcopy(SMALL)
    for place, action, value in edits:
        holder = data
        try:
            for key in place[:-1]:
                holder = holder[key]
            if action == "set" or isinstance(holder, list):
                holder[place[-1]] = value
            else:
                taken = holder.pop(place[-1])
                if action == "rename":
                    holder[str(value)[:20]] = taken
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # an edit before took this place away
    return data


def read_or_refuse(folder, monkeypatch):
    monkeypatch.chdir(folder)
    try:
        plan = plan_bundle(folder)
        plan.unet.build()
        plan.weight_file("unet", plan.unet)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(plan.scheduler, SchedulerSpec)
    assert not (folder / "canary").exists()


FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(FUZZ, max_examples=600)
@given(edits=EDITS, as_yaml=st.booleans())
def test_fuzzed_configs(tmp_path, monkeypatch, edits, as_yaml):
    for old in (tmp_path / "configs").glob("*"):
        old.unlink()
    data = edited(edits)
    write(tmp_path, data)
    if as_yaml:
        file = tmp_path / "configs" / "inference.json"
        file.rename(file.with_suffix(".yaml"))  # json is yaml, read by the other parser
    read_or_refuse(tmp_path, monkeypatch)


SOURCE = (CONFIGS / "mednist_ddpm.yaml").read_text()
TEXT = st.sampled_from(
    ["!!python/object/apply:os.mkdir [canary]", "&a", "*a", "<<: *a", "- ", "? ", "{", "}", "[", "'", "|\n", "\t", "\0", "!!bool x",
     "!!binary x", "!!timestamp 1-1-1", "---\n", "%YAML 9.9\n", "$", "@", "#", "1:1:1", "0x", ".inf"]
)  # fmt: skip


@settings(FUZZ, max_examples=400)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(SOURCE)), st.integers(0, 30), TEXT | st.text(max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_fuzzed_text(tmp_path, monkeypatch, edits):
    text = SOURCE
    for position, length, new in edits:
        text = text[:position] + new + text[position + length :]
    (tmp_path / "configs").mkdir(exist_ok=True)
    (tmp_path / "configs" / "inference.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    read_or_refuse(tmp_path, monkeypatch)


def test_a_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    config = SOURCE.replace("network_def:", "network_def:\n  ~: 1", 1)
    assert config != SOURCE
    (tmp_path / "configs" / "inference.yaml").write_text(config)
    with pytest.raises(ValueError, match=r"network_def#None: need text"):
        plan_bundle(tmp_path)


def test_an_autoencoder_that_is_mentioned_but_missing_is_asked_for(tmp_path: Path) -> None:
    folder = shutil.copytree(BUNDLE, tmp_path / "bundle")
    config = folder / "configs" / "inference.json"
    data = json.loads(config.read_text())
    del data["autoencoder_def"]
    config.write_text(json.dumps(data))
    with pytest.raises(
        ValueError, match=r"load_autoencoder is there and an autoencoder is not: add autoencoder_def"
    ):
        plan_bundle(folder)
