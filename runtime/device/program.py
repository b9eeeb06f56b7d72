"""The device programs of an artifact: what `volcast build --target cuda` writes and the CUDA engine reads.

A program is a list of operations in the order in which they run, data and never code: `operations.py` gives every
kind its meaning. Values have PyTorch's axis order; volumes (`N C D H W`, `N C H W`) lie channels last in memory,
tokens (`N L C`) and vectors (`N C`) contiguous. Sizes are free: nothing in a program names a batch or a spatial size.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from volcast.runtime.atomic import sha256
from volcast.runtime.frozen import Frozen

PROGRAMS = "programs.json"
WEIGHTS = "weights.safetensors"
FORMAT = 1

Kind = Literal[
    "attention", "average_pool", "cast", "columns", "concat", "convolution", "einsum", "expand", "group_norm",
    "input_head", "layer_norm", "linear", "matmul", "output_head", "pad", "pointwise", "reshape", "resize",
    "softmax", "tokens", "transpose", "transposed_convolution", "upsample_convolution", "volume",
]  # fmt: skip
KINDS: frozenset[str] = frozenset(get_args(Kind))
VIEWS: frozenset[str] = frozenset({"columns", "tokens", "volume"})
"""Kinds whose output is a view of their first input: no memory, no launch."""

DeviceProgramName = Literal["step", "decode", "encode"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-/:]{1,200}$")]


class Operation(Frozen):
    """One operation. `inputs` name values or weights, None stands for one that is left out."""

    kind: Kind
    inputs: tuple[Name | None, ...]
    outputs: tuple[Name, ...]
    settings: dict[str, Any] = Field(default_factory=dict)


class DeviceProgram(Frozen):
    """`inputs` in the order of the artifact's manifest. `offsets`: for an input, the weight to add to it before the run
    (biases that were folded into the time embedding or the condition)."""

    inputs: tuple[Name, ...]
    outputs: tuple[Name, ...]
    operations: tuple[Operation, ...]
    offsets: dict[Name, Name] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _in_order(self) -> DeviceProgram:
        made = set(self.inputs)
        for operation in self.operations:
            again = made & set(operation.outputs)
            if again:
                raise ValueError(f"{min(again)} is made twice")
            made |= set(operation.outputs)
        missing = set(self.outputs) - made
        if missing:
            raise ValueError(f"output {min(missing)} is made by no operation")
        return self

    def weights(self) -> frozenset[str]:
        """The names that are read and made by nothing: the weights."""
        made = {name for operation in self.operations for name in operation.outputs} | set(self.inputs)
        read = {name for operation in self.operations for name in operation.inputs if name is not None}
        return frozenset(read - made) | frozenset(self.offsets.values())


class DevicePrograms(Frozen):
    """`programs.json`. `artifact` is the sha256 of the manifest that the programs were made from."""

    format: Annotated[int, Field(ge=1, le=FORMAT)] = FORMAT
    name: str
    artifact: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    precision: Literal["fp32", "fp16", "bf16"]
    programs: dict[DeviceProgramName, DeviceProgram]
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def read_programs(folder: str | os.PathLike[str], artifact: str) -> DevicePrograms:
    """The device programs in `folder`, after a check of every digest.

    Raises ValueError, with the command that builds them: none there, damaged, newer, altered, or made from another
    artifact than the one whose manifest has the sha256 `artifact`.
    """
    remedy = "run `volcast build --target cuda` again"
    path, weights = Path(folder) / PROGRAMS, Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"[cuda] {folder} holds no {PROGRAMS}; run `volcast build --target cuda`")
    try:
        programs = DevicePrograms.model_validate(json.loads(path.read_bytes()))
    except (ValidationError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"[cuda] {path}: {where} {first['msg']}".replace("\n", " ") + f"; {remedy}"
        ) from error
    if programs.artifact != artifact:
        raise ValueError(f"[cuda] {path} was built from another export of {programs.name}; {remedy}")
    if not weights.is_file() or sha256(weights) != programs.weights_sha256:
        raise ValueError(f"[cuda] {weights} is missing or was altered; {remedy}")
    return programs
