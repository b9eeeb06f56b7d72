"""An option that means nothing beside what else is given is refused by name, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from volcast.__main__ import app

MEMORY = "for --memory alone; leave"
CHECK = "--check makes no volumes; leave"
SERVER = "of a Triton that is started here, not with --server; leave"
GATE = "for MONAI, not with --against or --samples, which compare artifacts; leave"
ALONE = "with MONAI one volume is compared, without --samples; leave"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("info ARTIFACT --size 4,4,4", f"[info] --size: {MEMORY} it out"),
        # Also with its default value: whoever writes it expects that it does something.
        ("info ARTIFACT --batch 1 --engine auto", f"[info] --batch, --engine: {MEMORY} them out"),
        ("info ARTIFACT --memory-limit 1GiB --json", f"[info] --memory-limit: {MEMORY}"),
        ("generate ARTIFACT --check set -n 4 -o other", f"[generate] ARTIFACT, --num, --out: {CHECK} them out"),
        ("generate --check set --seed 0", f"[generate] --seed: {CHECK} it out"),
        ("serve ARTIFACT --server h:1 --engine auto --queue 3", f"[serve] --engine, --queue: {SERVER} them out"),
        ("serve ARTIFACT --server h:1 --grpc-port 1", f"[serve] --grpc-port: {SERVER} it out"),
        ("verify ARTIFACT bundle --against ARTIFACT", f"[verify] BUNDLE: {GATE} it out"),
        ("verify ARTIFACT --samples 4 --set a=1 --negative x=1", f"[verify] --negative, --set: {GATE} them out"),
        ("verify ARTIFACT bundle --reuse 1 --real x", f"[verify] --reuse, --real: {ALONE} them out"),
    ],
)  # fmt: skip
def test_it_is_refused_by_name(
    gaussian: Path, capfd: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    arguments = [str(gaussian) if word == "ARTIFACT" else word for word in words.split()]
    assert app(arguments) == 2
    out, err = capfd.readouterr()
    assert not out and err.startswith(f"volcast: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("serve ARTIFACT --active 0", "'--active'"),
        ("serve ARTIFACT --queue -1", "'--queue'"),
        ("serve ARTIFACT --drain -1", "'--drain'"),
        ("serve ARTIFACT --grpc-port 99999", "'--grpc-port'"),
        ("serve ARTIFACT --http-port 8001", "[serve] ports (8001, 8001, 8002): need three different ones"),
        ("serve ARTIFACT --server nowhere", "[client] address 'nowhere': need HOST:PORT"),
        ("serve ARTIFACT --held-mib 10", "raise --held-mib, or lower --max-file-mib"),
        ("request --server nowhere", "[client] address 'nowhere': need HOST:PORT"),
        ("request --server :8001", "[client] address ':8001': need HOST:PORT"),
        ("request -n 0", "'--count'"),
        ("request --timeout 0", "'--timeout'"),
    ],
)
def test_a_number_or_place_that_cannot_be_is_refused_before_anything_starts(
    gaussian: Path, capfd: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert app([str(gaussian) if word == "ARTIFACT" else word for word in words.split()]) == 2
    out, err = capfd.readouterr()
    assert message in err and not out and "gateway on" not in err


def test_with_the_other_option_it_is_taken(gaussian: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["info", str(gaussian), "--memory", "--engine", "onnxruntime", "--batch", "1", "--size"]
    assert app([*words, "4,4,4"]) == 0
    assert app([*words, "4,4,5"]) == 2
    assert "d2=5" in capfd.readouterr().err
