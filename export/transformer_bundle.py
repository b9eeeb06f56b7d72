"""Reads the bundle of a VQVAE and its transformer: networks with their weights, token grid, order. Nothing is executed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai
import torch

from volcast.export.bundle_config import Config, one_line, read_data, shown
from volcast.export.bundle_expression import is_number
from volcast.export.bundle_networks import NetworkPlan, kind_of, plan_network
from volcast.export.bundle_plan import find_config
from volcast.export.transformer_order import read_order
from volcast.export.weights import LargeFiles, digest, read_checkpoint, state_dict
from volcast.export.weights_keys import load_weights
from volcast.runtime.spec import ConditionSpec

ROLES = ("vqvae", "transformer")
SETTINGS = frozenset(
    {
        "bos_token",
        "bundle_root",
        "context_tokens",
        "order",
        "ordering",
        "spacing_mm",
        "token_shape",
        "weights",
    }
)


@dataclass(frozen=True, kw_only=True)
class TransformerBundle:
    """A trained token model, ready for capture.

    `vqvae` and `transformer` are MONAI 1.6.1 networks in float32, eval mode, on the CPU, the transformer without its
    causal masks (constants; `with_masks` puts them back). `image_shape` is `(C, *spatial)`; the rest is as in `TokenSpec`.
    """

    name: str
    vqvae: torch.nn.Module
    transformer: torch.nn.Module
    token_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    num_codes: int
    bos_token: int
    order: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    conditions: tuple[ConditionSpec, ...]
    provenance: dict[str, str]


def has_transformer(folder: Path, config: Path | None) -> bool:
    """Whether the config of a bundle is that of a token model: one of its components is a DecoderOnlyTransformer."""
    targets = Config(read_data(find_config(folder, config)[1])[0], {}, frozenset()).targets()
    kinds = [kind_of(target) for target in targets.values()]
    return any(kind is not None and kind.role == "transformer" for kind in kinds)


def read_transformer(
    folder: Path,
    *,
    config: Path | None = None,
    weights: Mapping[str, Path] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TransformerBundle:
    """Read a bundle folder with `config`, or a plain config file.

    `weights` maps `vqvae` and `transformer` to files; else the config's `weights` is a file of both, their keys prefixed
    `vqvae.` and `transformer.`, or a mapping of the two. `settings` replace config keys by id. Raises ValueError, one line
    with the key and the remedy: a network or file is missing, the sequence is longer than the transformer's positions,
    an order does not fit, the codebook and the vocabulary do not belong together.
    """
    root, file = find_config(folder, config)
    data, config_sha256 = read_data(file)
    read = Config(data, {"bundle_root": str(root), **(settings or {})}, SETTINGS)
    unknown = sorted((weights or {}).keys() - set(ROLES))
    if unknown:
        raise ValueError(f"[bundle] --weights {unknown[0]}=...: need vqvae=FILE or transformer=FILE")
    vqvae, transformer = (_network(read, role) for role in ROLES)
    token_shape = _token_shape(read, vqvae, transformer)
    bos_token = _bos_token(read, vqvae, transformer)
    order = read_order(read, root, token_shape)
    image_shape = _image_shape(vqvae, token_shape)
    files = LargeFiles(root)
    loaded: dict[str, torch.nn.Module] = {}
    provenance: dict[str, str] = {}
    for role, plan in zip(ROLES, (vqvae, transformer), strict=True):
        path = _weight_file(read, root, role, weights or {})
        files.check(path)
        loaded[role] = _load(plan, path, role)
        provenance |= {f"{role}_file": path.name, f"{role}_sha256": digest(path)}
    metadata_file = file.parent / "metadata.json"
    metadata = read_data(metadata_file)[0] if metadata_file.is_file() else {}
    return TransformerBundle(
        name=one_line(metadata.get("name") or root.name or "model"),
        vqvae=loaded["vqvae"],
        transformer=loaded["transformer"],
        token_shape=token_shape,
        image_shape=image_shape,
        num_codes=vqvae.arguments["num_embeddings"],
        bos_token=bos_token,
        order=order,
        spacing_mm=_spacing(read, len(token_shape)),
        conditions=_conditions(read, transformer),
        provenance={
            "bundle": one_line(metadata.get("name") or root.name or "model"),
            "bundle_version": one_line(metadata.get("version", "unknown")),
            "monai_version": monai.__version__,
            "config": file.name,
            "config_sha256": config_sha256,
            **provenance,
        },
    )


def with_masks(transformer: torch.nn.Module, length: int) -> torch.nn.Module:
    """The same network with the causal masks that MONAI's own forward reads, for sequences up to `length`."""
    mask = torch.tril(torch.ones(length, length))[None, None]
    for attention in _attentions(transformer):
        attention.register_buffer("causal_mask", mask)
    return transformer


def _attentions(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    return [block.attn for block in transformer.blocks]  # type: ignore[union-attr]


def _network(read: Config, role: str) -> NetworkPlan:
    kinds = {id: kind_of(target) for id, target in read.targets().items()}
    ids = [id for id, kind in kinds.items() if kind is not None and kind.role == role]
    if len(ids) != 1:
        name = {"vqvae": "VQVAE", "transformer": "DecoderOnlyTransformer"}[role]
        found = f"several networks are a {name}: {', '.join(ids)}" if ids else f"the config has no {name}"
        raise ValueError(f"[bundle] {found}; name one {role}_def with _target_ {name}")
    return plan_network(ids[0], str(read.raw(ids[0]).get("_target_")), read.arguments(ids[0]))


def _token_shape(read: Config, vqvae: NetworkPlan, transformer: NetworkPlan) -> tuple[int, ...]:
    dims, longest = vqvae.arguments["spatial_dims"], transformer.arguments["max_seq_len"]
    remedy = f"give it with --set token_shape=[{','.join(['SIZE'] * dims)}]"
    shape: Any = read.need("token_shape", remedy) if "token_shape" in read else None
    good = isinstance(shape, list | tuple) and len(shape) == dims
    if not good or not all(type(size) is int and 0 < size <= 4096 for size in shape):
        raise ValueError(f"[bundle] token_shape={shown(shape)}: need {dims} sizes, each 1..4096; {remedy}")
    length = math.prod(shape)
    if length > longest:
        raise ValueError(
            f"[bundle] token_shape={list(shape)} is a sequence of {length} tokens: the transformer has positions for "
            f"max_seq_len={longest}; {remedy} that holds no more, or train with a longer max_seq_len"
        )
    return tuple(shape)


def _bos_token(read: Config, vqvae: NetworkPlan, transformer: NetworkPlan) -> int:
    codes, tokens = vqvae.arguments["num_embeddings"], transformer.arguments["num_tokens"]
    bos = read.need("bos_token") if "bos_token" in read else codes
    if type(bos) is not int or not codes <= bos < tokens:
        raise ValueError(
            f"[bundle] bos_token={shown(bos)}: need {codes}..{tokens - 1}, after the VQVAE's {codes} codes and within the "
            f"transformer's {tokens} tokens; MONAI trains with num_tokens = num_embeddings + 1; --set bos_token={codes}"
        )
    return bos


def _image_shape(vqvae: NetworkPlan, token_shape: tuple[int, ...]) -> tuple[int, ...]:
    network: Any = vqvae.build()
    codes = torch.empty(1, vqvae.arguments["embedding_dim"], *token_shape, device="meta")
    try:
        image = network.decoder(codes)
        back = network.encoder(
            torch.empty_like(image[:, :1]).expand(-1, vqvae.arguments["in_channels"], *image.shape[2:])
        )
    except RuntimeError as error:
        raise ValueError(
            f"[bundle] {vqvae.id}: {one_line(error)}; correct its strides and paddings"
        ) from None
    if tuple(back.shape) != tuple(codes.shape):
        raise ValueError(
            f"[bundle] token_shape={list(token_shape)} decodes to {list(image.shape[2:])}, which encodes to "
            f"{list(back.shape[2:])}; correct token_shape or the VQVAE's downsample_parameters"
        )
    return tuple(image.shape[1:])


def _weight_file(read: Config, root: Path, role: str, weights: Mapping[str, Path]) -> Path:
    if role in weights:
        return Path(weights[role])
    remedy = f"give the file with --weights {role}=FILE"
    value = read.need("weights", remedy) if "weights" in read else None
    if isinstance(value, dict):
        value = value.get(role)
    if isinstance(value, str) and (root / value).resolve().is_relative_to(root.resolve()):
        return root / value
    raise ValueError(f"[bundle] weights={shown(value)}: need a file of the {role} inside {root}; {remedy}")


def _load(plan: NetworkPlan, path: Path, role: str) -> torch.nn.Module:
    state = state_dict(read_checkpoint(path), (), path, role)
    own = {key.removeprefix(f"{role}."): value for key, value in state.items() if key.startswith(f"{role}.")}
    state = own or state
    network = plan.build()
    if role == "transformer":
        state = {key: value for key, value in state.items() if not key.endswith(".causal_mask")}
        state = _generative(state, network)
        for attention in _attentions(network):
            attention.register_buffer("causal_mask", None)
    return load_weights(network, state, path, role)


def _generative(state: dict[str, torch.Tensor], network: Any) -> dict[str, torch.Tensor]:
    """GenerativeModels' names of the norms: norm2 was the one before cross-attention, norm3 that before the MLP.

    MONAI's own loader leaves norm_cross_attn at its initial values. Without cross-attention it is never read.
    """
    if any("norm_cross_attn" in key for key in state):
        return state
    if any(re.search(r"\.norm3\.", key) for key in state):
        names = ((".norm2.", ".norm_cross_attn."), (".norm3.", ".norm2."))
        return {
            next((key.replace(old, new) for old, new in names if old in key), key): value
            for key, value in state.items()
        }
    if network.with_cross_attention:
        return state
    unread = {key: value for key, value in network.state_dict().items() if "norm_cross_attn" in key}
    return state | {key: torch.zeros(value.shape) for key, value in unread.items()}


def _spacing(read: Config, dims: int) -> tuple[float, ...]:
    if "spacing_mm" not in read:
        return (1.0,) * dims
    value = read.need("spacing_mm")
    good = isinstance(value, list | tuple) and len(value) == dims
    if not good or not all(is_number(size) and 0 < size <= 1000 for size in value):
        raise ValueError(
            f"[bundle] spacing_mm={shown(value)}: need {dims} sizes in mm; --set spacing_mm=[...]"
        )
    return tuple(float(size) for size in value)


def _conditions(read: Config, transformer: NetworkPlan) -> tuple[ConditionSpec, ...]:
    if not transformer.arguments["with_cross_attention"]:
        return ()
    tokens = read.need("context_tokens") if "context_tokens" in read else 1
    if type(tokens) is not int or not 1 <= tokens <= 2**16:
        raise ValueError(f"[bundle] context_tokens={shown(tokens)}: need 1..{2**16}; --set context_tokens=1")
    return (ConditionSpec(name="context", shape=(tokens, transformer.arguments["attn_layers_dim"])),)
