"""The TensorRT plans of an artifact, checked and loaded, and contexts that run them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, final

from volcast import _core

from .artifact import MANIFEST
from .atomic import sha256
from .captured import Network, Tensor, device_errors
from .default_artifact import cache_folder
from .engine import shapes
from .gpu import Gpu
from .plans import (
    PLANS,
    Host,
    PlanManifest,
    ProgramName,
    check_plans,
    check_sizes,
    read_plan,
    read_plans,
    read_skeleton,
)
from .refit import refit
from .spec import ProgramSpec
from .tensorrt_library import Library


def find_plans(artifact: Path, host: Host) -> tuple[Path, PlanManifest]:
    """The folder of plans of `artifact` that `host` may run, and its manifest.

    Raises ValueError, with the command that builds them: none for this library, or only such as are stale, damaged or
    another GPU's.
    """
    digest = sha256(artifact / MANIFEST)
    refused: ValueError | None = None
    for folder in sorted((artifact / "engines").glob(f"{host.target}*")):
        try:
            plans = read_plans(folder)
            if plans.target == host.target:
                check_plans(folder, plans, host, digest)
                return folder, plans
        except ValueError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    raise ValueError(
        f"[plans] {artifact / 'engines'} holds no {PLANS} for {host.target}; run `volcast build {artifact} --target "
        f"{host.target}`"
    )


@final
class TensorRtModel:
    """The plans of one artifact. A plan is loaded when a program of it is first opened."""

    def __init__(self, artifact: Path, library: Library, gpu: Gpu) -> None:
        host = Host(target=library.target, version=library.version, gpu=gpu.name, capability=gpu.capability)
        self._artifact, self._library, self._driver = artifact, library, gpu.driver
        self.folder, self.plans = find_plans(artifact, host)
        self._engines: dict[str, tuple[Any, Any]] = {}

    def network(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> TensorRtNetwork:
        """The program of the ONNX file at `path` at these sizes.

        Raises ValueError: sizes that the plan does not hold, a plan that is damaged or refused.
        """
        name = cast(ProgramName, path.stem)
        if name in self.plans.programs:
            check_sizes(self.folder, self.plans, name, sizes)
        if name not in self._engines:
            self._engines[name] = self._load(name, path)
        cache = cache_folder() / f"{self._library.target}-{self._library.version}-{self._key(name)}.kernels"
        return TensorRtNetwork(self._library, self._driver, self._engines[name][1], program, sizes, cache)

    def _load(self, name: ProgramName, path: Path) -> tuple[Any, Any]:
        plan = read_plan(self.folder, self.plans, name, sha256(path))
        runtime, engine = self._library.deserialize(plan, self.plans.version_compatible)
        described = self.plans.programs[name]
        if described.skeleton is not None:
            refit(
                self._library, engine, read_skeleton(self.folder, self.plans, name), described.weights, path
            )
        return runtime, engine

    def _key(self, name: ProgramName) -> str:
        return self.plans.programs[name].sha256[:16]


@final
class TensorRtNetwork(Network):
    """An execution context with the memory between its layers."""

    def __init__(
        self,
        library: Library,
        driver: _core.Driver,
        engine: Any,
        program: ProgramSpec,
        sizes: Mapping[str, int],
        cache: Path,
    ) -> None:
        self._library, self._name = library, program.file
        self._keep = engine
        given = shapes(program, sizes)
        self.inputs = {
            tensor.name: Tensor(shape=given[tensor.name], dtype=tensor.dtype) for tensor in program.inputs
        }
        library.log.clear()
        self._context = library.context(engine, cache)
        if self._context is None:
            raise self._refused()
        for name, shape in given.items():
            if not self._context.set_input_shape(name, shape):
                raise self._refused()
        missing = self._context.infer_shapes()
        if missing:
            raise ValueError(
                f"[{library.target}] {self._name} wants {', '.join(missing)}; build the plans again"
            )
        self.outputs = {
            tensor.name: Tensor(shape=tuple(self._context.get_tensor_shape(tensor.name)), dtype=tensor.dtype)
            for tensor in program.outputs
        }
        self.bytes = int(self._context.update_device_memory_size_for_shapes())
        with device_errors(program.file):
            self._memory = _core.DeviceMemory(driver, max(self.bytes, 1))
        self._context.set_device_memory(self._memory.address, self._memory.nbytes)
        stream = _core.Stream(driver)
        self._warm_up(driver, stream)
        library.keep_runtime_cache(self._context, cache)
        self.capturable = library.capturable(self._context, stream.handle)

    def enqueue(self, addresses: Mapping[str, int], stream: _core.Stream) -> None:
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise self._refused()
        if not self._context.execute_async_v3(stream.handle):
            raise self._refused()

    def _warm_up(self, driver: _core.Driver, stream: _core.Stream) -> None:
        """One run on memory of no meaning, in which TensorRT-RTX compiles its kernels for these sizes."""
        tensors = dict(self.inputs) | dict(self.outputs)
        with device_errors(self._name):
            memory = {name: _core.DeviceMemory(driver, tensor.bytes) for name, tensor in tensors.items()}
            self.enqueue({name: one.address for name, one in memory.items()}, stream)
            stream.synchronize()

    def _refused(self) -> ValueError:
        return ValueError(f"[{self._library.target}] {self._name}: {self._library.log.reason()}")
