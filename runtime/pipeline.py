"""load() and Model: from a request to volumes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack, final

import numpy as np
from numpy.typing import NDArray

from . import autoencoder
from .artifact import read_manifest
from .batching import Batching, Sampling, Turns
from .classifier import check_classifier
from .default_artifact import default_artifact
from .diffusion_likelihood import Bounding, bound_likelihood
from .engine import Engine
from .engine_auto import open_engine
from .frame import fitted, place_of
from .generator_model import load_generator
from .generator_spec import GeneratorSpec
from .host_memory import HostMemory
from .image_start import check_image, encode_one, painted
from .inpaint import Inpaint
from .inversion import Anomaly, Inversion, find_anomaly
from .job import Job, make_job
from .memory_limit import job_sizes
from .programs import Programs
from .request import OnStep, Settings, make_request, split_sweep
from .reuse import check_reuse, refuse_reuse
from .sampling import Images, Watch
from .sizes import parse_bytes, whole
from .spec import ArtifactSpec
from .volume import Volume, centred_affine

Condition = Mapping[str, Any]
OnPreview = Callable[[int, Images], None]
Encode = Callable[[Volume | NDArray[np.generic]], NDArray[np.float32]]
Frame = tuple[NDArray[np.float64], tuple[float, ...]]
"""Affine and voxel sizes."""


def load(
    path: str | os.PathLike[str] | None = None,
    engine: str | Engine = "auto",
    threads: int | None = None,
    memory_limit: int | str | None = None,
    *,
    active: int = 64,
    queue: int = 256,
) -> Model | Any:
    """Open the artifact in the folder `path`. Runs no code from it, and imports torch for the engine "cuda" alone.

    A `Model`, or for an artifact of a VQVAE with a transformer a `TokenModel` and for one that makes an image in one pass a
    `GeneratorModel`, both on a CPU engine and without a memory limit.

    Args:
        path: a folder that `volcast export` wrote; None: the bundled hippocampus model (`default_artifact`).
        engine: a name of `EngineName`, "auto" the fastest CPU engine installed (`Model.engine` tells which),
            or an engine of your own making.
        threads: 1..1024; None: one a physical core.
        memory_limit: bytes, or a text such as "2GiB": with "cuda", "tensorrt" and "tensorrt-rtx" what they may take on
            the device, else the process's resident memory while it samples. A decode that does not fit is done in slabs,
            exactly. None: no limit, and on a device what is free.
        active: samples of `submit` that take turns; of a token or one-pass model one at a time is under way.
        queue: how many more of them may wait.

    Raises:
        ValueError: a bad or altered artifact, an unknown or missing engine; one line with the remedy.
    """
    folder = default_artifact() if path is None else Path(path)
    spec = read_manifest(folder)
    if isinstance(spec, GeneratorSpec):
        return load_generator(folder, spec, engine, threads, memory_limit, active + queue)
    if not isinstance(spec, ArtifactSpec):
        from .token_model import load_tokens

        return load_tokens(folder, spec, engine, threads, memory_limit, active + queue)
    return open_model(folder, spec, engine, threads, memory_limit, active=active, queue=queue)


def open_model(
    folder: Path, spec: ArtifactSpec, engine: str | Engine, threads: int | None, memory_limit: int | str | None, *,
    active: int = 64, queue: int = 256,
) -> Model:  # fmt: skip
    """`load` of an artifact whose manifest has been read, and its files checked, before."""
    opened = engine if isinstance(engine, Engine) else open_engine(engine, threads, memory_limit)
    limit = None if memory_limit is None or engine == "cuda" else parse_bytes("load", memory_limit)
    return Model(folder, spec, opened, limit, active=active, queue=queue)


@final
class Model:
    """An opened artifact. Not for two threads at once: its programs reuse their memory.

    Attributes:
        spec: the manifest.
        engine: what runs it: `name`, `threads`.
    """

    def __init__(
        self, folder: Path, spec: ArtifactSpec, engine: Engine, memory_limit: int | None = None, *,
        active: int = 64, queue: int = 256,
    ) -> None:  # fmt: skip
        """`memory_limit`: bytes, which the engine keeps (`Engine.limited`); `active` and `queue` as `load` says."""
        self.spec = spec
        self.engine = engine
        self._folder = folder
        self._limits = {"active": active, "queue": queue}
        self._memory = None if memory_limit is None else engine.limited(folder, spec, memory_limit)
        self._programs = Programs(folder, spec, engine, self._memory)
        self._sampler = engine.sampler(folder, spec, self._programs)
        self._batching: Batching | None = None
        self._closed = False
        self._starting = threading.Lock()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, *, drain: bool = False) -> None:
        """End what `submit` started: finish the samples under way (`drain`) or cancel them."""
        with self._starting:
            self._closed = True
        if self._batching is not None:
            self._batching.close(drain=drain)

    @property
    def batching(self) -> Batching | None:
        """What `submit` started, to look at."""
        return self._batching

    def sample(
        self,
        seed: int = 0,
        *,
        condition: Condition | None = None,
        negative: Condition | None = None,
        size: Sequence[int] | None = None,
        image: Volume | NDArray[np.generic] | None = None,
        inpaint: Inpaint | None = None,
        on_step: OnStep | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 10,
        **settings: Unpack[Settings],
    ) -> Volume:
        """One volume: `sample_many(1, ...)`, whose arguments it takes but for a sweep."""
        if split_sweep(self.spec, seed, settings)[0]:
            raise ValueError("[sample] guidance: several weights make several volumes; call sample_many")
        volumes = self.sample_many(
            1, seed, condition=condition, negative=negative, size=size, image=image,
            inpaint=inpaint, on_step=on_step, on_preview=on_preview, preview_every=preview_every, **settings,
        )  # fmt: skip
        return next(volumes)

    def sample_many(
        self,
        n: int,
        seed: int = 0,
        *,
        batch: int = 1,
        condition: Condition | Sequence[Condition] | None = None,
        negative: Condition | None = None,
        size: Sequence[int] | None = None,
        image: Volume | NDArray[np.generic] | None = None,
        inpaint: Inpaint | None = None,
        on_step: OnStep | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 10,
        **settings: Unpack[Settings],
    ) -> Iterator[Volume]:
        """`n` volumes, `batch` at a time. Sample i takes its noise from (seed, i), whatever the batch.

        With k weights of `guidance` n k volumes: sample 0 at each weight in turn, then sample 1, and so on.

        Args:
            n: 1..1,000,000.
            seed: 0..2^64 - 1.
            batch: samples a network call, within the artifact's axis "batch".
            condition: values by the name of a condition or field, for all samples, or a sequence of n of them.
            negative: values by name for guidance's other branch, in place of the unconditional ones (a negative
                prompt); conditions that it does not name stay, fields of one that it does take their defaults.
            size: the latent's spatial sizes; None: `latent_shape[1:]`, with an image the image's.
            image: an image to start from, as `encode` takes it, one for all samples; `strength` says how far it is
                noised. The affine of a Volume passes to the samples, without an image that of a condition which is one
                (a label map). None: start from pure noise.
            inpaint: what of the image to paint anew (RePaint, arXiv:2201.09865), from pure noise unless `strength` is
                below 1; the rest stays. With ddim, ddpm and rflow.
            on_step: called with the steps done and to do, over all batches; what it raises stops the run.
            on_preview: called with the steps done of a batch and its images as they are by then, `[N, 1, D, H, W]`.
            preview_every: 1 or more steps between previews.
            settings: `Settings`: `steps`, `scheduler`, `guidance` and so on; see `SamplerConfig` and `Request`.

        Raises:
            ValueError: anything out of range, before any work (with an image: before the first step); while sampling,
                values that are not finite.
        """
        self._check_alone("sample")
        weights, settings = split_sweep(self.spec, seed, settings)
        if batch != 1 and len(set(weights)) > 1 and not self._sampler.mixes_weights:
            raise ValueError(
                f"[sample] guidance: {self.engine.name} takes one weight a call; sweep with batch=1"
            )
        if inpaint is not None and not self._sampler.inpaints:
            raise ValueError(
                f"[sample] inpaint: the engine {self.engine.name} does not; load the model with openvino or onnxruntime"
            )
        job, x0, frame = self._job(
            self.encode, seed, n, batch, condition, negative, size, image, inpaint, settings, weights
        )
        check_reuse(
            self.spec, job.request, self.engine.name, able=self._sampler.reuses, limited=self._memory is not None
        )  # fmt: skip
        every = self._every(preview_every) if on_preview is not None else 0
        watch = Watch(on_step=on_step, on_preview=on_preview, preview_every=every)
        if self._memory is not None:
            self._memory.check(job_sizes(self.spec, job, min(n * (len(weights) or 1), batch)))
        return self._run(job, n * (len(weights) or 1), batch, x0, frame, watch)

    def submit(
        self,
        seed: int = 0,
        *,
        sample: int = 0,
        condition: Condition | None = None,
        negative: Condition | None = None,
        size: Sequence[int] | None = None,
        image: Volume | NDArray[np.generic] | None = None,
        inpaint: Inpaint | None = None,
        turns: Turns = Turns(),  # noqa: B008  (frozen)
        on_step: OnStep | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 10,
        **settings: Unpack[Settings],
    ) -> Sampling:
        """A future of sample number `sample` of what `sample_many` makes of the other arguments, the same bits.

        Samples that are under way share the network's calls step by step (csrc/batcher.hpp); `turns` says how. Safe
        from any thread, beside one that samples. Callbacks run on a thread of their own. End it all with `close`.
        With a memory limit on the host every call has one sample, all calls but this one are refused from now on, and
        a decode in slabs is the same to rounding; volumes that are kept are the caller's and not counted.

        Raises:
            ValueError: anything out of range, no memory left for this size, before any work; `_core.Overloaded`: too
                many wait.
        """
        number = whole(sample)
        if not isinstance(number, int) or not 0 <= number < 1_000_000:
            raise ValueError(f"[sample] sample={sample!r}: need 0..999999")
        with self._starting:
            if self._closed:
                raise ValueError("[sample] the model is closed; load it again")
            if self._batching is None:
                self._batching = self._start()
            batching = self._batching
        job, x0, frame = self._job(
            batching.encode, seed, number + 1, 1, condition, negative, size, image, inpaint, settings
        )
        refuse_reuse(job.request, "sample", "submit mixes steps of many samples; call sample")
        every = self._every(preview_every) if on_preview is not None else 0
        return batching.submit(
            job, number, turns=turns, x0=x0, frame=frame, on_step=on_step, on_preview=on_preview, preview_every=every
        )  # fmt: skip

    def _start(self) -> Batching:
        memory = self._memory
        if memory is not None and not isinstance(memory, HostMemory):
            raise ValueError(
                f"[sample] memory_limit: submit keeps none on the device of {self.engine.name}; load without, or call sample"
            )
        for name in self.spec.programs if memory is not None else ():
            self._programs.close(name)
        return Batching(self._folder, self.spec, self.engine, memory, **self._limits)

    def _check_alone(self, operation: str) -> None:
        if self._memory is not None and self._batching is not None:
            raise ValueError(
                f"[{operation}] memory_limit: submit has all of it; call submit, or load the model once more"
            )

    def decode(self, z: NDArray[np.generic], condition: Condition | None = None) -> NDArray[np.float32]:
        """Images `[N, 1, D, H, W]` of latents `z` `[N, C, D', H', W']` or `[C, D', H', W']` as the loop yields them.

        The division by the scale factor happens here. A model without `decode` works on images: z comes back. Only a
        SPADE decoder takes a `condition`, its label map, one for all latents.
        """
        self._check_alone("decode")
        return autoencoder.decode(
            self.spec, self._programs, z, autoencoder.check_given(self.spec, np.asarray(z), condition)
        )

    def encode(self, image: Volume | NDArray[np.generic]) -> NDArray[np.float32]:
        """Latents `[N, C, D', H', W']` of images `[N, 1, D, H, W]` or one `[D, H, W]`: the posterior's mean, scaled.

        The inverse of `decode` up to the autoencoder's loss; the mean and not a draw, so that one image has one
        latent. A model without `decode` works on images: the image comes back.
        """
        self._check_alone("encode")
        return autoencoder.encode(self.spec, self._programs, image)

    def anomaly(
        self, image: Volume | NDArray[np.generic], on_step: OnStep | None = None, **how: Unpack[Inversion]
    ) -> Anomaly:
        """What is unlike health in one image, by DDIM inversion: `find_anomaly`."""
        self._check_alone("anomaly")
        return find_anomaly(self.spec, self.engine, self._programs, image, on_step, how)

    def likelihood(
        self, image: Volume | NDArray[np.generic], on_step: OnStep | None = None, **how: Unpack[Bounding]
    ) -> NDArray[np.float64]:
        """A lower bound of log p (natural) of one image, by value of its latent: `bound_likelihood`."""
        self._check_alone("likelihood")
        return bound_likelihood(self.spec, self.engine, self._programs, image, on_step, how)

    def _job(
        self, encode: Encode, seed: int, n: int, batch: int, condition: Condition | Sequence[Condition] | None,
        negative: Condition | None, size: Sequence[int] | None, image: Volume | NDArray[np.generic] | None,
        inpaint: Inpaint | None, settings: Settings, weights: tuple[float, ...] = (),
    ) -> tuple[Job, NDArray[np.float32] | None, Frame | None]:  # fmt: skip
        """The job, the latent to start from, and the frame of the image that it is of."""
        request = make_request(self.spec, seed, settings)
        check_image(image, inpaint, request)
        check_classifier(request, self.engine, limited=self._memory is not None)
        image = fitted("[sample] the image", image, self.spec)
        x0 = None if image is None else encode_one(encode, image, size)
        size = size if x0 is None else x0.shape[1:]
        job = make_job(self.spec, request, n, batch, condition, size, negative, weights)
        if inpaint is not None and x0 is not None:
            mask = fitted("[inpaint] the mask", inpaint.mask, self.spec)
            job, x0 = painted(job, replace(inpaint, mask=mask), image, x0)
        each = condition if isinstance(condition, Sequence) else [condition or {}]
        place = place_of(self.spec, "sample", image, each)
        return job, x0, None if place is None else (place.affine, place.spacing_mm)

    def _every(self, preview_every: int) -> int:
        every = whole(preview_every)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"[sample] preview_every={preview_every!r}: need 1 or more steps")
        return every

    def _run(
        self,
        job: Job,
        n: int,
        batch: int,
        x0: NDArray[np.float32] | None,
        frame: Frame | None,
        watch: Watch,
    ) -> Iterator[Volume]:
        parts = [range(first, min(first + batch, n)) for first in range(0, n, batch)]
        for images, report in self._sampler.run(job, parts, x0, watch):
            spacing = self.spec.spacing_mm
            affine, spacing = frame or (centred_affine(images.shape[2:], spacing), spacing)
            for image in images:
                array = np.ascontiguousarray(image[0] if image.shape[0] == 1 else image)
                yield Volume(array, affine, spacing, report)
