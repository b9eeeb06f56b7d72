"""Negative conditions, sweeps and masks to inpaint in a request's body, without a server: what it is sent, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_gateway_files import AFFINE, TILTED, image, label_map, text

from volcast.runtime.artifact import read_artifact
from volcast.runtime.asked import read_request
from volcast.runtime.spec import ArtifactSpec
from volcast.runtime.volume import Volume
from volcast.triton_repo.gateway.body import BodyReader
from volcast.triton_repo.gateway.describe import model_entry, openapi
from volcast.triton_repo.gateway.refusal import Refusal
from volcast.triton_repo.gateway.schema import body_schema
from volcast.triton_repo.gateway.settings import Limits

# Of 8 x 12 x 8 voxels 40 volumes find room: 4.04 bytes a voxel and a header, 4127 each.
LIMITS = Limits(voxels=2 * 8 * 12 * 8, previews=50, store_bytes=40 * 4127)
HIDDEN = np.zeros((8, 12, 8), np.float32)
HIDDEN[2:4, 4:8, :6] = 3


def mask(affine: np.ndarray = AFFINE, array: np.ndarray = HIDDEN) -> Volume:
    return Volume(array.astype(np.float32), affine, tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()))


@pytest.fixture(scope="module")
def spec(masked_gaussian: Path) -> ArtifactSpec:
    return read_artifact(masked_gaussian)


@pytest.fixture(scope="module")
def reader(spec: ArtifactSpec) -> BodyReader:
    return BodyReader(spec, body_schema(spec), LIMITS)


LABELS = text(label_map())


def test_a_body_becomes_what_the_server_reads(reader: BodyReader, spec: ArtifactSpec) -> None:
    other = label_map(TILTED)
    body: dict[str, Any] = {
        "num_samples": 2, "guidance": [1, 2.5, 7.1], "steps": 10, "scheduler": "ddpm", "image": text(image()),
        "condition": {"mask": LABELS, "anterior": 0.3}, "negative": {"posterior": 0.7, "mask": text(other)},
        "inpaint": {"mask": text(mask()), "resamples": 2, "jump_length": 3, "paste": False},
    }  # fmt: skip
    order = reader.read(json.dumps(body).encode())
    assert order.volumes == 6 and order.steps > 10  # with the steps that are run again
    np.testing.assert_array_equal(order.place.affine, AFFINE)  # type: ignore[union-attr]
    # Three times the image, the mask and two label maps, and nothing beside them.
    arrays = [order.tensors[name] for name in ("image", "inpaint_mask", "mask", "negative_mask")]
    assert 0 <= order.bytes - 3 * sum(one.nbytes for one in arrays) < 1024
    assert set(vars(order.place)) == {"affine", "spacing_mm"}
    asked = read_request(spec, order.tensors)
    assert (asked.volumes, asked.weights, asked.settings["guidance"]) == (6, (1.0, 2.5, 7.1), 1.0)
    assert asked.condition["anterior"] == 0.3 and asked.negative["posterior"] == 0.7
    np.testing.assert_array_equal(asked.condition["mask"], label_map().array)
    np.testing.assert_array_equal(asked.negative["mask"], other.array)
    assert asked.inpaint is not None
    assert (asked.inpaint.resamples, asked.inpaint.jump_length, asked.inpaint.paste) == (2, 3, False)
    np.testing.assert_array_equal(asked.inpaint.mask, HIDDEN)
    one = reader.read(json.dumps({"guidance": 2.1, "condition": {"mask": LABELS}}).encode())
    assert (one.volumes, read_request(spec, one.tensors).settings) == (1, {"guidance": 2.1})


PAINT = {"image": text(image()), "scheduler": "ddim"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"guidance": []}, "guidance=[]: need weight of"),
        ({"guidance": [1, "2"]}, "guidance=[1, '2']: need weight of"),
        ({"guidance": [1, 101]}, "guidance=101.0"),
        ({"guidance": [1] * 65}, "need weight of"),
        ({"guidance": [1, 2], "num_samples": 33}, "33 samples at 2 weights are 66 volumes: need 1..64"),
        ({"guidance": [1, 2], "steps": 100, "preview_every": 3}, "more than 50 previews; need 4 or more"),
        ({"negative": {"anterior": 0.5}}, "negative without guidance"),
        ({"negative": 5, "guidance": 2}, "negative=5: need with guidance: as condition"),
        ({"negative": {"front": 0.5}, "guidance": 2}, "[negative] unknown name 'front'"),
        ({"negative": {"anterior": 2}, "guidance": 2}, "[negative] anterior=2"),
        ({"negative": {"anterior": LABELS}, "guidance": 2}, "negative 'anterior' takes no file; those that do: mask"),
        ({"negative": {"mask": "x"}, "guidance": 2}, "[request] negative mask: no base64"),
        ({"inpaint": {"mask": text(mask())}}, "inpaint without an image: give the image"),
        ({"inpaint": 1, **PAINT}, "inpaint=1: need a part of the image"),
        ({"inpaint": {"paste": True}, **PAINT}, "inpaint without mask: need a NIfTI file in base64"),
        ({"inpaint": {"mask": text(mask()), "eta": 1}, **PAINT}, "unknown field inpaint.eta; known: mask, resamples"),
        ({"inpaint": {"mask": text(mask()), "\ud800": 1}, **PAINT}, "[request] inpaint"),
        ({"inpaint": {"mask": text(mask()), "resamples": 1.5}, **PAINT}, "inpaint.resamples=1.5: need runs of each stretch"),
        ({"inpaint": {"mask": text(mask()), "paste": 1}, **PAINT}, "inpaint.paste=1: need true, or false"),
        ({"inpaint": {"mask": text(mask()), "jump_length": 2**40}, **PAINT}, "inpaint.jump_length=1099511627776: need"),
        ({"inpaint": {"mask": "x"}, **PAINT}, "[request] inpaint mask: no base64"),
        ({"inpaint": {"mask": text(mask(TILTED))}, **PAINT}, "the mask lies elsewhere than the image"),
        ({"inpaint": {"mask": text(mask(2 * AFFINE))}, **PAINT}, "inpaint mask has voxels of 2 x 3 x 4 mm"),
        ({"inpaint": {"mask": text(mask(array=HIDDEN[:4]))}, **PAINT}, "the mask is float32 (4, 12, 8): need numbers of the image's"),
        ({"inpaint": {"mask": text(mask(array=0 * HIDDEN))}, **PAINT}, "the mask is 0 everywhere"),
        ({"inpaint": {"mask": text(mask(array=0 * HIDDEN + 1))}, **PAINT}, "no voxel of the latent (4, 6, 4) lies wholly outside"),
        ({"inpaint": {"mask": text(mask()), "resamples": 0}, **PAINT}, "[request] inpaint.resamples=0: need 1..1000"),
        ({"inpaint": {"mask": text(mask()), "resamples": 1000}, **PAINT}, "20000 steps in all: need 10000 or fewer"),
        ({"inpaint": {"mask": text(mask()), "jump_length": 20}, **PAINT}, "jumps back 20 of 20 steps"),
        ({"inpaint": {"mask": text(mask())}, **PAINT, "scheduler": "pndm"}, "pndm remembers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(reader: BodyReader, body: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal) as caught:
        reader.read(json.dumps({"condition": {"mask": LABELS}, **body}).encode())
    assert caught.value.code == "invalid" and message in caught.value.message, caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 600


def test_a_sweep_must_find_room(reader: BodyReader) -> None:
    body = {"guidance": list(range(41)), "condition": {"mask": LABELS}}
    with pytest.raises(Refusal, match="41 volumes of 8 x 12 x 8 are more than this server keeps"):
        reader.read(json.dumps(body).encode())
    body["guidance"] = list(range(40))
    assert reader.read(json.dumps(body).encode()).volumes == 40


def test_only_models_that_have_conditions_and_images_are_asked_for_them(spec: ArtifactSpec) -> None:
    assert model_entry(spec, "g", LIMITS)["guidance"] is True
    fields = openapi(spec, "g", body_schema(spec), LIMITS, keyed=False)["components"]["schemas"]
    given = fields["Generate"]["properties"]
    assert given["negative"]["properties"] == given["condition"]["properties"]
    assert fields["Inpainting"]["properties"]["mask"]["contentEncoding"] == "base64"
    bare = spec.model_copy(
        update={"conditions": (), "programs": {k: v for k, v in spec.programs.items() if k != "encode"}}
    )
    assert {"negative", "inpaint"}.isdisjoint(body_schema(bare).model_fields)
    assert model_entry(bare, "g", LIMITS)["guidance"] is False
