"""What `volcast sample` was asked for, given to the kind of model that the artifact is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from .chain import Chain, parse_stage
from .condition_text import mask_texts, parse_conditions
from .generator_model import GeneratorModel, refuse_settings
from .inpaint import Inpaint
from .request import OnStep, Settings
from .token_cli import choice_settings
from .token_model import TokenModel
from .volume import Volume


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of `volcast sample`, read but not yet fitted to a model.

    Attributes:
        settings: of diffusion models.
        choice: `temperature`, `top_k` and `top_p` of token models.
        condition, negative, mask: texts; `size`: a latent's.
        then: texts, of the later stages of a chain.
    """

    settings: Settings
    choice: Mapping[str, Any]
    condition: Sequence[str]
    negative: Sequence[str]
    mask: Sequence[str]
    size: tuple[int, ...] | None
    image: Volume | None
    inpaint: Inpaint | None
    then: Sequence[str]

    def given(self) -> dict[str, bool]:
        """Whether an option that is for diffusion models was given, be it with 0."""
        usual = {"strength": 1, "reuse": 1, "eta": 0}
        own = {name: value is not None and value != usual.get(name) for name, value in self.settings.items()}
        more = {
            "mask": bool(self.mask), "size": self.size is not None, "image": self.image is not None,
            "inpaint": self.inpaint is not None, "negative": bool(self.negative),
        }  # fmt: skip
        return own | more


def sample_volumes(
    model: Any, asked: Asked, n: int, seed: int, *, batch: int, on_step: OnStep
) -> Iterator[Volume]:
    """The `n` volumes of each guidance weight. `model`: as `load` opened it, or the `Chain` with the stages asked for.

    Raises ValueError: options of another kind of model, by name, or what the model raises.
    """
    given = asked.given()
    choice = choice_settings(model, **asked.choice, other=given)
    if isinstance(model, GeneratorModel):
        refuse_settings(
            model.spec, {name: one for name, one in given.items() if name not in ("mask", "image")}
        )
    spec = model.specs[0] if isinstance(model, Chain) else model.spec
    conditions = parse_conditions(spec, [*asked.condition, *mask_texts(spec, asked.mask)])
    common: dict[str, Any] = {"batch": batch, "condition": conditions, "on_step": on_step}
    if isinstance(model, TokenModel):
        return model.sample_many(n, seed, **common, **choice)
    if isinstance(model, GeneratorModel):
        return model.sample_many(n, seed, **common, image=asked.image)
    common["negative"] = parse_conditions(spec, asked.negative) if asked.negative else None
    common |= {"image": asked.image, "inpaint": asked.inpaint, "size": asked.size, **asked.settings}
    if isinstance(model, Chain):
        common["then"] = list(map(parse_stage, asked.then, model.specs[1:]))
    volumes: Iterator[Volume] = model.sample_many(n, seed, **common)
    return volumes
