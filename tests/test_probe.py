"""A model is asked for one step before it takes requests."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken import without_numbers

from volcast.runtime.pipeline import load
from volcast.runtime.probe import warm_up
from volcast.runtime.service import Service


def test_a_model_that_samples_is_warmed_up(gaussian: Path) -> None:
    model = load(gaussian, engine="onnxruntime", threads=1)
    service = Service(model)
    try:
        warm_up(service, model.spec)
        assert service.totals()["volcast_volumes_total", ""] == 1
    finally:
        service.close()


def test_one_that_cannot_tells_why(gaussian: Path, tmp_path: Path) -> None:
    model = load(without_numbers(gaussian, tmp_path / "broken"), engine="onnxruntime", threads=1)
    service = Service(model)
    try:
        with pytest.raises(ValueError, match="not finite"):
            warm_up(service, model.spec)
    finally:
        service.close()
