"""`volcast verify --against`: what an artifact lost against the float32 one, and what it refuses to compare."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import volcast
from volcast.__main__ import app
from volcast.export.evaluation_images import read_images
from volcast.export.fidelity import SamplerChoice, distribution_checks, fidelity
from volcast.export.frechet import frechet
from volcast.export.quantize import quantize
from volcast.export.similarity import ms_ssim, psnr
from volcast.runtime.artifact import digests
from volcast.runtime.default_artifact import BUNDLE
from volcast.runtime.quality import QualityBudget

FEW = {"engine": "onnxruntime", "threads": 1, "samples": 4, "sampler": SamplerChoice(steps=3)}


@pytest.fixture
def altered(gaussian: Path, tmp_path: Path) -> Callable[..., Path]:
    """`alter(factor, **manifest)`: the decoded images times 1 + factor on every other voxel, under another manifest."""

    def alter(factor: float, **manifest: object) -> Path:
        folder = Path(shutil.copytree(gaussian, tmp_path / f"altered {factor}"))
        model = onnx.load(folder / "decode.onnx")
        resize = model.graph.node[-1]
        resize.output[0] = "whole"
        pattern = 1 + factor * (np.indices((1, 1, 8, 12, 8)).sum(axis=0) % 2)
        model.graph.initializer.append(numpy_helper.from_array(pattern.astype(np.float32), "pattern"))
        model.graph.node.append(onnx.helper.make_node("Mul", ["whole", "pattern"], ["image"]))
        onnx.save(model, folder / "decode.onnx")
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **manifest, "files": digests(folder)}))
        return folder

    return alter


def test_the_numbers_are_those_of_the_volumes(gaussian: Path, altered: Callable[..., Path]) -> None:
    folder = altered(0.001, precision="int8")
    seen: list[tuple[int, int]] = []
    found = fidelity(folder, gaussian, seed=5, on_step=lambda *done: seen.append(done), **FEW)
    given = {"engine": "onnxruntime", "threads": 1}
    ours, theirs = (
        np.stack([each.array for each in volcast.load(path, **given).sample_many(4, 5, steps=3)])[:, None]
        for path in (folder, gaussian)
    )
    values = {check.name: check for check in found.checks}
    alike = [ms_ssim(ours[i : i + 1], theirs[i : i + 1]) for i in range(4)]
    signal = [psnr(ours[i : i + 1], theirs[i : i + 1]) for i in range(4)]
    assert (
        values["MS-SSIM, mean"].value == pytest.approx(np.mean(alike))
        and values["MS-SSIM, mean"].budget == 0.97
    )
    assert values["MS-SSIM, worst"].value == min(alike)
    assert values["PSNR in dB, mean"].value == pytest.approx(np.mean(signal))
    assert values["PSNR in dB, worst"].value == min(signal)
    assert values["Fréchet distance"].value == frechet(ours, theirs)
    assert values["Fréchet distance"].budget == frechet(theirs[:2], theirs[2:])
    assert found.passed and "int8 against fp32" in found.subject and "4 seeds from 5" in found.subject
    assert seen == [(done, 24) for done in range(1, 25)]


def test_a_loss_past_the_budget_is_exit_code_1(gaussian: Path, altered: Callable[..., Path], capfd) -> None:
    folder = altered(0.8, precision="int8")
    given = ["verify", folder, "--against", gaussian, "--engine", "onnxruntime", "--steps", 2, "--samples", 2]
    assert app([*map(str, given), "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    failed = {check["name"] for check in found["checks"] if not check["passed"]}
    assert failed == {"MS-SSIM, mean", "Fréchet distance"} and not found["passed"]
    assert app([*map(str, given)]) == 1
    assert "FAILED: MS-SSIM, mean, Fréchet distance" in capfd.readouterr().out


def test_volumes_that_are_not_finite_fail(gaussian: Path, altered: Callable[..., Path]) -> None:
    found = fidelity(altered(np.nan, precision="fp16"), gaussian, **FEW)
    assert not found.passed and "not finite" in found.verdict


def test_one_seed_has_no_distance_to_other_seeds(gaussian: Path) -> None:
    found = fidelity(gaussian, gaussian, **FEW | {"samples": 1})
    assert found.passed and found.checks[-1].budget is None and found.checks[-1].value < 1e-12


def test_other_source_files_are_another_model(gaussian: Path, altered: Callable[..., Path]) -> None:
    folder = altered(0.0, provenance={"unet_sha256": "a"})
    other = altered(1e-9, provenance={"unet_sha256": "b"})
    found = fidelity(folder, other, **FEW)
    assert "source files that differ (unet came from other files: different models)" in found.verdict


def test_fewer_steps_against_more(gaussian: Path, capfd) -> None:
    """The same artifact with 20 steps and with 2: closer where both are DDIM's by MS-SSIM, and further than other seeds."""
    given = ["verify", gaussian, "--engine", "onnxruntime", "--samples", 6, "--json"]
    assert app([*map(str, [*given, "--steps", 2])]) == 1
    found = json.loads(capfd.readouterr().out)
    checks = {check["name"]: check for check in found["checks"]}
    assert "2 ddim steps against 20 ddim steps" in found["subject"]
    assert checks["MS-SSIM, mean"]["budget"] is None
    model = volcast.load(gaussian, engine="onnxruntime", threads=1)
    ours, theirs = (
        np.stack([volume.array[None] for volume in model.sample_many(6, 0, steps=steps)]) for steps in (2, 20)
    )
    assert checks["Fréchet distance"]["value"] == frechet(ours, theirs)
    assert checks["Fréchet distance"]["budget"] == frechet(theirs[:3], theirs[3:])
    assert not checks["Fréchet distance"]["passed"]
    # 2 steps of the exact denoiser give a smaller spread (its deviation falls short of 0.5): less contrast.
    assert ours.std() < 0.9 * theirs.std()


def test_steps_of_the_reference_and_noise_of_its_own(gaussian: Path) -> None:
    """A seed of DDPM with other steps is another volume: no MS-SSIM. With the same steps it is the same one."""
    few, many = SamplerChoice(scheduler="ddpm", steps=5), SamplerChoice(scheduler="ddpm", steps=30)
    found = fidelity(gaussian, gaussian, **FEW | {"sampler": few}, reference_sampler=many)
    assert "5 ddpm steps against 30 ddpm steps" in found.subject
    names = [check.name for check in found.checks]
    assert names[1:] == ["Fréchet distance", "diversity over the reference's"]
    same = fidelity(gaussian, gaussian, **FEW | {"sampler": few}, reference_sampler=few)
    assert same.passed and same.checks[1].name == "MS-SSIM, mean" and same.checks[1].budget == 0.99
    assert same.checks[1].value == pytest.approx(1, abs=1e-6)


def test_the_budget_is_the_manifest_s(gaussian: Path, altered: Callable[..., Path]) -> None:
    """`quality` of the artifact that is judged; a check fails or passes by it alone."""
    given = {**FEW, "reference_sampler": SamplerChoice(steps=20)}
    loose = altered(0.0, quality={"ms_ssim": 0.1, "frechet": 1000, "diversity": 0})
    found = fidelity(loose, gaussian, **given)
    assert found.passed, found.as_text()
    budgets = {check.name: check.budget for check in found.checks}
    assert budgets["MS-SSIM, mean"] == 0.1 and budgets["diversity over the reference's"] == 0
    strict = altered(1e-9, quality={"frechet": 1e-9, "diversity": 0})
    failed = [check for check in fidelity(strict, gaussian, **given).checks if not check.passed]
    assert [check.name for check in failed] == ["Fréchet distance"]
    assert failed[0].budget == pytest.approx(1e-12 * budgets["Fréchet distance"])
    with pytest.raises(ValueError, match="quality.frechet"):
        fidelity(altered(1e-8, quality={"frechet": 0}), gaussian, **given)


def test_volumes_that_are_all_one_have_no_diversity(gaussian: Path) -> None:
    images = np.stack([np.asarray(v.array)[None] for v in volcast.load(gaussian, threads=1).sample_many(4)])
    checks = distribution_checks(images[[0] * 4], images, None, QualityBudget(), 0)
    assert checks[-1].name == "diversity over the reference's" and not checks[-1].passed
    assert checks[-1].value == pytest.approx(0, abs=1e-5)
    assert distribution_checks(images, images, None, QualityBudget(), 0)[-1].value == 1


def test_real_images(gaussian: Path, altered: Callable[..., Path], tmp_path: Path, capfd) -> None:
    """As far from them as the reference is, or further: 1.1 times is the budget. Real ones here are other seeds."""
    for name, size in (("real", (4, 6, 4)), ("small", (4, 4, 4))):
        (tmp_path / name).mkdir()
        volumes = volcast.load(gaussian, threads=1).sample_many(5, 77, size=size, steps=20)
        for place, volume in enumerate(volumes):
            volume.save(tmp_path / name / f"{place}.nii.gz")
    given = ["verify", gaussian, "--engine", "onnxruntime", "--samples", 4]
    assert app([*map(str, [*given, "--steps", 2, "--real", tmp_path / "real"])]) == 1
    assert "Fréchet distance, real images" in capfd.readouterr().out.splitlines()[-1]
    real = read_images(tmp_path / "real")
    found = fidelity(altered(1e-4), gaussian, **FEW | {"sampler": SamplerChoice(steps=20)}, real=real)
    check = next(one for one in found.checks if one.name == "Fréchet distance, real images")
    assert check.passed and check.value == pytest.approx(check.budget / 1.1, rel=0.01)
    assert app([*map(str, [*given, "--steps", 2, "--real", tmp_path / "small"])]) == 2
    assert "need one shape" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "2"], "--samples without --against: nothing differs"),
        (["--samples", "2", "--steps", "20", "--scheduler", "ddim"], "nothing differs"),
        (["--samples", "2", "--steps", "0"], "steps=0: need 1..1000"),
        (["--samples", "2", "--reference-steps", "0"], "steps=0: need 1..1000"),
        (["--samples", "2", "--reuse", "3"], "reuse=3"),
        (["--samples", "2", "--scheduler", "rflow"], "rflow"),
        (["--scheduler", "pndm"], "--scheduler: with MONAI one volume is compared"),
        (["--samples", "2", "--steps", "2", "--real", "nowhere"], "nowhere is no folder"),
        (["--samples", "1", "--steps", "2"], "samples=1: one volume of each sampler judges nothing"),
    ],
)
def test_a_gate_that_cannot_be(gaussian: Path, capfd, arguments: list[str], message: str) -> None:
    assert app(["verify", str(gaussian), "--engine", "onnxruntime", *arguments]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", 0], "[verify] samples=0: need 1..10000"),
        (["--steps", 0], "steps=0: need 1..1000"),
        (["--guidance", -1], "guidance=-1"),
        (["--set", "a=1"], "--set: for MONAI, not with --against or --samples"),
    ],
)
def test_bad_arguments(gaussian: Path, capfd, arguments: list[object], message: str) -> None:
    given = ["verify", gaussian, "--against", gaussian, "--engine", "onnxruntime", *arguments]
    assert app([*map(str, given)]) == 2
    assert message in capfd.readouterr().err


def test_what_cannot_be_compared(gaussian: Path, altered: Callable[..., Path], capfd) -> None:
    assert app(["verify", str(gaussian), str(BUNDLE), "--samples", "2"]) == 2
    assert "not with --against or --samples, which compare artifacts" in capfd.readouterr().err
    half = altered(0.0, precision="fp16")
    with pytest.raises(ValueError, match="against gaussian in fp16: need the float32 artifact"):
        fidelity(gaussian, half, **FEW)
    other = altered(0.1, scale_factor=0.25)
    with pytest.raises(ValueError, match="scale_factor of 'gaussian' and of 'gaussian' differ"):
        fidelity(gaussian, other, **FEW)


def test_the_bundled_model_in_int8(default_artifact_folder: Path, tmp_path: Path, capfd) -> None:
    """End to end, with few samples: also against MONAI, where int8 has a budget for the volume alone."""
    quantize(default_artifact_folder, tmp_path / "int8", samples=2, steps=4, threads=1)
    found = fidelity(
        tmp_path / "int8", default_artifact_folder, threads=1, samples=2, seed=0, guidance=2.0,
        sampler=SamplerChoice(steps=4),
    )  # fmt: skip
    assert found.passed, found.as_text()
    alike = next(check.value for check in found.checks if check.name == "MS-SSIM, mean")
    assert 0.97 < alike < 0.99999
    assert app(["verify", str(tmp_path / "int8"), str(BUNDLE), "--steps", "4", "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capfd.readouterr().out)["checks"]}
    assert checks["decode"]["budget"] is None and checks["volume, MS-SSIM"]["budget"] == 0.97
    # The encoder stays float32 and keeps its budget.
    assert checks["encode, mean"]["budget"] == 1e-4 and checks["encode, mean"]["passed"]
