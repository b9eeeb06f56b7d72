"""The race of the zoo's small models: every contestant makes MONAI's numbers. Nothing asserts on speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from volcast.benchmarks import zoo


@pytest.mark.parametrize("name", ["mednist_gan", "spade_gan"])
def test_the_race(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "ENGINES", ("onnxruntime",))
    threads = torch.get_num_threads()
    try:
        line = zoo.case(name, tmp_path / "artifact", 1, 2)
    finally:
        torch.set_num_threads(threads)
    assert line["call_ms"].keys() - {"MONAI eager"} == line["relative_l2"].keys()
    # verification.STEP: float32 sums in another order.
    assert all(error < 1e-4 for error in line["relative_l2"].values())
    assert all(ratio["median"] > 0 for ratio in line["monai_over_volcast"].values())
