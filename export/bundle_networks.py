"""Which networks a bundle may hold, and how their constructors are called."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.nets.autoencoderkl import AutoencoderKL
from monai.networks.nets.controlnet import ControlNet
from monai.networks.nets.diffusion_model_unet import DiffusionModelEncoder, DiffusionModelUNet
from monai.networks.nets.generator import Generator
from monai.networks.nets.spade_autoencoderkl import SPADEAutoencoderKL
from monai.networks.nets.spade_diffusion_model_unet import SPADEDiffusionModelUNet
from monai.networks.nets.spade_network import SPADENet
from monai.networks.nets.transformer import DecoderOnlyTransformer
from monai.networks.nets.vqvae import VQVAE

from volcast.export.bundle_config import one_line, shown
from volcast.export.bundle_expression import is_number

_MONAI = r"(?:(?:monai|generative)\.networks\.nets\.(?:\w+\.)?)?"
_MAISI = r"(?:monai\.apps\.generation\.maisi\.networks\.(?:\w+\.)?)?"
# Bounds that keep a hostile config from building networks for hours; the largest published UNet has 4 levels.
_LIMITS = {
    "spatial_dims": 3,
    "num_res_blocks": 64,
    "num_res_layers": 64,
    "transformer_num_layers": 64,
    "attn_layers_depth": 1024,
    "num_splits": 1024,
}
_MAX_LEVELS = 12
_MAX_INTEGER = 2**20
_MINIMUM = {
    "spatial_dims": 2,
    "num_head_channels": 0,
    "dim_split": 0,
    "num_splits": 0,
    "downsample_parameters": 0,
    "upsample_parameters": 0,
}


@dataclass(frozen=True, kw_only=True)
class NetworkKind:
    """A network class: the `_target_`s that mean it, old argument names, arguments that are fixed here."""

    network: type[torch.nn.Module]
    role: str
    target: str
    renamed: Mapping[str, str]
    fixed: Mapping[str, Any]


# Fixed arguments change memory or speed, never the mathematics: flash attention is refused without CUDA (Maisi) and
# applies dropout in eval mode; norm_float16 works under autocast only; num_splits=1 is the convolution unsplit.
_KINDS = (
    NetworkKind(
        network=DiffusionModelUNet,
        role="unet",
        target=_MONAI + "DiffusionModelUNet",
        renamed={"num_channels": "channels"},
        fixed={"use_flash_attention": False},
    ),
    NetworkKind(
        network=AutoencoderKL,
        role="autoencoder",
        target=_MONAI + "AutoencoderKL",
        renamed={"num_channels": "channels", "use_checkpointing": "use_checkpoint"},
        fixed={"use_flash_attention": False, "use_checkpoint": False},
    ),
    NetworkKind(
        network=DiffusionModelUNetMaisi,
        role="unet",
        target=_MAISI + "DiffusionModelUNetMaisi",
        renamed={},
        fixed={"use_flash_attention": False},
    ),
    NetworkKind(
        network=AutoencoderKlMaisi,
        role="autoencoder",
        target=_MAISI + "AutoencoderKlMaisi",
        renamed={},
        fixed={
            "use_flash_attention": False,
            "use_checkpointing": False,
            "norm_float16": False,
            "num_splits": 1,
            "print_info": False,
            "save_mem": False,
        },
    ),
    NetworkKind(
        network=SPADEDiffusionModelUNet,
        role="unet",
        target=_MONAI + "SPADEDiffusionModelUNet",
        renamed={"num_channels": "channels"},
        fixed={"use_flash_attention": False},
    ),
    NetworkKind(
        network=SPADEAutoencoderKL,
        role="autoencoder",
        target=_MONAI + "SPADEAutoencoderKL",
        renamed={"num_channels": "channels"},
        fixed={"use_flash_attention": False},
    ),
    NetworkKind(
        network=ControlNet,
        role="controlnet",
        target=_MONAI + "ControlNet",
        renamed={"num_channels": "channels"},
        fixed={"use_flash_attention": False},
    ),
    NetworkKind(
        network=ControlNetMaisi,
        role="controlnet",
        target=_MAISI + "ControlNetMaisi",
        renamed={},
        fixed={"use_flash_attention": False, "use_checkpointing": False},
    ),
    NetworkKind(
        network=VQVAE,
        role="vqvae",
        target=_MONAI + "VQVAE",
        renamed={"num_channels": "channels"},
        fixed={"use_checkpointing": False, "ddp_sync": False},
    ),
    NetworkKind(
        network=Generator,
        role="generator",
        target=_MONAI + "Generator",
        renamed={},
        fixed={"dropout": None},
    ),
    NetworkKind(
        network=SPADENet,
        role="generator",
        target=_MONAI + "SPADENet",
        renamed={"num_channels": "channels"},
        fixed={},
    ),
    NetworkKind(
        network=DecoderOnlyTransformer,
        role="transformer",
        target=_MONAI + "DecoderOnlyTransformer",
        renamed={},
        fixed={"use_flash_attention": False},
    ),
    NetworkKind(
        network=DiffusionModelEncoder,
        role="classifier",
        target=_MONAI + "DiffusionModelEncoder",
        renamed={"num_channels": "channels"},
        fixed={"use_flash_attention": False},
    ),
)


@dataclass(frozen=True, kw_only=True)
class NetworkPlan:
    """A network as the config describes it: class and full constructor arguments, nothing built yet."""

    id: str
    kind: NetworkKind
    arguments: Mapping[str, Any]

    def build(self, device: str = "meta", **changed: Any) -> torch.nn.Module:
        """The network in eval mode; on `meta` its parameters have shapes and no memory. ValueError if refused."""
        name = self.kind.network.__name__
        try:
            # SPADENet turns the caller's list of channels around, in place.
            arguments = copy.deepcopy({**self.arguments, **changed})
            with torch.device(device):
                return self.kind.network(**arguments).eval()
        # MONAI checks some arguments; the others fail wherever they are first used.
        except (
            TypeError,
            ValueError,
            RuntimeError,
            ArithmeticError,
            LookupError,
            AttributeError,
            AssertionError,
        ) as error:
            raise ValueError(f"[bundle] {self.id}: {name} refuses its arguments: {one_line(error)}") from None


def kind_of(target: str) -> NetworkKind | None:
    """The kind that `_target_` names, or None."""
    return next((kind for kind in _KINDS if re.fullmatch(kind.target, target)), None)


def known_networks() -> str:
    """The names of the networks that can be read, for messages."""
    return ", ".join(kind.network.__name__ for kind in _KINDS)


def plan_network(id: str, target: str, arguments: Mapping[str, Any]) -> NetworkPlan:
    """Check a component's `_target_` and arguments against MONAI 1.6's constructor."""
    kind = kind_of(target)
    if kind is None:
        raise ValueError(f"[bundle] {id}: _target_={target!r} is not known; known: {known_networks()}")
    parameters = inspect.signature(kind.network).parameters
    known = {kind.renamed.get(key, key): value for key, value in arguments.items()}
    if len(known) != len(arguments):
        raise ValueError(
            f"[bundle] {id}: an argument is given under its old and its new name: {sorted(arguments)}"
        )
    unknown = sorted(known.keys() - parameters.keys())
    if unknown:
        raise ValueError(
            f"[bundle] {id}: {kind.network.__name__} has no argument {', '.join(map(repr, unknown))}"
        )
    defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
    missing = sorted(parameters.keys() - defaults.keys() - known.keys())
    if missing:
        raise ValueError(f"[bundle] {id}: {missing[0]} is missing; give it with --set {id}#{missing[0]}=...")
    for key, value in known.items():
        annotation = parameters[key].annotation
        # Generator's act and norm have none.
        _check(id, key, value, "str | tuple" if annotation is inspect.Parameter.empty else str(annotation))
    return NetworkPlan(id=id, kind=kind, arguments={**defaults, **known, **kind.fixed})


def _check(id: str, key: str, value: Any, annotation: str) -> None:
    """`annotation` is MONAI's own, such as `Sequence[int] | int`."""
    limit = _LIMITS.get(key, _MAX_INTEGER)
    if not any(_fits(value, kind.strip(), _MINIMUM.get(key, 1), limit) for kind in annotation.split("|")):
        raise ValueError(
            f"[bundle] {id}#{key}={shown(value)}: need {annotation} up to {limit}, at most {_MAX_LEVELS} levels; "
            f"correct it with --set {id}#{key}=..."
        )


def _fits(value: Any, kind: str, minimum: int, limit: int) -> bool:
    if kind.startswith(("Sequence[", "list[")):
        item = kind.partition("[")[2].removesuffix("]")
        good = isinstance(value, list | tuple) and 0 < len(value) <= _MAX_LEVELS
        return good and all(_fits(entry, item, minimum, limit) for entry in value)
    if kind.startswith("tuple["):
        items = kind.removeprefix("tuple[").removesuffix("]").split(",")
        good = isinstance(value, list | tuple) and len(value) == len(items)
        return good and all(
            _fits(*pair, minimum, limit) for pair in zip(value, map(str.strip, items), strict=True)
        )
    if kind == "tuple":  # MONAI's layers: a name and its options
        return (
            isinstance(value, list | tuple)
            and len(value) == 2
            and _fits(value[0], "str", minimum, limit)
            and isinstance(value[1], dict)
            and all(isinstance(option, int | float | bool) for option in value[1].values())
        )
    if kind == "str":
        return isinstance(value, str) and value.isidentifier() and len(value) <= 40
    if kind == "int":
        return type(value) is int and minimum <= value <= limit
    if kind == "float":
        return is_number(value) and 0 <= value <= limit
    return isinstance(value, bool) if kind == "bool" else kind == "None" and value is None
