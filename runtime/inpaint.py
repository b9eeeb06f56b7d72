"""Inpainting: an image of which a part is painted anew, brought to the latent grid (RePaint, arXiv:2201.09865)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from .volume import Volume

MOST_CALLS = 10_000
"""Of the network for one volume: each is a row of a table that the request holds."""


@final
@dataclass(frozen=True, eq=False)
class Inpaint:
    """Which part of an image to paint anew, and how.

    Attributes:
        mask: numbers `[D, H, W]` of the image's size (2D: `[H, W]`), not 0 where to paint anew. A latent voxel stays
            where all of its image voxels do.
        resamples: how often each stretch of `jump_length` steps is run, 1..1000, x being noised back in between;
            more fit the new part better to the old one, and take as many times the steps, 10,000 at most in all. 4 and 1
            are those of MONAI's tutorial (2d_ddpm_inpainting).
        jump_length: 1 to one less than the steps.
        paste: put the image's own voxels back after the decode, which else differ by the autoencoder's loss.
    """

    mask: Volume | NDArray[Any]
    resamples: int = 4
    jump_length: int = 1
    paste: bool = True


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What stays of an image, the same for every sample.

    Attributes:
        x0: float32 `[C, D', H', W']`, the image's latent as the loop has it.
        keep: float32, as x0: 1 where the latent stays, 0 where it is painted anew.
        image: float32 `[C, D, H, W]`, and `stays` bool `[D, H, W]`: what `paste` puts back; None without it.
    """

    x0: NDArray[np.float32]
    keep: NDArray[np.float32]
    image: NDArray[np.float32] | None
    stays: NDArray[np.bool_]

    def pasted(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images `[N, C, D, H, W]` with the voxels that stay as they were given."""
        return images if self.image is None else np.where(self.stays, self.image, images)


def make_known(image: Volume | NDArray[Any], inpaint: Inpaint, z: NDArray[np.float32]) -> Known:
    """The known part of an image `[D, H, W]` or `[C, D, H, W]` (2D: an axis less) whose latent is `z` `[C, D', H', W']`.

    Raises:
        ValueError: a mask of another shape or place, of nothing, or of all; a latent that does not divide the image.
    """
    array = np.asarray(image)
    shape = array.shape[1 - z.ndim :]
    hidden = hidden_voxels(image, inpaint.mask, shape)
    latent = _pooled(hidden, z.shape[1:])
    if latent.all():
        raise ValueError(
            f"[inpaint] no voxel of the latent {z.shape[1:]} lies wholly outside the mask; hide less, or sample without"
        )
    keep = np.broadcast_to(np.float32(1) - latent, z.shape)
    whole = array.reshape(-1, *shape).astype(np.float32) if inpaint.paste else None
    return Known(x0=z, keep=np.ascontiguousarray(keep, np.float32), image=whole, stays=~hidden)


def hidden_voxels(image: Any, mask: Any, shape: Sequence[int]) -> NDArray[np.bool_]:
    """Where a mask is not 0, `shape` being the image's `[D, H, W]`.

    Raises:
        ValueError: another shape, no numbers, 0 everywhere; two Volumes that lie in different places.
    """
    numbers = np.asarray(mask)
    if numbers.shape != tuple(shape) or numbers.dtype.kind not in "biuf":
        raise ValueError(
            f"[inpaint] the mask is {numbers.dtype} {numbers.shape}: need numbers of the image's shape {tuple(shape)}"
        )
    if (
        isinstance(image, Volume)
        and isinstance(mask, Volume)
        and not np.allclose(image.affine, mask.affine, rtol=0, atol=1e-3 * min(image.spacing_mm))
    ):
        raise ValueError(
            "[inpaint] the mask lies elsewhere than the image (affine); resample it to the image's grid"
        )
    if not np.isfinite(numbers).all():
        raise ValueError("[inpaint] the mask holds NaN or infinity; give 0 and 1")
    hidden: NDArray[np.bool_] = numbers != 0
    if not hidden.any():
        raise ValueError("[inpaint] the mask is 0 everywhere: it is not 0 where to paint anew")
    return hidden


def _pooled(hidden: NDArray[np.bool_], latent: Sequence[int]) -> NDArray[np.bool_]:
    """Where any image voxel of a latent voxel is hidden."""
    blocks: list[int] = []
    for size, small in zip(hidden.shape, latent, strict=True):
        if size % small:
            raise ValueError(
                f"[inpaint] the latent {tuple(latent)} does not divide the image {hidden.shape}, so the mask has no place "
                "in it; crop or pad the image"
            )
        blocks += [small, size // small]
    return np.asarray(hidden.reshape(blocks).any(axis=tuple(range(1, len(blocks), 2))))
