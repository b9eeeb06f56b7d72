"""Chain: artifacts as one pipeline, each an upscaler of the one before, opened in turn."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, final

import numpy as np

from .artifact import MANIFEST, read_manifest
from .classifier import check_classifier
from .condition_text import parse_conditions
from .engine import Engine
from .engine_auto import open_engine
from .frame import SPACING_TOLERANCE
from .image_start import check_image, repainting
from .job import Job, make_job
from .low_res import enlargement
from .pipeline import open_model
from .request import OnStep, make_request
from .reuse import check_reuse
from .sizes import volume_channels, volume_shape, whole
from .spec import LOW_RES, ArtifactSpec
from .volume import Volume

Stage = Mapping[str, Any]
"""What `Model.sample_many` takes but n, seed and on_step."""
_SAMPLES = ("batch", "condition", "negative", "size", "image", "inpaint")
_NUMBERS = {
    "steps": int, "batch": int, "eta": float, "guidance": float, "label": int, "scale": float, "reuse": int,
}  # fmt: skip
_TEXTS = ("scheduler", "spacing", "compat")


@final
class Chain:
    """Artifacts of which each takes the samples of the one before as its low-resolution image.

    Their files are checked once, here. Only one of them is open at a time: all samples of a stage are made, and kept,
    before the next stage opens.

    Attributes:
        specs: their manifests.
    """

    def __init__(
        self,
        artifacts: Sequence[str | os.PathLike[str]],
        engine: str | Engine = "auto",
        threads: int | None = None,
        memory_limit: int | str | None = None,
    ) -> None:
        """`artifacts`: folders, the first of any diffusion model; the others as `load` takes them.

        Raises ValueError: fewer than two; a later one that is no upscaler, or of other channels, axes or voxels.
        """
        if len(artifacts) < 2:
            raise ValueError(f"[chain] {len(artifacts)} artifacts: need two or more; volcast.load opens one")
        self._folders = [Path(folder) for folder in artifacts]
        self._opening = engine, threads, memory_limit
        self.specs = tuple(map(_read, self._folders))
        for before, after in pairwise(self.specs):
            _check_fit(before, after)

    def sample(self, seed: int = 0, *, then: Sequence[Stage] = (), **first: Any) -> Volume:
        """One volume: `sample_many(1, ...)`, whose arguments it takes."""
        return next(self.sample_many(1, seed, then=then, **first))

    def sample_many(
        self,
        n: int,
        seed: int = 0,
        *,
        then: Sequence[Stage] = (),
        on_step: OnStep | None = None,
        **first: Any,
    ) -> Iterator[Volume]:
        """`n` volumes of the last stage. Stage k takes its noise from seed + k, so that no two share any.

        Args:
            n, seed: as `Model.sample_many` takes them.
            then: for each later stage what `Model.sample_many` takes; left out, they run as their artifacts say.
            on_step: called with the steps done and to do, over all batches of all stages.
            first: for the first stage.

        Raises:
            ValueError: anything out of range, in any stage, before any work.
        """
        stages = [first, *then] if then else [first, *({} for _ in self.specs[1:])]
        if len(stages) != len(self.specs):
            raise ValueError(
                f"[chain] then has settings for {len(stages) - 1} stages: need {len(self.specs) - 1}, one each"
            )
        make_request(self.specs[0], seed, {})
        seeds = [(whole(seed) + number) % 2**64 for number in range(len(stages))]
        totals = self._totals(n, seeds, stages)

        def run(number: int, condition: Any = None) -> Iterator[Volume]:
            def told(done: int, _: int) -> None:
                if on_step is not None:
                    on_step(sum(totals[:number]) + done, sum(totals))

            given = dict(stages[number]) if condition is None else {**stages[number], "condition": condition}
            model = open_model(self._folders[number], self.specs[number], *self._opening)
            return model.sample_many(n, seeds[number], on_step=told, **given)

        return self._run(run, stages, run(0))

    def _run(self, run: Any, stages: Sequence[Stage], volumes: Iterator[Volume]) -> Iterator[Volume]:
        for number, stage in enumerate(stages[1:], start=1):
            made = list(volumes)
            del volumes  # with it the stage's programs go
            gc.collect()
            volumes = run(number, [{**(stage.get("condition") or {}), LOW_RES: volume} for volume in made])
            del made
        yield from volumes

    def _totals(self, n: int, seeds: Sequence[int], stages: Sequence[Stage]) -> list[int]:
        """The steps of each stage, over all its batches; checks whatever can be checked without a network."""
        engine, threads, memory_limit = self._opening
        opened = engine if isinstance(engine, Engine) else open_engine(engine, threads, memory_limit)
        totals: list[int] = []
        shape: tuple[int, ...] = ()
        for number, (spec, stage) in enumerate(zip(self.specs, stages, strict=True)):
            try:
                stage = _checked(stage, number)
                if number:
                    blank = np.zeros((volume_channels(self.specs[number - 1]), *shape), np.float32)
                    stage = {**stage, "condition": {**(stage.get("condition") or {}), LOW_RES: blank}}
                job = _job(spec, n, seeds[number], stage, opened, limited=memory_limit is not None)
                inpaint = stage.get("inpaint")
                rows = len(job.plan if inpaint is None else repainting(job.plan, inpaint))
            except ValueError as error:
                place = "" if number == 0 else f"[chain] stage {number + 1}, {spec.name}: "
                raise ValueError(f"{place}{error}") from None
            image = stage.get("image")
            shape = (
                volume_shape(spec, job.shape[1:])
                if image is None else np.shape(image)[-len(spec.spacing_mm):]
            )  # fmt: skip
            totals.append(rows * -(-n // stage.get("batch", 1)))
        return totals


def chain(
    artifacts: Sequence[str | os.PathLike[str]],
    engine: str | Engine = "auto",
    threads: int | None = None,
    memory_limit: int | str | None = None,
) -> Chain:
    """Artifacts as one pipeline: see `Chain`, whose arguments it takes."""
    return Chain(artifacts, engine, threads, memory_limit)


def stage_folder(text: str) -> Path:
    """The artifact of a later stage, `FOLDER` or `FOLDER,steps=20,noise_level=10` (ValueError: there is none)."""
    folder = Path(text.partition(",")[0])
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"[chain] --then {folder}: holds no {MANIFEST}; give a folder written by `volcast export`"
        )
    return folder


def parse_stage(text: str, spec: ArtifactSpec) -> dict[str, Any]:
    """What `Chain` takes for the stage of such a text, whose artifact is `spec`.

    Raises ValueError: neither a setting nor a condition of it; one given twice; a value that is none.
    """
    pairs = text.split(",")[1:]
    stage: dict[str, Any] = {}
    conditions: list[str] = []
    settings = (*_NUMBERS, *_TEXTS)
    own = [name for one in spec.conditions for name in (one.name, *(field.name for field in one.fields))]
    for pair in pairs:
        name, _, value = (part.strip() for part in pair.partition("="))
        if name not in (*settings, *own):
            shown = ", ".join(one for one in own if one != LOW_RES) or "none"
            raise ValueError(
                f"[chain] --then {text}: unknown name {name!r}; settings: {', '.join(settings)}; conditions: {shown}"
            )
        if name in stage:
            raise ValueError(f"[chain] --then {text}: {name} is given twice; give it once")
        if name in _TEXTS:
            stage[name] = value
        elif name in _NUMBERS:
            try:
                stage[name] = _NUMBERS[name](value)
            except ValueError:
                raise ValueError(f"[chain] --then {text}: {pair} is no number") from None
        else:
            conditions.append(pair)
    return stage | ({"condition": parse_conditions(spec, conditions)} if conditions else {})


def _read(folder: Path) -> ArtifactSpec:
    spec = read_manifest(folder)
    if isinstance(spec, ArtifactSpec):
        return spec
    raise ValueError(f"[chain] {spec.name} is no diffusion model, and a chain has no others; sample it alone")


def _checked(stage: Stage, number: int) -> Stage:
    guidance = stage.get("guidance")
    if guidance is not None and not isinstance(guidance, int | float):
        raise ValueError("[sample] guidance: a chain takes one weight; sweep its stages one by one")
    for name in ("image", "inpaint"):
        if number and name in stage:
            raise ValueError(
                f"[sample] {name}: a later stage starts from the one before; give the first stage one"
            )
    if number and not isinstance(stage.get("condition") or {}, Mapping):
        raise ValueError("[condition] need one mapping for all samples of a later stage")
    if number and LOW_RES in (stage.get("condition") or {}):
        raise ValueError(f"[condition] {LOW_RES} comes from the stage before; leave it out")
    return stage


def _job(spec: ArtifactSpec, n: int, seed: int, stage: Stage, engine: Engine, *, limited: bool) -> Job:
    settings: Any = {key: value for key, value in stage.items() if key not in _SAMPLES}
    request = make_request(spec, seed, settings)
    check_image(stage.get("image"), stage.get("inpaint"), request)
    check_classifier(request, engine, limited=limited)
    check_reuse(spec, request, engine.name, able=type(engine).sampler is Engine.sampler, limited=limited)
    condition, negative = stage.get("condition"), stage.get("negative")
    return make_job(spec, request, n, stage.get("batch", 1), condition, stage.get("size"), negative)


def _check_fit(before: ArtifactSpec, after: ArtifactSpec) -> None:
    where = f"[chain] {after.name} after {before.name}:"
    if after.low_res is None:
        raise ValueError(
            f"{where} it takes no low-resolution image; export it from a bundle with a low_res_scheduler"
        )
    wanted = next(one.shape for one in after.conditions if one.name == LOW_RES)
    if len(before.latent_shape) != len(after.latent_shape) or wanted[0] != volume_channels(before):
        raise ValueError(
            f"{where} it takes {wanted[0]} channels of {len(wanted) - 1} axes, the samples before it have "
            f"{volume_channels(before)} of {len(before.spacing_mm)}; export models that fit"
        )
    written = [None if spec.intensity is None else spec.intensity.written for spec in (before, after)]
    if written[0] != written[1]:
        raise ValueError(
            f"{where} it takes intensities of {_range(written[1])}, those before it are of {_range(written[0])}; export "
            "both with the same --set intensity"
        )
    coarse = [size * factor for size, factor in zip(after.spacing_mm, enlargement(after), strict=True)]
    known = all(spec.provenance.get("spacing_mm") != "assumed 1 mm" for spec in (before, after))
    if known and not np.allclose(before.spacing_mm, coarse, rtol=SPACING_TOLERANCE, atol=0):
        raise ValueError(
            f"{where} it takes voxels of {' x '.join(f'{one:g}' for one in coarse)} mm, those before it have "
            f"{' x '.join(f'{one:g}' for one in before.spacing_mm)}; export models that fit"
        )


def _range(written: tuple[float, float] | None) -> str:
    return "the network's own" if written is None else f"{written[0]:g}..{written[1]:g}"
