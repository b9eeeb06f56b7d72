"""What both clients do with answers, without a server."""

from __future__ import annotations

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from volcast.runtime.answers import pack_volume
from volcast.runtime.exchange import Exchange, Messages, Unavailable
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


@pytest.fixture
def messages() -> Messages:
    """Of a model that takes a label map, an image and a number."""
    found = Messages("127.0.0.1:8001", "m")
    inputs = {"mask": ("INT64", [-1, -1, -1]), "image": ("FP32", [-1, -1, -1]), "steps": ("INT32", [1])}
    metadata = service_pb2.ModelMetadataResponse()
    for name, (datatype, shape) in inputs.items():
        metadata.inputs.add(name=name, datatype=datatype, shape=shape)
    found.learn(metadata)
    return found


@pytest.mark.parametrize("bad", [np.nan, 0.5])
@pytest.mark.filterwarnings("error")
def test_a_refused_label_map_is_told_by_its_shape(messages: Messages, bad: float) -> None:
    volume = Volume(np.full((9, 9, 9), bad, np.float32), np.eye(4), (1.0, 1.0, 1.0))
    for given in (volume.array, volume):
        with pytest.raises(ValueError) as caught:
            messages.request({"mask": given})
        assert str(caught.value) == "[client] mask=float32 (9, 9, 9): need INT64 [-1, -1, -1]"
    with pytest.raises(ValueError, match="steps=2.5: need INT32"):
        messages.request({"steps": 2.5})


def test_an_image_may_have_its_axis_of_one_channel(messages: Messages) -> None:
    image = np.random.default_rng(0).random((1, 2, 3, 4), np.float32)
    (sent,) = messages.request({"image": image}).inputs
    assert list(sent.shape) == [2, 3, 4]


def test_a_sweep_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance: 0 weights: give one or several, or leave it out"):
        Exchange(1, 0, {"guidance": []}, tries=1, shared_memory=False)
