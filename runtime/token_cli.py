"""What `volcast sample` needs of token models. Heavy imports stand inside the functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .token_choice import ChoiceSettings


def choice_settings(
    model: object,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    other: Mapping[str, bool],
) -> ChoiceSettings:
    """How `sample` draws tokens. `other`: whether each option of diffusion models was given.

    Raises ValueError: an option that is for the other kind of model.
    """
    from .token_model import TokenModel

    choice: ChoiceSettings = {"top_k": top_k, "top_p": top_p}
    if temperature is not None:
        choice["temperature"] = temperature
    if isinstance(model, TokenModel):
        given = [f"--{name}" for name, was in other.items() if was]
        if given:
            raise ValueError(
                f"[sample] {', '.join(given)}: {model.spec.name} samples tokens; leave it out (--temperature, --top-k "
                "and --top-p are for it)"
            )
        return choice
    if any(value is not None for value in choice.values()):
        raise ValueError(
            "[sample] --temperature, --top-k, --top-p are for token models (a VQVAE with a transformer); leave them out"
        )
    return choice
