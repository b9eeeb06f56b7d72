from __future__ import annotations

import json
import math

import pytest

from volcast.benchmarks.tune import as_json, neighbours, search
from volcast.kernels.configuration import TABLE, configuration, consulted, pinned


def test_neighbours_change_one_setting() -> None:
    assert list(neighbours({"warps": 4, "stages": 1})) == [
        {"warps": 2, "stages": 1},
        {"warps": 8, "stages": 1},
        {"warps": 4, "stages": 2},
    ]


def test_search_finds_the_minimum_of_a_bowl() -> None:
    def bowl(settings: dict[str, int]) -> float:
        return 1 + abs(math.log2(settings["tile"] / 4096)) + abs(math.log2(settings["warps"] / 8))

    assert search({"tile": 256, "warps": 1}, bowl) == ({"tile": 4096, "warps": 8}, 1.0)


def test_search_passes_over_what_does_not_run_and_over_noise() -> None:
    times = {1: 1.0, 2: 0.99, 4: None}
    assert search({"warps": 1}, lambda settings: times[settings["warps"]]) == ({"warps": 1}, 1.0)
    with pytest.raises(ValueError, match=r"\[tune\] the pinned settings {'warps': 4} do not run"):
        search({"warps": 4}, lambda settings: times[settings["warps"]])


def test_the_committed_table_is_as_the_script_writes_it() -> None:
    assert as_json(json.loads(TABLE.read_text())) == TABLE.read_text()


def test_every_row_can_be_reached_and_every_dtype_has_one() -> None:
    for kernel, entry in json.loads(TABLE.read_text()).items():
        assert entry["basis"]
        reached = set()
        for dtype in ("float32", "float16", "bfloat16"):
            rows = [(place, row) for place, row in enumerate(entry["rows"]) if dtype in row["dtypes"]]
            limits = [math.inf if row["up_to"] is None else row["up_to"] for _, row in rows]
            assert limits == sorted(set(limits)) and limits[-1:] in ([], [math.inf]), kernel
            reached |= {place for place, _ in rows}
        assert reached == set(range(len(entry["rows"])))


def test_what_is_pinned_is_taken_and_what_is_taken_is_noted() -> None:
    import torch

    with consulted() as rows:
        settings = configuration("group_norm_split", torch.float16, 10)
        with pinned({"group_norm_split": {"warps": 1}}):
            assert configuration("group_norm_split", torch.float16, 10) == {"warps": 1}
    assert rows == {("group_norm_split", 0)}
    assert configuration("group_norm_split", torch.float16, 10) == settings
    with pytest.raises(LookupError, match=r"no configuration for int8, size 1"):
        configuration("group_norm_split", torch.int8, 1)
