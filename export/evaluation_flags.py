"""Two faults of a generator that a distance of distributions may miss: it repeats its training data, or itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from .similarity import ms_ssim

Array = NDArray[np.float64]
Images = NDArray[np.float32]

COPY = 0.5
"""Of the median distance from a real image to its nearest other: nearer than that, a sample counts as a copy. A real
image that went through the bundled autoencoder lies at 0.28 to 0.43 of it from itself, another sample above 0.6."""
DIVERSITY = 0.7
"""Of the real images' diversity, 1 less the mean MS-SSIM of two of them: samples below it are flagged. Four images, each
as often, have 3/4 of what as many of their kind have."""
PAIRS = 100
"""Compared for the diversity, of all that there are: a 3D pair takes some 50 ms."""
BLOCK = 64


@final
@dataclass(frozen=True, kw_only=True)
class Flag:
    """A suspicion: raised where `value` is on the wrong side of `limit`; `text` says it in words."""

    name: str
    value: float
    limit: float
    raised: bool
    text: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "value": self.value, "limit": self.limit, "raised": self.raised, "text": self.text}  # fmt: skip


def inner_products(images: Images) -> Array:
    """`[N, N]` of images `[N, C, ...]` less their mean, over the number of voxels, in float64 by blocks."""
    flat = images.reshape(len(images), -1)
    mean = flat.mean(axis=0, dtype=np.float64)
    found = np.empty((len(flat), len(flat)))
    for first in range(0, len(flat), BLOCK):
        left = flat[first : first + BLOCK] - mean
        for second in range(0, first + 1, BLOCK):
            block = left @ (flat[second : second + BLOCK] - mean).T / flat.shape[1]
            found[first : first + BLOCK, second : second + BLOCK] = block
            found[second : second + BLOCK, first : first + BLOCK] = block.T
    return found


def nearest(products: Array, samples: int) -> tuple[Array, Array, NDArray[np.intp]]:
    """Root mean square differences to the nearest real image: of every sample, and of every real image to the others;
    and which one it is for each sample. The first `samples` rows of `products` are the samples'."""
    square = np.diag(products)[:, None] + np.diag(products)[None] - 2 * products
    distances = np.sqrt(np.maximum(square, 0))
    to_real, among = distances[:samples, samples:], distances[samples:, samples:].copy()
    np.fill_diagonal(among, np.inf)
    return to_real.min(axis=1), among.min(axis=1), to_real.argmin(axis=1)


def memorisation(to_real: Array, among: Array) -> Flag:
    """Of what `nearest` gives: `value` counts the samples that lie nearer to a real image than `COPY` allows."""
    limit = COPY * float(np.median(among))
    # Real images that lie twice in the folder say nothing: what is no distance at all is a copy in any case.
    copies = int(np.sum((to_real < limit) | (to_real == 0)))
    text = f"{copies} of {len(to_real)} samples lie nearer than {limit:.3g} to a real image"
    text += f" (samples' median {np.median(to_real):.3g}, real to real {np.median(among):.3g})"
    return Flag(name="memorisation", value=copies, limit=0, raised=copies > 0, text=text)


def pairs(n: int, generator: np.random.Generator) -> NDArray[np.intp]:
    """`[P, 2]`: all pairs of n, or `PAIRS` of them, each image in as many to within two."""
    if n * (n - 1) // 2 <= PAIRS:
        return np.stack(np.triu_indices(n, 1), axis=1)
    order = generator.permutation(n)
    places = np.arange(PAIRS)
    # Along a random circle: neighbours first, then the next but one, and so on.
    return np.stack((order[places % n], order[(places % n + 1 + places // n) % n]), axis=1)


def alikeness(images: Images, chosen: NDArray[np.intp], peak: float) -> Array:
    """The MS-SSIM of every pair `[P, 2]`; `peak` is the data range."""
    return np.array([ms_ssim(images[i : i + 1], images[j : j + 1], peak) for i, j in chosen])


def low_diversity(samples: Array, real: Array) -> Flag:
    """Of the MS-SSIM of pairs of samples and of real images: `value` is the ratio of their diversities."""
    ours, theirs = 1 - float(np.mean(samples)), 1 - float(np.mean(real))
    # Real images that are all one have none to fall short of.
    value = ours / theirs if theirs > 0 else 1.0
    text = f"1 - MS-SSIM of two samples is {value:.3g} of that of two real images; below {DIVERSITY:g} is flagged"
    return Flag(name="low diversity", value=value, limit=DIVERSITY, raised=value < DIVERSITY, text=text)
