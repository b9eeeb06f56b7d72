"""What an upscaler is shown: a low-resolution image, noised once to a level that its network is told.

Noise conditioning augmentation (arXiv:2106.15282, section 4.2), as MONAI's 2d_super_resolution tutorial samples it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .intensity import IntensitySpec, of_network
from .sampler import make_schedule
from .sizes import latent_sizes, related_sizes
from .spec import LOW_RES, TAU, ArtifactSpec, LowResSpec
from .volume import Volume, refined_affine

Array = NDArray[np.generic]

NOISE_STEP = 2**32 - 1
"""The noise's number in its sample's Philox stream: no plan has so many rows, and the first latent has 0."""


def noised_low_res(
    spec: LowResSpec,
    intensity: IntensitySpec | None,
    values: Mapping[str, Array],
    seed: int,
    samples: NDArray[np.uint64],
) -> dict[str, Array]:
    """`values`, conditions `[N, ...]` by name, with each sample's low-resolution image brought to its noise level.

    y is the image in the network's intensities; the network is shown
    sqrt(alpha_bar) y + sqrt(1 - alpha_bar) n at the level's timestep, in float64, rounded once; n by (seed, sample).
    """
    image = of_network(intensity, values[LOW_RES]).astype(np.float64)
    seeds = np.full(len(image), seed, np.uint64)
    noise = _core.normal(seeds, samples, NOISE_STEP, image.shape[1:], np.dtype(np.float32))
    kept = make_schedule(spec.noise_schedule).alphas_cumprod[values[TAU].astype(np.int64)]
    kept = kept.reshape(-1, *[1] * (image.ndim - 1))
    return {**values, LOW_RES: (np.sqrt(kept) * image + np.sqrt(1 - kept) * noise).astype(np.float32)}


def with_channels(spec: ArtifactSpec, condition: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The condition with the low-resolution image as `[C, *spatial]`; one channel may be left out."""
    given = dict(condition or {})
    if LOW_RES in given:
        array = np.asarray(given[LOW_RES])
        given[LOW_RES] = array[None] if array.ndim == len(spec.latent_shape) - 1 else array
    return given


def low_res_size(
    spec: ArtifactSpec, condition: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> Sequence[int] | None:
    """The latent's sizes for these conditions: the low-resolution image's (None: there is none, or of another rank).

    Raises ValueError: sizes that the model does not take.
    """
    first = condition if isinstance(condition, Mapping) else next(iter(condition), {})
    shape = np.asarray(first.get(LOW_RES, 0)).shape
    if len(shape) != len(spec.latent_shape):
        return None
    try:
        return latent_sizes(spec, shape[1:], LOW_RES)[0]
    except ValueError as error:
        raise ValueError(f"{error}; crop, pad or resample the image") from None


def enlargement(spec: ArtifactSpec) -> tuple[int, ...]:
    """By how much the samples are larger than the low-resolution image, along each axis."""
    latent = spec.latent_shape[1:]
    images = related_sizes(spec, {f"d{i}": size for i, size in enumerate(latent)})
    return tuple(images.get(f"o{i}", size) // size for i, size in enumerate(latent))


def refined(spec: ArtifactSpec, volume: Volume) -> Volume:
    """The volume's frame as the samples have it that are made of it; its array stays."""
    factors = enlargement(spec)
    spacing = tuple(size / factor for size, factor in zip(volume.spacing_mm, factors, strict=True))
    return Volume(volume.array, refined_affine(volume.affine, factors), spacing)
