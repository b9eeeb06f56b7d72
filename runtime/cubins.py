"""The manifest of ahead-of-time compiled kernels: what `volcast build --target cubin` writes and a launcher reads.

A folder holds `cubins.json` and one file per kernel and compute capability. Launching needs the CUDA driver alone: load
the file, take `entry`, pass the arguments of a launch in order and two scratch pointers after them (null where
`scratch_bytes` is 0, else `scratch_bytes` times the number of programs).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from .atomic import sha256
from .frozen import Frozen

CUBINS = "cubins.json"
CUBIN_FORMAT = 1
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Key = Annotated[str, Field(pattern=r"^[a-z0-9_]+-[0-9a-f]{16}$")]
Capability = Annotated[str, Field(pattern=r"^sm_[0-9]{2,3}$")]


class CubinFile(Frozen):
    """One kernel for one compute capability. Registers are per thread, bytes of shared memory per block."""

    file: Annotated[str, Field(pattern=r"^sm_[0-9]{2,3}/[a-z0-9_]+-[0-9a-f]{16}\.cubin$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    registers: Count
    spill_bytes: Count
    shared_bytes: Count
    scratch_bytes: Count


class KernelSpec(Frozen):
    """A kernel with its constants compiled in. `signature`: (argument, type) in order, types in Triton's names."""

    kernel: str
    entry: str
    constants: dict[str, Any]
    signature: tuple[tuple[str, str], ...]
    threads: Annotated[int, Field(ge=32, le=1024)]
    files: dict[Capability, CubinFile]


class TensorArgument(Frozen):
    """A view of a buffer: shape in PyTorch's axis order, strides and offset in elements.

    Buffers are numbered within a use: its launches that name the same number share the memory.
    """

    buffer: Count
    dtype: str
    shape: tuple[Count, ...]
    strides: tuple[Count, ...]
    offset: Count


class LaunchSpec(Frozen):
    """One launch: its grid and what goes into the arguments; every buffer starts at a multiple of 16 bytes.

    The number `steps` of a sampler's update is that of the artifact's own plan: give the plan's that is run.
    """

    kernel: Key
    grid: tuple[Count, Count, Count]
    tensors: dict[str, TensorArgument]
    numbers: dict[str, int | float]


class UseSpec(Frozen):
    """One operation of a program, at the sizes that were built for: launches in order, for each device.

    `left_out` says why no kernel takes it: the engine's own operators run it.
    """

    program: Literal["step", "decode", "encode", "sampler"]
    node: str
    operation: str
    launches: dict[Capability, tuple[LaunchSpec, ...]]
    left_out: str | None = None


class CubinManifest(Frozen):
    """`cubins.json`. `artifact` is the sha256 of the manifest of the artifact that the uses were read from."""

    format: Annotated[int, Field(ge=1, le=CUBIN_FORMAT)]
    name: str
    artifact: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    precision: Literal["fp32", "fp16", "bf16"]
    batch: Annotated[int, Field(ge=1)]
    latent_shape: tuple[int, ...]
    triton_version: str
    kernels: dict[Key, KernelSpec]
    uses: tuple[UseSpec, ...]


def read_cubins(folder: str | os.PathLike[str]) -> CubinManifest:
    """The manifest in `folder`, after checking every file against its sha256.

    Raises ValueError: no manifest there, a damaged or newer one, a missing or altered file; with the remedy.
    """
    remedy = "run `volcast build --target cubin` again"
    path = Path(folder) / CUBINS
    if not path.is_file():
        raise ValueError(f"[cubins] {folder} holds no {CUBINS}; {remedy}")
    try:
        manifest = CubinManifest.model_validate(json.loads(path.read_bytes()))
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"[cubins] {path}: {where} {first['msg']}".replace("\n", " ") + f"; {remedy}"
        ) from error
    for kernel in manifest.kernels.values():
        for cubin in kernel.files.values():
            file = Path(folder) / cubin.file
            if not file.is_file() or sha256(file) != cubin.sha256:
                raise ValueError(f"[cubins] {file} is missing or was altered; {remedy}")
    return manifest
