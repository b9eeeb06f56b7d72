"""State-dict keys: MONAI 1.6's, and those of its ancestor, the GenerativeModels package ("GM").

MONAI's own `load_old_state_dict` applies GM's `proj_attn`, which GM (0.2 and later) defines and never uses; here it
is dropped and the network is built without that projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

# GM's name -> MONAI's, tried only on keys that the network does not have.
_RENAMES = (
    (
        re.compile(
            r"^((?:.+\.)?(?:attentions\.\d+|attention|(?:encoder|decoder)\.blocks\.\d+))\.(to_[qkv]\.)"
        ),
        r"\1.attn.\2",
    ),
    (re.compile(r"\.(attn[12])\.to_out\.0\."), r".\1.out_proj."),
    (re.compile(r"\.upsampler\.conv\.conv\."), ".upsampler.postconv.conv."),
    (re.compile(r"^(decoder\.blocks\.\d+)\.conv\.conv\."), r"\1.postconv.conv."),
)
_UNUSED = re.compile(r"\.proj_attn\.(weight|bias)$")
_PART = re.compile(r"\.(?:to_[qkv]|qkv)\.(weight|bias)$")


def is_generative(keys: Iterable[str]) -> bool:
    """Whether these keys come from GM's attention blocks (a network without attention needs no such telling)."""
    return any(_UNUSED.search(key) or ".to_out.0." in key for key in keys)


def to_monai(state: Mapping[str, torch.Tensor], wanted: Iterable[str]) -> dict[str, torch.Tensor]:
    """`state` under the names that the network wants, q/k/v joined or parted as it wants them (dim 0, order q, k, v)."""
    names = set(wanted)
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key not in names:
            if _UNUSED.search(key):
                continue
            for pattern, replacement in _RENAMES:
                key = pattern.sub(replacement, key)
        if key in renamed:
            raise ValueError(f"[weights] two tensors are both {key!r}; save the state dict of one network")
        renamed[key] = value
    return _combine(renamed, names)


def _combine(state: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    for stem, kind in sorted({(key[: m.start()], m.group(1)) for key in names if (m := _PART.search(key))}):
        parts = [f"{stem}.to_{letter}.{kind}" for letter in "qkv"]
        whole = f"{stem}.qkv.{kind}"
        if whole in names and whole not in state and all(part in state for part in parts):
            tensors = [state.pop(part) for part in parts]
            if len({tensor.shape for tensor in tensors}) == 1 and tensors[0].dim():
                state[whole] = torch.cat(tensors)
        elif parts[0] in names and parts[0] not in state and whole in state:
            tensor = state.pop(whole)
            if tensor.dim() and tensor.shape[0] % 3 == 0:
                state.update(zip(parts, tensor.chunk(3), strict=True))
    return state


def load_weights(
    network: torch.nn.Module, state: Mapping[str, torch.Tensor], path: Path, role: str
) -> torch.nn.Module:
    """The network with these weights in float32, eval mode, gradients off; it may come on the meta device.

    GM's keys need it built with `include_fc` as GM works: True with transformer blocks, else False. ValueError for
    missing, unexpected or misshapen tensors and for NaN or Inf, with up to three keys and the remedy.
    """
    target = network.state_dict()
    tensors = to_monai(state, target)
    remedy = f"the config does not describe this file: correct the network's arguments or name it with --weights {role}=FILE"
    _complain(path, "has no", sorted(target.keys() - tensors.keys()), remedy)
    _complain(path, "has unexpected", sorted(tensors.keys() - target.keys()), remedy)
    shapes = [
        f"{k} {tuple(tensors[k].shape)} instead of {tuple(v.shape)}"
        for k, v in target.items()
        if tensors[k].shape != v.shape
    ]
    _complain(path, "has shapes", shapes, remedy)
    types = [
        key
        for key, value in tensors.items()
        if not (value.is_floating_point() or value.dtype == target[key].dtype)
    ]
    _complain(path, "has no floating-point numbers in", types, remedy)
    cast = {key: value.to(target[key].dtype) for key, value in tensors.items()}
    broken = [key for key, value in cast.items() if not bool(torch.isfinite(value).all())]
    _complain(
        path,
        "has NaN or Inf in",
        broken,
        "its training failed or the file is damaged: use another checkpoint",
    )
    # Weights that share one tensor (or view a larger one) would keep it alive: each gets memory of its own.
    network.load_state_dict(
        {key: value.clone().contiguous() for key, value in cast.items()}, strict=True, assign=True
    )
    return network.eval().requires_grad_(False)


def _complain(path: Path, what: str, items: list[str], remedy: str) -> None:
    if items:
        more = f" and {len(items) - 3} more" if len(items) > 3 else ""
        raise ValueError(f"[weights] {path} {what} {', '.join(items[:3])}{more}; {remedy}")
