"""The image that a request starts from, and what of it stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from volcast import _core

from .inpaint import MOST_CALLS, Inpaint, make_known
from .job import Job
from .request import Request
from .volume import Volume

Image = Volume | NDArray[np.generic]
Encode = Callable[[Image], NDArray[np.float32]]


def check_image(image: Image | None, inpaint: Inpaint | None, request: Request) -> None:
    """ValueError: something that is about an image, and no image; what inpainting does not go with."""
    if image is None and request.strength != 1:
        raise ValueError(f"[sample] strength={request.strength} without an image: give one, or leave it out")
    if image is None and inpaint is not None:
        raise ValueError("[sample] inpaint without an image: give the image that its mask is of")
    if inpaint is not None and not isinstance(inpaint, Inpaint):
        raise ValueError(
            f"[sample] inpaint is {type(inpaint).__name__}: need volcast.Inpaint(mask), not 0 where to paint anew"
        )
    if inpaint is not None and request.reuse != 1:
        raise ValueError(f"[sample] reuse={request.reuse} with inpaint, whose steps jump back; leave one out")


def encode_one(encode: Encode, image: Image, size: Sequence[int] | None) -> NDArray[np.float32]:
    """The latent `[C, D', H', W']` of one image (ValueError: several, or not of the latent size asked for)."""
    z = encode(image)
    if z.shape[0] != 1:
        raise ValueError(f"[sample] image holds {z.shape[0]} images: give one")
    if size is not None and tuple(size) != z.shape[2:]:
        raise ValueError(f"[sample] size={tuple(size)}: the image's latent is {z.shape[2:]}; leave size out")
    one: NDArray[np.float32] = z[0]
    return one


def painted(
    job: Job, inpaint: Inpaint, image: Any, x0: NDArray[np.float32]
) -> tuple[Job, NDArray[np.float32] | None]:
    """The job that paints a part of the image anew, and the latent to start from: none, as in the paper, unless a strength
    below 1 asks for it."""
    plan, known = repainting(job.plan, inpaint), make_known(image, inpaint, x0)
    return replace(job, plan=plan, known=known), None if job.request.strength == 1 else x0


def repainting(plan: _core.Plan, inpaint: Inpaint) -> _core.Plan:
    """The plan with its jumps back, which make it longer.

    ValueError: too many; a jump of all its steps; a sampler that remembers.
    """
    last = len(plan) - 1
    calls = len(plan) * inpaint.resamples
    if calls > MOST_CALLS:
        raise ValueError(
            f"[sample] inpaint resamples={inpaint.resamples}: {calls} steps in all: need {MOST_CALLS} or fewer; take fewer steps"
        )
    if inpaint.resamples > 1 and inpaint.jump_length > last:
        raise ValueError(
            f"[sample] inpaint jumps back {inpaint.jump_length} of {last + 1} steps: need fewer; take more steps or strength, "
            "or resamples=1"
        )
    return _core.make_repaint(plan, resamples=inpaint.resamples, jump_length=inpaint.jump_length)
