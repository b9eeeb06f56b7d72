"""TensorRT and TensorRT-RTX behind one interface; what they do differently stands in this file alone.

Neither is imported before it is asked for. TensorRT tunes plans on the GPU that is here; TensorRT-RTX builds plans for
named compute capabilities anywhere and compiles the rest when it loads them.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, final

from .plans import Compatibility, Target

INSTALL: dict[Target, str] = {
    "tensorrt": "pip install 'volcast[tensorrt]' (or tensorrt-cu12, 10.12 or newer, for CUDA 12)",
    "tensorrt-rtx": "pip install 'volcast[tensorrt-rtx]'",
}
MODULES: dict[Target, tuple[str, ...]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
ACTIVATION = "Total Activation Memory: "
"""So a builder's log begins the line with the bytes between a plan's layers."""
OLDEST = {"tensorrt": (10, 12), "tensorrt-rtx": (1, 2)}


class Library(ABC):
    """One of the two.

    Attributes:
        trt: the Python module.
        version: as `__version__` has it.
        log: what the library has said; given to its objects.
    """

    target: Target

    def __init__(self, module: ModuleType) -> None:
        self.trt: Any = module
        self.version = str(module.__version__)
        self.log = _make_log(self.trt)

    @abstractmethod
    def capabilities(self) -> tuple[int, ...]:
        """The compute capabilities that plans can be built for without their GPU, 86 for 8.6; ascending."""

    @abstractmethod
    def target_devices(self, config: Any, capabilities: Sequence[int]) -> None:
        """Let a builder's configuration be for these compute capabilities."""

    @abstractmethod
    def use_timing_cache(self, config: Any, path: Path) -> None:
        """Start from the timings in `path`, if there are any."""

    @abstractmethod
    def keep_timing_cache(self, config: Any, path: Path) -> None:
        """Write what the builder has timed to `path`."""

    @abstractmethod
    def scratch_bytes(self, plan: bytes, host_code: bool) -> int | None:
        """What a plan that was just built takes between its layers at its largest sizes; None: the library is silent."""

    @abstractmethod
    def context(self, engine: Any, cache: Path) -> Any:
        """An execution context whose memory the caller gives; compiled kernels may be kept in `cache`."""

    @abstractmethod
    def keep_runtime_cache(self, context: Any, cache: Path) -> None:
        """Write the kernels that were compiled for a context to `cache`, where the library compiles any."""

    @abstractmethod
    def capturable(self, context: Any, stream: int) -> bool:
        """Whether the context's work on a stream can become a CUDA graph."""

    def network(self, builder: Any) -> Any:
        """An empty network that is strongly typed. From 11 on all are, and the flag says nothing new."""
        return builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def set_compatibility(self, config: Any, level: Compatibility, versions: bool) -> None:
        """Plans for further GPUs (`level`) and for later versions of the library."""
        levels = self.trt.HardwareCompatibilityLevel
        config.hardware_compatibility_level = {
            "none": levels.NONE,
            "same-capability": levels.SAME_COMPUTE_CAPABILITY,
            "ampere-plus": levels.AMPERE_PLUS,
        }[level]
        if versions:
            config.set_flag(self.trt.BuilderFlag.VERSION_COMPATIBLE)

    def deserialize(self, plan: bytes, host_code: bool) -> tuple[Any, Any]:
        """(runtime, engine) of a plan whose origin has been checked. `host_code`: it may bring its own runtime.

        Raises ValueError for a plan that the library refuses.
        """
        runtime = self.trt.Runtime(self.log)
        if host_code:
            runtime.engine_host_code_allowed = True
        self.log.clear()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ValueError(f"[{self.target}] cannot load the plan: {self.log.reason()}")
        return runtime, engine


@final
class TensorRt(Library):
    """TensorRT 10.12 and newer, 11 included."""

    target: Target = "tensorrt"

    def capabilities(self) -> tuple[int, ...]:
        return ()

    def target_devices(self, config: Any, capabilities: Sequence[int]) -> None:
        pass  # always the GPU that is here

    def use_timing_cache(self, config: Any, path: Path) -> None:
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def keep_timing_cache(self, config: Any, path: Path) -> None:
        _keep(config.get_timing_cache().serialize(), path)

    def scratch_bytes(self, plan: bytes, host_code: bool) -> int | None:
        return int(self.deserialize(plan, host_code)[1].device_memory_size_v2)  # the GPU is here

    def context(self, engine: Any, cache: Path) -> Any:
        return engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def keep_runtime_cache(self, context: Any, cache: Path) -> None:
        pass  # its kernels are in the plan

    def capturable(self, context: Any, stream: int) -> bool:
        return True


@final
class TensorRtRtx(Library):
    """TensorRT-RTX 1.2 and newer."""

    target: Target = "tensorrt-rtx"

    def capabilities(self) -> tuple[int, ...]:
        names = (name[2:] for name in self.trt.ComputeCapability.__members__ if name.startswith("SM"))
        return tuple(sorted(map(int, names)))

    def target_devices(self, config: Any, capabilities: Sequence[int]) -> None:
        config.num_compute_capabilities = len(capabilities)
        for place, capability in enumerate(capabilities):
            member = self.trt.ComputeCapability.__members__[f"SM{capability}"]
            if not config.set_compute_capability(member, place):
                raise ValueError(
                    f"[build] --sm {capability}: {self.target} {self.version} refuses it: {self.log.reason()}"
                )

    def use_timing_cache(self, config: Any, path: Path) -> None:
        pass  # it times nothing when it builds

    def keep_timing_cache(self, config: Any, path: Path) -> None:
        pass

    def scratch_bytes(self, plan: bytes, host_code: bool) -> int | None:
        told: int | None = self.log.activation()  # its engine could tell, but loads on its GPU alone
        return told

    def context(self, engine: Any, cache: Path) -> Any:
        settings = engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(
            self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # A captured step keeps the kernels that it was captured with: have them specialised before.
        strategy = self.trt.DynamicShapesKernelSpecializationStrategy
        settings.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
        compiled = settings.create_runtime_cache()
        if cache.is_file():
            compiled.deserialize(cache.read_bytes())
        settings.set_runtime_cache(compiled)
        return engine.create_execution_context(settings)

    def keep_runtime_cache(self, context: Any, cache: Path) -> None:
        _keep(context.get_runtime_config().get_runtime_cache().serialize(), cache)

    def capturable(self, context: Any, stream: int) -> bool:
        return bool(context.is_stream_capturable(stream))


def open_library(target: Target) -> Library:
    """Import a library. Raises ValueError, with the line that installs it, where it is missing or too old."""
    module, reason = None, ""
    for name in MODULES[target]:
        try:
            module = import_module(name)
            break
        except ImportError as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == name):
                reason = f" ({' '.join(str(error).split())})"
    if module is None:
        raise ValueError(f"[{target}] it is not installed{reason}; {INSTALL[target]}")
    version = str(module.__version__)
    if tuple(map(int, version.split(".")[:2])) < OLDEST[target]:
        wanted = ".".join(map(str, OLDEST[target]))
        raise ValueError(
            f"[{target}] version {version} is too old: need {wanted} or newer; {INSTALL[target]}"
        )
    return (TensorRt if target == "tensorrt" else TensorRtRtx)(module)


def _keep(content: Any, path: Path) -> None:
    from .atomic import atomic_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_bytes(memoryview(content))


def _make_log(trt: Any) -> Any:
    """A logger that keeps the errors, for one line of our own, and what a builder says of memory. It prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lock = threading.Lock()
            self._errors: list[str] = []
            self._activation: int | None = None

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                with self._lock:
                    self._errors.append(" ".join(message.split()))
            elif message.startswith(ACTIVATION):
                with self._lock:
                    self._activation = int(message.removeprefix(ACTIVATION).split()[0])

        def clear(self) -> None:
            with self._lock:
                self._errors.clear()
                self._activation = None

        def activation(self) -> int | None:
            with self._lock:
                return self._activation

        def reason(self) -> str:
            with self._lock:
                return (self._errors[0] if self._errors else "no reason given")[:300]

    return Log()
