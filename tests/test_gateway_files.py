"""Images to start from and label maps through the gateway, before a real tritonserver: the bits of `Model.sample`."""

from __future__ import annotations

import base64
import gzip
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gateways import EVENTS, GENERATE, LIMITS, events, gateway, until
from served import Served

from volcast import Inpaint
from volcast.runtime.artifact import read_artifact
from volcast.runtime.pipeline import Model, load
from volcast.runtime.spec import ConditionField, ConditionSpec, LowResSpec
from volcast.runtime.volume import Volume, read_nifti
from volcast.triton_repo.gateway.body import BodyReader
from volcast.triton_repo.gateway.refusal import Refusal
from volcast.triton_repo.gateway.schema import body_schema
from volcast.triton_repo.gateway.server import Gateway
from volcast.triton_repo.gateway.settings import Limits

AFFINE = np.array([[1, 0, 0, -5], [0, 1.5, 0, 7], [0, 0, 2, 9], [0, 0, 0, 1.0]])
TILTED = np.array([[0.875, 0.734375, 0, 3], [-0.484375, 1.3125, 0, 7], [0, 0, 2, 9], [0, 0, 0, 1.0]])
TURNED = np.array([[0, 1.5, 0, 3], [1, 0, 0, 7], [0, 0, -2, 9], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def opened(masked_gaussian: Path, labelled: Served) -> Iterator[Gateway]:
    with gateway(masked_gaussian, labelled) as running:
        yield running


@pytest.fixture
def client(opened: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=opened.url, timeout=60) as one:
        yield one


@pytest.fixture(scope="module")
def model(masked_gaussian: Path) -> Iterator[Model]:
    with load(masked_gaussian, engine="onnxruntime", threads=1) as one:
        yield one


def image(shape: tuple[int, ...] = (8, 12, 8), affine: np.ndarray = AFFINE) -> Volume:
    spacing = tuple(float(one) for one in np.linalg.norm(affine[:3, :3], axis=0))
    return Volume(np.random.default_rng(1).normal(size=shape).astype(np.float32), affine, spacing)


def label_map(affine: np.ndarray = AFFINE, shape: tuple[int, ...] = (8, 12, 8)) -> Volume:
    labels = np.random.default_rng(2).integers(0, 3, shape).astype(np.float32)
    return Volume(labels, affine, (1.0, 1.5, 2.0))


def text(volume: Volume, zipped: bool = True) -> str:
    content = volume.nifti()
    return base64.b64encode(gzip.compress(content) if zipped else content).decode()


def saved(content: bytes, folder: Path) -> Volume:
    (folder / "out.nii.gz").write_bytes(content)
    return read_nifti(folder / "out.nii.gz")


@pytest.mark.parametrize("zipped", [True, False], ids=["nii.gz", "nii"])
def test_a_volume_begins_with_the_image_and_lies_where_it_does(
    client: httpx.Client, model: Model, tmp_path: Path, zipped: bool
) -> None:
    # Another size than the artifact's own, a little turned: as `Model.sample` takes it.
    given = image((4, 8, 12), TILTED)
    asked: dict[str, Any] = {
        "steps": 6,
        "strength": 0.5,
        "condition": {"mask": text(label_map(shape=given.array.shape))},
    }
    answer = client.post(GENERATE, json={"seed": 3, "image": text(given, zipped), **asked})
    assert answer.status_code == 200, answer.text
    asked["condition"] = {"mask": label_map(shape=given.array.shape)}
    alone = model.sample(3, image=given, **asked)
    found = saved(answer.content, tmp_path)
    np.testing.assert_array_equal(found.array, alone.array)
    np.testing.assert_array_equal(found.affine, given.affine)
    assert gzip.decompress(answer.content) == alone.nifti()
    bare = model.sample(3, size=(2, 4, 6), **{**asked, "strength": 1})
    assert not np.array_equal(found.array, bare.array)  # the image is no ornament


def test_events_tell_where_the_volumes_lie(client: httpx.Client, model: Model, tmp_path: Path) -> None:
    hidden = Volume((np.indices((8, 12, 8))[0] < 4).astype(np.float32), AFFINE, (1.0, 1.5, 2.0))
    body = {"seed": 4, "steps": 6, "num_samples": 2, "preview_every": 2, "image": text(image()), "strength": 0.9,
            "guidance": [1, 2.1], "negative": {"anterior": 0.3}, "inpaint": {"mask": text(hidden), "resamples": 2},
            "condition": {"mask": text(label_map())}}  # fmt: skip
    with client.stream("POST", GENERATE, json=body, headers=EVENTS) as answer:
        told = list(events(answer))
    assert told[-1] == ("end", {})
    volumes = {value["sample"]: value for name, value in told if name == "volume"}
    expected = list(
        model.sample_many(
            2, 4, steps=6, image=image(), strength=0.9, condition={"mask": label_map()}, guidance=[1, 2.1],
            negative={"anterior": 0.3}, inpaint=Inpaint(hidden, resamples=2),
        )
    )  # fmt: skip
    assert [value["guidance"] for _, value in sorted(volumes.items())] == [1, 2.1, 1, 2.1]
    for sample, alone in enumerate(expected):
        np.testing.assert_array_equal(volumes[sample]["affine"], AFFINE)
        assert volumes[sample]["shape"] == [8, 12, 8] and len(volumes[sample]["seconds"]) == 2
        content = client.get(volumes[sample]["url"]).content
        assert gzip.decompress(content) == alone.nifti() and volumes[sample]["bytes"] == len(content)
    previews = [value for name, value in told if name == "preview"]
    shown = saved(client.get(previews[0]["url"]).content, tmp_path)
    np.testing.assert_array_equal(shown.affine, AFFINE)
    assert shown.array.shape == (8, 12, 8)


def test_a_label_map_is_a_condition_and_places_the_volume(client: httpx.Client, model: Model) -> None:
    contents = []
    for given, value in [
        (text(label_map()), label_map()),
        (np.zeros((8, 12, 8), int).tolist(), np.zeros((8, 12, 8), int)),
    ]:
        answer = client.post(
            GENERATE, json={"seed": 5, "steps": 4, "guidance": 2, "condition": {"mask": given}}
        )
        assert answer.status_code == 200, answer.text
        contents.append(gzip.decompress(answer.content))
        assert contents[-1] == model.sample(5, steps=4, guidance=2, condition={"mask": value}).nifti()
    assert contents[0] != contents[1]


@pytest.fixture(scope="module")
def reader(masked_gaussian: Path) -> BodyReader:
    spec = read_artifact(masked_gaussian)
    return BodyReader(spec, body_schema(spec), Limits(voxels=2 * 8 * 12 * 8))


LABELS = text(label_map())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"image": 5}, "image=5: need an image to start from"),
        ({"image": "x"}, "image: no base64"),
        ({"image": text(image((8, 12, 16)))[:-40]}, "image: the file ends early"),
        ({"image": text(image((8, 12, 6)))}, "o2=6: need 4..32 and a multiple of 4"),
        ({"image": text(image((8, 12, 24)))}, "up to 1536 voxels"),
        ({"image": text(image()), "size": [2, 2, 2]}, "size=[2, 2, 2]: the image's latent is [4, 6, 4]"),
        ({"image": text(image((8, 12, 4)))}, "axis o2 is 4 here"),
        ({"image": text(image()), "strength": 0}, "strength=0.0"),
        ({"image": text(image()), "strength": 1.5}, "strength=1.5"),
        ({"strength": 0.5}, "strength=0.5 without an image"),
        ({"condition": {"mask": "x"}}, "[request] mask: no base64"),
        ({"condition": {"anterior": LABELS}}, "condition 'anterior' takes no file; those that do: mask"),
        ({"condition": {"front": LABELS}}, "condition 'front' takes no file"),
        ({"condition": {"x" * 101: 1}}, "need by name of up to 100 letters"),
        ({"condition": {}}, "mask is missing: give a int64 label map"),
        ({"condition": {"mask": text(label_map(TURNED))}}, "mask has axes ARI: need RAS"),
        ({"image": text(image((12, 8, 8), TURNED))}, "image has axes ARI: need RAS"),
        ({"condition": {"mask": text(label_map(2 * AFFINE))}}, "mask has voxels of 2 x 3 x 4 mm: the model has 1 x 1.5 x 2"),
        ({"condition": {"mask": text(label_map(shape=(4, 12, 8)))}}, "axis o0 is 8 here"),
        ({"condition": {"mask": text(image())}}, "holds fractions"),
        ({"condition": {"mask": text(Volume(label_map().array * 2, AFFINE, (1, 1.5, 2)))}}, "unknown labels 4: the model knows 0 background"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(reader: BodyReader, body: dict[str, Any], message: str) -> None:
    whole = {"condition": {"mask": LABELS}, **body}
    with pytest.raises(Refusal) as caught:
        reader.read(json.dumps(whole).encode())
    assert caught.value.code == "invalid" and message in caught.value.message, caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 600


def test_files_are_offered_where_the_model_takes_them(client: httpx.Client, gaussian: Path) -> None:
    (entry,) = client.get("/v1/models").json()["models"]
    assert entry["image"] is True and entry["limits"]["file_bytes"] == LIMITS.file_bytes
    assert {one["name"]: one["file"] for one in entry["conditions"]} == {"context": False, "mask": True}
    assert entry["conditions"][1]["labels"] == ["background", "front", "back"]
    body = client.get("/openapi.json").json()["components"]["schemas"]["Generate"]["properties"]
    assert body["image"]["contentEncoding"] == "base64" and "strength" in body
    kinds = body["condition"]["properties"]["mask"]["anyOf"]
    assert [one["type"] for one in kinds] == ["array", "string"] and kinds[1]["contentEncoding"] == "base64"
    # A model without an encoder takes no image, and no larger body.
    spec = read_artifact(gaussian)
    bare = spec.model_copy(update={"programs": {k: v for k, v in spec.programs.items() if k != "encode"}})
    assert {"image", "strength"}.isdisjoint(body_schema(bare).model_fields)
    assert BodyReader(bare, body_schema(bare), LIMITS).most_bytes == LIMITS.body_bytes


def test_an_upscaler_s_volumes_lie_where_its_low_resolution_image_does(gaussian: Path) -> None:
    """The same field of view: its first corner stays where it is, its voxels are half as large."""
    own = read_artifact(gaussian)
    level = ConditionField(name="noise_level", minimum=0, maximum=350, default=20)
    conditions = (
        ConditionSpec(name="low_res", shape=(1, "d0", "d1", "d2")),
        ConditionSpec(name="tau", dtype="int64", shape=(), fields=(level,)),
    )
    spec = own.model_copy(update={"conditions": conditions, "low_res": LowResSpec()})
    coarse = AFFINE @ np.diag([2, 2, 2, 1])
    given = image((4, 6, 8), coarse)
    reader = BodyReader(spec, body_schema(spec), Limits(voxels=8 * 12 * 16))
    order = reader.read(json.dumps({"steps": 2, "condition": {"low_res": text(given)}}).encode())
    assert order.shape == (8, 12, 16) and order.place is not None  # not the artifact's own, 8 x 12 x 8
    np.testing.assert_array_equal(order.tensors["low_res"], given.array[None])
    corner = np.array([-0.5, -0.5, -0.5, 1])
    np.testing.assert_array_equal(order.place.affine @ corner, coarse @ corner)  # of halves: exact
    np.testing.assert_array_equal(order.place.affine[:3, :3], AFFINE[:3, :3])
    assert order.place.spacing_mm == (1.0, 1.5, 2.0)
    lists = {"condition": {"low_res": given.array.tolist()}}
    assert reader.read(json.dumps(lists).encode()).shape == (8, 12, 16)
    for wrong, message in (
        (image((4, 6, 10), coarse), "8 x 12 x 20 = 1920 voxels"),
        (image((4, 6, 8)), "voxels of 1 x 1.5 x 2 mm: the model has 2 x 3 x 4"),
    ):
        with pytest.raises(Refusal, match=message):
            reader.read(json.dumps({"condition": {"low_res": text(wrong)}}).encode())


def test_only_files_may_be_large(masked_gaussian: Path, labelled: Served) -> None:
    limits = Limits(rate=1e6, body_bytes=2**14, file_bytes=2**15)
    small, large = text(label_map()), text(image((16, 12, 8)), zipped=False)
    assert len(small) < 2**12 and 2**13 < len(large) < 2**14
    with (
        gateway(masked_gaussian, labelled, limits=limits) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):

        def ask(**body: Any) -> httpx.Response:
            return client.post(GENERATE, json={"steps": 1, "condition": {"mask": small}, **body})

        assert ask(image=text(image(), zipped=False)).status_code == 200
        files = {"image": large, "condition": {"mask": text(label_map(shape=(16, 12, 8)), zipped=False)}}
        assert len(json.dumps(files)) > 2**14  # together more than a body without files may be
        answer = ask(**files)
        assert answer.status_code == 200, answer.text
        numbers = ask(condition={"mask": np.zeros((32, 24, 16), int).tolist()})
        assert numbers.status_code == 413 and "without its files: need 16384 bytes" in numbers.text
        more = ask(image="A" * 2**15)
        assert more.status_code == 413 and "need 32768 bytes or fewer" in more.text


def test_what_is_held_for_all_callers_is_bounded(masked_gaussian: Path, labelled: Served) -> None:
    body = json.dumps({"steps": 1, "condition": {"mask": text(label_map(), zipped=False)}}).encode()
    body = body.ljust(2**15)  # more than what is held of it once it is read
    most = len(body) + 1
    limits = Limits(rate=1e6, held_bytes=int(1.5 * len(body)), file_bytes=most, body_bytes=most)
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body) + 1}\r\n\r\n"
    with (
        gateway(masked_gaussian, labelled, limits=limits) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as slow:
            slow.sendall(head.encode() + body)  # one byte is missing: it is held until that comes

            def refused() -> httpx.Response | None:
                answer = client.post(GENERATE, content=body, headers={"content-type": "application/json"})
                return answer if answer.status_code == 503 else None

            found = until(refused)
            assert (
                "other requests' images fill the memory" in found.text and found.headers["retry-after"] == "1"
            )
        assert until(
            lambda: (
                client.post(GENERATE, content=body, headers={"content-type": "application/json"}).status_code
                == 200
            )
        )
