"""Ahead-of-time compilation of a `Launch` to a cubin, on any machine: no GPU and no CUDA toolkit.

ptxas, cuobjdump and nvdisasm come with Triton. A cubin runs on the devices of its capability only (and on later minor versions
of the same major one for 8.x); the kernels for 9.0, 10.0 and 12.0 use instructions of just that architecture.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from .launch_triton import Launch

# Compute capability: shared memory that a block may use, in KiB.
CAPABILITIES = {80: 163, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}
_POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cubin:
    """A compiled kernel and what a launcher needs to know of it."""

    entry: str  # the symbol in the cubin
    capability: int
    data: bytes
    signature: tuple[tuple[str, str], ...]  # (argument, type), in order; two scratch pointers follow
    threads: int
    shared_bytes: int  # dynamic shared memory of a block
    scratch_bytes: int  # of global memory, per program
    registers: int
    spill_bytes: int  # of local memory, per thread

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def opcodes(self) -> frozenset[str]:
        """Of the machine code, without modifiers. Disassembles it."""
        lines = _tool("nvdisasm", self.data, "-c")
        return frozenset(
            re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]+)", lines, re.MULTILINE)
        )


def compile_launch(launch: Launch, capability: int) -> Cubin:
    """Compile for a compute capability (90 for 9.0). Buffers are taken to start at multiples of 16 bytes, as PyTorch's do.

    Raises ValueError for a capability that is not listed, or a kernel whose shared memory does not fit it.
    """
    if capability not in CAPABILITIES:
        known = ", ".join(map(str, CAPABILITIES))
        raise ValueError(f"[build] sm={capability}: need one of {known}")
    if triton.knobs.runtime.interpret:
        raise ValueError("[build] TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    signature, constants, attributes = _source(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options())
    except TritonError as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise ValueError(
            f"[build] {launch.name} does not compile for sm_{capability}: {reason[0]}"
        ) from error
    metadata = compiled.metadata
    if metadata.shared > CAPABILITIES[capability] * 1024:
        raise ValueError(
            f"[build] {launch.name} needs {metadata.shared} bytes of shared memory, sm_{capability} has "
            f"{CAPABILITIES[capability] * 1024} a block: choose another configuration"
        )
    _check_calling_convention(compiled.asm["ptx"], signature)
    data = compiled.asm["cubin"]
    registers, spills = _resources(data)
    return Cubin(
        entry=metadata.name,
        capability=capability,
        data=data,
        signature=tuple((name, kind) for name, kind in signature.items() if kind != "constexpr"),
        threads=metadata.num_warps * 32,
        shared_bytes=metadata.shared,
        scratch_bytes=metadata.global_scratch_size,
        registers=registers,
        spill_bytes=spills,
    )


def _source(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Triton's signature, constants and attributes."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = {**launch.arguments, **launch.constants}[parameter.name]
        if parameter.name in launch.constants or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            if is_aligned(value):
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type
    return signature, constants, attributes


def is_aligned(tensor: Tensor) -> bool:
    """Whether a view starts at a multiple of 16 bytes of its buffer, which starts at one itself."""
    return tensor.storage_offset() * tensor.itemsize % 16 == 0


def _check_calling_convention(ptx: str, signature: dict[str, str]) -> None:
    """What `Cubin.signature` promises: the arguments in order, then two scratch pointers."""
    taken = len(re.findall(r"^\s*\.param ", ptx.partition(".entry")[2].partition(")")[0], re.MULTILINE))
    promised = sum(kind != "constexpr" for kind in signature.values()) + 2
    if taken != promised:
        raise RuntimeError(
            f"[build] this Triton ({triton.__version__}) passes {taken} parameters where {promised} were expected; "
            "install the version that volcast was tested with"
        )


def _tool(name: str, data: bytes, *options: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        done = subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def _resources(data: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of the kernel in a cubin."""
    found = re.search(
        r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", _tool("cuobjdump", data, "--dump-resource-usage")
    )
    assert found, "cuobjdump did not print the resources"
    return int(found[1]), int(found[2]) + int(found[3])
