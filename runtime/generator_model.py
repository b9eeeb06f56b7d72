"""GeneratorModel: an opened network that makes an image in one pass, from a request to volumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from .batching import Turns
from .conditions import resolve
from .engine import Arrays, Engine
from .engine_auto import check_engine, open_engine
from .frame import fitted, place_of
from .generator_spec import GeneratorSpec
from .memory import PeakMemory
from .noise import request_noise
from .queued_model import QueuedModel, sample_parts
from .queueing import Queued, check_sample
from .report import Report, Stopwatch
from .request import OnStep
from .sizes import default_sizes
from .volume import Volume, centred_affine

Condition = Mapping[str, Any]
Image = Volume | NDArray[np.generic]


@final
class GeneratorModel(QueuedModel):
    """An opened artifact of a one-pass model. Not for two threads at once, but for `submit`: its programs reuse their
    memory.

    Attributes:
        spec: the manifest.
    """

    def __init__(self, folder: Path, spec: GeneratorSpec, engine: Engine, most: int = 320) -> None:
        """`most`: samples of `submit` that are open."""
        super().__init__(folder, spec, engine, most)
        self.spec = spec

    def sample(
        self,
        seed: int = 0,
        *,
        condition: Condition | None = None,
        image: Image | None = None,
        on_step: OnStep | None = None,
    ) -> Volume:
        """One volume: `sample_many(1, ...)`, whose arguments it takes."""
        return next(self.sample_many(1, seed, condition=condition, image=image, on_step=on_step))

    def sample_many(
        self,
        n: int,
        seed: int = 0,
        *,
        batch: int = 1,
        condition: Condition | Sequence[Condition] | None = None,
        image: Image | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[Volume]:
        """`n` volumes, `batch` at a time. Sample i takes its noise from (seed, i), whatever the batch.

        Args:
            n: 1..1,000,000.
            seed: 0..2^64 - 1.
            batch: samples a network call, within the artifact's axis "batch".
            condition: values by the name of a condition (`mask`: a label map), for all samples, or a sequence of n of
                them. A Volume lends the samples its affine.
            image: an image whose style the samples have, where the network has an encoder: the noise is then the
                encoder's mean and, times the sample's own noise, its deviation (MONAI's `SPADENet.encode`).
            on_step: called with the batches done and to do; what it raises stops the run.

        Raises:
            ValueError: anything out of range, before any work; volumes that are not finite.
        """
        parts = sample_parts(self.spec, n, seed, batch)
        given = list(condition) if isinstance(condition, Sequence) else [condition or {}]
        if isinstance(condition, Sequence) and len(given) != n:
            raise ValueError(
                f"[sample] {len(given)} conditions for {n} samples: give one for all, or one for each"
            )
        values = [self._values(one) for one in given]
        style = None if image is None else self.encode(image)
        place = place_of(self.spec, "sample", None, given)
        return self._run(parts, seed, values, style, place, on_step or (lambda done, total: None))

    def encode(self, image: Image) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and deviation `[1, Z]` of the noise that has the style of an image `[D, H, W]` (2D: `[H, W]`).

        Raises ValueError: a network without an encoder, an image of another size.
        """
        found = self._programs.call("encode", {"image": check_style(self.spec, image)})
        return np.asarray(found["z_mu"], np.float32), np.asarray(found["z_sigma"], np.float32)

    def submit(
        self,
        seed: int = 0,
        *,
        sample: int = 0,
        condition: Condition | None = None,
        image: Image | None = None,
        turns: Turns = Turns(),  # noqa: B008  (frozen)
        on_step: OnStep | None = None,
    ) -> Queued:
        """A future of sample number `sample` of what `sample_many` makes of the other arguments, the same bits.

        Samples are made one after the other, on a thread of their own, on which `on_step` runs too; those of a higher
        priority first. Safe from any thread, beside one that samples. End it with `close`.

        Raises:
            ValueError: anything out of range, before any work; `_core.Overloaded`: too many wait.
        """
        parts = [check_sample(sample)]
        sample_parts(self.spec, 1, seed, 1)
        values, place = [self._values(condition)], place_of(self.spec, "sample", None, [condition or {}])
        if image is not None:
            check_style(self.spec, image)

        def job(told: OnStep) -> Volume:
            worker = self._worker
            style = None if image is None else worker.encode(image)
            return next(worker._run(parts, seed, values, style, place, told))

        return self._queueing.submit(job, turns, on_step)

    def _opened_again(self) -> GeneratorModel:
        return GeneratorModel(self._folder, self.spec, self.engine)

    def _values(self, condition: Condition | None) -> Arrays:
        return resolve(self.spec, condition, default_sizes(self.spec)).values

    def _run(
        self,
        parts: list[range],
        seed: int,
        values: Sequence[Arrays],
        style: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
        place: Volume | None,
        on_step: OnStep,
    ) -> Iterator[Volume]:
        spacing = self.spec.spacing_mm if place is None else place.spacing_mm
        affine = place.affine if place is not None else centred_affine(self.spec.image_shape[1:], spacing)
        for number, part in enumerate(parts):
            memory, watch = PeakMemory(), Stopwatch(self._programs)
            each = [values[i] for i in part] if len(values) > 1 else [values[0]] * len(part)
            given: dict[str, Any] = {name: np.stack([one[name] for one in each]) for name in values[0]}
            if "prepare" in self.spec.programs:
                given = dict(self._programs.call("prepare", given))
            prepare_seconds = watch.lap()
            if self.spec.noise_shape:
                z = request_noise(seed, part, 0, self.spec.noise_shape)
                given |= {"z": z if style is None else style[0] + style[1] * z}
            images = np.asarray(self._programs.call("decode", given)["image"], np.float32)
            if not np.isfinite(images).all():
                raise ValueError(
                    "[sample] the volume is not finite; check the weights, or export with fp32 weights"
                )
            report = Report(
                engine=self.engine.name,
                threads=self.engine.threads,
                scheduler="one pass",
                steps=1,
                batch=len(part),
                open_seconds=watch.open_seconds(),
                schedule_seconds=0.0,
                prepare_seconds=prepare_seconds,
                loop_seconds=0.0,
                network_seconds=0.0,
                decode_seconds=watch.lap(),
                peak_bytes=memory.bytes(),
                peak_of_process=memory.since_start_of_process,
            )
            on_step(number + 1, len(parts))
            for image in images:
                array = np.ascontiguousarray(image[0] if image.shape[0] == 1 else image)
                yield Volume(array, affine, spacing, report)


def check_style(spec: GeneratorSpec, image: Image) -> NDArray[np.generic]:
    """An image whose style samples shall have, `[1, C, *spatial]`. Raises ValueError as `GeneratorModel.encode`."""
    if "encode" not in spec.programs:
        raise ValueError(f"[encode] {spec.name} has no encoder of styles; leave the image out")
    array = np.asarray(fitted("[encode] the image", image, spec))
    shape = spec.programs["encode"].inputs[0].shape[1:]
    wanted = array[None] if array.ndim == len(shape) - 1 else array
    if wanted.shape != shape or array.dtype.kind not in "fiub" or not np.isfinite(array).all():
        raise ValueError(
            f"[encode] got {array.dtype} {array.shape}: need finite numbers, {shape}; crop, pad or resample the image"
        )
    return wanted[None]


def load_generator(
    folder: Path,
    spec: GeneratorSpec,
    engine: str | Engine = "auto",
    threads: int | None = None,
    memory_limit: int | str | None = None,
    most: int = 320,
) -> GeneratorModel:
    """What `load` gives for the artifact of a one-pass model. Arguments as `load` has them.

    Raises ValueError: an engine for another device, or a memory limit, which nothing keeps here.
    """
    check_engine(spec, engine)
    if memory_limit is not None:
        raise ValueError(
            f"[load] memory_limit: {spec.name} makes an image in one pass and keeps none; leave it out"
        )
    return GeneratorModel(
        folder, spec, engine if isinstance(engine, Engine) else open_engine(engine, threads), most
    )


def refuse_settings(spec: GeneratorSpec, given: Mapping[str, bool]) -> None:
    """ValueError: options of diffusion or token models, by name, whether each was given."""
    named = [f"--{name.replace('_', '-')}" for name, was in given.items() if was]
    if named:
        raise ValueError(
            f"[sample] {', '.join(named)}: {spec.name} makes an image in one pass; leave it out (--condition, --mask and "
            "--image are for it)"
        )
