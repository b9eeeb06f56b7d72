"""Who may import whom: kernels < runtime < export < triton_repo, benchmarks, tests; csrc only through runtime."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "kernels": {"kernels"},
    "runtime": {"kernels", "runtime"},
    "export": {"kernels", "runtime", "export"},
    "triton_repo": {"kernels", "runtime", "export", "triton_repo"},
    "benchmarks": {"kernels", "runtime", "export", "benchmarks"},
    "tests": {"kernels", "runtime", "export", "triton_repo", "benchmarks", "tests", "_core"},
}
ALLOWED["runtime"] |= {"_core"}
HEAVY = {"torch", "monai", "onnx", "onnxscript", "triton"}
ON_DEVICE = {"device": {"torch"}}
"""What the runtime's folder for devices may import, besides."""


def imports(text: str) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import, and of every name imported from a package."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from ((node.level, f"{module}.{alias.name}".strip(".")) for alias in node.names)


def faults(folder: str, name: str, text: str) -> list[str]:
    found = []
    for level, dotted in imports(text):
        first, _, rest = dotted.partition(".")
        target = rest.partition(".")[0]
        if level >= 2:
            found.append(f"relative import of level {level}: write volcast.{dotted}")
        elif level == 0 and first in ALLOWED:
            found.append(f"import of {dotted} makes a second copy: write volcast.{dotted}")
        elif level == 0 and first == "volcast" and target in {*ALLOWED, "_core"} - ALLOWED[folder]:
            found.append(f"{folder} must not import {dotted}")
        elif level == 0 and first == "triton" and folder != "tests" and not name.endswith("_triton.py"):
            found.append("only *_triton.py imports triton")
        elif (
            level == 0
            and first in HEAVY - ON_DEVICE.get(name.partition("/")[0], set())
            and folder == "runtime"
        ):
            found.append(f"runtime must not import {first}")
        elif (
            folder == "runtime"
            and _is_device(level, dotted)
            and not name.startswith(("device/", "engine_cuda."))
        ):
            found.append("only engine_cuda.py imports the device's modules, which import torch")
    return found


def _is_device(level: int, dotted: str) -> bool:
    path = f"volcast.runtime.{dotted}" if level else dotted
    return f"{path}.".startswith("volcast.runtime.device.")


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_only_what_stands_below(folder: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}: {fault}"
        for path in (ROOT / folder).rglob("*.py")
        for fault in faults(folder, path.relative_to(ROOT / folder).as_posix(), path.read_text())
    }
    assert not found


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("runtime", "from .device import model"),
        ("runtime", "from .device.model import DeviceModel"),
        ("runtime", "import volcast.runtime.device.model"),
        ("runtime", "from volcast.export import bundle"),
        ("runtime", "from volcast import export"),
        ("runtime", "def f():\n    import torch.nn"),
        ("runtime", "import onnx"),
        ("kernels", "import volcast.runtime.spec"),
        ("kernels", "import triton"),
        ("export", "from volcast import _core"),
        ("export", "from volcast._core import run"),
        ("benchmarks", "from volcast.triton_repo import x"),
        ("runtime", "from ..kernels import x"),
        ("export", "from runtime import spec"),
        ("tests", "import kernels"),
    ],
)
def test_the_walk_sees_a_fault(folder: str, text: str) -> None:
    assert faults(folder, "file.py", text)


def test_the_device_s_modules_may_import_torch_and_no_more() -> None:
    assert not faults("runtime", "device/model.py", "import torch\nfrom .device import Device")
    assert faults("runtime", "device/model.py", "import onnx")


def test_no_file_is_long_and_no_drawer_exists() -> None:
    files = [path for folder in ALLOWED for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    assert not [path.name for path in files if len(path.read_text().splitlines()) > 400]
    assert not [path.name for path in files if path.stem in {"utils", "common", "helpers", "misc"}]


def test_the_package_s_root_imports_only_what_is_cheap() -> None:
    for path in (ROOT / "src" / "volcast").glob("*.py"):
        top = [
            node
            for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        text = "\n".join(ast.unparse(node) for node in top)
        cheap = {"__future__", "collections", "importlib", "os", "typer", "typing", "sys"}
        assert {dotted.partition(".")[0] for _, dotted in imports(text)} <= cheap
