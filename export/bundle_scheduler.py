"""MONAI schedulers, as a config describes them, to `SchedulerSpec`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from volcast.export.bundle_config import shown, validated
from volcast.runtime.spec import NoiseSchedule, SchedulerSpec

_MODULES = r"(?:(?:monai|generative)\.networks\.schedulers\.(?:\w+\.)?)?"
_TARGETS = {
    _MODULES + "DDPMScheduler": "ddpm",
    _MODULES + "DDIMScheduler": "ddim",
    _MODULES + "PNDMScheduler": "pndm",
    # MAISI's bundle carries the file that became MONAI's class.
    r"(?:scripts\.rectified_flow\.)?RFlowScheduler|" + _MODULES + "RFlowScheduler": "rflow",
}
_CLIP = {"clip_sample", "clip_sample_min", "clip_sample_max"}
_OPTIONS = {
    "ddpm": {"prediction_type", "variance_type", *_CLIP},
    "ddim": {"prediction_type", "set_alpha_to_one", "steps_offset", *_CLIP},
    "pndm": {"prediction_type", "set_alpha_to_one", "steps_offset", "skip_prk_steps"},
    "rflow": {"use_discrete_timesteps", "use_timestep_transform", "base_img_size_numel", "steps_offset"},
}
# MONAI 1.6.1's constructor defaults where SchedulerSpec's differ.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ddpm": {"clip_sample": True},
    "ddim": {"clip_sample": True, "set_alpha_to_one": True},
    "pndm": {"skip_prk_steps": False, "set_alpha_to_one": False},
    "rflow": {"prediction_type": "flow"},
}
# How training draws timesteps; transform_scale is read by no code of MONAI 1.6.1.
_TRAINING_ONLY = {"sample_method", "loc", "scale", "transform_scale"}
_SCHEDULES = {
    "linear_beta": {"beta_start", "beta_end"},
    "scaled_linear_beta": {"beta_start", "beta_end"},
    "sigmoid_beta": {"beta_start", "beta_end", "sig_range"},
    "cosine": {"s"},
}


def scheduler_name(target: str) -> str | None:
    """`ddim`, `ddpm`, `pndm` or `rflow` for a known `_target_`, else None."""
    return next((name for pattern, name in _TARGETS.items() if re.fullmatch(pattern, target)), None)


def known_schedulers() -> str:
    """The names of the schedulers that can be read, for messages."""
    return "DDPMScheduler, DDIMScheduler, PNDMScheduler, RFlowScheduler"


def read_scheduler(
    id: str, target: str, arguments: Mapping[str, Any], steps: int | None, spatial_dims: int
) -> SchedulerSpec:
    """The spec of a scheduler component; `steps` None means that the config sets none.

    Options that volcast does not implement and those of another scheduler are a ValueError, never dropped.
    """
    name = scheduler_name(target)
    if name is None:
        raise ValueError(f"[bundle] {id}: _target_={target!r} is not known; known: {known_schedulers()}")
    options = dict(arguments)
    if name == "rflow":
        noise: dict[str, Any] = {}
        options = {key: value for key, value in options.items() if key not in _TRAINING_ONLY}
        dims = options.pop("spatial_dim", 3 if options.get("use_timestep_transform") else spatial_dims)
        if dims != spatial_dims:
            raise ValueError(
                f"[bundle] {id}#spatial_dim={shown(dims)}: the network has {spatial_dims} spatial axes; set it so"
            )
    else:
        noise = _noise_options(id, options)
    if "num_train_timesteps" in options:
        noise["num_train_timesteps"] = options.pop("num_train_timesteps")
    unknown = sorted(options.keys() - _OPTIONS[name])
    if unknown:
        raise ValueError(
            f"[bundle] {id}: {target.rpartition('.')[2]} option {unknown[0]}={shown(options[unknown[0]])} is not "
            f"implemented; known: {', '.join(sorted(_OPTIONS[name]))}"
        )
    schedule = validated(NoiseSchedule, noise, id)
    if steps is None:
        # DDPM and PNDM begin with every training step; the others have no timesteps until they are set.
        if name not in {"ddpm", "pndm"}:
            raise ValueError(
                f"[bundle] {id}: the config sets no steps; give them with --set num_inference_steps=50"
            )
        steps = schedule.num_train_timesteps
    if steps > schedule.num_train_timesteps:
        raise ValueError(f"[bundle] num_inference_steps={steps}: need 1..{schedule.num_train_timesteps}")
    values = {**_DEFAULTS[name], **options, "scheduler": name, "noise_schedule": schedule, "steps": steps}
    return validated(SchedulerSpec, values, id)


def _noise_options(id: str, options: dict[str, Any]) -> dict[str, Any]:
    """Take the noise schedule's arguments out of `options`, those of the chosen schedule only."""
    for old in (
        "beta_schedule",
        "schedule_beta",
    ):  # GM's first releases: 'linear', 'scaled_linear', 'sigmoid', 'cosine'
        if old in options and "schedule" not in options:
            value = options.pop(old)
            options["schedule"] = (
                value if value == "cosine" or str(value).endswith("_beta") else f"{value}_beta"
            )
    schedule = options.pop("schedule", "linear_beta")
    if not isinstance(schedule, str) or schedule not in _SCHEDULES:
        raise ValueError(f"[bundle] {id}#schedule={shown(schedule)}: need one of {', '.join(_SCHEDULES)}")
    noise = {key: options.pop(key) for key in _SCHEDULES[schedule] if key in options}
    return {"schedule": schedule, **noise}
