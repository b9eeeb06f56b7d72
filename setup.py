"""Builds the compiled sampler core, volcast._core. Needs a C++17 compiler and pybind11, nothing else."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
ParallelCompile("VOLCAST_BUILD_JOBS", default=0).install()

setup(
    packages=find_packages("src"),
    package_dir={"": "src"},
    package_data={"volcast": ["py.typed", "*.pyi", "models/**/*", "kernels/*.json", "triton_repo/**/*"]},
    ext_modules=[
        Pybind11Extension(
            "volcast._core",
            sources,
            depends=sorted(str(path) for path in Path("csrc").glob("*.hpp")),
            cxx_std=17,
            # -ffp-contract=off: a fused multiply-add would make the bits depend on the machine.
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"],
            extra_link_args=["-pthread"],
            libraries=["dl"],  # dlopen; a glibc older than 2.34 keeps it apart
        )
    ],
    cmdclass={"build_ext": build_ext},
)
