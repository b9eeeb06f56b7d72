"""GeneratorSpec: the manifest of a network that makes an image in one pass: a GAN's, or a VAE-GAN's with a label map."""

from __future__ import annotations

from typing import Annotated, final

from pydantic import Field, model_validator

from .frozen import PositiveInt
from .spec import Manifest

GENERATOR_FORMAT = 3
"""Its `format`: readers that know diffusion and token models alone ask to be upgraded."""


@final
class GeneratorSpec(Manifest):
    """The manifest of a one-pass model.

    Programs: `decode` (noise and what `prepare` makes to an image), `prepare` (a label map to each norm's scale and shift)
    and `encode` (an image to the mean and deviation of the noise that has its style), the last two where the network has
    a label map.

    Attributes:
        noise_shape: of one sample's standard normal noise; empty: the network takes none.
        image_shape: `(C, *spatial)`, the only size there is.
    """

    format: Annotated[int, Field(ge=GENERATOR_FORMAT, le=GENERATOR_FORMAT)]
    noise_shape: Annotated[tuple[PositiveInt, ...], Field(max_length=5)]
    image_shape: Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=4)]

    def required_programs(self) -> set[str]:
        return {"decode"}

    @model_validator(mode="after")
    def _fits(self) -> GeneratorSpec:
        if len(self.spacing_mm) != len(self.image_shape) - 1:
            raise ValueError(f"spacing_mm {self.spacing_mm} does not fit image_shape {self.image_shape}")
        return self
