"""The compiled core for a machine that is not here, with zig as the compiler: `pip install ziglang`, no toolchain."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import volcast

GLIBC = "2.34"
"""The oldest C library that the core runs on: JetPack 6 has 2.35, JetPack 7 2.39. From 2.34 on threads are part of it."""


def cross_core(folder: Path, machine: str) -> Path:
    """Compile volcast._core for this Python's version on `machine` ("aarch64") with glibc 2.34, into `folder`.

    CPython's headers say the same on every 64-bit Linux: those of this Python serve.

    Raises ValueError: no zig, no pybind11, no sources of the core, or they do not compile.
    """
    root = Path(volcast.__file__).resolve().parents[2]
    sources = sorted((root / "csrc").glob("*.cpp"))
    if not sources:
        raise ValueError(
            f"[pack] --platform {machine} compiles volcast's core, whose sources are not here; pack from a checkout, or "
            "build the wheel on the device: pip wheel --no-deps -w wheels CHECKOUT"
        )
    for package, name in (("ziglang", "ziglang"), ("pybind11", "pybind11")):
        if find_spec(package) is None:
            raise ValueError(
                f"[pack] --platform {machine} needs {name} to compile volcast's core; pip install {name}"
            )
    import pybind11

    core = folder / f"_core.{sys.implementation.cache_tag}-{machine}-linux-gnu.so"
    command = [
        sys.executable, "-m", "ziglang", "c++", "-target", f"{machine}-linux-gnu.{GLIBC}", "-shared", "-fPIC",
        # As setup.py has them; -ffp-contract=off keeps the bits of every machine equal.
        "-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-s",
        f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", *map(str, sources), "-o", str(core),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise ValueError(
            f"[pack] the core does not compile for {machine}: {(lines or ['no reason given'])[0][:200]}"
        )
    return core
