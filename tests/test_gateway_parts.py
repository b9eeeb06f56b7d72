"""What the gateway is made of, where no server is needed: keys, quotas, the volume store, where it may listen."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from volcast.__main__ import app
from volcast.runtime.artifact import read_artifact
from volcast.runtime.asked import read_request
from volcast.runtime.pipeline import load
from volcast.runtime.probe import probe_tensors
from volcast.runtime.sizes import volume_shape
from volcast.runtime.spec import ArtifactSpec
from volcast.triton_repo.gateway.body import BodyReader, parse_json
from volcast.triton_repo.gateway.keys import NOBODY, Keys, read_keys
from volcast.triton_repo.gateway.quota import Budget, Quotas
from volcast.triton_repo.gateway.refusal import Refusal
from volcast.triton_repo.gateway.schema import body_schema
from volcast.triton_repo.gateway.server import check_exposure
from volcast.triton_repo.gateway.settings import Limits, Listening
from volcast.triton_repo.gateway.store import VolumeStore

KEY, OTHER = "a" * 16, "b" * 16


@pytest.fixture(scope="module")
def spec(gaussian: Path) -> ArtifactSpec:
    return read_artifact(gaussian)


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalice {KEY}  # since May\n\n")
    environment = {"VOLCAST_API_KEYS": f"bob={OTHER}", "HOME": "/"}
    keys = read_keys(file, environment)
    assert keys.caller(f"Bearer {KEY}") == "alice" and keys.caller(f"bearer {OTHER}") == "bob"
    assert environment == {"HOME": "/"}
    assert KEY not in repr(vars(keys)) and OTHER not in repr(vars(keys))
    for given in (None, "", KEY, f"Bearer {KEY}a", f"Bearer {KEY[:-1]}", "Bearer \xe9", f"Basic {KEY}"):
        with pytest.raises(Refusal, match="Authorization: Bearer KEY") as caught:
            keys.caller(given)
        assert caught.value.code == "unauthorized"
    assert not read_keys(None, {}) and Keys().caller(None) == NOBODY


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no key"), ("alice", "line 1: need a name and a key"), (f"a {KEY}\na {OTHER}", "each name once"),
     ("alice short", "16..256"), (f"al/ice {KEY}", "key name 'al/ice'"), (f"a {KEY}\nb {KEY}", "given twice")],
)  # fmt: skip
def test_bad_key_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_keys(tmp_path / "keys", {})
    assert KEY not in str(caught.value) and "short" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot read it"):
        read_keys(tmp_path / "none", {})
    with pytest.raises(ValueError, match="need name=key"):
        read_keys(None, {"VOLCAST_API_KEYS": KEY})


def test_the_bucket_fills_at_its_rate() -> None:
    now = [0.0]
    quotas = Quotas(2.0, 100, lambda: now[0])

    def taken(seconds: float) -> int:
        """Requests that pass in this time, tried ten times a second."""
        passed = 0
        for _ in range(round(10 * seconds)):
            try:
                with quotas.one("a"):
                    passed += 1
            except Refusal as refusal:
                assert refusal.code == "rate_limited" and 0 < (refusal.retry_s or 0) <= 0.5
            now[0] += 0.1
        return passed

    assert taken(10) in (23, 24)  # four at once, then two a second
    with quotas.one("b"):
        pass
    now[0] += 1e6
    assert taken(0.5) == 4  # idle days fill the bucket and no more


def test_open_requests_are_counted_per_key() -> None:
    quotas = Quotas(1e6, 2)
    with (
        quotas.one("a"),
        quotas.one("a"),
        quotas.one("b"),
        pytest.raises(Refusal, match="2 requests of this key are open"),
        quotas.one("a"),
    ):
        pass
    with pytest.raises(ZeroDivisionError), quotas.one("a"):
        raise ZeroDivisionError
    with quotas.one("a"), quotas.one("a"):
        pass


def test_what_no_memory_would_hold_is_told_so() -> None:
    budget = Budget(3 * 2**20)
    with budget.request() as hold, budget.request() as other:
        hold(2**20)
        other(2**21)
        for size, code in ((2**21, "unavailable"), (3 * 2**20, "unavailable"), (2**22, "too_large")):
            with pytest.raises(Refusal) as caught:
                hold(size)
            assert caught.value.code == code
        assert (
            "takes 4.0 MiB" in caught.value.message and "holds 3.0 MiB (--held-mib)" in caught.value.message
        )
        assert caught.value.retry_s is None
    with budget.request() as hold:
        hold(3 * 2**20)


def test_the_store_keeps_what_is_worth_most() -> None:
    store = VolumeStore(100, 1e6)

    def put(size: int, preview: bool = False) -> str:
        return store.put(b"x" * size, owner="a", filename="f", preview=preview)

    def kept(*keys: str) -> list[bool]:
        return [store.get(key, "a") is not None for key in keys]

    preview, old, fetched, new = put(20, True), put(30), put(30), put(20)
    one = store.get(fetched, "a")
    assert one is not None and store.get(fetched, "b") is None and store.get("", "a") is None
    one.fetched = True
    assert store.bytes == 100 and store.waiting() == 2
    late = put(20)
    assert kept(preview, old, fetched, new, late) == [False, True, True, True, True]
    with pytest.raises(Refusal, match="find no place"):
        put(1, True)  # a preview sends no volume away
    put(30)
    assert kept(old, fetched, new, late) == [True, False, True, True]
    put(10)
    assert kept(old, new, late) == [False, True, True] and store.bytes <= 100
    with pytest.raises(Refusal, match="find no place"):
        put(101)
    assert kept(new, late) == [True, True]


def test_the_store_forgets() -> None:
    store = VolumeStore(100, 1e-9)
    assert (
        store.get(store.put(b"x", owner="a", filename="f", preview=False), "a") is None and store.bytes == 0
    )


def test_nobody_listens_to_the_world_without_keys() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ValueError, match=r"without keys.*give --keys, or --insecure"):
            check_exposure(Listening(host=host), Keys())
        check_exposure(Listening(host=host), Keys([("a", KEY)]))
        check_exposure(Listening(host=host, insecure=True), Keys())
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        check_exposure(Listening(host=host), Keys())
    with pytest.raises(ValueError, match="TLS needs both"):
        check_exposure(Listening(certificate=Path("a")), Keys())
    with pytest.raises(ValueError, match="rate=0"):
        Limits(rate=0)
    with pytest.raises(ValueError, match="rate=nan"):
        Limits(rate=math.nan)
    with pytest.raises(ValueError, match="would never be taken; raise --held-mib, or lower --max-file-mib"):
        Limits(held_bytes=2**20)
    with pytest.raises(ValueError, match=r"file_bytes=1048576: .* may have 8388608; need that or more"):
        Limits(file_bytes=2**20)


def test_serve_refuses_before_it_starts_anything(gaussian: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in [
        (["--host", "0.0.0.0"], "without keys"),
        (["--keys", str(gaussian / "none")], "cannot read it"),
        (["--rate", "0"], "rate=0"),
        (["--max-file-mib", "7"], "--max-file-mib"),
        (["--tls-cert", "a.pem"], "TLS needs both"),
    ]:
        assert app(["serve", str(gaussian), *more]) == 2
        assert message in capsys.readouterr().err


def test_the_shape_of_a_volume_is_foretold(spec: ArtifactSpec, gaussian: Path) -> None:
    with load(gaussian, engine="onnxruntime", threads=1) as model:
        for size in itertools.product((2, 6), (4, 16), (8,)):
            assert model.sample(0, steps=1, size=size).array.shape == volume_shape(spec, size)
    pixels = spec.model_copy(update={"programs": {k: v for k, v in spec.programs.items() if k != "decode"}})
    assert volume_shape(pixels, (2, 4, 6)) == (2, 4, 6)


def test_a_body_becomes_what_the_server_reads(spec: ArtifactSpec) -> None:
    reader = BodyReader(spec, body_schema(spec), Limits())
    order = reader.read(
        b'{"seed": "5", "size": [4, 6, 8], "num_samples": 3, "steps": 9, "condition": {"anterior": 1}}'
    )
    assert (order.seed, order.volumes, order.steps, order.shape) == (5, 3, 9, (8, 12, 16))
    asked = read_request(spec, order.tensors)
    assert (asked.seed, asked.samples, asked.size, asked.output_format) == (5, 3, (4, 6, 8), "nifti")
    assert asked.condition == {"anterior": 1.0} and asked.settings == {"steps": 9}
    assert read_request(spec, reader.read(b"").tensors).samples == 1
    assert reader.read(b'{"steps": null}').steps == 20


def test_the_probe_is_a_request_that_is_taken(spec: ArtifactSpec) -> None:
    assert read_request(spec, probe_tensors(spec)).settings == {"steps": 1}
    whole = spec.conditions[0].model_copy(update={"fields": (), "minimum": 2.0, "shape": (1, "d1")})
    bare = spec.model_copy(update={"conditions": (whole,)})
    np.testing.assert_array_equal(probe_tensors(bare)["context"], np.full((1, 6), 2, np.float32))
    assert read_request(bare, probe_tensors(bare)).condition["context"].shape == (1, 6)


def test_depth_and_digits_are_bounded_where_they_are_said() -> None:
    assert parse_json(b"[" * 8 + b"1" * 64 + b"]" * 8)
    for content in (b"[" * 9 + b"1" + b"]" * 9, b"[" + b"1" * 65 + b"]"):
        with pytest.raises(ValueError, match="need 8 or fewer|more than 64"):
            parse_json(content)
    assert parse_json(b'{"a": "' + b"[" * 99 + b"1" * 99 + b'\\""}')
