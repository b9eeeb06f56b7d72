"""A small real artifact whose answer is known in closed form: the denoiser of Gaussian data.

For data x0 ~ N(m, 0.5^2) per voxel the best epsilon is sqrt(1 - a) (x - sqrt(a) m) / (0.25 a + 1 - a), linear in x,
with a = alpha_bar(t) and m = anterior - posterior + 10 ratio. `schedule` looks the two factors up, `prepare` computes
m, `step` multiplies, `decode` averages the channels and doubles each axis.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper

# A shell that starts the tests in the background has SIGINT ignored, and the processes that they interrupt inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton reads it when a kernel is decorated: without a GPU the kernels' tests interpret them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# The same examples every time, so that a change is judged by what it changes; VOLCAST_FUZZ=1 draws new ones.
settings.register_profile("same", derandomize=True, deadline=None)
if "VOLCAST_FUZZ" not in os.environ:
    settings.load_profile("same")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter multiplies the bit patterns of bfloat16: widen them to float32, which is exact."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    product = InterpreterBuilder.create_dot

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return product(self, *wide, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


STEPS, CHANNELS, VARIANCE = 1000, 2, 0.25


def alpha_bar() -> np.ndarray:
    return np.cumprod(1 - np.linspace(1e-4, 2e-2, STEPS))


def _program(nodes: list, inputs: dict, outputs: dict, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    def values(named: dict) -> list:
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in named.items()
        ]

    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([helper.make_node(*node[:3], **node[3]) for node in nodes], "g", values(inputs),
                              values(outputs), initializers)  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def _programs() -> dict[str, tuple[onnx.ModelProto, dict, dict]]:
    a = alpha_bar()
    below = a * VARIANCE + 1 - a
    table = np.stack([np.sqrt(1 - a) / below, -np.sqrt(a * (1 - a)) / below], 1).astype(np.float32)
    latent = ["batch", CHANNELS, "d0", "d1", "d2"]
    column = np.array([1, -1, 10], np.float32)[:, None]
    double = np.array([1, 1, 2, 2, 2], np.float32)
    described = {
        "schedule": (
            [("Cast", ["timesteps"], ["t"], {"to": TensorProto.INT64}), ("Gather", ["table", "t"], ["rows"], {})],
            {"timesteps": ["steps"]}, {"rows": ["steps", 2]}, {"table": table}),
        "prepare": (
            [("Squeeze", ["context", "one"], ["flat"], {}), ("MatMul", ["flat", "column"], ["constants"], {})],
            {"context": ["batch", 1, 3]}, {"constants": ["batch", 1]},
            {"one": np.array([1], np.int64), "column": column}),
        "step": (
            [("Split", ["row"], ["k", "c"], {"axis": 1, "num_outputs": 2}), ("Mul", ["c", "constants"], ["m"], {}),
             ("Reshape", ["k", "shape"], ["k5"], {}), ("Reshape", ["m", "shape"], ["m5"], {}),
             ("Mul", ["x", "k5"], ["kx"], {}), ("Add", ["kx", "m5"], ["out"], {})],
            {"x": latent, "row": ["batch", 2], "constants": ["batch", 1]}, {"out": latent},
            {"shape": np.array([-1, 1, 1, 1, 1], np.int64)}),
        "decode": (
            [("ReduceMean", ["z", "one"], ["mean"], {}),
             ("Resize", ["mean", "", "double"], ["image"],
              {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"})],
            {"z": latent}, {"image": ["batch", 1, "o0", "o1", "o2"]},
            {"one": np.array([1], np.int64), "double": double}),
        "encode": (
            [("AveragePool", ["image"], ["mean"], {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]}),
             ("Concat", ["mean", "mean"], ["z_mu"], {"axis": 1}), ("Mul", ["z_mu", "zero"], ["z_sigma"], {})],
            {"image": ["batch", 1, "o0", "o1", "o2"]}, {"z_mu": latent, "z_sigma": latent},
            {"zero": np.array(0, np.float32)}),
    }  # fmt: skip
    return {name: (_program(*program), program[1], program[2]) for name, program in described.items()}


def _manifest(folder: Path, programs: dict) -> dict[str, Any]:
    from volcast.runtime.artifact import digests

    def tensors(named: dict) -> list[dict]:
        return [{"name": name, "dtype": "float32", "shape": shape} for name, shape in named.items()]

    fields = [{"name": "anterior", "minimum": 0, "maximum": 1, "default": 0.5, "description": "of the front"},
              {"name": "posterior", "minimum": 0, "maximum": 1, "default": 0.25},
              {"name": "ratio", "minimum": 0, "maximum": 1, "default": {
                  "numerator": {"": 1, "posterior": 2}, "denominator": {"": 2, "posterior": 2, "anterior": 4}}}]  # fmt: skip
    axes = [("batch", 1, 4, 1), ("steps", 1, STEPS, 1), *((f"d{i}", 2, 16, 2) for i in range(3)),
            *((f"o{i}", 4, 32, 4) for i in range(3))]  # fmt: skip
    return {
        "format": 1,
        "name": "gaussian",
        "precision": "fp32",
        "axes": [dict(zip(("name", "minimum", "maximum", "multiple"), axis, strict=True)) for axis in axes],
        "programs": {
            name: {"file": f"{name}.onnx", "inputs": tensors(inputs), "outputs": tensors(outputs),
                   "nodes": len(model.graph.node), "nodes_before": 9, "flops": 100, "flops_before": 200}
            for name, (model, inputs, outputs) in programs.items()
        },
        "scheduler": {"scheduler": "ddim", "prediction_type": "epsilon", "steps": 20},
        "scale_factor": 0.5,
        "latent_shape": [CHANNELS, 4, 6, 4],
        "spacing_mm": [1.0, 1.5, 2.0],
        "conditions": [{"name": "context", "shape": [1, 3], "fields": fields, "unconditional": -1.0}],
        "provenance": {"bundle": "closed form"},
        "files": digests(folder),
    }  # fmt: skip


@pytest.fixture(scope="session")
def gaussian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact's folder; copy it before changing it."""
    folder = tmp_path_factory.mktemp("gaussian")
    programs = _programs()
    for name, (model, _, _) in programs.items():
        onnx.save(model, folder / f"{name}.onnx")
    (folder / "manifest.json").write_text(json.dumps(_manifest(folder, programs), indent=1))
    return folder


@pytest.fixture(scope="session")
def served(gaussian: Path) -> Any:
    """One `volcast serve` of `gaussian` for all tests of this process; some of them kill parts of it."""
    from served import start

    running = start(gaussian)
    try:
        running.wait("ready: gaussian")
        yield running
    finally:
        running.stop()


@pytest.fixture(autouse=True)
def _ready(request: pytest.FixtureRequest) -> None:
    """What a test finds is a server that answers, whatever the one before has done to it."""
    for name in ("served", "labelled"):
        if name in request.fixturenames:
            request.getfixturevalue(name).ready()


@pytest.fixture(scope="session")
def masked_gaussian(gaussian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gaussian` with a label map, which is required."""
    from masked import masked

    return masked(gaussian, tmp_path_factory.mktemp("masked") / "gaussian")


@pytest.fixture(scope="session")
def labelled(masked_gaussian: Path) -> Any:
    """As `served`, of `masked_gaussian`."""
    from served import start

    running = start(masked_gaussian)
    try:
        running.wait("ready: gaussian")
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def generative_keys() -> Any:
    """`rename(state)`: a MONAI state dict under the GenerativeModels package's names, its unused proj_attn added."""
    import torch

    def rename(state: dict[str, Any]) -> dict[str, Any]:
        old = {}
        for key, value in state.items():
            name = key.replace(".postconv.", ".conv.").replace(".out_proj.", ".to_out.0.")
            if ".attn.to_" in name:
                name = name.replace(".attn.", ".")
                old[
                    name.replace("to_q", "proj_attn")
                    .replace("to_k", "proj_attn")
                    .replace("to_v", "proj_attn")
                ] = torch.randn_like(value)
            old[name] = value
        return old

    return rename


@pytest.fixture(scope="session")
def make_zoo_bundle(generative_keys: Any) -> Any:
    """`make(root, name, controlnets=(), **settings) -> Bundle`: see `zoo_bundle`; its files go under `root`."""
    import torch

    from volcast.export.bundle import read_bundle
    from volcast.export.bundle_plan import plan_bundle

    configs = Path(__file__).parent / "configs"

    def make(root: Path, name: str, controlnets: Sequence[str] = (), **settings: Any) -> Any:
        narrow = json.loads((configs / "narrow.json").read_text())[name]
        narrow |= {key.replace("__", "#"): value for key, value in settings.items()}
        source = next(configs.glob(f"{name}.[jy]*"))
        file = root / name / "configs" / f"inference{source.suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(source.read_bytes())
        plan = plan_bundle(root / name, settings=narrow, controlnets=controlnets)
        generator = torch.Generator().manual_seed(0)
        networks = [("unet", plan.unet), ("autoencoder", plan.autoencoder)]
        for role, network in [*networks, *((control.id, control) for control in plan.controls)]:
            if network is None:
                continue
            old = "brats" in name or "brain" in name
            fc = {"include_fc": bool(network.arguments.get("with_conditioning"))} if old else {}
            state = {}
            for key, value in network.build(**fc).state_dict().items():
                noise = 0.05 * torch.randn(value.shape, generator=generator)
                state[key] = noise + 1 if value.dim() == 1 and key.endswith("weight") else noise
            path, keys = plan.weight_file(role, network)
            path.parent.mkdir(exist_ok=True)
            content = generative_keys(state) if old else state
            torch.save({keys[0]: content, "scale_factor": torch.tensor(0.75)} if keys else content, path)
        return read_bundle(root / name, settings=narrow, controlnets=controlnets)

    return make


@pytest.fixture
def zoo_bundle(tmp_path: Path, make_zoo_bundle: Any) -> Any:
    """`make(name, **settings) -> Bundle`: tests/configs/<name>, narrowed, with random weights in every parameter.

    MONAI's fresh UNets return exactly 0, so weights are N(0, 0.05^2) and norm scales 1 + N(0, 0.05^2). `settings` are
    ids with `__` for `#`. Bundles that their makers trained with GenerativeModels get its keys.
    """
    return functools.partial(make_zoo_bundle, tmp_path)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`folder(name, make) -> Path`: what `make(folder)` writes there, made once for all of pytest-xdist's workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def folder(name: str, make: Callable[[Path], Any]) -> Path:
        place = root / f"shared {name}"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not place.exists():
                # A maker that fails leaves nothing that another worker would take for whole.
                with tempfile.TemporaryDirectory(dir=root) as temporary:
                    made = Path(temporary) / "made"
                    make(made)
                    made.rename(place)
        return place

    return folder


@pytest.fixture(scope="session")
def zoo_artifact(shared_folder: Any, make_zoo_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`artifact(name) -> Path`: `zoo_bundle(name)` exported in float32, once a session. Copy it before a change."""
    from volcast.export.artifact import export_bundle

    def make(name: str, folder: Path) -> None:
        export_bundle(make_zoo_bundle(tmp_path_factory.mktemp(name), name), folder)

    return lambda name: shared_folder(f"artifact {name}", functools.partial(make, name))


@pytest.fixture(scope="session")
def default_cache(shared_folder: Any) -> Path:
    """A cache folder (XDG_CACHE_HOME) into which volcast itself has exported the bundled model, once a session."""
    from volcast.runtime.default_artifact import default_artifact

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder))
            default_artifact()

    return shared_folder("cache", make)


@pytest.fixture(scope="session")
def default_artifact_folder(default_cache: Path) -> Path:
    """The bundled hippocampus model, exported in float32. Copy it before a change."""
    from volcast.runtime.default_artifact import default_artifact

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(default_cache))
        return default_artifact()


@pytest.fixture(scope="session")
def controlled_cache(shared_folder: Any) -> Path:
    """A cache folder into which volcast itself has exported the bundled model with its ControlNet, once a session."""
    from volcast.runtime.default_artifact import default_artifact

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder))
            default_artifact(controlled=True)

    return shared_folder("controlled cache", make)


@pytest.fixture(scope="session")
def tiny_tokens(shared_folder: Any) -> Any:
    """`folder(tiny) -> Path`: a bundle of `token_bundles.py` under `bundle`, exported under `artifact`, once for all."""
    from volcast.export.transformer_artifact import export_transformer
    from volcast.export.transformer_bundle import read_transformer

    def make(tiny: Any, folder: Path) -> None:
        export_transformer(read_transformer(tiny.write(folder / "bundle")), folder / "artifact")

    return lambda tiny: shared_folder(f"tokens {tiny.dims}", functools.partial(make, tiny))


@pytest.fixture(scope="session")
def spade(shared_folder: Any) -> Path:
    """A SPADENet of three axes with its encoder of styles (`generator_bundles.py`), exported, once for all."""
    from generator_bundles import spade_gan

    from volcast.export.generator_artifact import export_generator
    from volcast.export.generator_bundle import read_generator

    def make(folder: Path) -> None:
        spade_gan(folder / "bundle", dims=3)
        export_generator(read_generator(folder / "bundle"), folder / "artifact")

    return Path(shared_folder("spade 3D", make) / "artifact")


@pytest.fixture(scope="session")
def token_artifact_folder(shared_folder: Any) -> Path:
    """The bundled VQVAE with its transformer, exported in float32, once for all. Copy it before a change."""
    from volcast.export.transformer_artifact import export_transformer
    from volcast.export.transformer_bundle import read_transformer
    from volcast.runtime.default_artifact import BUNDLE

    bundle = read_transformer(BUNDLE, config=Path("configs/transformer.json"))
    return shared_folder("bundled tokens", functools.partial(export_transformer, bundle))


@pytest.fixture(scope="session")
def built(default_artifact_folder: Path, shared_folder: Any) -> Path:
    """The bundled model with device programs in float32, once for all. Copy it before a change."""
    from volcast.export.to_cuda import build_cuda
    from volcast.runtime.spec import Precision

    def make(folder: Path) -> None:
        shutil.copytree(default_artifact_folder, folder)
        build_cuda(folder, precision=Precision.FP32)

    return shared_folder("built", make)
