"""TokenSpec: the manifest of a VQVAE with a transformer, which samples an image token by token."""

from __future__ import annotations

import math
from typing import Annotated, final

from pydantic import Field, model_validator

from .frozen import PositiveInt
from .spec import Manifest

TOKEN_FORMAT = 2
"""Its `format`: readers that know diffusion models alone ask to be upgraded."""
LONGEST = 2**20
"""The most tokens of a sequence that a manifest admits."""


@final
class TokenSpec(Manifest):
    """The manifest of a token model.

    Programs: `step` (tokens and the cache of keys and values to logits), `decode` (code indices to an image), `encode`
    (the other way) and, with cross-attention, `prepare` (context to its keys and values).

    Attributes:
        token_shape: the grid of code indices `(D, H, W)` or `(H, W)`.
        num_codes: of the codebook; the transformer may know more tokens, which are never sampled.
        bos_token: what every sequence begins with.
        order: the place in the grid, counted in C order, of each token of the sequence; empty: raster scan.
        layers: how many caches `step` takes.
    """

    format: Annotated[int, Field(ge=TOKEN_FORMAT, le=TOKEN_FORMAT)]
    token_shape: Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=3)]
    num_codes: PositiveInt
    bos_token: Annotated[int, Field(ge=0, le=2**31 - 1)]
    order: tuple[int, ...] = ()
    layers: Annotated[int, Field(ge=1, le=1024)]

    @property
    def length(self) -> int:
        """Tokens of one image."""
        return math.prod(self.token_shape)

    def required_programs(self) -> set[str]:
        return {"step", "decode", "encode"}

    @model_validator(mode="after")
    def _fits(self) -> TokenSpec:
        if self.length > LONGEST:
            raise ValueError(f"token_shape {self.token_shape} holds more than {LONGEST} tokens")
        if len(self.spacing_mm) != len(self.token_shape):
            raise ValueError(f"spacing_mm {self.spacing_mm} does not fit token_shape {self.token_shape}")
        if self.order and sorted(self.order) != list(range(self.length)):
            raise ValueError(f"order does not hold each of the {self.length} places once")
        shapes = {tensor.name: tensor.shape for tensor in self.programs["step"].inputs}
        for layer in range(self.layers):
            for name, along in ((f"keys_{layer}", -1), (f"values_{layer}", -2)):
                if len(shapes.get(name, ())) != 4 or shapes[name][along] != self.length:
                    raise ValueError(f"program step has no {name} for {self.length} tokens")
        return self
