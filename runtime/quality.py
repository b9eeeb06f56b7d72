"""QualityBudget: what an artifact's manifest allows its fast samples to lose against the float32 reference."""

from __future__ import annotations

from typing import Annotated, final

from pydantic import Field

from .frozen import Frozen

Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@final
class QualityBudget(Frozen):
    """Of `volcast verify --samples`, which compares many volumes with the reference's at the same seeds.

    Attributes:
        ms_ssim: the least mean MS-SSIM of a volume and the reference's of the same seed. None: where the artifacts alone
            differ 0.99, of int8 0.97; no budget where the steps differ, since fewer of them make another volume as good.
        frechet: the largest Fréchet distance from the reference's volumes, as a multiple of what lies between two
            halves of these, which is what other seeds make.
        real: the largest Fréchet distance from real images, as a multiple of the reference's own.
        diversity: the least diversity, 1 less the mean MS-SSIM of two volumes, as a share of the reference's.
    """

    ms_ssim: Share | None = None
    frechet: Above0 = 1.0
    real: Above0 = 1.1
    diversity: Share = 0.9
