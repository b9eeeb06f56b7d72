"""A bundle's upscaler: the scheduler that noises its low-resolution image, and the conditions that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from volcast.export.bundle_config import Config, shown
from volcast.export.bundle_scheduler import known_schedulers, read_scheduler, scheduler_name
from volcast.runtime.spec import LEVEL, LOW_RES, TAU, ConditionField, ConditionSpec, LowResSpec

LOW_RES_SCHEDULER = "low_res_scheduler"
"""The component's id in MONAI's tutorial, and the setting that names another one."""
SETTINGS = frozenset({LOW_RES_SCHEDULER, "max_noise_level", "noise_level"})
USUAL_LEVEL = 20
"""At which MONAI's tutorial samples."""


@dataclass(frozen=True, kw_only=True)
class LowRes:
    """An upscaler as its bundle describes it. `found`: where its highest and its usual noise level were found."""

    spec: LowResSpec
    highest: int
    usual: int
    found: str

    def conditions(self, derived: tuple[ConditionSpec, ...]) -> tuple[ConditionSpec, ...]:
        """The UNet's own conditions with `concat` as the low-resolution image and `class_labels` as the noise level.

        A network without class labels is not told the level; the image is noised to it all the same.
        """
        (concat,) = (one for one in derived if one.name == "concat")
        told = any(one.name == "class_labels" for one in derived)
        usual = ConditionField(
            name=LEVEL, minimum=0, maximum=self.highest, default=self.usual,
            description="how far low_res is noised: a timestep of its scheduler; "
            + ("the network is told" if told else "the network is not told, it has no class embedding"),
        )  # fmt: skip
        text = "required: the image to enlarge, with the intensities of training"
        return (
            *(one for one in derived if one.name not in ("concat", "class_labels")),
            ConditionSpec(name=LOW_RES, shape=concat.shape, description=text),
            ConditionSpec(name=TAU, dtype="int64", shape=(), fields=(usual,)),
        )


def plan_low_res(read: Config, unet: Mapping[str, Any], latent_channels: int) -> LowRes | None:
    """None: the config names no scheduler for a low-resolution image.

    Raises:
        ValueError: it is no scheduler or has no noise schedule; a UNet that takes no image beside the latent; levels
            that the schedule or the class embedding does not have.
    """
    if LOW_RES_SCHEDULER not in read:
        return None
    value = read.raw(LOW_RES_SCHEDULER)
    id = value.removeprefix("@") if isinstance(value, str) else LOW_RES_SCHEDULER
    target = str(read.targets().get(id))
    if scheduler_name(target) is None:
        raise ValueError(
            f"[bundle] {LOW_RES_SCHEDULER}={shown(value)}: need the key of a scheduler; known: {known_schedulers()}"
        )
    scheduler = read_scheduler(id, target, read.arguments(id), 1, unet["spatial_dims"])
    if scheduler.scheduler == "rflow":
        raise ValueError(
            f"[bundle] {id}: RFlowScheduler has no noise levels; give a DDPMScheduler with the training's betas"
        )
    if unet["in_channels"] <= latent_channels:
        raise ValueError(
            f"[bundle] {id}: the UNet's in_channels={unet['in_channels']} leave no room for a low-resolution image "
            f"beside the latent's {latent_channels}; leave the scheduler out, or correct latent_shape"
        )
    last = scheduler.noise_schedule.num_train_timesteps - 1
    classes = unet["num_class_embeds"]
    highest = _level(read, "max_noise_level", last)
    if classes and highest >= classes:
        raise ValueError(
            f"[bundle] max_noise_level={highest}: the UNet knows levels 0..{classes - 1} (num_class_embeds); "
            f"--set max_noise_level={classes - 1}"
        )
    usual = _level(read, LEVEL, highest) if LEVEL in read else min(USUAL_LEVEL, highest)
    where = "config" if "max_noise_level" in read else "the schedule's last"
    assumed = "config" if LEVEL in read else "assumed"
    found = f"0..{highest} ({where}), {usual} unless asked ({assumed})"
    return LowRes(
        spec=LowResSpec(noise_schedule=scheduler.noise_schedule), highest=highest, usual=usual, found=found
    )


def _level(read: Config, key: str, last: int) -> int:
    level = read.need(key) if key in read else last
    if type(level) is not int or not 0 <= level <= last:
        raise ValueError(f"[bundle] {key}={shown(level)}: need a whole number of 0..{last}; --set {key}=...")
    return level
