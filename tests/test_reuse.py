"""Sampling with reused features, end to end: against DeepCache in eager PyTorch under MONAI's DDIM, and what refuses it."""

from __future__ import annotations

import copy
import math
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import nibabel
import numpy as np
import onnx
import pytest
import torch
from deep_cache import DeepCache
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler
from PIL import Image
from test_passes import randomise

from volcast.__main__ import app
from volcast.benchmarks import reuse as benchmark
from volcast.export.artifact import export_bundle
from volcast.export.bundle import Bundle
from volcast.export.calibration import draw_condition
from volcast.export.frechet import frechet
from volcast.export.quantize import quantize
from volcast.export.similarity import psnr, relative_l2
from volcast.runtime.artifact import read_artifact
from volcast.runtime.engine import Engine, Program
from volcast.runtime.engine_auto import open_engine
from volcast.runtime.generate import prepare
from volcast.runtime.inpaint import Inpaint
from volcast.runtime.noise import request_noise
from volcast.runtime.pipeline import Model, load
from volcast.runtime.programs import Programs
from volcast.runtime.sampling import HostLoop, HostSampler, Sampler
from volcast.runtime.spec import ArtifactSpec, ConditionField, ConditionSpec, ProgramSpec, SchedulerSpec

SHAPE, STEPS, SEED = (1, 4, 8, 4), 7, 5
CONTEXT, NULL = (0.3, 0.7), -1.0
FIELDS = tuple(
    ConditionField(name=name, minimum=0, maximum=1, default=value)
    for name, value in zip(("front", "back"), CONTEXT, strict=True)
)
BOUND = 2**-24 * math.sqrt(864 * 20) * 6 * math.pi / 2
"""Float32 sums in another order, as `export/verification` derives it, here of 864 terms in 20 layers: 7e-5."""


def make_unet() -> DiffusionModelUNet:
    unet = DiffusionModelUNet(
        spatial_dims=3, in_channels=1, out_channels=1, num_res_blocks=1, channels=(8, 16), norm_num_groups=8,
        attention_levels=(False, True), num_head_channels=(0, 8), with_conditioning=True, cross_attention_dim=2,
    )  # fmt: skip
    randomise(unet)
    return unet


@pytest.fixture(scope="session")
def folder(shared_folder: Any) -> Path:
    """A small guided model of images, exported for reuse."""
    bundle = Bundle(
        name="small", unet=make_unet(), autoencoder=None, scheduler=SchedulerSpec(), scale_factor=1.0,
        latent_shape=SHAPE, spacing_mm=(1.0, 1.0, 1.0), provenance={},
        conditions=(ConditionSpec(name="context", shape=(1, 2), fields=FIELDS, unconditional=NULL),),
    )  # fmt: skip
    return shared_folder("reuse", lambda place: export_bundle(bundle, place, reuse=True))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, engine="openvino", threads=1)


def sampled(model: Model, **settings: Any) -> np.ndarray:
    volumes = model.sample_many(
        2,
        SEED,
        batch=2,
        steps=STEPS,
        compat="monai-1.6",
        **settings,
    )
    return np.stack([volume.array for volume in volumes])


def eager(reuse: int, guidance: float | None) -> np.ndarray:
    """Each branch of guidance has a network, and a cache, of its own."""
    branches = {NULL: make_unet(), None: make_unet()} if guidance is not None else {None: make_unet()}
    caches = {fill: DeepCache(unet) for fill, unet in branches.items()}
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    x = torch.from_numpy(request_noise(SEED, range(2), 0, SHAPE))
    for step, t in enumerate(scheduler.timesteps):
        out = {}
        for fill, unet in branches.items():
            caches[fill].reusing = step % reuse != 0
            context = torch.tensor([[CONTEXT]]) if fill is None else torch.full((1, 1, 2), fill)
            out[fill] = unet(x, t.float().repeat(2), context=context.repeat(2, 1, 1))
        mixed = out[None] if guidance is None else out[NULL] + guidance * (out[None] - out[NULL])
        x = scheduler.step(mixed, int(t), x)[0]
    return x[:, 0].numpy()


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_it_is_deep_cache(folder: Path, engine: str, guidance: float | None) -> None:
    model = load(folder, engine=engine, threads=1)
    wanted = eager(3, guidance)
    assert relative_l2(sampled(model, reuse=3, guidance=guidance), wanted) < BOUND
    assert relative_l2(sampled(model, guidance=guidance), wanted) > 5 * BOUND
    assert relative_l2(sampled(model, reuse=2, guidance=guidance), wanted) > 5 * BOUND


def test_a_sweep_of_weights_keeps_both_branches(model: Model) -> None:
    swept = model.sample_many(
        1, SEED, batch=2, steps=STEPS, compat="monai-1.6",
        guidance=(1.0, 3.0), reuse=3,
    )  # fmt: skip
    found = [volume.array for volume in swept]
    assert relative_l2(found[1], eager(3, 3.0)[0]) < BOUND
    assert relative_l2(found[0], eager(3, None)[0]) < BOUND


@final
class Counting(Engine):
    """OpenVINO that notes which program is called."""

    name, threads = "counting", 1

    def __init__(self) -> None:
        self.called: list[str] = []
        self._engine = open_engine("openvino", 1)

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        return Noting(path.stem, self.called, self._engine.open(path, program, sizes))


@final
class Noting(Program):
    def __init__(self, name: str, called: list[str], program: Program) -> None:
        self._name, self._called, self._program = name, called, program

    def __call__(self, inputs: Any) -> Any:
        self._called.append(self._name)
        return self._program(inputs)


def test_which_programs_run(folder: Path, model: Model) -> None:
    engine = Counting()
    counted = Model(folder, read_artifact(folder), engine)
    assert np.array_equal(sampled(counted, reuse=1), sampled(model))
    assert [name for name in engine.called if name.startswith("step")] == ["step"] * STEPS
    engine.called.clear()
    sampled(counted, reuse=3, guidance=2.0)
    deep, shallow = ["step_deep"] * 2, ["step_shallow"] * 2
    wanted = (deep + 2 * shallow) * 2 + deep
    assert [name for name in engine.called if name.startswith("step")] == wanted


def test_more_than_all_steps_is_one_whole_step(model: Model) -> None:
    assert np.array_equal(sampled(model, reuse=STEPS), sampled(model, reuse=1000))


def test_a_cancelled_run_leaves_nothing_behind(model: Model) -> None:
    before = sampled(model, reuse=3)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled(model, reuse=3, on_step=stop)
    assert np.array_equal(sampled(model, reuse=3), before)


def test_weights_are_on_disk_once(folder: Path) -> None:
    def outside(name: str) -> dict[tuple[str, ...], int]:
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        each = [{pair.key: pair.value for pair in one.external_data} for one in graph.initializer]
        assert all(place or one.ByteSize() < 1000 for one, place in zip(graph.initializer, each, strict=True))
        return {(place["location"], place["offset"]): int(place["length"]) for place in each if place}

    whole, deep, shallow = map(outside, ("step", "step_deep", "step_shallow"))
    assert whole == deep and 0 < len(shallow) < len(whole) and shallow.items() < whole.items()
    assert {location for location, _ in whole} == {"step.onnx.data"}
    assert sum(whole.values()) <= (folder / "step.onnx.data").stat().st_size


@final
class Elsewhere(Engine):
    """An engine with a loop of its own, as TensorRT's is."""

    name, threads = "elsewhere", 1

    def open(self, path: Path, program: ProgramSpec, sizes: Mapping[str, int]) -> Program:
        raise AssertionError("refused before any work")

    def sampler(self, folder: Path, spec: ArtifactSpec, programs: Programs) -> Sampler:
        return HostSampler(spec, self, programs, HostLoop(programs))


def test_what_cannot_reuse_says_so(folder: Path, model: Model, gaussian: Path, tmp_path: Path) -> None:
    spec = read_artifact(folder)
    asked: dict[str, Any] = {"steps": 2, "reuse": 2}
    with pytest.raises(
        ValueError, match=r"reuse=2: gaussian has no programs for it; .*export BUNDLE --reuse"
    ):
        load(gaussian, engine="openvino").sample(steps=2, reuse=2)
    with pytest.raises(ValueError, match=r"reuse=2: the engine elsewhere has no loop for it; take openvino"):
        Model(folder, spec, Elsewhere()).sample(**asked)
    with pytest.raises(ValueError, match=r"reuse=2: no memory limit is kept with it; load the model without"):
        load(folder, engine="openvino", memory_limit="8GiB").sample(**asked)
    with (
        load(folder, engine="openvino") as other,
        pytest.raises(ValueError, match=r"reuse=2: submit .*call sample"),
    ):
        other.submit(**asked)
    image = np.zeros(SHAPE[1:], np.float32)
    half = image + (np.arange(4) < 2)
    with pytest.raises(ValueError, match=r"reuse=2 with inpaint, whose steps jump back"):
        model.sample(**asked, image=image, inpaint=Inpaint(mask=half))
    with pytest.raises(ValueError, match=r"\[generate\] reuse=2: call Model.sample_many"):
        prepare(gaussian, 1, settings={"reuse": 2})
    with pytest.raises(ValueError, match=r"\[quantize\] small has programs for reuse.*without --reuse"):
        quantize(folder, tmp_path / "int8")


@pytest.mark.parametrize("reuse", [0, 1001, 2.5, True, "3"])
def test_out_of_range(model: Model, reuse: Any) -> None:
    with pytest.raises(ValueError, match=r"\[sample\] reuse="):
        model.sample(steps=2, reuse=reuse)


def test_half_of_the_programs_is_no_artifact(folder: Path) -> None:
    spec = read_artifact(folder)
    assert spec.reuses and spec.provenance["passes"].split()[-1] == "reuse"
    for name in ("step_deep", "step_shallow"):
        data = copy.deepcopy(spec.model_dump())
        del data["programs"][name]
        with pytest.raises(ValueError, match="of step_deep and step_shallow one is missing"):
            ArtifactSpec.model_validate(data)
    data = copy.deepcopy(spec.model_dump())
    data["programs"]["step_deep"] = data["programs"]["step"]
    with pytest.raises(ValueError, match="does not make the one feature"):
        ArtifactSpec.model_validate(data)


def test_the_command_line(folder: Path, model: Model, tmp_path: Path) -> None:
    output = tmp_path / "out.nii.gz"
    common = [
        "sample",
        str(folder),
        "-o",
        str(output),
        "--steps",
        "4",
        "--engine",
        "openvino",
        "--threads",
        "1",
        "-q",
    ]
    assert app([*common, "--reuse", "2"]) == 0
    assert np.array_equal(np.asarray(nibabel.load(output).dataobj), model.sample(steps=4, reuse=2).array)


def test_the_example(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["reuse.py", str(folder), str(tmp_path), "--steps", "3"])
    runpy.run_path(str(Path(__file__).parent.parent / "docs" / "examples" / "reuse.py"), run_name="__main__")
    with Image.open(tmp_path / "reuse.png") as picture:
        assert np.asarray(picture).std() > 0


def test_the_benchmark(folder: Path, model: Model) -> None:
    """Nothing asserts on speed; the likeness is that of volumes drawn here."""
    called = benchmark.calls(folder, "openvino", 1, repeats=2)
    assert called["step_ms"]["count"] == 2 and called["step_shallow_over_step"]["minimum"] > 0
    full, reusing = benchmark.Run(steps=4), benchmark.Run(steps=4, reuse=2)
    assert [run.reuse for run in benchmark.as_long(model, [reusing], full, None)] == [1]
    whole, other = benchmark.draw(model, [full, reusing], range(2), None)
    line = benchmark.compare(other, whole)
    condition = draw_condition(model.spec, {}, np.random.default_rng(1))
    alone = [model.sample(1, steps=4, reuse=k, condition=condition).array[None, None] for k in (2, 1)]
    assert psnr(*alone) in (line["psnr_db"]["minimum"], line["psnr_db"]["maximum"])
    assert line["frechet"] == frechet(other.volumes, whole.volumes) > 0
    assert benchmark.compare(whole, whole)["ms_ssim"] is None
