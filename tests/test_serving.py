"""The real tritonserver over the closed-form artifact: `volcast serve`, its client, and what it survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken import without_numbers
from served import Served, start

from volcast import Inpaint, Volume
from volcast.runtime.client import Client, Unavailable
from volcast.runtime.pipeline import Model, load
from volcast.runtime.volume import read_nifti


@pytest.fixture(scope="module")
def model(gaussian: Path) -> Iterator[Model]:
    with load(gaussian, engine="onnxruntime", threads=1) as opened:
        yield opened


def test_a_volume_has_the_bits_of_sample(served: Served, model: Model) -> None:
    asked: dict[str, Any] = {
        "steps": 12,
        "scheduler": "pndm",
        "guidance": 2.0,
        "condition": {"anterior": 0.25},
    }
    alone = model.sample(3, **asked)
    with served.client() as client:
        for form in ("float32", "float16", "uint16"):
            volume = client.sample(3, output_format=form, **asked)
            np.testing.assert_array_equal(volume.affine, alone.affine)
            assert volume.spacing_mm == alone.spacing_mm
            # Half a step of float16's 11 bits, or of 65535 over the range; a little for the scale's own rounding.
            bound = {
                "float32": 0,
                "float16": 2**-11 * np.abs(alone.array).max(),
                "uint16": 0.51 * np.ptp(alone.array) / 65535,
            }
            assert np.abs(volume.array - alone.array).max() <= bound[form]


def test_an_image_and_a_whole_condition_cross(served: Served, model: Model) -> None:
    image = model.sample(1)
    asked: dict[str, Any] = {
        "image": image,
        "strength": 0.5,
        "steps": 6,
        "condition": {"context": [[0.1, 0.2, 0.3]]},
    }
    with served.client() as client:
        np.testing.assert_array_equal(client.sample(2, **asked).array, model.sample(2, **asked).array)


def test_a_sweep_a_negative_condition_and_a_mask_cross(served: Served, model: Model) -> None:
    image = model.sample(1)
    mask = Volume((np.arange(8) < 4).astype(np.float32)[:, None, None] * np.ones((8, 12, 8), np.float32), image.affine, image.spacing_mm)  # fmt: skip
    asked: dict[str, Any] = {
        "steps": 6, "scheduler": "ddpm", "guidance": (weight for weight in (1, 2.1)), "image": image,
        "condition": {"anterior": 0.9}, "negative": {"anterior": 0.3, "ratio": 0.1},
        "inpaint": Inpaint(mask, resamples=2, jump_length=2, paste=False),
    }  # fmt: skip
    with served.client(shared_memory=True) as client:
        found = client.sample_many(2, 2, **asked)
        asked["guidance"] = [1, 2.1]
        for volume, alone in zip(found, model.sample_many(2, 2, **asked), strict=True):
            np.testing.assert_array_equal(volume.array, alone.array)
            np.testing.assert_array_equal(volume.affine, image.affine)
        turned = Volume(image.array, image.affine @ np.diag([-1, 1, 1, 1]), image.spacing_mm)
        elsewhere = Volume(mask.array, mask.affine + 1, mask.spacing_mm)
        for more, message in [
            ({"inpaint": Inpaint(elsewhere)}, "the mask lies elsewhere than the image"),
            ({"inpaint": Inpaint(mask.array[1:])}, r"the mask is float32 \(7, 12, 8\)"),
            ({"inpaint": Inpaint(mask, resamples=2.5)}, "inpaint_resamples=2.5: need INT32"),  # type: ignore[arg-type]
            ({"image": turned}, "image has axes LAS: need RAS"),
            ({"image": None}, "inpaint without an image"),
            ({"guidance": [1] * 33}, "2 samples at 33 weights are 66 volumes"),
            ({"guidance": None}, "negative without guidance"),
            ({"scheduler": "pndm"}, "pndm remembers"),
        ]:
            with pytest.raises(ValueError, match=message):
                client.sample_many(2, 2, **{**asked, **more})
        with pytest.raises(ValueError, match="several weights make several volumes; call sample_many"):
            client.sample(2, **asked)


def test_requests_of_different_steps_run_together(served: Served, model: Model) -> None:
    def ask(seed: int) -> tuple[int, np.ndarray]:
        steps = 3 + 17 * seed
        return steps, client.sample(seed, steps=steps).array

    with served.client() as client, ThreadPoolExecutor(8) as pool:
        for seed, (steps, array) in enumerate(pool.map(ask, range(8))):
            np.testing.assert_array_equal(array, model.sample(seed, steps=steps).array)


def test_progress_and_previews_arrive_in_order(served: Served) -> None:
    steps: list[tuple[int, int]] = []
    previews: list[tuple[int, tuple[int, ...]]] = []
    with served.client() as client:
        first, second = client.sample_many(
            2, 1, steps=60, on_step=lambda done, total: steps.append((done, total)), preview_every=20,
            on_preview=lambda done, volume: previews.append((done, volume.array.shape)),
        )  # fmt: skip
    assert steps == sorted(steps) and steps[-1] == (120, 120)
    assert (
        previews
        and {one for one, _ in previews} <= {20, 40}
        and {shape for _, shape in previews} == {(8, 12, 8)}
    )
    assert (first.array != second.array).any()


def test_a_cancelled_request_frees_its_places(served: Served) -> None:
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Enough

    with served.client(tries=1) as client:
        for _ in range(4):  # 64 samples each, of 320 places
            with pytest.raises(Enough):
                client.sample_many(64, 1, steps=1000, size=[16, 16, 16], on_step=stop)
        with pytest.raises(TimeoutError, match="in time"):
            client.sample_many(64, 1, steps=1000, size=[16, 16, 16], timeout_s=0.2)
    with served.client() as client:
        assert client.sample(1, steps=2).array.shape == (8, 12, 8)


def test_bad_requests_are_refused_by_name_and_the_server_lives(served: Served) -> None:
    before = served.told("restarting")
    with served.client() as client:
        for asked, message in [
            ({"steps": 0}, "steps=0: need 1..1000"),
            ({"condition": {"anterior": 2}}, "anterior=2.*need 0..1"),
            ({"condition": {"front": 2}}, "unknown input 'front'; known: seed"),
            ({"size": [3, 4, 4]}, "d0=3"),
            ({"seed": -1}, "seed=-1: need UINT64"),
            ({"eta": 0.5}, "unknown input 'eta'"),
        ]:
            with pytest.raises(ValueError, match=message):
                client.sample(**asked)
        given = {"output_format": np.frombuffer(b"png", np.uint8)}
        with pytest.raises(ValueError, match="output_format='png'"):
            list(client.answers(given))
        assert client.sample(1, steps=2).array.shape == (8, 12, 8)
    assert served.told("restarting") == before, "".join(served.lines)
    with Client("127.0.0.1:1", tries=1) as nobody, pytest.raises(Unavailable, match="127.0.0.1:1"):
        nobody.sample(1)


def test_curl_gets_a_file(served: Served, model: Model, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{served.http}/v2/models/gaussian/generate"

    def post(body: dict[str, Any]) -> dict[str, Any]:
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode()), timeout=60
        ) as answer:
            return json.load(answer)  # type: ignore[no-any-return]

    path = tmp_path / "out.nii.gz"
    path.write_bytes(bytes(post({"seed": 3, "steps": 4, "output_format": list(b"nifti")})["nifti"]))
    np.testing.assert_array_equal(read_nifti(path).array, model.sample(3, steps=4).array)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post({"steps": 0})


def test_the_command_line_writes_what_sample_gives(served: Served, model: Model, tmp_path: Path) -> None:
    image, hidden = model.sample(1), tmp_path / "hidden.nii"
    image.save(tmp_path / "scan.nii.gz")
    mask = Volume(
        (image.array > np.median(image.array, axis=0)).astype(np.float32), image.affine, image.spacing_mm
    )
    mask.array[4:] = 0
    mask.save(hidden)
    command = [sys.executable, "-m", "volcast", "request", "--server", f"127.0.0.1:{served.grpc}", "--seed", "4", "-n", "2",
               "--steps", "5", "-c", "context=0.1,0.2,0.3", "-o", str(tmp_path / "out.nii.gz"), "--guidance", "2,3.1",
               "--negative", "anterior=0.3", "--image", str(tmp_path / "scan.nii.gz"), "--inpaint", str(hidden),
               "--resamples", "2", "--no-paste"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = list(
        model.sample_many(
            2, 4, steps=5, condition={"context": [[0.1, 0.2, 0.3]]}, guidance=[2, 3.1], negative={"anterior": 0.3},
            image=image, inpaint=Inpaint(mask, resamples=2, paste=False),
        )
    )  # fmt: skip
    for number, volume in enumerate(expected):
        file = f"out_{number // 2}_guidance{(2, 3.1)[number % 2]}.nii.gz"
        np.testing.assert_array_equal(read_nifti(tmp_path / file).array, volume.array)


def test_too_much_is_refused_with_a_hint(gaussian: Path) -> None:
    small = start(gaussian, "--active", "1", "--queue", "2")
    try:
        small.wait("ready: gaussian")
        with small.client(tries=1) as client, pytest.raises(ValueError, match="ask for at most 3 at once"):
            client.sample_many(4, 1, steps=2)
        begun, stop = threading.Event(), threading.Event()

        def told(*_: int) -> None:
            begun.set()
            if stop.is_set():
                raise InterruptedError

        def hold() -> None:
            with small.client(tries=1) as client, suppress(InterruptedError):
                while not stop.is_set():
                    with suppress(Unavailable):
                        client.sample_many(3, 1, steps=1000, size=[16, 16, 16], on_step=told)

        with ThreadPoolExecutor(1) as pool, small.client(tries=1) as client:
            holder = pool.submit(hold)
            try:
                assert begun.wait(60)
                with pytest.raises(Unavailable, match="retry in"):
                    for _ in range(50):  # until it comes while the other has the places
                        client.sample_many(3, 1, steps=1000, size=[16, 16, 16])
            finally:
                stop.set()
            holder.result(60)
        with small.client() as client:
            assert client.sample(1, steps=2).array.shape == (8, 12, 8)
        assert small.shared_memory()
        # A second server on its ports is refused, and the first stays.
        again = subprocess.run(small.process.args, capture_output=True, text=True, check=False)
        assert again.returncode == 2 and "in use" in again.stderr
        children = small.processes("triton")
        assert len(children) >= 2
        small.process.send_signal(signal.SIGINT)
        assert small.process.wait(30) == 0 and any("stopped" in line for line in small.lines)
        assert not small.shared_memory()
        assert not [one for one in children if Path(f"/proc/{one}").exists()]
    finally:
        small.process.kill()
        small.process.wait()
        small.process.stderr.close()  # type: ignore[union-attr]


STUB, TRITON = "triton_python_backend_stub", "bin/tritonserver"


@pytest.mark.parametrize(
    ("victim", "number"), [(STUB, signal.SIGKILL), (TRITON, signal.SIGKILL), (TRITON, signal.SIGSTOP)]
)
def test_what_dies_or_hangs_comes_back_and_who_waits_is_answered(
    served: Served, model: Model, victim: str, number: int
) -> None:
    begun = threading.Event()
    before = served.told("ready:")
    with served.client(tries=10) as client, ThreadPoolExecutor(2) as pool:
        # 128 samples: 64 take turns, the others wait.
        crowd = [
            pool.submit(client.sample_many, 64, seed, steps=20, on_step=lambda *_: begun.set())
            for seed in range(2)
        ]
        assert begun.wait(60)
        # Whatever comes next meets them as they are now.
        served.signal(STUB, signal.SIGSTOP)
        served.signal(victim, number)
        served.wait("ready:", before + 1)
        made = [one.result(180) for one in crowd]
    for seed, volumes in enumerate(made):
        for volume, expected in zip(volumes, model.sample_many(64, seed, steps=20), strict=True):
            np.testing.assert_array_equal(volume.array, expected.array)
    assert len(served.shared_memory()) == 1


def test_a_model_that_cannot_sample_is_not_served(gaussian: Path, tmp_path: Path) -> None:
    # What a server left that nobody could stop goes as the next one starts.
    space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    left = Path("/dev/shm") / f"volcast_999999999_{space}_left"
    left.touch()
    running = start(without_numbers(gaussian, tmp_path / "broken"))
    try:
        assert running.process.wait(60) == 2
        running.wait("volcast: [serve] tritonserver did not start")
        assert running.told("not finite") and not running.told("ready:")
        assert not left.exists()
    finally:
        running.end()
        left.unlink(missing_ok=True)


def test_a_missing_server_is_named(gaussian: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "volcast", "serve", str(gaussian), "--tritonserver", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install --no-deps nvidia-pytriton==0.7.0" in done.stderr
