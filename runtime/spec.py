"""ArtifactSpec: the one description of an exported model, shared by export, engines and serving.

An artifact is data, never code: `manifest.json` (this module's schema) beside ONNX files. Every model here is
frozen, refuses unknown keys and refuses values out of range.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from enum import StrEnum
from typing import Annotated, Literal, final

from pydantic import BeforeValidator, Field, model_validator

from .frozen import Finite, Frozen, Identifier, PositiveInt
from .intensity import IntensitySpec
from .quality import QualityBudget

FORMAT = 1
"""Version of a diffusion model's manifest; a reader refuses a newer one (`token_spec.py` has the next)."""


class Precision(StrEnum):
    """The type in which an artifact stores its weights."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Axis(Frozen):
    """A size that may vary: `minimum <= size <= maximum`, a multiple of `multiple`."""

    name: Identifier
    minimum: PositiveInt
    maximum: PositiveInt
    multiple: PositiveInt = 1

    @model_validator(mode="after")
    def _ordered(self) -> Axis:
        if self.minimum > self.maximum:
            raise ValueError(f"axis {self.name}: minimum {self.minimum} exceeds maximum {self.maximum}")
        return self


class TensorSpec(Frozen):
    """A tensor's name, dtype (numpy's name) and shape; a size is a number or an axis name."""

    name: Identifier
    dtype: Literal["float32", "float16", "int64"]
    shape: tuple[PositiveInt | Identifier, ...]


class ProgramSpec(Frozen):
    """One ONNX program, with the graph's size before and after the passes.

    FLOPs are of one forward pass at batch 1 and the default shape, a multiply-add counted as two.
    """

    file: Annotated[
        str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.\-]*/)?[A-Za-z0-9_][A-Za-z0-9_.\-]*\.onnx$")
    ]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: Annotated[int, Field(ge=0)]
    nodes_before: Annotated[int, Field(ge=0)]
    flops: Annotated[int, Field(ge=0)]
    flops_before: Annotated[int, Field(ge=0)]


class SlabValue(Frozen):
    """A value between two segments: a volume `[1, channels, *(scale * latent size)]`, float32."""

    channels: PositiveInt
    scale: Annotated[tuple[PositiveInt, ...], Field(min_length=2, max_length=3)]


class SlabRead(Frozen):
    """A segment's input that holds rows of a value: those under the rows it makes, `before` and `after` of them more.

    Rows outside the volume are zeros, with `edge` the nearest row. `mask` names the input `[1, 1, rows, ..]` that is 1
    for rows inside it and 0 for others.
    """

    input: Identifier
    value: Identifier
    before: Annotated[int, Field(ge=0, le=1024)] = 0
    after: Annotated[int, Field(ge=0, le=1024)] = 0
    edge: bool = False
    mask: Identifier | None = None


class SlabNorm(Frozen):
    """A group norm that a segment begins with: its inputs `mean` and `inverse` `[1, channels, 1, ..]` are every
    channel's mean and 1 / sqrt(variance + epsilon) of its group, over the whole volume."""

    value: Identifier
    groups: PositiveInt
    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    mean: Identifier
    inverse: Identifier


class SlabSegment(Frozen):
    """Makes a value, the program's output `y`, from rows of others; `whole`: from all rows at once.

    With `moments` the outputs `mean` and `variance` `[1, channels, rows, 1, ..]` are those of every row of it.
    """

    program: ProgramSpec
    value: Identifier
    reads: tuple[SlabRead, ...]
    norms: tuple[SlabNorm, ...] = ()
    whole: bool = False
    moments: bool = False


class SlabSpec(Frozen):
    """The decoder once more, in segments that run slab by slab along the first spatial axis, in this order.

    `values` holds the latent as `z` and what each segment makes, the last of them the image.
    """

    values: dict[Identifier, SlabValue]
    segments: Annotated[tuple[SlabSegment, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _in_order(self) -> SlabSpec:
        known, measured = {"z"}, set[str]()
        for segment in self.segments:
            missing = {read.value for read in segment.reads} - known
            missing |= {norm.value for norm in segment.norms} - measured
            if missing or segment.value in known:
                raise ValueError(
                    f"segment {segment.value} is made twice or reads what is not there: {missing}"
                )
            known.add(segment.value)
            measured |= {segment.value} if segment.moments else set()
        if known != self.values.keys():
            raise ValueError(f"values {sorted(known ^ self.values.keys())} are not described or not made")
        return self


class NoiseSchedule(Frozen):
    """The noise schedule of training, in MONAI's names (`monai.networks.schedulers.NoiseSchedules`)."""

    schedule: Literal["linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine"] = "linear_beta"
    num_train_timesteps: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 2e-2
    sig_range: Annotated[float, Field(gt=0, le=100)] = 6.0
    s: Annotated[float, Field(ge=0, le=1)] = 8e-3


class SchedulerSpec(Frozen):
    """How the network was trained and which sampler its bundle uses by default.

    `prediction_type` is what the network's output means: `epsilon`, `sample` (x0), `v_prediction`, or `flow`
    (MONAI's RFlow: x0 - noise). The fields below `scheduler` are MONAI's constructor arguments of the same name.
    """

    scheduler: Literal["ddim", "ddpm", "pndm", "dpm-solver++", "rflow"] = "ddim"
    noise_schedule: NoiseSchedule = NoiseSchedule()
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow"] = "epsilon"
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    clip_sample: bool = False
    clip_sample_min: Finite = -1.0
    clip_sample_max: Finite = 1.0
    set_alpha_to_one: bool = True
    steps_offset: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    skip_prk_steps: bool = True
    variance_type: Literal["fixed_small", "fixed_large"] = "fixed_small"
    use_discrete_timesteps: bool = True
    use_timestep_transform: bool = False
    base_img_size_numel: PositiveInt = 32**3

    @model_validator(mode="after")
    def _consistent(self) -> SchedulerSpec:
        if (self.scheduler == "rflow") != (self.prediction_type == "flow"):
            raise ValueError(
                f"scheduler {self.scheduler!r} with prediction_type {self.prediction_type!r}: 'flow' and 'rflow' "
                "belong together"
            )
        if self.clip_sample_min >= self.clip_sample_max:
            raise ValueError(f"clip_sample_min {self.clip_sample_min} is not below {self.clip_sample_max}")
        return self


LOW_RES, LEVEL, TAU = "low_res", "noise_level", "tau"
"""An upscaler's conditions: its low-resolution image, and `tau`, whose only field is the noise level."""


class LowResSpec(Frozen):
    """How an upscaler's low-resolution image is noised before sampling: level tau is this schedule's timestep tau."""

    noise_schedule: NoiseSchedule = NoiseSchedule()


class Ratio(Frozen):
    """`(n0 + sum n_i f_i) / (d0 + sum d_i f_i)` over other fields; the key "" holds the constant."""

    numerator: dict[str, Finite]
    denominator: dict[str, Finite]


class ConditionField(Frozen):
    """One named number of a condition: `--condition anterior=0.5`. The network is shown `factor` times the number."""

    name: Identifier
    minimum: Finite
    maximum: Finite
    default: Finite | Ratio
    factor: Finite = 1.0
    description: Annotated[str, Field(max_length=500)] = ""


class ConditionSpec(Frozen):
    """A conditioning input of the network, per sample (no batch axis).

    With `fields`, the tensor is that many named numbers, in order; without, an array of this shape is given whole.
    `unconditional` is the value that fills the tensor in the unconditional branch of classifier-free guidance;
    None: the network was not trained for guidance. `minimum` and `maximum` bound every number of an array given whole.
    Whole numbers whose sizes are all named are a label map (`is_mask`); `labels` may name its values, from 0.
    """

    name: Identifier
    dtype: Literal["float32", "int64"] = "float32"
    shape: tuple[PositiveInt | Identifier, ...]
    fields: tuple[ConditionField, ...] = ()
    unconditional: Finite | None = None
    minimum: Finite | None = None
    maximum: Finite | None = None
    labels: tuple[Annotated[str, Field(min_length=1, max_length=100)], ...] = ()
    description: Annotated[str, Field(max_length=2000)] = ""

    @property
    def is_mask(self) -> bool:
        return (
            self.dtype == "int64"
            and len(self.shape) > 1
            and all(isinstance(size, str) for size in self.shape)
        )

    @model_validator(mode="after")
    def _fields_fill_shape(self) -> ConditionSpec:
        sizes = [size for size in self.shape if isinstance(size, int)]
        count = 1
        for size in sizes:
            count *= size
        if self.fields and (len(sizes) != len(self.shape) or count != len(self.fields)):
            raise ValueError(
                f"condition {self.name}: {len(self.fields)} fields do not fill shape {self.shape}"
            )
        if self.labels and not (self.is_mask and self.minimum == 0 and self.maximum == len(self.labels) - 1):
            raise ValueError(
                f"condition {self.name}: {len(self.labels)} labels need a label map of 0..{len(self.labels) - 1}"
            )
        names = [field.name for field in self.fields]
        if len(set(names)) != len(names):
            raise ValueError(f"condition {self.name}: field names repeat: {names}")
        return self


def _known_precision(value: object) -> object:
    """Before pydantic tries the types of the union one by one, and names each of them in its error."""
    known = (*Precision, "int8")
    if value not in known:
        raise ValueError(f"need one of {', '.join(repr(str(one)) for one in known)}")
    return value


class Manifest(Frozen):
    """What every artifact's manifest says. `files` holds the sha256 of every other file, by its path inside the artifact.

    `spacing_mm` is the voxel size of the decoded volume. With `precision` int8 most layers compute in it, as
    `volcast quantize` writes them; the rest is float32.
    """

    format: Annotated[int, Field(ge=1)]
    name: Annotated[str, Field(min_length=1, max_length=200)]
    precision: Annotated[Precision | Literal["int8"], BeforeValidator(_known_precision)]
    axes: tuple[Axis, ...]
    programs: dict[
        Literal["schedule", "prepare", "step", "step_deep", "step_shallow", "decode", "encode", "gradient"],
        ProgramSpec,
    ]
    spacing_mm: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1000)], ...], Field(min_length=2, max_length=3)
    ]
    conditions: tuple[ConditionSpec, ...] = ()
    provenance: dict[str, str] = {}  # noqa: RUF012  (pydantic copies it)
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]

    @model_validator(mode="after")
    def _whole(self) -> Manifest:
        missing = self.required_programs() - self.programs.keys()
        if missing:
            raise ValueError(f"programs lack {sorted(missing)}")
        for path in self.files:
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)*", path):
                raise ValueError(f"file {path!r} leaves the artifact's folder or has odd characters")
        for program in self.every_program():
            if program.file not in self.files:
                raise ValueError(f"program {program.file!r} has no digest")
        known = {axis.name for axis in self.axes}
        shapes = [t.shape for p in self.programs.values() for t in (*p.inputs, *p.outputs)]
        shapes += [condition.shape for condition in self.conditions]
        unknown = {size for shape in shapes for size in shape if isinstance(size, str)} - known
        if unknown:
            raise ValueError(f"axes {sorted(unknown)} are used but not described")
        return self

    @abstractmethod
    def required_programs(self) -> set[str]:
        """Without these it is no artifact."""

    def every_program(self) -> list[ProgramSpec]:
        """Every ONNX file's description."""
        return list(self.programs.values())

    def axis(self, name: str) -> Axis:
        """The axis of that name (KeyError if there is none)."""
        return {axis.name: axis for axis in self.axes}[name]


@final
class ArtifactSpec(Manifest):
    """The manifest of a diffusion model.

    `latent_shape` is `(C, *spatial)` at the default size (of the volume itself for a pixel-space model, which has
    no `decode`). `slabs` is `decode` cut for little memory. `intensity`: None where volumes have the network's own. `low_res`: it is an upscaler's. `step_deep`, which gives the feature that comes up from
    below the network's top level besides, and `step_shallow`, which takes it, are for `reuse` and stand together.
    `quality`: what fast samples may lose; None: `QualityBudget`'s defaults.
    """

    format: Annotated[int, Field(ge=1, le=FORMAT)]
    scheduler: SchedulerSpec
    scale_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    latent_shape: Annotated[tuple[PositiveInt, ...], Field(min_length=3, max_length=4)]
    slabs: SlabSpec | None = None
    intensity: IntensitySpec | None = None
    low_res: LowResSpec | None = None
    quality: QualityBudget | None = None

    @model_validator(mode="after")
    def _upscales(self) -> ArtifactSpec:
        if self.low_res is None:
            return self
        found = {one.name: one for one in self.conditions}
        levels = self.low_res.noise_schedule.num_train_timesteps
        if LOW_RES not in found or len(found[LOW_RES].shape) != len(self.latent_shape):
            raise ValueError(f"low_res needs a condition {LOW_RES} of the latent's rank")
        fields = found[TAU].fields if TAU in found else ()
        if (
            len(fields) != 1
            or found[TAU].dtype != "int64"
            or not 0 <= fields[0].minimum <= fields[0].maximum < levels
        ):
            raise ValueError(f"low_res needs a whole number {TAU} with one field, within 0..{levels - 1}")
        return self

    @model_validator(mode="after")
    def _spaced(self) -> ArtifactSpec:
        if len(self.spacing_mm) != len(self.latent_shape) - 1:
            raise ValueError(f"spacing_mm {self.spacing_mm} does not fit latent_shape {self.latent_shape}")
        return self

    @model_validator(mode="after")
    def _reusable(self) -> ArtifactSpec:
        if self.reuses:
            (_, *made), taken = self.programs["step_deep"].outputs, self.programs["step_shallow"].inputs
            if len(made) != 1 or made[0] not in taken:
                raise ValueError("step_deep does not make the one feature that step_shallow takes")
        elif not {"step_deep", "step_shallow"}.isdisjoint(self.programs):
            raise ValueError("of step_deep and step_shallow one is missing")
        return self

    @property
    def reuses(self) -> bool:
        """Whether it holds the programs for `reuse`."""
        return {"step_deep", "step_shallow"} <= self.programs.keys()

    def required_programs(self) -> set[str]:
        return {"schedule", "step"}

    def every_program(self) -> list[ProgramSpec]:
        """The programs, and the segments of `slabs`."""
        segments = () if self.slabs is None else self.slabs.segments
        return [*self.programs.values(), *(segment.program for segment in segments)]
