"""TokenModel: an opened VQVAE with its transformer, from a request to volumes, and from images to likelihoods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, final

import numpy as np
from numpy.typing import NDArray

from .batching import Turns
from .conditions import resolve
from .engine import Arrays, Engine
from .engine_auto import check_engine, open_engine
from .frame import fitted
from .healing import Healed, heal_tokens, masked_difference, unlikely
from .memory import PeakMemory
from .queued_model import QueuedModel, sample_parts
from .queueing import Queued, check_sample
from .report import Report, Stopwatch
from .request import OnStep
from .spec import Manifest
from .token_choice import Choice, ChoiceSettings, make_choice
from .token_sequence import Drawn, Indices, TokenSequence, draw_sequences, log_likelihoods
from .token_spec import TokenSpec
from .volume import Volume, centred_affine

Condition = Mapping[str, Any]


@final
class TokenModel(QueuedModel):
    """An opened artifact of a token model. Not for two threads at once, but for `submit`: its programs reuse their memory.

    Attributes:
        spec: the manifest.
        order: int64 `[L]`, the place in the grid, counted in C order, of each token of the sequence.
    """

    def __init__(self, folder: Path, spec: TokenSpec, engine: Engine, most: int = 320) -> None:
        """`most`: samples of `submit` that are open."""
        super().__init__(folder, spec, engine, most)
        self.spec = spec
        raster = np.arange(spec.length)
        self.order = np.array(spec.order, np.int64) if spec.order else raster

    def sample(
        self,
        seed: int = 0,
        *,
        condition: Condition | None = None,
        on_step: OnStep | None = None,
        **settings: Unpack[ChoiceSettings],
    ) -> Volume:
        """One volume: `sample_many(1, ...)`, whose arguments it takes."""
        return next(self.sample_many(1, seed, condition=condition, on_step=on_step, **settings))

    def sample_many(
        self,
        n: int,
        seed: int = 0,
        *,
        batch: int = 1,
        condition: Condition | None = None,
        on_step: OnStep | None = None,
        **settings: Unpack[ChoiceSettings],
    ) -> Iterator[Volume]:
        """`n` volumes, `batch` at a time. Token t of sample i is decided by (seed, i, t), whatever the batch.

        A sample has the same bits in any batch where the engine's products do not depend on it (docs/transformer.md).

        Args:
            n: 1..1,000,000.
            seed: 0..2^64 - 1.
            batch: samples a network call, within the artifact's axis "batch".
            condition: with cross-attention, values by the name of a condition, for all samples.
            on_step: called with the tokens done and to do of each sample, over all batches; what it raises stops the run.
            settings: `temperature`, `top_k`, `top_p`, as `Choice` says.

        Raises:
            ValueError: anything out of range, before any work; logits or volumes that are not finite.
        """
        choice = make_choice(settings)
        parts = self._parts(n, seed, batch, choice)
        values = self._conditions(condition)
        return self._run(parts, seed, values, choice, on_step)

    def submit(
        self,
        seed: int = 0,
        *,
        sample: int = 0,
        condition: Condition | None = None,
        turns: Turns = Turns(),  # noqa: B008  (frozen)
        on_step: OnStep | None = None,
        **settings: Unpack[ChoiceSettings],
    ) -> Queued:
        """A future of sample number `sample` of what `sample_many` makes of the other arguments, the same bits.

        Samples are made one after the other, on a thread of their own, on which `on_step` runs too; those of a higher
        priority first. Safe from any thread, beside one that samples. End it with `close`.

        Raises:
            ValueError: anything out of range, before any work; `_core.Overloaded`: too many wait.
        """
        choice = make_choice(settings)
        parts = [check_sample(sample)]
        self._parts(1, seed, 1, choice)
        values = self._conditions(condition)

        def job(told: OnStep) -> Volume:
            return next(self._worker._run(parts, seed, values, choice, told))

        return self._queueing.submit(job, turns, on_step)

    def _opened_again(self) -> TokenModel:
        return TokenModel(self._folder, self.spec, self.engine)

    def tokens(
        self,
        n: int,
        seed: int = 0,
        *,
        batch: int = 1,
        condition: Condition | None = None,
        **settings: Unpack[ChoiceSettings],
    ) -> Indices:
        """The code indices int64 `[n, *token_shape]` of what `sample_many` makes of the same arguments."""
        choice = make_choice(settings)
        parts = self._parts(n, seed, batch, choice)
        values = self._conditions(condition)
        drawn = [self._draw(part, seed, values, choice, None).tokens for part in parts]
        return self._grid(np.concatenate(drawn))

    def traced(
        self, seed: int = 0, *, condition: Condition | None = None, **settings: Unpack[ChoiceSettings]
    ) -> tuple[Indices, NDArray[np.float32]]:
        """`tokens(1, ...)` and the logits float32 `[1, L, tokens]` from which each token of the sequence was drawn."""
        choice = make_choice(settings)
        (part,) = self._parts(1, seed, 1, choice)
        drawn = self._draw(part, seed, self._conditions(condition), choice, None, keep=True)
        assert drawn.logits is not None
        return self._grid(drawn.tokens), drawn.logits

    def encode(self, image: Volume | NDArray[np.generic]) -> Indices:
        """Code indices int64 `[N, *token_shape]` of images `[N, C, D, H, W]`, or of one `[D, H, W]` or `[C, D, H, W]`."""
        given = np.asarray(fitted("[encode] the image", image, self.spec))
        wanted = self.image_shape
        array = given[None] if given.shape == wanted[1:] else given
        array = array[None] if array.shape == wanted else array
        if array.ndim != len(wanted) + 1 or array.shape[1:] != wanted or array.dtype.kind not in "fiub":
            raise ValueError(
                f"[encode] got {given.dtype} {given.shape}: need numbers, (N, {', '.join(map(str, wanted))}) or one of "
                "them; crop, pad or resample the image"
            )
        if not np.isfinite(array).all():
            raise ValueError("[encode] the input holds NaN or infinity; give finite numbers")
        return np.asarray(self._programs.call("encode", {"image": array})["indices"], np.int64)

    def decode(self, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        """Images float32 `[N, C, D, H, W]` of code indices `[N, *token_shape]` or of one `[*token_shape]`."""
        array = self._codes("decode", indices)
        image = np.asarray(self._programs.call("decode", {"indices": array})["image"], np.float32)
        if not np.isfinite(image).all():
            raise ValueError(
                "[decode] the decoded volume is not finite; check the weights, or export with fp32 weights"
            )
        return image

    def likelihood(
        self, image: Volume | NDArray[np.generic], *, condition: Condition | None = None
    ) -> NDArray[np.float64]:
        """log p (natural) of every token of images, float64 `[N, *token_shape]`; summed, that of the image.

        Images as `encode` takes them, with the intensities of training. Low sums tell images unlike those of training
        (Graham et al. 2022, "Transformer-based out-of-distribution detection for clinically safe segmentation"). The
        tokens are known, so the network runs over blocks of them, not token by token.
        """
        return self.token_likelihood(self.encode(image), condition=condition)

    def token_likelihood(
        self, indices: NDArray[np.integer], *, condition: Condition | None = None
    ) -> NDArray[np.float64]:
        """The same for code indices `[N, *token_shape]`."""
        codes = self._codes("likelihood", indices).astype(np.int64)
        values = self._conditions(condition)
        found = []
        for one in codes.reshape(-1, self.spec.length):
            sequence = TokenSequence(self.spec, self._programs, 1, self._prepared(values, 1))
            found.append(log_likelihoods(sequence, self.spec, one[self.order][None]))
        return self._grid(np.concatenate(found))

    def heal(
        self,
        image: Volume | NDArray[np.generic],
        *,
        quantile: float = 0.03,
        condition: Condition | None = None,
    ) -> Healed:
        """One image with its unlikely tokens replaced by those that the transformer expects, and where it differs.

        Args:
            image: one image as `encode` takes it, with the intensities of training.
            quantile: tokens whose log p lies below this quantile of the image's are replaced, above 0 and below 1.
            condition: as `sample_many` takes it.

        Raises:
            ValueError: several images, or anything out of range.
        """
        codes = self.encode(image)
        if len(codes) != 1:
            raise ValueError(f"[heal] image holds {len(codes)} images: give one")
        masked = unlikely(self.token_likelihood(codes, condition=condition)[0], quantile)
        sequence = TokenSequence(self.spec, self._programs, 1, self._prepared(self._conditions(condition), 1))
        ordered = codes.reshape(-1)[self.order], masked.reshape(-1)[self.order]
        (tokens,) = self._grid(heal_tokens(sequence, self.spec, *ordered)[None])
        (found,) = self.decode(tokens)
        given = np.asarray(image, np.float32).reshape(found.shape)
        return Healed(
            tokens=tokens, masked=masked, image=found, difference=masked_difference(given, found, masked)
        )

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(C, *spatial)` of the images."""
        return tuple(int(size) for size in self.spec.programs["encode"].inputs[0].shape[1:])

    def _codes(self, operation: str, indices: NDArray[np.integer]) -> NDArray[np.integer]:
        """`[N, *token_shape]`, checked (ValueError)."""
        array = np.asarray(indices)
        array = array[None] if array.shape == self.spec.token_shape else array
        if array.shape[1:] != self.spec.token_shape or array.dtype.kind not in "iu":
            raise ValueError(
                f"[{operation}] got {array.dtype} {array.shape}: need whole numbers, (N, *{self.spec.token_shape})"
            )
        if array.size and not 0 <= array.min() <= array.max() < self.spec.num_codes:
            raise ValueError(
                f"[{operation}] indices reach from {array.min()} to {array.max()}: need 0..{self.spec.num_codes - 1}"
            )
        return array

    def _grid(self, values: NDArray[Any]) -> NDArray[Any]:
        """From the order of the sequence `[N, L]` to the grid `[N, *token_shape]`."""
        grid = np.empty_like(values)
        grid[:, self.order] = values
        return grid.reshape(-1, *self.spec.token_shape)

    def _parts(self, n: int, seed: int, batch: int, choice: Choice) -> list[range]:
        choice.check(self.spec.num_codes)
        return sample_parts(self.spec, n, seed, batch)

    def _conditions(self, given: Condition | None) -> Arrays:
        return resolve(self.spec, given, {}).values

    def _prepared(self, values: Arrays, batch: int) -> Arrays:
        if "prepare" not in self.spec.programs:
            return {}
        repeated = {name: np.repeat(value[None], batch, axis=0) for name, value in values.items()}
        return self._programs.call("prepare", repeated)

    def _draw(
        self,
        part: Sequence[int],
        seed: int,
        values: Arrays,
        choice: Choice,
        on_step: OnStep | None,
        keep: bool = False,
    ) -> Drawn:
        sequence = TokenSequence(self.spec, self._programs, len(part), self._prepared(values, len(part)))
        return draw_sequences(
            sequence, self.spec, seed, part, choice, on_step or (lambda done, total: None), keep
        )

    def _run(
        self, parts: list[range], seed: int, values: Arrays, choice: Choice, on_step: OnStep | None
    ) -> Iterator[Volume]:
        for number, part in enumerate(parts):
            memory, watch = PeakMemory(), Stopwatch(self._programs)

            def told(done: int, total: int, number: int = number) -> None:
                if on_step is not None:
                    on_step(number * total + done, len(parts) * total)

            drawn = self._draw(part, seed, values, choice, told)
            loop_seconds = watch.lap()
            images = self.decode(self._grid(drawn.tokens))
            report = Report(
                engine=self.engine.name,
                threads=self.engine.threads,
                scheduler="autoregressive",
                steps=self.spec.length,
                batch=len(part),
                open_seconds=watch.open_seconds(),
                schedule_seconds=0.0,
                prepare_seconds=0.0,
                loop_seconds=loop_seconds,
                network_seconds=drawn.network_seconds,
                decode_seconds=watch.lap(),
                peak_bytes=memory.bytes(),
                peak_of_process=memory.since_start_of_process,
            )
            affine = centred_affine(images.shape[2:], self.spec.spacing_mm)
            for image in images:
                array = np.ascontiguousarray(image[0] if image.shape[0] == 1 else image)
                yield Volume(array, affine, self.spec.spacing_mm, report)


def load_tokens(
    folder: Path,
    spec: Manifest,
    engine: str | Engine = "auto",
    threads: int | None = None,
    memory_limit: int | str | None = None,
    most: int = 320,
) -> TokenModel:
    """What `load` gives for the artifact of a token model. Arguments as `load` has them.

    Raises ValueError: a diffusion model, an engine for another device, or a memory limit, which nothing keeps here.
    """
    check_engine(spec, engine)
    if memory_limit is not None:
        raise ValueError(f"[load] memory_limit: {spec.name} samples tokens, which keeps none; leave it out")
    if isinstance(spec, TokenSpec):
        return TokenModel(
            folder, spec, engine if isinstance(engine, Engine) else open_engine(engine, threads), most
        )
    raise ValueError(f"[load] {folder}: {spec.name} is a diffusion model; give a token model")
