"""Kernels compiled for GPUs that are not here. In processes of their own: the interpreter compiles nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from volcast.kernels.compile_triton import CAPABILITIES, compile_launch, is_aligned
from volcast.kernels.group_norm_triton import group_norm_launches

TENSOR_CORES = {80: "HMMA", 87: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


@pytest.mark.slow
# 8.7 and 8.9 take the instructions of 8.0; 8.7 has its shared memory, 8.9 that of 12.0.
@pytest.mark.parametrize("capability", sorted(CAPABILITIES.keys() - {87, 89}))
def test_every_case_fits_every_device(capability: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "triton")
    command = [sys.executable, "-m", "volcast.benchmarks.kernels", "--compile-only", "--sm", str(capability)]
    done = subprocess.run(
        [*command, "-o", tmp_path / "lines"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    operations = {line["operation"] for line in lines}
    assert operations == {
        "group_norm", "layer_norm", "attention", "input_head", "output_head", "upsample_convolution", "pointwise",
        "sampler_step",
    }  # fmt: skip
    for line in lines:
        assert line["timed"] is None
        used = set()
        for kernel in line["resources"]:
            assert kernel["sm"] == capability
            assert kernel["spill_bytes"] == 0, (line["case"], kernel)
            assert kernel["registers"] * kernel["threads"] <= 65536
            assert kernel["shared_bytes"] <= CAPABILITIES[capability] * 1024
            used |= set(kernel["instructions"])
        # Products run on the device's own tensor cores; norms fetch their tiles ahead.
        if line["operation"] in ("attention", "upsample_convolution", "output_head", "input_head"):
            assert {TENSOR_CORES[capability], "HMMA"} & used, line["case"]
        if line["operation"] == "upsample_convolution":
            assert TENSOR_CORES[capability] in used
        if line["operation"] == "group_norm":
            assert "LDGSTS" in used


def test_what_cannot_be_compiled_is_named() -> None:
    x, one = torch.empty(1, 2, 2, 2, 8, device="meta").movedim(-1, 1), torch.empty(8, device="meta")
    (launch,) = group_norm_launches(x, 2, one, one, 1e-6, "silu", None, None, None)[2]
    with pytest.raises(ValueError, match=r"\[build\] sm=75: need one of 80, 87, 89, 90, 100, 120"):
        compile_launch(launch, 75)
    if os.environ.get("TRITON_INTERPRET") == "1":
        with pytest.raises(ValueError, match=r"\[build\] TRITON_INTERPRET is set: unset it"):
            compile_launch(launch, 90)


def test_alignment_is_that_of_the_view() -> None:
    x = torch.empty(64, dtype=torch.float16)
    assert is_aligned(x) and is_aligned(x[8:])
    assert not is_aligned(x[4:])
