"""The TensorRT plans of an artifact, checked and loaded, and contexts that run them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final
from weakref import WeakValueDictionary

from volcast import _core

from .artifact import MANIFEST
from .atomic import sha256
from .captured import Network, Tensor, device_errors
from .default_artifact import cache_folder
from .engine import shapes
from .gpu import Gpu
from .ledger import Ledger
from .plan_memory import PlanMemory, Scratch
from .plans import (
    PLANS,
    Host,
    PlanManifest,
    ProgramName,
    check_plans,
    check_sizes,
    planned_programs,
    read_plan,
    read_plans,
    read_skeleton,
)
from .refit import refit
from .spec import ArtifactSpec, ProgramSpec
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
class LoadedPlan:
    """An engine, and the runtime that it needs to live."""

    def __init__(self, runtime: Any, engine: Any) -> None:
        self._runtime, self.engine = runtime, engine


@final
class TensorRtModel:
    """The plans of one artifact. A plan is loaded when a program of it is opened, and stays while one is open.

    Attributes:
        ledger: what they take on the device.
    """

    def __init__(self, artifact: Path, library: Library, gpu: Gpu) -> None:
        host = Host(target=library.target, version=library.version, gpu=gpu.name, capability=gpu.capability)
        self._artifact, self._library, self._driver = artifact, library, gpu.driver
        self.folder, self.plans = find_plans(artifact, host)
        self.ledger = Ledger()
        self._loaded: WeakValueDictionary[str, LoadedPlan] = WeakValueDictionary()

    def network(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> TensorRtNetwork:
        """The program of the ONNX file at `path` at these sizes.

        Raises ValueError: sizes that the plan does not hold, a plan that is damaged or refused.
        """
        name = path.stem
        if name in self.plans.programs:
            check_sizes(self.folder, self.plans, name, sizes)
        plan = self._load(name, path)
        return TensorRtNetwork(self._library, self._driver, plan, program, sizes, self._cache(name))

    def memory(self, spec: ArtifactSpec, limit: int) -> PlanMemory:
        """What keeps a limit of so many bytes on the device."""
        programs = planned_programs(spec)

        def scratch(name: str) -> Scratch:
            program = programs[name]
            plan = self._load(name, self._artifact / program.file)
            return Context(self._library, plan, program, self._cache(name)).shape

        return PlanMemory(self._artifact, spec, self.folder, self.plans, limit, scratch)

    def _load(self, name: ProgramName, path: Path) -> LoadedPlan:
        loaded = self._loaded.get(name)
        if loaded is None:
            plan = read_plan(self.folder, self.plans, name, sha256(path))
            loaded = LoadedPlan(*self._library.deserialize(plan, self.plans.version_compatible))
            described = self.plans.programs[name]
            if described.skeleton is not None:
                skeleton = read_skeleton(self.folder, self.plans, name)
                refit(self._library, loaded.engine, skeleton, described.weights, path)
            self.ledger.enter(loaded, described.weight_bytes)
            self._loaded[name] = loaded
        return loaded

    def _cache(self, name: ProgramName) -> Path:
        key = self.plans.programs[name].sha256[:16]
        return cache_folder() / f"{self._library.target}-{self._library.version}-{key}.kernels"


@final
class Context:
    """An execution context without memory.

    Attributes:
        context: the library's.
    """

    def __init__(self, library: Library, plan: LoadedPlan, program: ProgramSpec, cache: Path) -> None:
        self._library, self._plan, self._program = library, plan, program
        library.log.clear()
        self.context = library.context(plan.engine, cache)
        if self.context is None:
            raise self.refused()

    def shape(self, sizes: Mapping[str, int]) -> int:
        """Give the inputs' axes these sizes; the bytes that it then needs between its layers."""
        for name, shape in shapes(self._program, sizes).items():
            if not self.context.set_input_shape(name, shape):
                raise self.refused()
        missing = self.context.infer_shapes()
        if missing:
            raise ValueError(
                f"[{self._library.target}] {self._program.file} wants {', '.join(missing)}; build the plans again"
            )
        return int(self.context.update_device_memory_size_for_shapes())

    def refused(self) -> ValueError:
        return ValueError(f"[{self._library.target}] {self._program.file}: {self._library.log.reason()}")


@final
class TensorRtNetwork(Network):
    """A plan at fixed sizes, with the memory between its layers."""

    def __init__(
        self,
        library: Library,
        driver: _core.Driver,
        plan: LoadedPlan,
        program: ProgramSpec,
        sizes: Mapping[str, int],
        cache: Path,
    ) -> None:
        self._name, self._shaped = program.file, Context(library, plan, program, cache)
        self._context = self._shaped.context
        given = shapes(program, sizes)
        self.inputs = {
            tensor.name: Tensor(shape=given[tensor.name], dtype=tensor.dtype) for tensor in program.inputs
        }
        self.bytes = self._shaped.shape(sizes)
        self.outputs = {
            tensor.name: Tensor(shape=tuple(self._context.get_tensor_shape(tensor.name)), dtype=tensor.dtype)
            for tensor in program.outputs
        }
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
                raise self._shaped.refused()
        if not self._context.execute_async_v3(stream.handle):
            raise self._shaped.refused()

    def _warm_up(self, driver: _core.Driver, stream: _core.Stream) -> None:
        """One run on memory of no meaning, in which TensorRT-RTX compiles its kernels for these sizes."""
        tensors = dict(self.inputs) | dict(self.outputs)
        with device_errors(self._name):
            memory = {name: _core.DeviceMemory(driver, tensor.bytes) for name, tensor in tensors.items()}
            self.enqueue({name: one.address for name, one in memory.items()}, stream)
            stream.synchronize()
