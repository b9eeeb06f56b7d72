"""`volcast serve` of a token model and of a one-pass model: the real tritonserver, client, gateway and page.

One test each, so that each starts one server, whichever worker runs it.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import pytest
from gateways import EVENTS, events, until
from pages import PATIENCE_MS, done, download, visit
from playwright.sync_api import Page, expect, sync_playwright
from served import Served, start
from test_page import CHROMIUM, QUIET
from test_service_kinds import CONTEXT, LENGTH, MASK, SHAPE
from token_bundles import CODES, DEEP, Tiny

import volcast
from volcast.__main__ import app
from volcast.runtime.client import Client
from volcast.runtime.dataset_manifest import volume_name
from volcast.runtime.pipeline import load
from volcast.runtime.volume import Volume, read_nifti

HOW: dict[str, Any] = {"temperature": 5.0, "top_k": 7, "top_p": 0.98}
CONDITION = {"context": CONTEXT}
AFFINE = np.array([[2, 0, 0, -5], [0, 2, 0, 7], [0, 0, 2, 9], [0, 0, 0, 1.0]])
LABELS = Volume(MASK.astype(np.float32), AFFINE, (2.0, 2.0, 2.0))
STYLE = Volume(
    np.random.default_rng(5).random(SHAPE).astype(np.float32), AFFINE + np.eye(4, k=3), (2.0, 2.0, 2.0)
)


class Enough(Exception):
    pass


def stop(done: int, total: int) -> None:
    raise Enough


@contextmanager
def serving(artifact: Path) -> Iterator[Served]:
    running = start(artifact)
    try:
        running.wait("ready:")
        yield running
    finally:
        running.stop()
        running.end()


@contextmanager
def paged(served: Served) -> Iterator[Page]:
    """The served page in Chromium."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET, timeout=PATIENCE_MS)
        page = visit(browser, f"http://127.0.0.1:{served.port}", key=None)
        expect(page.locator("#generate")).to_be_enabled()
        yield page
        assert page.faults == []  # type: ignore[attr-defined]
        browser.close()


def metric(served: Served, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def shown(page: Page) -> set[str]:
    names = (
        "Steps",
        "Scheduler",
        "Guidance",
        "Temperature",
        "Top k",
        "Top p",
        "Seed",
        "Image",
        "mask",
        "context",
    )
    return {name for name in names if page.get_by_label(name, exact=True).is_visible()}


def file(volume: Volume, path: Path) -> str:
    volume.save(path)
    return base64.b64encode(path.read_bytes()).decode()


def numbers(content: bytes) -> Any:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(content))


def test_a_token_model_is_served(tiny_tokens: Callable[[Tiny], Path], tmp_path: Path) -> None:
    artifact = tiny_tokens(DEEP) / "artifact"
    model = load(artifact, engine="onnxruntime", threads=1)
    alone = list(model.sample_many(2, 5, condition=CONDITION, **HOW))
    assert (alone[0].array != alone[1].array).any()
    with serving(artifact) as served:
        with served.client() as client:
            tokens_are_counted(served, client, alone)
            tokens_are_refused_and_cancelled(client)
        with served.client(shared_memory=True) as client:
            again = client.sample_many(2, 5, condition=CONDITION, **HOW)
            np.testing.assert_array_equal(again[1].array, alone[1].array)
        volume = asyncio.run(asked_in_a_loop(f"127.0.0.1:{served.grpc}"))
        np.testing.assert_array_equal(volume.array, alone[0].array)
        tokens_on_the_command_line(served, tmp_path, alone[0])
        choice = [
            "-c",
            f"context=@{tmp_path / 'context.npy'}",
            "--temperature",
            5,
            "--top-k",
            7,
            "--top-p",
            0.98,
        ]
        for one, wanted in zip(dataset(artifact, served, tmp_path, *choice), alone, strict=True):
            np.testing.assert_array_equal(one.array, wanted.array)
        tokens_through_the_gateway(served, alone)
        if CHROMIUM is not None:
            tokens_on_the_page(served, alone[0])


def tokens_are_counted(served: Served, client: Client, alone: list[Volume]) -> None:
    # The warm-up's and the supervisor's first.
    until(lambda: metric(served, "volcast_steps_total") == 2 * LENGTH)
    steps: list[tuple[int, int]] = []
    found = client.sample_many(
        2, 5, condition=CONDITION, on_step=lambda done, total: steps.append((done, total)), **HOW
    )
    for one, wanted in zip(found, alone, strict=True):
        np.testing.assert_array_equal(one.array, wanted.array)
        np.testing.assert_array_equal(one.affine, wanted.affine)
    assert steps == [(done, 2 * LENGTH) for done in range(1, 2 * LENGTH + 1)]
    until(lambda: metric(served, "volcast_steps_total") == 4 * LENGTH)


def tokens_are_refused_and_cancelled(client: Client) -> None:
    for wrong, message in [
        ({"steps": 5}, "unknown input 'steps'; known: seed"), ({"top_k": CODES + 1}, f"top_k={CODES + 1}: need 1..{CODES}"),
        ({"temperature": 0.0}, "temperature=0.0: need a number above 0"), ({"condition": {}}, "context is missing"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            client.sample(1, **{"condition": CONDITION, **wrong})
    for _ in range(6):  # 64 samples each, of 320 places
        with pytest.raises(Enough):
            client.sample_many(64, 1, condition=CONDITION, on_step=stop)


async def asked_in_a_loop(address: str) -> Volume:
    async with volcast.AsyncClient(address) as client:
        return await client.sample(5, condition=CONDITION, **HOW)


def tokens_on_the_command_line(served: Served, folder: Path, wanted: Volume) -> None:
    np.save(folder / "context.npy", CONTEXT)
    arguments = ["request", "-o", folder / "out.nii.gz", "--server", f"127.0.0.1:{served.grpc}", "--seed", 5, "-q",
                 "-c", f"context=@{folder / 'context.npy'}", "--temperature", 5, "--top-k", 7, "--top-p", 0.98]  # fmt: skip
    assert app([str(one) for one in arguments]) == 0
    np.testing.assert_array_equal(read_nifti(folder / "out.nii.gz").array, wanted.array)


def dataset(artifact: Path, served: Served, folder: Path, *more: object) -> list[Volume]:
    """Two volumes of seed 5, made by the server."""
    words = ["generate", artifact, "--out", folder / "set", "--num", 2, "--seed", 5, "-q",
             "--server", f"127.0.0.1:{served.grpc}", *more]  # fmt: skip
    assert app([str(word) for word in words]) == 0
    return [read_nifti(folder / "set" / volume_name(index)) for index in range(2)]


def tokens_through_the_gateway(served: Served, alone: list[Volume]) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=60) as client:
        (entry,) = client.get("/v1/models").json()["models"]
        assert entry["limits"].keys() >= {"temperature", "top_k", "top_p"} and "steps" not in entry["limits"]
        assert not entry["image"] and not entry["guidance"] and entry["volume"]["shape"] == [4, 6, 4]
        assert client.get("/health/ready").status_code == 200
        url = f"/v1/models/{entry['name']}/generate"
        body = {"seed": 5, "condition": {"context": CONTEXT.tolist()}, **HOW}
        answer = client.post(url, json=body)
        np.testing.assert_array_equal(numbers(answer.content).get_fdata(dtype=np.float32), alone[0].array)
        more = {**body, "num_samples": 2, "progress_every": 4}
        with client.stream("POST", url, json=more, headers=EVENTS) as response:
            told = [(name, value) for name, value in events(response) if name]
        steps = [value["step"] for name, value in told if name == "progress" and value["sample"] == 1]
        assert steps == [4, 8, 12] and [name for name, _ in told][-1] == "end"
        urls = {value["sample"]: value["url"] for name, value in told if name == "volume"}
        second = numbers(client.get(urls[1]).content)
        np.testing.assert_array_equal(second.get_fdata(dtype=np.float32), alone[1].array)
        for wrong, message in [
            ({"steps": 5}, "unknown field 'steps'"), ({"guidance": 2}, "unknown field 'guidance'"),
            ({"top_k": CODES + 1}, f"need 1..{CODES}"), ({"negative": {}}, "unknown field 'negative'"),
            ({"condition": {}}, "context is missing"), ({"top_p": "x"}, "top_p='x'"),
        ]:  # fmt: skip
            refused = client.post(url, json={**body, **wrong})
            assert refused.status_code == 400 and message in refused.json()["error"]["message"]


def tokens_on_the_page(served: Served, wanted: Volume) -> None:
    with paged(served) as page:
        assert shown(page) == {"Temperature", "Top k", "Top p", "Seed", "context"}
        expect(page.locator("#more")).to_be_hidden()
        page.get_by_label("context", exact=True).fill(json.dumps(CONTEXT.tolist()))
        for name, value in (("Temperature", "5"), ("Top k", "7"), ("Top p", "0.98"), ("Seed", "5")):
            page.get_by_label(name, exact=True).fill(value)
        page.get_by_label("Seed", exact=True).press("Enter")
        done(page)
        expect(page.locator("#facts")).to_contain_text("temperature 5, top k 7, top p 0.98, context given")
        found = download(page, page.get_by_role("link", name="Download NIfTI"))
        np.testing.assert_array_equal(found.array, wanted.array)


def test_a_one_pass_model_is_served(spade: Path, tmp_path: Path) -> None:
    model = load(spade, engine="onnxruntime", threads=1)
    styled = list(model.sample_many(2, 3, condition={"mask": LABELS}, image=STYLE))
    plain = model.sample(3, condition={"mask": LABELS})
    assert (styled[0].array != plain.array).any() and (plain.affine == AFFINE).all()
    with serving(spade) as served:
        with served.client() as client:
            found = client.sample_many(2, 3, condition={"mask": LABELS}, image=STYLE)
            for one, wanted in zip(found, styled, strict=True):
                np.testing.assert_array_equal(one.array, wanted.array)
                np.testing.assert_array_equal(one.affine, wanted.affine)
            np.testing.assert_array_equal(client.sample(3, condition={"mask": LABELS}).array, plain.array)
            for wrong, message in [
                ({"temperature": 1.0}, "unknown input 'temperature'"), ({"condition": {"mask": MASK + 1}}, "unknown labels 6"),
                ({"image": np.zeros((8, 8, 8), np.float32)}, "need finite numbers"), ({"condition": {}}, "mask is missing"),
            ]:  # fmt: skip
                with pytest.raises(ValueError, match=message):
                    client.sample(1, **{"condition": {"mask": LABELS}, **wrong})
        styles_through_the_gateway(served, tmp_path, styled[0])
        made = dataset(spade, served, tmp_path, "-c", f"mask=@{tmp_path / 'labels.nii.gz'}")
        for one, wanted in zip(made, model.sample_many(2, 5, condition={"mask": LABELS}), strict=True):
            np.testing.assert_array_equal(one.array, wanted.array)
            np.testing.assert_array_equal(one.affine, AFFINE)
        if CHROMIUM is not None:
            styles_on_the_page(served, tmp_path, styled[0])


def styles_through_the_gateway(served: Served, folder: Path, wanted: Volume) -> None:
    body = {
        "seed": 3, "condition": {"mask": file(LABELS, folder / "labels.nii.gz")}, "image": file(STYLE, folder / "style.nii.gz"),
    }  # fmt: skip
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=60) as client:
        (entry,) = client.get("/v1/models").json()["models"]
        assert entry["image"] and not entry["guidance"] and entry["default"] == {}
        assert {"steps", "temperature", "strength"}.isdisjoint(entry["limits"])
        url = f"/v1/models/{entry['name']}/generate"
        found = numbers(client.post(url, json=body).content)
        np.testing.assert_array_equal(found.get_fdata(dtype=np.float32), wanted.array)
        np.testing.assert_array_equal(found.affine, AFFINE)  # the label map's, not the style's
        assert client.get("/health/ready").status_code == 200
        small = Volume(STYLE.array[:8], AFFINE, (2.0, 2.0, 2.0))
        for wrong, message in [
            ({"strength": 0.5}, "unknown field 'strength'"), ({"inpaint": {}}, "unknown field 'inpaint'"),
            ({"condition": {}}, "mask is missing"), ({"image": file(small, folder / "small.nii.gz")}, "need finite numbers"),
        ]:  # fmt: skip
            refused = client.post(url, json={**body, **wrong})
            assert refused.status_code == 400 and message in refused.json()["error"]["message"]


def styles_on_the_page(served: Served, folder: Path, wanted: Volume) -> None:
    with paged(served) as page:
        assert shown(page) == {"Seed", "Image", "mask"}
        page.get_by_label("mask", exact=True).set_input_files(folder / "labels.nii.gz")
        page.get_by_label("Image", exact=True).set_input_files(folder / "style.nii.gz")
        page.get_by_label("Seed", exact=True).fill("3")
        page.get_by_label("Seed", exact=True).press("Enter")
        done(page)
        expect(page.locator("#facts")).to_contain_text("from style.nii.gz in its style, mask labels.nii.gz")
        found = download(page, page.get_by_role("link", name="Download NIfTI"))
        np.testing.assert_array_equal(found.array, wanted.array)
        page.get_by_role("button", name="Remove: Image").press("Enter")
        page.get_by_role("button", name="Repeat: seed 3").press("Enter")
        expect(page.get_by_role("button", name="Remove: Image")).to_be_visible()
