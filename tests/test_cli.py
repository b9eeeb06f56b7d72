"""The command line: outputs, exit codes, one-line errors, what it imports."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

import volcast
from volcast.__main__ import app


def run(*arguments: object) -> int:
    return app([str(argument) for argument in arguments])


def sample(artifact: Path, output: Path, *more: object) -> int:
    return run("sample", artifact, "-o", output, "--engine", "onnxruntime", "--threads", 1, *more)


def test_one_volume(gaussian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.nii.gz"
    assert (
        sample(gaussian, output, "--steps", 5, "--seed", 3, "-c", "anterior=0.9", "--png", tmp_path / "o.png")
        == 0
    )
    expected = volcast.load(gaussian, engine="onnxruntime", threads=1).sample(
        3, steps=5, condition={"anterior": 0.9}
    )
    image = nibabel.load(output)
    np.testing.assert_array_equal(np.asarray(image.dataobj), expected.array)
    assert image.header["descrip"].item() == b"volcast gaussian seed 3"
    with Image.open(tmp_path / "o.png") as picture:
        assert picture.format == "PNG"
    out, err = capsys.readouterr()
    assert "gaussian on onnxruntime, 1 threads" in err
    assert "8 x 12 x 8" in out and "5 ddim steps" in out and "MiB" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.png", "out.nii.gz"]


def test_many_volumes_and_json(gaussian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = (
        "-n",
        3,
        "--batch",
        2,
        "--json",
        "--steps",
        2,
        "--png",
        tmp_path / "all.png",
        "--scheduler",
        "dpm-solver++",
    )
    assert sample(gaussian, tmp_path / "v.nii", *more) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [Path(row["path"]).name for row in rows] == ["v_0.nii", "v_1.nii", "v_2.nii"]
    assert [row["report"]["batch"] for row in rows] == [2, 2, 1]
    assert rows[0]["report"]["scheduler"] == "dpm-solver++" and "steps:" not in err
    assert all(Path(row["path"]).is_file() for row in rows) and (tmp_path / "all.png").is_file()


def test_image_to_image_from_a_file(gaussian: Path, tmp_path: Path) -> None:
    assert sample(gaussian, tmp_path / "a.nii", "-q") == 0
    assert sample(gaussian, tmp_path / "b.nii", "-q", "--image", tmp_path / "a.nii", "--strength", 0.3) == 0
    assert nibabel.load(tmp_path / "b.nii").shape == (8, 12, 8)


def test_info(gaussian: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", gaussian) == 0
    text = capsys.readouterr().out
    for word in (
        "gaussian",
        "9 > 6",
        "anterior: 0..1, default 0.5 of the front",
        "d0: 2..16, multiples of 2",
        "closed form",
    ):
        assert word in text
    assert run("info", gaussian, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["bytes"]["step.onnx"] == (gaussian / "step.onnx").stat().st_size
    assert data["programs"]["step"]["nodes_before"] == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 0], "[sample] steps=0: need 1..1000"),
        (["--steps", 1001], "[sample] steps=1001: need 1..1000"),
        (["--condition", "anterior"], "[condition] 'anterior': write name=number"),
        (["--condition", "front=1"], "unknown name 'front'"),
        (["--condition", "context=@/no/such.npy"], "cannot read it"),
        (["--size", "a,b"], "size=a,b: need whole numbers"),
        (["--size", "4,4,5"], "d2=5"),
        (["--image", "/no/such.nii"], "/no/such.nii: cannot be read (No such file"),
        (["--png", "x.jpg"], "ends in .png"),
        (["-n", 0], "n=0"),
        (["--threads", 0], "threads=0"),
        (["--guidance", "nan"], "guidance=nan"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    gaussian: Path, tmp_path: Path, capfd, arguments, message
) -> None:
    assert sample(gaussian, tmp_path / "out.nii", "-q", *arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("volcast: [") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def test_bad_outputs_fail_before_any_work(gaussian: Path, tmp_path: Path, capsys) -> None:
    for output in (tmp_path / "no" / "out.nii", tmp_path / "out.dcm"):
        assert sample(gaussian, output) == 2
        err = capsys.readouterr().err
        assert err.startswith("volcast: [") and "gaussian on" not in err


def test_a_folder_in_the_way_is_named_before_any_work(gaussian: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "out_1.nii").mkdir()
    assert sample(gaussian, tmp_path / "out.nii", "-n", 2) == 2
    assert "out_1.nii is a folder; choose another output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out_1.nii"]


def test_a_truncated_artifact(gaussian: Path, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(gaussian, tmp_path / "artifact"))
    (folder / "decode.onnx").write_bytes((folder / "decode.onnx").read_bytes()[:-20])
    assert sample(folder, tmp_path / "out.nii") == 2
    assert "decode.onnx was altered or cut short" in capsys.readouterr().err
    assert run("info", tmp_path) == 2
    assert "holds no manifest.json" in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2(capsys) -> None:
    assert run("sample", "--stepz", "3") == 2
    assert "--stepz" in capsys.readouterr().err
    assert run("smaple") == 2


def volcast_process(*arguments: object, prefix: str = "") -> subprocess.Popen[str]:
    code = f"{prefix}\nimport sys\nfrom volcast.__main__ import app\nsys.exit(app())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_version_and_completion_are_quick_to_import() -> None:
    heavy = "import sys\nfrom volcast.__main__ import app\ncode = app(sys.argv[1:])\n"
    heavy += (
        "print(sorted({'numpy', 'torch', 'onnxruntime', 'openvino', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", heavy, "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"volcast {volcast.__version__}", "[]"]
    environment = {
        **os.environ,
        "_VOLCAST_COMPLETE": "complete_bash",
        "COMP_WORDS": "volcast sam",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "volcast"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "sample"


def test_ctrl_c_is_130_and_leaves_nothing(gaussian: Path, tmp_path: Path) -> None:
    with volcast_process(
        "sample", gaussian, "-o", tmp_path / "out.nii", "-n", 100000, "--steps", 1000
    ) as process:
        while not list(tmp_path.iterdir()) and process.poll() is None:
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in err
    files = [path.name for path in tmp_path.iterdir()]
    assert not [name for name in files if name.startswith(".tmp")]
    for name in files:
        assert nibabel.load(tmp_path / name).get_fdata().shape == (8, 12, 8)


def test_a_closed_stderr_and_a_reader_that_is_gone(gaussian: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "volcast",
        "sample",
        str(gaussian),
        "--steps",
        "1",
        "--engine",
        "onnxruntime",
    ]
    command += ["-o", str(tmp_path / "out.nii")]
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(command, stdout=writes, check=False, preexec_fn=functools.partial(os.close, 2))
    os.close(writes)
    assert done.returncode == 141 and (tmp_path / "out.nii").is_file()


@pytest.mark.parametrize("command", ["export", "verify"])
def test_a_missing_package_is_named_with_its_extra(gaussian: Path, tmp_path: Path, command: str) -> None:
    places = [tmp_path, "-o", tmp_path / "out"] if command == "export" else [gaussian, tmp_path]
    code = "import sys; sys.modules['torch'] = None; from volcast.__main__ import app; sys.exit(app(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, command, *map(str, places)], capture_output=True, text=True, check=False
    )
    wanted = "volcast: this command needs torch: pip install 'volcast[export]'\n"
    assert (done.returncode, done.stderr) == (2, wanted)


def test_no_room_for_the_volume(gaussian: Path, tmp_path: Path) -> None:
    # RLIMIT_FSIZE stands for a full disk; 3.4 kB would be needed.
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    with volcast_process("sample", gaussian, "-o", tmp_path / "out.nii", "-q", "--engine", "onnxruntime",
                         prefix=limit) as process:  # fmt: skip
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "size limit" in err
    assert list(tmp_path.iterdir()) == []


def test_outputs_stay_apart_from_inputs_and_one_another(
    gaussian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, scan = tmp_path / "a.nii.gz", tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 12, 8), np.float32), np.diag([1, 1.5, 2, 1])), scan)
    before = scan.read_bytes()
    for words, message in (
        (("--image", scan, "-o", scan), "scan.nii.gz is read, and would be replaced"),
        (("-n", 2, "--mean", out, "--variance", out), "a.nii.gz is two of the outputs"),
        (("-n", 2, "-o", out, "--mean", tmp_path / "a_0.nii.gz"), "a_0.nii.gz is two of the outputs"),
        (("-n", 99_999_999_999, "-o", out), "n=99999999999: need 1..1000000"),
    ):
        assert run("sample", gaussian, *words) == 2
        assert message in capsys.readouterr().err
    condition = f"lab=@{scan}"
    for words in (
        ("sample", gaussian, "-c", condition),
        ("sample", gaussian, "--negative", condition),
        ("sample", gaussian, "--mask", scan),
        ("sample", gaussian, "--mask", f"lab={scan}"),
        ("sample", gaussian, "--then", f"{gaussian},steps=2,{condition}"),
        ("request", "-c", condition),
        ("request", "--negative", condition),
        ("likelihood", gaussian, tmp_path / "x.nii", "-c", condition),
        ("anomaly", gaussian, tmp_path, "-c", condition),
        ("anomaly", gaussian, tmp_path, "--observed", condition),
        ("heal", gaussian, tmp_path, "-c", condition),
    ):
        assert run(*words, "-o", scan) == 2
        assert "scan.nii.gz is read, and would be replaced" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"] and scan.read_bytes() == before


def test_colours_are_no_volume(gaussian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colours = np.zeros((8, 12, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), tmp_path / "rgb.nii")
    assert run("sample", gaussian, "--image", tmp_path / "rgb.nii", "-o", tmp_path / "a.nii") == 2
    assert "rgb.nii has datatype 128: need whole or real numbers" in capsys.readouterr().err
