"""Cubins launched through the driver: parameters as the machine code wants them, calls as the driver is to get them."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from volcast import _core
from volcast.runtime.cubin_launcher import CubinLauncher, pack_arguments, pick_device
from volcast.runtime.cubins import KernelSpec, LaunchSpec, TensorArgument, read_cubins

ROOT = Path(__file__).parent.parent
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.fixture(scope="module")
def built(gaussian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sampler's update, the only kernels of an artifact without norms: pointers and numbers of every size."""
    folder = tmp_path_factory.mktemp("cubins") / "orin"
    command = [
        sys.executable,
        "-m",
        "volcast",
        "build",
        gaussian,
        "--target",
        "cubin",
        "--sm",
        "87",
        "-o",
        folder,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcuda.so.1 that has every entry point which csrc/driver.cpp looks for."""
    folder = tmp_path_factory.mktemp("driver")
    source = (ROOT / "tests" / "fake_cuda.cpp").read_text()
    wanted = re.findall(r'find\(library, "(\w+)"', (ROOT / "csrc" / "driver.cpp").read_text())
    rest = [name for name in wanted if f"int {name}(" not in source]
    assert len(wanted) - len(rest) >= 9
    (folder / "cuda.cpp").write_text(
        source + "".join(f'extern "C" int {name}() {{ return 0; }}\n' for name in rest)
    )
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "cuda.cpp"], check=True
    )
    return folder


def parameters(cubin: Path) -> list[tuple[int, int]]:
    """(offset, size) of every parameter in its order, as the cubin's own table has them."""
    listing = subprocess.run([CUOBJDUMP, "-elf", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(
        r"EIATTR_KPARAM_INFO.*?Ordinal\s*: (0x\w+)\s+Offset\s*: (0x\w+)\s+Size\s*: (0x\w+)",
        listing,
        re.DOTALL,
    )
    return [
        (int(offset, 16), int(size, 16)) for _, offset, size in sorted(found, key=lambda row: int(row[0], 16))
    ]


def test_parameters_lie_where_the_machine_code_reads_them(built: Path) -> None:
    manifest = read_cubins(built)
    for use in manifest.uses:
        for launch in use.launches["sm_87"]:
            kernel = manifest.kernels[launch.kernel]
            table = parameters(built / kernel.files["sm_87"].file)
            assert len(table) == len(kernel.signature) + 2
            buffers = [0x7F00_0000_0000 + 0x100 * number for number in range(len(launch.tensors))]
            packed = pack_arguments(kernel, launch, buffers, {"steps": 7}, 0xABC0)
            assert len(packed) == sum(table[-1])
            for (name, _), (offset, size) in zip(kernel.signature, table, strict=False):
                found = int.from_bytes(packed[offset : offset + size], "little")
                if name in launch.tensors:
                    assert found == buffers[launch.tensors[name].buffer]
                else:
                    assert found == {**launch.numbers, "steps": 7}[name]
            assert struct.unpack("<QQ", packed[table[-2][0] :]) == (0xABC0, 0)


def test_views_start_inside_their_buffer(built: Path) -> None:
    manifest = read_cubins(built)
    launch = manifest.uses[0].launches["sm_87"][0]
    kernel = manifest.kernels[launch.kernel]
    moved = {name: tensor.model_copy(update={"offset": 3}) for name, tensor in launch.tensors.items()}
    names = [name for name, _ in kernel.signature]
    packed = pack_arguments(kernel, launch.model_copy(update={"tensors": moved}), [0] * len(moved), {}, 0)
    words = dict(zip(names, struct.unpack_from(f"<{len(moved)}Q", packed), strict=False))
    assert (words["x"], words["out"], words["weights"], words["seeds"]) == (12, 6, 24, 24)


def test_numbers_have_the_bits_of_their_types() -> None:
    signature = (("a", "i32"), ("b", "fp64"), ("c", "fp32"), ("d", "*fp16"), ("e", "i64"))
    kernel = KernelSpec.model_construct(signature=signature)
    tensor = TensorArgument(buffer=0, dtype="float16", shape=(1,), strides=(1,), offset=0)
    numbers = {"a": -2, "b": 0.1, "c": 0.5, "e": -(2**40)}
    launch = LaunchSpec.model_construct(tensors={"d": tensor}, numbers=numbers)
    packed = pack_arguments(kernel, launch, [64], {}, 0)
    assert packed == struct.pack(
        "@idfPqPP", -2, 0.1, 0.5, 64, -(2**40), 0, 0
    )  # "@": as the C compiler lays it out


def test_the_driver_is_called_in_order(built: Path, fake: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from volcast import _core\n"
        "from volcast.runtime.cubin_launcher import CubinLauncher\n"
        "driver = _core.Driver.cuda()\n"
        f"launcher = CubinLauncher(Path({str(built)!r}), driver)\n"
        "assert launcher.device == 'sm_87'\n"
        "stream = _core.Stream(driver)\n"
        "plain, guided = launcher.manifest.uses\n"
        "for use, count in ((plain, 10), (guided, 12), (plain, 10)):\n"
        "    assert launcher.scratch_bytes(use) == 0\n"
        "    launcher.launch(use, [4096 * (1 + i) for i in range(count)], stream, numbers={'steps': 50})\n"
        "del launcher\n"
        "assert not {'torch', 'triton'} & sys.modules.keys()\n"
    )
    log = tmp_path / "log"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake), "FAKE_CUDA_LOG": str(log)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    lines = log.read_text().splitlines()
    manifest = read_cubins(built)
    plain, guided = (
        (use.launches["sm_87"][0], manifest.kernels[use.launches["sm_87"][0].kernel]) for use in manifest.uses
    )
    expected = []
    for number, (launch, kernel) in enumerate((plain, guided, plain)):
        if number < 2:  # the third finds its kernel loaded
            expected += ["load 0", f"function {kernel.entry}"]
        buffers = [4096 * (1 + i) for i in range(len(launch.tensors))]
        packed = pack_arguments(kernel, launch, buffers, {"steps": 50}, 0)
        grid = " ".join(map(str, launch.grid))
        expected.append(
            f"launch {grid} {kernel.threads} 1 1 {kernel.files['sm_87'].shared_bytes} {packed.hex()}"
        )
    assert lines == [*expected, "unload 1", "unload 1"]


def test_what_cannot_be_launched_is_named(built: Path, fake: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from volcast import _core\n"
        "from volcast.runtime.cubin_launcher import CubinLauncher\n"
        "driver = _core.Driver.cuda()\n"
        f"launcher = CubinLauncher(Path({str(built)!r}), driver)\n"
        "use, stream = launcher.manifest.uses[0], _core.Stream(driver)\n"
        "good = [4096] * 10\n"
        "for arguments, numbers in ((good[:9], {}), ([*good[:9], 4100], {}), ([*good[:9], 0], {}), (good, {'volume': 1})):\n"
        "    try: launcher.launch(use, arguments, stream, numbers=numbers)\n"
        "    except ValueError as error: print(error)\n"
        "left = use.model_copy(update={'left_out': 'too wide'})\n"
        "try: launcher.launch(left, good, stream)\n"
        "except ValueError as error: print(error)\n"
        "try: _core.Kernel(driver, b'x' * 100, 'entry', 32, 0)\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake), "FAKE_CUDA_LOG": str(tmp_path / "log")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "[cubins] sampler_step x: 9 buffers: need 10",
        "[cubins] sampler_step x: buffer 9 at 0x1004: need a multiple of 16",
        "[cubins] sampler_step x: buffer 9 at 0x0: need a multiple of 16",
        "[cubins] sampler_step x: it takes no number volume",
        "[cubins] sampler_step x has no kernel: too wide",
        "[Kernel] entry: the image is no cubin; build it again",
    ]
    assert not (tmp_path / "log").exists(), "something was launched"


def test_cubins_need_a_gpu(built: Path, tmp_path: Path) -> None:
    image = next(built.rglob("*.cubin")).read_bytes()
    with pytest.raises(ValueError, match=r"\[Kernel\] driver=host: cubins need a GPU; open Driver.cuda"):
        _core.Kernel(_core.Driver.host(), image, "sampler_step", 128, 0)
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    next(copy.rglob("*.cubin")).write_bytes(image[:-1])
    with pytest.raises(ValueError, match="is missing or was altered; run `volcast build"):
        CubinLauncher(copy, _core.Driver.host())


@pytest.mark.parametrize(
    ("built", "capability", "picked"),
    [
        ({"sm_80", "sm_89"}, 86, "sm_80"),  # a later minor version of 8
        ({"sm_80", "sm_89"}, 89, "sm_89"),  # the closest
        ({"sm_80", "sm_87"}, 87, "sm_87"),
        ({"sm_80"}, 87, None),  # Tegra has binaries of its own
        ({"sm_87"}, 89, None),
        ({"sm_90", "sm_89"}, 100, None),  # architecture-specific instructions
        ({"sm_90"}, 90, "sm_90"),
    ],
)
def test_a_gpu_gets_the_cubins_that_it_runs(built: set[str], capability: int, picked: str | None) -> None:
    if picked is not None:
        assert pick_device(built, capability) == picked
        return
    with pytest.raises(
        ValueError, match=rf"this GPU is sm_{capability}; run `volcast build .* --sm {capability} --force`"
    ):
        pick_device(built, capability)
