"""The networks' benchmark: what it counts, that its ways to run a model agree, its table. Nothing asserts on speed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from volcast.benchmarks import network_cases as cases
from volcast.benchmarks import network_counts, networks
from volcast.benchmarks.network_counts import Counted
from volcast.benchmarks.network_ours import VolcastWay, outside_percent
from volcast.benchmarks.network_peers import MonaiWay
from volcast.benchmarks.network_report import as_markdown
from volcast.benchmarks.networks import MS_SSIM, STEPS, counted, fractions, given, raced, turns
from volcast.export.bundle_networks import plan_network
from volcast.runtime.artifact import read_artifact

CPU = torch.device("cpu")
BRATS_UNET = {
    "spatial_dims": 3, "in_channels": 4, "out_channels": 4, "channels": (32, 64), "num_res_blocks": 1,
    "attention_levels": (False, True), "num_head_channels": (0, 32), "norm_num_groups": 8, "include_fc": False,
}  # fmt: skip
DECODER = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4, "channels": (32, 32),
    "num_res_blocks": 1, "norm_num_groups": 8, "attention_levels": (False, False), "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}  # fmt: skip
LATENT = (8, 12, 8)
SMALL = cases.Case(
    name="small",
    bundle=cases.published(
        "small", cases.Published(network="DiffusionModelUNet", arguments=BRATS_UNET),
        cases.Published(network="AutoencoderKL", arguments=DECODER), (4, *LATENT), cases.ddim(0.0195),
    ),
    parts=(cases.Part(part="step", latent=LATENT, batches=(1, 2)), cases.Part(part="decode", latent=LATENT),
           cases.Part(part="volume", latent=LATENT)),
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's artifact with its device programs."""
    return cases.artifact(SMALL, tmp_path_factory.mktemp("networks"))


@pytest.mark.parametrize(
    ("bundle", "latent", "millions", "teraflops"),
    # Parameters and FLOPs of the published networks, counted on MONAI's modules from the published configs.
    [("BRAIN_LDM", (7, 20, 28, 20), 553.2, 1.452), ("BRATS", (8, 36, 44, 28), 189.3, 2.962)],
)
def test_the_published_networks_have_their_published_size(
    monkeypatch: pytest.MonkeyPatch, bundle: str, latent: tuple[int, ...], millions: float, teraflops: float
) -> None:
    monkeypatch.setattr(cases, "drawn", lambda network, seed: network)  # stays on meta
    unet = getattr(cases, bundle)(False).unet
    assert sum(value.numel() for value in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        context = {"context": torch.empty(1, 1, 4)} if bundle == "BRAIN_LDM" else {}
        unet(torch.empty(1, *latent), torch.empty(1), **context)
    assert counter.get_total_flops() / 1e12 == pytest.approx(teraflops, abs=6e-4)


def test_drawn_networks_keep_the_size_of_what_passes_through() -> None:
    plan = plan_network("unet", "DiffusionModelUNet", BRATS_UNET)
    network = cases.drawn(plan.build(), 0)
    again = cases.drawn(plan.build(), 0)
    x = torch.randn(1, 4, *LATENT, generator=torch.Generator().manual_seed(0))
    out = network(x, torch.tensor([500.0]))
    assert torch.equal(out, again(x, torch.tensor([500.0])))
    # Unit variance out of the last norm (SiLU takes about two thirds), times variance 1 of the product.
    assert 0.3 < float(out.std()) < 2


@pytest.mark.parametrize("batch", [1, 2])
def test_counts_are_the_artifact_s_own(small: Path, batch: int) -> None:
    counts, spec = Counted(small), read_artifact(small)
    step, decode = counts.program("step", LATENT, batch), counts.program("decode", LATENT, 1)
    # The manifest's FLOPs are torch's count of the captured program.
    assert step["flops"] == batch * spec.programs["step"].flops
    assert decode["flops"] == spec.programs["decode"].flops
    assert step["launches"] >= sum(step["operations"].values()) > 20
    assert step["peak_bytes"] > step["weight_bytes"] > 0 and step["slabs"] is None
    volume = counted(SMALL.parts[2], batch, counts)
    assert volume["flops"] == STEPS * step["flops"] + batch * decode["flops"]
    assert volume["operations"]["convolution"] == sum(
        times * one["operations"]["convolution"] for times, one in ((STEPS, step), (batch, decode))
    )


def test_what_does_not_fit_is_decoded_in_slabs(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counted(small)
    whole = counts.program("decode", LATENT, 1)
    assert whole["slabs"] is None and whole["launches"] > 0
    for limit, fits in ((whole["peak_bytes"], True), (whole["peak_bytes"] - 1, False)):
        monkeypatch.setattr(network_counts, "LIMIT", limit)
        found = counts.program("decode", LATENT, 1)
        assert (found["slabs"] is None) == fits and found["peak_bytes"] <= limit


def test_a_larger_latent_than_the_exported_one_is_counted(small: Path) -> None:
    counts = Counted(small)
    # Twice the voxels: every convolution of a decoder without attention doubles.
    once, twice = (counts.program("decode", size, 1)["flops"] for size in (LATENT, (16, 12, 8)))
    assert twice == 2 * once


@pytest.mark.slow
def test_the_ways_to_run_a_model_agree(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "STEPS", 3)
    spec, bundle = read_artifact(small), SMALL.bundle(True)
    ways = [MonaiWay("MONAI eager", bundle, CPU), VolcastWay(small, "cpu")]
    for part in SMALL.parts:
        for batch in (1, 2) if part.part == "step" else (1,):
            monai, ours = raced(part, given(spec, part, batch), ways, rounds=1)
            assert monai["reason"] is None and ours["reason"] is None, (part, monai, ours)
            # float16 against float32: different, and alike.
            assert 0 == monai["relative_l2"] < ours["relative_l2"] < 0.03
            assert monai["ms"]["count"] == ours["ms"]["count"] == 1 and ours["ms"]["minimum"] > 0
            assert part.part != "volume" or ours["ms_ssim"] > MS_SSIM
    assert ways[1].reports[0].steps == 3  # type: ignore[attr-defined]


def test_another_result_is_a_reason_and_no_time(small: Path) -> None:
    spec, bundle = read_artifact(small), SMALL.bundle(True)
    other = MonaiWay("MONAI eager", bundle, CPU)
    with torch.no_grad():
        bundle.unet.out[-1].conv.weight.mul_(1.1)  # type: ignore[union-attr, operator, index]
    (_, ours) = raced(
        SMALL.parts[0], given(spec, SMALL.parts[0], 1), [other, VolcastWay(small, "cpu")], rounds=1
    )
    assert "differs from the first way" in ours["reason"] and "ms" not in ours


def test_turns_alternate_and_repeat_short_calls() -> None:
    called: list[str] = []

    def call(name: str) -> Any:
        return lambda: called.append(name)

    a, b = turns([call("a"), call("b")], rounds=2)
    assert called.count("a") > 1000 and (a.count, b.count) == (2, 2)
    changes = sum(one != other for one, other in itertools.pairwise(called))
    assert changes == 7  # a b a b for the count of repeats, then two rounds


def test_time_outside_kernels() -> None:
    assert outside_percent(0.101, 50, 2.0) == pytest.approx(100 / 101)


def line(**changed: Any) -> dict[str, Any]:
    return {
        "case": "A", "part": "step", "latent": [4, 8, 8, 8], "batch": 1, "reason": None, "reach_ms": 2.5,
        "reach_bytes": None, "flops": 10**12, "bytes": 10**9, "roofline_ms": 1.25, "launches": 7, "slabs": None,
        "peak_bytes": 2 * 10**9, "timed": None, "fraction": None, **changed,
    }  # fmt: skip


def contestant(name: str, median: float, reason: str | None = None) -> dict[str, Any]:
    return {"name": name, "reason": reason, "ms": {"median": median}, "peak_bytes": 3 * 10**9}


def test_the_table_without_a_gpu_says_not_yet_timed() -> None:
    wide = line(batch=8, roofline_ms=8.0)
    broken = {"case": "B", "part": None, "reason": "ValueError: no", "timed": None}
    *_, row, _, note = as_markdown([line(), wide, broken]).splitlines()
    assert row == (
        "| A step, latent 8x8x8 | not yet timed | not yet timed | 2.5 ms | 1.25 ms (1 ms) | 1 | 1 | not yet timed | 7 "
        "| 2 GB, planned |"
    )
    assert note == "B: ValueError: no"


def test_the_table_has_the_best_peer_and_what_was_reached() -> None:
    ways = [contestant("MONAI eager", 40), contestant("torch.compile", 5), contestant("volcast", 2.5)]
    timed = line(timed={"contestants": ways})
    timed["fraction"] = fractions(timed)
    row = as_markdown([timed]).splitlines()[-1]
    # 1e12 FLOP in 2.5 ms are 400 of 798 TFLOP/s; 1e9 bytes are 0.4 of 3.0 TB/s.
    assert row.split(" | ")[1:3] == ["5 ms (torch.compile)", "2.5 ms"]
    assert "| 50%, 13% |" in row and row.endswith("| 3 GB |")


@pytest.fixture
def results() -> Iterator[list[dict[str, Any]]]:
    path = Path(__file__).parent.parent / "benchmarks" / "results" / "networks.jsonl"
    yield [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def test_the_committed_results_cover_every_part(results: list[dict[str, Any]]) -> None:
    wanted = [
        (case.name, part.part, batch) for case in cases.CASES for part in case.parts for batch in part.batches
    ]
    assert [(one["case"], one["part"], one["batch"]) for one in results] == wanted
    for one in results:
        assert one["flops"] > 0 and one["bytes"] > 0 and one["roofline_ms"] > 0
        assert one["reach_bytes"] is None or one["peak_bytes"] <= one["reach_bytes"]
