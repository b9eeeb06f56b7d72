"""The gateway before the real tritonserver: answers, limits, keys, and what becomes of callers who leave."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gateways import EVENTS, GENERATE, LIMITS, LONG, counted, events, gateway, until
from served import Served

from volcast.runtime.pipeline import Model, load
from volcast.runtime.volume import read_nifti
from volcast.triton_repo.gateway.keys import Keys
from volcast.triton_repo.gateway.server import Gateway
from volcast.triton_repo.gateway.settings import Limits, Timing

ASKED: dict[str, Any] = {"steps": 12, "scheduler": "pndm", "guidance": 2.0, "condition": {"anterior": 0.25}}
JSON = {"content-type": "application/json"}
ONE, OTHER = "0123456789abcdef-one", "0123456789abcdef-other"


@pytest.fixture(scope="module")
def opened(gaussian: Path, served: Served) -> Iterator[Gateway]:
    with gateway(gaussian, served) as running:
        yield running


@pytest.fixture
def client(opened: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=opened.url, timeout=60) as one:
        yield one


@pytest.fixture(scope="module")
def model(gaussian: Path) -> Iterator[Model]:
    with load(gaussian, engine="onnxruntime", threads=1) as one:
        yield one


def saved(content: bytes, folder: Path) -> np.ndarray:
    (folder / "out.nii.gz").write_bytes(content)
    return read_nifti(folder / "out.nii.gz").array


def test_a_file_has_the_bits_of_sample(client: httpx.Client, model: Model, tmp_path: Path) -> None:
    answer = client.post(GENERATE, json={"seed": str(2**64 - 1), **ASKED}, headers={"x-request-id": "mine-1"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/gzip"
    assert answer.headers["x-seed"] == str(2**64 - 1) and answer.headers["x-request-id"] == "mine-1"
    np.testing.assert_array_equal(saved(answer.content, tmp_path), model.sample(2**64 - 1, **ASKED).array)


def test_a_whole_condition_and_a_drawn_seed(client: httpx.Client, model: Model, tmp_path: Path) -> None:
    context = [[0.1, 0.2, 0.3]]
    answer = client.post(GENERATE, json={"steps": 3, "size": [4, 4, 8], "condition": {"context": context}})
    alone = model.sample(
        int(answer.headers["x-seed"]), steps=3, size=(4, 4, 8), condition={"context": context}
    )
    np.testing.assert_array_equal(saved(answer.content, tmp_path), alone.array)
    assert client.post(GENERATE, json={"steps": 1}).headers["x-seed"] != answer.headers["x-seed"]


def test_events_tell_all_and_volumes_are_fetched(client: httpx.Client, model: Model, tmp_path: Path) -> None:
    body = {**ASKED, "seed": 7, "num_samples": 2, "progress_every": 4, "preview_every": 5}
    with client.stream("POST", GENERATE, json=body, headers=EVENTS) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        told = list(events(answer))
        request_id = answer.headers["x-request-id"]
    assert told[0] == ("accepted", {"request_id": request_id, "seed": "7"}) and told[-1] == ("end", {})
    expected = list(model.sample_many(2, 7, **ASKED))
    volumes = {value["sample"]: value for name, value in told if name == "volume"}
    for sample, alone in enumerate(expected):
        value = volumes[sample]
        fetched = client.get(value["url"])
        assert fetched.headers["content-disposition"] == f'attachment; filename="gaussian-7-{sample}.nii.gz"'
        np.testing.assert_array_equal(saved(fetched.content, tmp_path), alone.array)
        assert value["shape"] == list(alone.array.shape) and value["bytes"] == len(fetched.content)
        np.testing.assert_array_equal(value["affine"], alone.affine)
        assert value["seed"] == "7" and len(value["seconds"]) == 2
        done = [
            (one["step"], one["steps"])
            for name, one in told
            if name == "progress" and one["sample"] == sample
        ]
        assert done == sorted(set(done)) and done[-1][0] == done[-1][1]
    previews = [value for name, value in told if name == "preview"]
    assert previews and {one["steps"] for one in previews} == {done[-1][1]}
    assert saved(client.get(previews[0]["url"]).content, tmp_path).shape == expected[0].array.shape
    assert client.get("/v1/volumes/" + "A" * 22).status_code == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"steps": 0}, "steps=0: need 1..1000"),
        ({"steps": 2.5}, "[request] steps=2.5: need denoising steps, 1..1000, default 20"),
        ({"steps": True}, "steps=True: need"),
        ({"steps": 2**40}, "steps=1099511627776: need"),
        ({"num_samples": 65}, "num_samples=65: need 1..64"),
        ({"seed": -1}, "seed=-1: need 0..18446744073709551615"),
        ({"seed": "1e3"}, "seed='1e3': need 0.."),
        ({"seed": 2**64}, "need 0..18446744073709551615"),
        ({"guidance": 1e300}, "guidance=1e+300"),
        ({"scheduler": "euler"}, "scheduler='euler'"),
        ({"scheduler": "\ud800"}, r"scheduler='\ud800': need ddim"),
        ({"size": [4, 4]}, "size=[4, 4]: need the latent's sizes"),
        ({"size": [3, 4, 4]}, "d0=3: need 2..16 and a multiple of 2"),
        ({"sead": 1}, "unknown field 'sead'; known: seed"),
        ({"\ud800": 1}, r"unknown field '\ud800'"),
        ({"output_format": "float32"}, "unknown field 'output_format'"),
        ({"region": "x"}, "unknown field 'region'"),
        ({"condition": {"anterior": 2}}, "anterior=2.0: need 0..1"),
        ({"condition": {"front": 2}}, "unknown name 'front'"),
        ({"condition": {"context": [[1, 2]]}}, "context has shape (1, 2): need (1, 3)"),
        ({"condition": {"context": [[1, 2], [3]]}}, "context"),
        ({"condition": {"context": [["a", "b", "c"]]}}, "is not a number"),
        ({"condition": {"context": [[{}, None, []]]}}, "context"),
        ({"condition": {"context": [[0, 0, 0]], "anterior": 0.5}}, "both given"),
        ({"deadline_s": -1}, "deadline_s=-1"),
        ({"preview_every": 1, "steps": 1000}, "more than 256 previews; need 4 or more"),
        ({"num_samples": 2}, "one file holds one"),
        ([], "no JSON object"),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused_by_name(client: httpx.Client, body: Any, message: str) -> None:
    answer = client.post(GENERATE, content=json.dumps(body), headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "invalid", error
    assert message in error["message"] and "\n" not in error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "brackets 100000 deep"),
        (b'{"condition":' * 9 + b"1" + b"}" * 9, "brackets 9 deep"),
        (b'{"seed": ' + b"1" * 65 + b"}", "a number of more than 64"),
        (b'{"guidance": NaN}', "NaN is no JSON"),
        (b'{"seed": 1, "seed": 2}', "given twice"),
        (b'{"seed": 1', "no JSON: "),
        (b"\xff\xfe", "not UTF-8"),
        (b'"' + b'\\"' * 200_000, "no JSON: "),
        (b"null", "no JSON object"),
    ],
)
def test_what_is_no_json_is_refused(client: httpx.Client, content: bytes, message: str) -> None:
    answer = client.post(GENERATE, content=content, headers=JSON)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_brackets_in_texts_do_not_count(client: httpx.Client) -> None:
    answer = client.post(GENERATE, content=b'{"scheduler": "[[[[[[[[[[[[\\""}', headers=JSON)
    assert "scheduler=" in answer.json()["error"]["message"]


def test_headers_and_routes_are_checked(client: httpx.Client) -> None:
    for status, code, answer in [
        (400, "invalid", client.post(GENERATE, content=b"{}", headers={"content-type": "text/plain"})),
        (400, "invalid", client.post(GENERATE, json={}, headers={"content-encoding": "gzip"})),
        (400, "invalid", client.post(GENERATE, json={}, headers={"accept": "application/json"})),
        (400, "invalid", client.get("/v1/models", headers={"host": "elsewhere.example"})),
        (404, "not_found", client.post("/v1/models/other/generate")),
        (404, "not_found", client.get("/v1")),
        (404, "not_found", client.get("/page/../../cli.py")),
        (404, "not_found", client.get("/page/%2e%2e/%2e%2e/cli.py")),
        (404, "not_found", client.get("/page/nothing.js")),
        (405, "invalid", client.get(GENERATE)),
        (413, "too_large", client.post(GENERATE, content=b" " * (LIMITS.body_bytes + 1), headers=JSON)),
        (413, "too_large", client.post(GENERATE, content=iter([b" " * 2**20] * 9), headers=JSON)),
    ]:  # fmt: skip
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        assert (
            answer.headers["x-request-id"]
            and "default-src 'self'" in answer.headers["content-security-policy"]
        )
    long = client.get("/v1/models", headers={"x-request-id": "x" * 65})
    assert long.headers["x-request-id"] != "x" * 65


def test_the_model_is_described(client: httpx.Client, model: Model) -> None:
    (entry,) = client.get("/v1/models").json()["models"]
    assert entry["volume"] == {"shape": [8, 12, 8], "spacing_mm": [1.0, 1.5, 2.0]}
    assert model.sample(1, steps=1).array.shape == (8, 12, 8)
    assert entry["default"] == {"steps": 20, "scheduler": "ddim", "size": [4, 6, 4]} and entry["guidance"]
    assert [one["name"] for one in entry["conditions"][0]["fields"]] == ["anterior", "posterior", "ratio"]
    for scheduler in entry["schedulers"]:
        body = {**entry["default"], "steps": 2, "scheduler": scheduler}
        assert client.post(GENERATE, json=body).status_code == 200


def test_the_openapi_document_holds_together(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from ([value["$ref"]] if "$ref" in value else [])
            for one in value.values():
                yield from references(one)
        elif isinstance(value, list):
            for one in value:
                yield from references(one)

    for reference in set(references(document)):
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    body = document["components"]["schemas"]["Generate"]
    assert body["additionalProperties"] is False
    assert set(body["properties"]) == {"seed", "num_samples", "steps", "scheduler", "guidance", "size", "priority",
                                       "deadline_s", "progress_every", "preview_every", "condition", "negative", "image", "strength",
                                       "inpaint"}  # fmt: skip
    assert document["openapi"] == "3.1.0" and GENERATE in document["paths"]


def test_who_leaves_frees_the_places(client: httpx.Client) -> None:
    for _ in range(6):  # 64 samples each, of 320 places
        with client.stream("POST", GENERATE, json=LONG, headers=EVENTS) as answer:
            assert next(value for name, value in events(answer) if name == "progress")["steps"] == 1000
    # The 250 previews, which a file's caller never sees, take a thousand times as long as this one's patience.
    hasty = httpx.Timeout(60, read=0.001)
    with pytest.raises(httpx.ReadTimeout):
        client.post(GENERATE, json={**LONG, "num_samples": 1, "preview_every": 4}, timeout=hasty)
    assert until(lambda: counted(client, "volcast_gateway_open_requests") == 0)
    assert counted(client, 'volcast_gateway_generations_total{outcome="cancelled"}') == 7
    assert client.post(GENERATE, json={"steps": 2}).status_code == 200


def test_too_much_is_refused_with_a_hint(gaussian: Path, served: Served) -> None:
    # 640 samples for 320 places; taking one in is far less work than its 2000 calls and 1000 draws of noise.
    body = {**LONG, "scheduler": "ddpm", "guidance": 2, "progress_every": 1000}
    stop, refused = threading.Event(), list[tuple[Any, int]]()

    def hold() -> None:
        with client.stream("POST", GENERATE, json=body, headers=EVENTS) as answer:
            for name, value in events(answer):
                if name == "error":
                    refused.append((value, client.get("/health/ready").status_code))
                if stop.is_set() or name in ("end", "error"):
                    stop.set()
                    return

    with (
        gateway(gaussian, served, timing=Timing(ready_s=1e-9, keep_alive_s=0.05)) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
        ThreadPoolExecutor(10) as pool,
    ):
        for held in [pool.submit(hold) for _ in range(10)]:
            held.result(60)
    value, ready = refused[0]
    assert value["error"]["code"] == "unavailable" and "retry in" in value["error"]["message"]
    assert value["retry_s"] >= 0 and ready == 200  # a full server is no broken one


def test_keys_and_their_limits(gaussian: Path, served: Served) -> None:
    keys = Keys([("one", ONE), ("other", OTHER)])
    limits = Limits(rate=1e-6, concurrency=1)  # a burst of one, and then nothing for days
    with (
        gateway(gaussian, served, keys=keys, limits=limits) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        for given in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Basic {ONE}"},
            {"authorization": ONE},
        ):
            answer = client.post(GENERATE, json={}, headers=given)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "unauthorized"
            assert client.get("/v1/models", headers=given).status_code == 401
        assert client.get("/health/live").status_code == client.get("/openapi.json").status_code == 200
        one, other = ({"authorization": f"Bearer {key}"} for key in (ONE, OTHER))
        with client.stream("POST", GENERATE, json={"steps": 2}, headers={**one, **EVENTS}) as answer:
            (volume,) = [value for name, value in events(answer) if name == "volume"]
        assert client.get(volume["url"], headers=one).status_code == 200
        assert client.get(volume["url"], headers=other).status_code == 404
        again = client.post(GENERATE, json={"steps": 2}, headers=one)
        assert again.status_code == 429 and int(again.headers["retry-after"]) > 1000
        with client.stream("POST", GENERATE, json=LONG, headers={**other, **EVENTS}) as answer:
            told = events(answer)  # it would close the stream if it were let go
            assert next(told)[0] == "accepted"
            second = client.post(GENERATE, json={}, headers=other)
            assert second.status_code == 429 and "1 requests of this key are open" in second.text


def test_sizes_are_limited_before_anything_is_made(gaussian: Path, served: Served) -> None:
    limits = Limits(rate=1e6, voxels=8 * 12 * 8, store_bytes=3 * (5 * 8 * 12 * 8 + 1024))
    with (
        gateway(gaussian, served, limits=limits) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        assert client.post(GENERATE, json={"steps": 1}).status_code == 200
        larger = client.post(GENERATE, json={"steps": 1, "size": [4, 6, 6]})
        assert larger.status_code == 413 and "8 x 12 x 12 = 1152 voxels" in larger.text
        many = client.post(GENERATE, json={"steps": 1, "num_samples": 4}, headers=EVENTS)
        assert many.status_code == 413 and "num_samples=4" in many.text


def test_signs_of_life(gaussian: Path, served: Served) -> None:
    with (
        gateway(gaussian, served, timing=Timing(keep_alive_s=0.001)) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
        client.stream("POST", GENERATE, json={**LONG, "progress_every": 1000}, headers=EVENTS) as answer,
    ):
        assert "" in {name for name, _ in zip((name for name, _ in events(answer)), range(2), strict=False)}


def test_health_and_metrics(client: httpx.Client, gaussian: Path, served: Served) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready"}
    before = counted(client, "volcast_gateway_generations_total")
    assert client.post(GENERATE, json={"steps": 2}).status_code == 200
    assert counted(client, "volcast_gateway_generations_total") == before + 1
    assert (
        counted(client, "nv_inference_request_success") > 0
        and counted(client, "volcast_gateway_triton_metrics_up") == 1
    )
    with (
        gateway(
            gaussian, served, grpc="127.0.0.1:1", triton_metrics="127.0.0.1:1", timing=Timing(patience_s=0.3)
        ) as alone,
        httpx.Client(base_url=alone.url, timeout=60) as lonely,
    ):
        assert lonely.get("/health/live").status_code == 200
        ready = lonely.get("/health/ready")
        assert (
            ready.status_code == 503 and "the server is away" in ready.text and ready.headers["retry-after"]
        )
        gone = lonely.post(GENERATE, json={"steps": 2})
        assert gone.status_code == 503 and gone.json()["error"]["code"] == "unavailable"
        assert (
            counted(lonely, "volcast_gateway_triton_metrics_up")
            == counted(lonely, "volcast_gateway_ready")
            == 0
        )
        assert counted(lonely, "volcast_gateway_resent_total") > 0
