"""Launching ahead-of-time cubins through the CUDA driver alone: no compiler, no CUDA toolkit, no PyTorch.

No GPU has run it yet. What is tested: the parameters' bytes against the layout that the cubins themselves state, and the
calls of the driver in their order.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from volcast import _core

from .cubins import CubinFile, KernelSpec, LaunchSpec, UseSpec, read_cubins

_FORMATS = {"i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
            "fp32": "f", "fp64": "d"}  # fmt: skip
_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_ALIGNMENT = 16
"""Bytes: what every buffer starts at a multiple of, as the kernels were compiled to expect."""


@final
class CubinLauncher:
    """The cubins of one folder on one GPU. A kernel is loaded when it is first launched, and kept.

    Args:
        folder: what `volcast build --target cubin` wrote.
        driver: `_core.Driver.cuda()`.

    Raises ValueError: an altered or damaged folder, or one without cubins for this GPU.
    """

    def __init__(self, folder: Path, driver: _core.Driver) -> None:
        self.manifest = read_cubins(folder)
        self._folder = folder
        self._driver = driver
        built = {device for use in self.manifest.uses for device in use.launches}
        self.device = pick_device(built, driver.capability)
        self._loaded: dict[str, _core.Kernel] = {}

    def scratch_bytes(self, use: UseSpec) -> int:
        """What `launch` needs as scratch memory of the device for a use; mostly 0."""
        return max(
            (self._file(launch).scratch_bytes * math.prod(launch.grid) for launch in self._launches(use)),
            default=0,
        )

    def launch(
        self,
        use: UseSpec,
        buffers: Sequence[int],
        stream: _core.Stream,
        *,
        numbers: Mapping[str, int | float] | None = None,
        scratch: int = 0,
    ) -> None:
        """Add the launches of a use to the stream's work, in order. Works while the stream captures.

        Args:
            buffers: device addresses, by the numbers that the use's tensors have; multiples of 16.
            numbers: values instead of those that the use was built with, such as a plan's `steps`.
            scratch: address of `scratch_bytes(use)` bytes, which this use alone works with meanwhile.

        Raises ValueError, before the first launch: a use that no kernel takes, buffers that are too few or misaligned.
        """
        launches = self._launches(use)
        self._check(use, launches, buffers, numbers or {}, scratch)
        for launch in launches:
            kernel = self.manifest.kernels[launch.kernel]
            own = scratch if self._file(launch).scratch_bytes else 0
            arguments = pack_arguments(kernel, launch, buffers, numbers or {}, own)
            self._kernel(launch.kernel).launch(stream, launch.grid, arguments)

    def _launches(self, use: UseSpec) -> tuple[LaunchSpec, ...]:
        if use.left_out is not None:
            raise ValueError(f"[cubins] {use.operation} {use.node} has no kernel: {use.left_out}")
        return use.launches[self.device]

    def _file(self, launch: LaunchSpec) -> CubinFile:
        return self.manifest.kernels[launch.kernel].files[self.device]

    def _kernel(self, key: str) -> _core.Kernel:
        if key not in self._loaded:
            spec = self.manifest.kernels[key]
            file = spec.files[self.device]
            image = (self._folder / file.file).read_bytes()
            self._loaded[key] = _core.Kernel(self._driver, image, spec.entry, spec.threads, file.shared_bytes)
        return self._loaded[key]

    def _check(
        self,
        use: UseSpec,
        launches: Sequence[LaunchSpec],
        buffers: Sequence[int],
        numbers: Mapping[str, int | float],
        scratch: int,
    ) -> None:
        place = f"[cubins] {use.operation} {use.node}"
        count = 1 + max(tensor.buffer for launch in launches for tensor in launch.tensors.values())
        if len(buffers) != count:
            raise ValueError(f"{place}: {len(buffers)} buffers: need {count}")
        for number, address in enumerate(buffers):
            if address <= 0 or address % _ALIGNMENT:
                raise ValueError(f"{place}: buffer {number} at {address:#x}: need a multiple of {_ALIGNMENT}")
        unknown = numbers.keys() - {name for launch in launches for name in launch.numbers}
        if unknown:
            raise ValueError(f"{place}: it takes no number {min(unknown)}")
        if scratch == 0 and self.scratch_bytes(use):
            raise ValueError(f"{place}: scratch=0: need {self.scratch_bytes(use)} bytes of the device")


def pack_arguments(
    kernel: KernelSpec,
    launch: LaunchSpec,
    buffers: Sequence[int],
    numbers: Mapping[str, int | float],
    scratch: int,
) -> bytes:
    """The parameters of a launch as the kernel's parameter space has them: every one at a multiple of its size.

    Two pointers follow what the signature names: to global scratch memory, and to a profiler's.
    """
    given = {**launch.numbers, **numbers}
    layout, values = "<", list[Any]()
    for name, kind in kernel.signature:
        if kind.startswith("*"):
            tensor = launch.tensors[name]
            code = "Q"
            values.append(buffers[tensor.buffer] + tensor.offset * _BYTES[tensor.dtype])
        else:
            code = _FORMATS[kind]
            values.append(given[name])
        layout += _padding(layout, code) + code
    return struct.pack(layout + _padding(layout, "Q") + "QQ", *values, scratch, 0)


def _padding(layout: str, code: str) -> str:
    rest = -struct.calcsize(layout) % struct.calcsize(f"<{code}")
    return f"{rest}x" if rest else ""


def pick_device(built: set[str], capability: int) -> str:
    """Of the devices that cubins were built for ("sm_87"), the one whose cubins this capability (87) runs.

    A cubin runs on its own capability and, but for the Tegra ones (8.7), on later ones of the 8 family. Raises
    ValueError, with the command that builds it, for none.
    """
    fitting = [
        sm
        for sm in (int(device.removeprefix("sm_")) for device in built)
        if sm == capability
        or (sm < capability and sm // 10 == capability // 10 == 8 and 87 not in (sm, capability))
    ]
    if not fitting:
        raise ValueError(
            f"[cubins] built for {', '.join(sorted(built))}, this GPU is sm_{capability}; run "
            f"`volcast build ARTIFACT --target cubin --sm {capability} --force`"
        )
    return f"sm_{max(fitting)}"
