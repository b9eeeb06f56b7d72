"""What both clients do with answers, without a server."""

from __future__ import annotations

import numpy as np
import pytest

from volcast.runtime.answers import pack_volume
from volcast.runtime.exchange import Exchange, Unavailable
from volcast.runtime.interface import Array, as_bytes
from volcast.runtime.volume import Volume


def answer(sample: int) -> dict[str, Array]:
    volume = Volume(np.full((2, 3, 4), sample, np.float32), np.eye(4), (1.0, 1.0, 1.0))
    return {
        "kind": as_bytes("volume"),
        "sample": np.array([sample], np.int32),
        **pack_volume(volume, "float32"),
    }


def test_answers_that_end_early_are_a_reason_to_ask_again() -> None:
    exchange = Exchange(2, 0, {}, tries=2, shared_memory=False)
    exchange.hear(answer(1), starts=False)
    with pytest.raises(Unavailable, match=r"ended without volume 0 of 2; ask again") as error:
        exchange.volumes()
    assert exchange.pause_s(error.value) == 0.25
    exchange.hear(answer(0), starts=False)
    assert [volume.array[0, 0, 0] for volume in exchange.volumes()] == [0, 1]


def test_a_sweep_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance: 0 weights: give one or several, or leave it out"):
        Exchange(1, 0, {"guidance": []}, tries=1, shared_memory=False)
