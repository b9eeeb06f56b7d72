"""CLIP's text encoder against torch's own transformer layers, and a text-conditioned model against MONAI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from mask_bundles import UNET, write_bundle
from safetensors.torch import save_file
from torch import nn

from volcast.__main__ import app
from volcast.export.artifact import export_bundle
from volcast.export.bundle import read_bundle
from volcast.export.bundle_config import Config
from volcast.export.text_encoder import ClipTextEncoder, plan_text
from volcast.runtime.pipeline import load

LENGTH, WORDS, WIDTH = 7, 50, 16
CONFIG = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": WORDS, "hidden_size": WIDTH,
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": LENGTH,
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49,
}  # fmt: skip
TEXT_UNET = UNET | {"spatial_dims": 2, "with_conditioning": True, "cross_attention_dim": WIDTH}
PROMPT = np.array([48, 3, 17, 5, 49, 49, 49])
OTHER = np.array([48, 49, 49, 49, 49, 49, 49])


def write_encoder(folder: Path, config: dict[str, Any] = CONFIG) -> dict[str, torch.Tensor]:
    """A folder as `save_pretrained` writes it, N(0, 1 / fan-in) weights; the names of transformers 4."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes = {"embeddings.token_embedding.weight": (config["vocab_size"], width),
              "embeddings.position_embedding.weight": (config["max_position_embeddings"], width)}  # fmt: skip
    norms = ["final_layer_norm"]
    for layer in (f"encoder.layers.{i}" for i in range(config["num_hidden_layers"])):
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        sizes = {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        for name, size in (sizes | {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}).items():
            shapes |= {f"{layer}.{name}.weight": size, f"{layer}.{name}.bias": size[:1]}
    state = {name: torch.randn(size, generator=generator) * size[-1] ** -0.5 for name, size in shapes.items()}
    for name in norms:
        state |= {f"{name}.weight": 1 + 0.2 * torch.randn(width, generator=generator),
                  f"{name}.bias": 0.2 * torch.randn(width, generator=generator)}  # fmt: skip
    state["embeddings.position_ids"] = torch.arange(config["max_position_embeddings"])[None]
    save_file({f"text_model.{name}": value for name, value in state.items()}, folder / "model.safetensors")
    return state


def torch_s(state: dict[str, torch.Tensor], config: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """The same of `nn.TransformerEncoderLayer`s (norm first, causal), in float64."""
    state = {name: value.double() for name, value in state.items() if value.is_floating_point()}

    def quick(x: torch.Tensor) -> torch.Tensor:
        return x * (1.702 * x).sigmoid()

    activation = quick if config["hidden_act"] == "quick_gelu" else nn.functional.gelu
    x = state["embeddings.token_embedding.weight"][tokens] + state["embeddings.position_embedding.weight"]
    mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=torch.float64)
    for i in range(config["num_hidden_layers"]):
        own = {name.removeprefix(f"encoder.layers.{i}."): value for name, value in state.items()}
        layer = nn.TransformerEncoderLayer(
            config["hidden_size"], config["num_attention_heads"], config["intermediate_size"], dropout=0,
            activation=activation, layer_norm_eps=config["layer_norm_eps"], batch_first=True, norm_first=True,
        ).double()  # fmt: skip
        joined = {f"self_attn.in_proj_{kind}": torch.cat([own[f"self_attn.{p}_proj.{kind}"] for p in "qkv"])
                  for kind in ("weight", "bias")}  # fmt: skip
        names = {"self_attn.out_proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2",
                 "layer_norm1": "norm1", "layer_norm2": "norm2"}  # fmt: skip
        layer.load_state_dict(joined | {f"{theirs}.{kind}": own[f"{ours}.{kind}"]
                                        for ours, theirs in names.items() for kind in ("weight", "bias")})  # fmt: skip
        x = layer(x, src_mask=mask, is_causal=True)
    return nn.functional.layer_norm(
        x, x.shape[-1:], state["final_layer_norm.weight"], state["final_layer_norm.bias"], config["layer_norm_eps"]
    )  # fmt: skip


def encoder_of(folder: Path) -> ClipTextEncoder:
    plan = plan_text(
        Config({"text_encoder": str(folder)}, {}, frozenset()), folder, {"with_conditioning": True, "cross_attention_dim": WIDTH}
    )  # fmt: skip
    assert plan is not None
    return plan.load()[0]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_encoder_is_torch_s_transformer(tmp_path: Path, activation: str) -> None:
    config = CONFIG | {"hidden_act": activation}
    state = write_encoder(tmp_path / "clip", config)
    tokens = torch.from_numpy(np.stack([PROMPT, OTHER]))
    with torch.no_grad():
        found = encoder_of(tmp_path / "clip").double()(tokens)
        wanted = torch_s(state, config, tokens)
    # Float64 sums of at most 40 terms in another order, through two layers.
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-conditioned model of images: its bundle and its artifact."""
    root = tmp_path_factory.mktemp("text")
    write_encoder(root / "bundle" / "text_encoder")
    networks = {"network_def": TEXT_UNET}
    bundle = write_bundle(root / "bundle", networks, [2, 8, 12], text_encoder="text_encoder")
    export_bundle(bundle, root / "artifact", batch=(1, 2))
    return root


def test_a_prompt_goes_through_the_encoder_once_a_request(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "prompt.npy", PROMPT)
    np.save(tmp_path / "other.npy", OTHER)
    command = [
        "verify",
        str(folder / "artifact"),
        str(folder / "bundle"),
        "--engine",
        "onnxruntime",
        "--steps",
        "2",
    ]
    command += ["-c", f"text=@{tmp_path}/prompt.npy", "--guidance", "3"]
    assert app([*command, "--negative", f"text=@{tmp_path}/other.npy"]) == 0, capfd.readouterr().out
    assert app(command) == 2 and "no unconditional value; give negative=" in capfd.readouterr().err

    given: dict[str, Any] = {
        "condition": {"text": PROMPT},
        "negative": {"text": OTHER},
        "guidance": 3.0,
        "steps": 2,
    }
    model = load(folder / "artifact", "onnxruntime", threads=1)
    takes = {name: {one.name for one in program.inputs} for name, program in model.spec.programs.items()}
    assert takes["prepare"] == {"text"} and "text" not in takes["step"]
    volume = model.sample(**given).array
    for name in ("condition", "negative"):
        changed = PROMPT + (np.arange(LENGTH) == 2)
        other = model.sample(**(given | {name: {"text": changed}})).array
        assert np.abs(other - volume).max() > 1e-4 * np.abs(volume).max(), name
    swept = [one.array for one in model.sample_many(1, **(given | {"guidance": [1, 3]}), batch=2)]
    np.testing.assert_allclose(swept[1], volume, atol=1e-6 * np.abs(volume).max(), rtol=0)


def test_a_sweep_of_prompts_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    for name, tokens in (("prompt", PROMPT), ("null", OTHER)):
        np.save(tmp_path / f"{name}.npy", tokens)
    command = ["sample", str(folder / "artifact"), "-o", str(tmp_path / "out.nii.gz"), "--steps", "2", "-q"]
    command += ["--engine", "onnxruntime", "--threads", "1", "--guidance", "1..3"]
    command += ["-c", f"text=@{tmp_path}/prompt.npy", "--negative", f"text=@{tmp_path}/null.npy"]
    assert app(command) == 0
    model = load(folder / "artifact", "onnxruntime", threads=1)
    given: dict[str, Any] = {"condition": {"text": PROMPT}, "negative": {"text": OTHER}, "steps": 2}
    for weight in (1, 2, 3):
        image = nibabel.load(tmp_path / f"out_guidance{weight}.nii.gz")
        found = np.moveaxis(np.asarray(image.dataobj), -1, 0)[..., 0]  # channels last in NIfTI, one slice
        np.testing.assert_array_equal(found, model.sample(guidance=weight, **given).array)


def test_without_the_encoder_the_context_is_an_array(folder: Path) -> None:
    settings = {"text_encoder": None, "context_tokens": LENGTH}
    (context,) = read_bundle(folder / "bundle", settings=settings).conditions
    assert (context.name, context.dtype, context.shape) == ("context", "float32", (LENGTH, WIDTH))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PROMPT[:-1], r"text has shape \(6,\): need \(7\)"),
        (PROMPT + 1, "text reaches from 4 to 50: need 0.0..49.0"),
        (PROMPT + 0.5, "text holds fractions"),
    ],
)
def test_prompts_that_are_refused(folder: Path, text: np.ndarray, message: str) -> None:
    model = load(folder / "artifact", "onnxruntime", threads=1)
    with pytest.raises(ValueError, match=message):
        model.sample(condition={"text": text})
    with pytest.raises(ValueError, match="no unconditional value; give negative="):
        model.sample(condition={"text": PROMPT}, guidance=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, r"config\.json: model_type='t5'"),
        ({"hidden_size": 20}, "makes 20 numbers a token, the UNet takes cross_attention_dim=16"),
        ({"num_attention_heads": 3}, "hidden_size=16 is no multiple of its 3 heads"),
        ({"num_hidden_layers": 3}, "16 tensors are not what config.json says, encoder.layers.2"),
        ({"vocab_size": 51}, "1 tensors are not what config.json says, embeddings.token_embedding.weight first"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"vocab_size": 10**9}, "vocab_size=1000000000"),
    ],
)  # fmt: skip
def test_encoders_that_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_encoder(tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(ValueError, match=message) as caught:
        read_bundle(folder / "bundle", settings={"text_encoder": str(tmp_path / "clip")})
    assert "\n" not in str(caught.value)


def test_a_folder_without_an_encoder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder with a config\.json; give where save_pretrained wrote"):
        read_bundle(folder / "bundle", settings={"text_encoder": str(tmp_path)})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"no model\.safetensors or pytorch_model\.bin"):
        read_bundle(folder / "bundle", settings={"text_encoder": str(tmp_path)})
