"""CLIP's text encoder, read from the folder in which `transformers` keeps one; nothing in it is executed.

The text encoder of latent diffusion models such as the chest X-ray one of MONAI's GenerativeModels (that of Stable
Diffusion 2.1). It depends on the prompt alone, so that it becomes a part of `prepare`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, final

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from volcast.export.bundle_config import Config, read_data, shown, validated
from volcast.export.weights import digest, read_checkpoint, state_dict
from volcast.runtime.frozen import Frozen
from volcast.runtime.spec import ConditionSpec

TEXT = "text"
"""The condition: a prompt's token ids."""
TEXT_ENCODER = "text_encoder"
"""The setting, or key of a config, that names the folder."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
HIDDEN = -1e30
"""Added to a score that must not count; its exponential is 0, and unlike -inf it makes no NaN on any engine."""
# In the files and of no use here: the ids 0..L-1, and the projection for comparing texts with images.
_UNUSED = ("embeddings.position_ids", "text_projection.weight")


class ClipConfig(Frozen):
    """`config.json` of a `CLIPTextModel`, what matters of it; bounds keep a hostile one from building for hours."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    model_type: Literal["clip_text_model"]
    vocab_size: Annotated[int, Field(ge=1, le=2**20)]
    hidden_size: Annotated[int, Field(ge=1, le=2**13)]
    intermediate_size: Annotated[int, Field(ge=1, le=2**15)]
    num_hidden_layers: Annotated[int, Field(ge=1, le=128)]
    num_attention_heads: Annotated[int, Field(ge=1, le=256)]
    max_position_embeddings: Annotated[int, Field(ge=1, le=4096)] = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-5


@final
class ClipTextEncoder(nn.Module):
    """`forward(tokens) -> last_hidden_state`: int64 [N, L], L the config's positions, to float32 [N, L, C].

    Causal: a token sees itself and those before it. Parameters have `transformers`' names without `text_model.`.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, length = config.hidden_size, config.max_position_embeddings
        self.config = config
        self.embeddings = nn.ModuleDict(
            {"token_embedding": nn.Embedding(config.vocab_size, width), "position_embedding": nn.Embedding(length, width)}
        )  # fmt: skip
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))}
        )
        self.final_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, tokens: Tensor) -> Any:
        length = self.config.max_position_embeddings
        mask = torch.full((length, length), HIDDEN).triu(1)
        x = self.embeddings["token_embedding"](tokens) + self.embeddings["position_embedding"].weight
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            x = layer(x, mask)
        return self.final_layer_norm(x)


@final
class _Layer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        self.quick = config.hidden_act == "quick_gelu"
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, width)}
        )  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        y = self.layer_norm1(x)
        q, k, v = (self._split(self.self_attn[name](y)) for name in ("q_proj", "k_proj", "v_proj"))
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)) + mask
        mixed = torch.matmul(scores.softmax(-1), v).transpose(1, 2)
        x = x + self.self_attn["out_proj"](mixed.reshape(x.shape))
        y = self.mlp["fc1"](self.layer_norm2(x))
        y = y * torch.sigmoid(1.702 * y) if self.quick else nn.functional.gelu(y)
        return x + self.mlp["fc2"](y)

    def _split(self, x: Tensor) -> Tensor:
        """[N, L, H d] -> [N, H, L, d]"""
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


@final
@dataclass(frozen=True, kw_only=True)
class TextPlan:
    """A text encoder's folder and what its config says; no weight file is open yet."""

    folder: Path
    config: ClipConfig

    def condition(self) -> ConditionSpec:
        """What takes the place of `context`."""
        length, last = self.config.max_position_embeddings, self.config.vocab_size - 1
        return ConditionSpec(
            name=TEXT, dtype="int64", shape=(length,), minimum=0, maximum=last,
            description=f"required: a prompt's {length} token ids, padded as in training",
        )  # fmt: skip

    def load(self) -> tuple[ClipTextEncoder, dict[str, str]]:
        """The encoder with its weights, in float32 and eval mode, and its provenance.

        Raises ValueError: no weight file, or one that does not fit the config.
        """
        path = next((self.folder / name for name in WEIGHTS if (self.folder / name).is_file()), None)
        if path is None:
            raise ValueError(
                f"[bundle] {self.folder}: no {' or '.join(WEIGHTS)}; give the folder that holds one"
            )
        with torch.device("meta"):
            encoder = ClipTextEncoder(self.config)
        given = state_dict(read_checkpoint(path), (), path, TEXT_ENCODER)
        state = {name.removeprefix("text_model."): value.float() for name, value in given.items()}
        state = {name: value for name, value in state.items() if name not in _UNUSED}
        wanted = {name: value.shape for name, value in encoder.state_dict().items()}
        found = {name: value.shape for name, value in state.items()}
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if odd:
            raise ValueError(
                f"[bundle] {path}: {len(odd)} tensors are not what config.json says, {odd[0]} first; give the weights of "
                "a CLIPTextModel with its own config.json"
            )
        encoder.load_state_dict(state, assign=True)
        provenance = {f"{TEXT_ENCODER}_file": path.name, f"{TEXT_ENCODER}_sha256": digest(path)}
        return encoder.eval().requires_grad_(False), provenance


def plan_text(read: Config, root: Path, unet: Mapping[str, Any]) -> TextPlan | None:
    """None: neither a setting nor the config names a text encoder.

    An expression of the config (`$transformers...`) names none: give the folder with --set text_encoder=FOLDER.

    Raises:
        ValueError: no such folder, another kind of model, a UNet without a context of that width.
    """
    value = read.raw(TEXT_ENCODER) if TEXT_ENCODER in read else None
    if not isinstance(value, str) or value.startswith("$"):
        return None
    folder = Path(value) if Path(value).is_dir() else root / value
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"[bundle] {TEXT_ENCODER}={shown(value)}: no folder with a config.json; give where save_pretrained wrote a "
            "CLIPTextModel"
        )
    config = validated(ClipConfig, read_data(folder / "config.json")[0], str(folder / "config.json"))
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"[bundle] {folder}: hidden_size={config.hidden_size} is no multiple of its "
            f"{config.num_attention_heads} heads; correct config.json"
        )
    if not unet["with_conditioning"] or unet["cross_attention_dim"] != config.hidden_size:
        raise ValueError(
            f"[bundle] {TEXT_ENCODER}={shown(value)}: it makes {config.hidden_size} numbers a token, the UNet takes "
            f"cross_attention_dim={unet['cross_attention_dim']}; give the encoder of its training"
        )
    return TextPlan(folder=folder, config=config)
