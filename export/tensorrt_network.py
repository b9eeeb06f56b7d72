"""One ONNX program to one TensorRT plan: parse, configure, build, with progress and Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from volcast.runtime.plans import Compatibility, Range, inputs_ranges
from volcast.runtime.spec import ProgramSpec
from volcast.runtime.tensorrt_library import Library

Progress = Callable[[str, int, int], None]
"""(what is being done, steps done, steps to do) as the library tells them; its steps are rough."""
DTYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """How plans are built. `strip`: weights stay in the artifact, and are put in when a plan is loaded."""

    capabilities: tuple[int, ...]
    compatibility: Compatibility = "none"
    version_compatible: bool = False
    strip: bool = False
    timing_cache: Path


def build_plan(
    library: Library,
    onnx: Path,
    program: ProgramSpec,
    ranges: Mapping[str, Range],
    settings: PlanSettings,
    progress: Progress,
) -> tuple[bytes, int | None]:
    """The plan of the ONNX program at `onnx`, whose tensors `program` describes, for the sizes in `ranges`.

    Beside it what it takes on the device between its layers at the largest sizes, if the library tells.

    Raises ValueError with the library's reason, KeyboardInterrupt soon after Ctrl-C.
    """
    trt, name = library.trt, program.file
    library.log.clear()
    builder = trt.Builder(library.log)
    if builder is None:
        raise ValueError(f"[build] {library.target} has no builder here: {library.log.reason()}")
    network = library.network(builder)
    parser = trt.OnnxParser(network, library.log)
    if not parser.parse_from_file(str(onnx)):
        reason = (
            " ".join(str(parser.get_error(0).desc()).split()) if parser.num_errors else library.log.reason()
        )
        raise ValueError(
            f"[build] {library.target} {library.version} does not take {name}: {reason[:300]}; use --engine onnxruntime"
        )
    _check_inputs(trt, network, program)
    config = builder.create_builder_config()
    library.target_devices(config, settings.capabilities)
    library.set_compatibility(config, settings.compatibility, settings.version_compatible)
    # float32 means float32: whoever wants speed asks for a half precision.
    config.clear_flag(trt.BuilderFlag.TF32)
    if settings.strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    profile = builder.create_optimization_profile()
    for place, shapes in enumerate(inputs_ranges(program, ranges).values()):
        tensor = network.get_input(place)
        profile.set_shape(tensor.name, *shapes)
        # Sizes that do not vary are constants, for kernels that are chosen for them.
        tensor.shape = [least if least == most else -1 for least, _, most in zip(*shapes, strict=True)]
    config.add_optimization_profile(profile)
    library.use_timing_cache(config, settings.timing_cache)
    plan = _built(library, builder, network, config, name, settings.strip, progress)
    library.keep_timing_cache(config, settings.timing_cache)
    return plan, library.scratch_bytes(plan, settings.version_compatible)


def _check_inputs(trt: Any, network: Any, program: ProgramSpec) -> None:
    inputs = [network.get_input(place) for place in range(network.num_inputs)]
    found = [(tensor.name, tensor.dtype) for tensor in inputs]
    wanted = [(tensor.name, getattr(trt.DataType, DTYPES[tensor.dtype])) for tensor in program.inputs]
    if found != wanted:
        raise ValueError(
            f"[build] {program.file} takes {found}, the manifest says {wanted}; export the model again with "
            "`volcast export`"
        )


def _built(
    library: Library, builder: Any, network: Any, config: Any, name: str, strip: bool, progress: Progress
) -> bytes:
    """Build on a thread of its own: Python sees Ctrl-C on this one alone, and the library must be asked to stop."""
    monitor = _make_monitor(library.trt, progress)
    config.progress_monitor = monitor
    library.log.clear()
    with ThreadPoolExecutor(1) as thread:
        work = thread.submit(builder.build_serialized_network, network, config)
        try:
            plan = work.result()
        except BaseException:
            monitor.stopped.set()
            raise
    if plan is None:
        # A plan whose weights can be replaced has kernels that do so, and those are compiled on the device.
        remedy = "; --strip needs the GPU when it builds: leave it out here" if strip else ""
        raise ValueError(
            f"[build] {library.target} {library.version} cannot build {name}: {library.log.reason()}{remedy}"
        )
    return bytes(plan)


def _make_monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells of the outermost phase. Called from threads of the library's."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = threading.Event()
            self._done: dict[str, int] = {}
            self._steps: dict[str, int] = {}
            self._lock = threading.Lock()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._steps[phase], self._done[phase] = steps, 0
                progress(phase, sum(self._done.values()), sum(self._steps.values()))

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                self._done[phase] = step + 1
                progress(phase, sum(self._done.values()), sum(self._steps.values()))
            return not self.stopped.is_set()

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                self._done[phase] = self._steps[phase]

    return Monitor()
