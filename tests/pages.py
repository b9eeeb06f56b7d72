"""The page in a browser: what its tests do there."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from volcast.runtime.volume import Volume, read_nifti

KEY = "0123456789abcdef-of-the-tests"
PATIENCE_MS = 60_000
"""Nothing here is timed; a slow machine may take this long for one thing."""


def visit(browser: Browser, address: str, *, key: str | None = KEY, **context: Any) -> Page:
    """A fresh tab on the page, the key given; a script's error or a breach of the CSP fails `quiet`."""
    page = browser.new_context(**{"viewport": {"width": 1000, "height": 640}, **context}).new_page()
    page.set_default_timeout(PATIENCE_MS)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.faults = faults  # type: ignore[attr-defined]
    page.goto(address)
    if key is not None:
        expect(page.locator("#key")).to_be_focused()
        page.locator("#key").fill(key)
        page.locator("#key").press("Enter")
        expect(page.locator("#generate")).to_be_enabled()
        expect(page.locator("#error")).to_be_hidden()
    return page


def ask(page: Page, seed: int = 3) -> None:
    page.get_by_label("Steps").fill("12")
    page.get_by_label("Scheduler").select_option("pndm")
    page.get_by_label("Guidance").fill("2")
    page.get_by_label("anterior", exact=True).fill("0.25")
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_label("Seed").press("Enter")


def done(page: Page) -> None:
    expect(page.locator("#state")).to_contain_text("Done")


def eventually(page: Page, condition: Callable[[], bool]) -> None:
    for _ in range(PATIENCE_MS // 100):
        if condition():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it never came true")


def drawn(page: Page) -> np.ndarray:
    """The canvas as grey levels, once it holds a volume."""

    def look() -> np.ndarray:
        shot = page.locator("#canvas").screenshot()
        return np.asarray(Image.open(io.BytesIO(shot)).convert("L"))

    expect(page.locator("#empty")).to_be_hidden()
    # A black canvas with the crosshair and letters has some dozens of levels at their edges; an image has most of 256.
    eventually(page, lambda: np.count_nonzero(np.bincount(look().ravel())) > 100)
    return look()


def download(page: Page, control: Locator) -> Volume:
    with page.expect_download() as coming:
        control.press("Enter")
    name = coming.value.suggested_filename
    path = Path(coming.value.path()).with_name(name)
    coming.value.save_as(path)
    return read_nifti(path)


def saved(path: Path, array: np.ndarray) -> Volume:
    """The volume that is now in the file `path`, on the grid of the tests' model."""
    affine = np.array([[1, 0, 0, -5], [0, 1.5, 0, 7], [0, 0, 2, 9], [0, 0, 0, 1.0]])
    volume = Volume(array.astype(np.float32), affine, (1.0, 1.5, 2.0))
    volume.save(path)
    return volume


def tab_to(page: Page, control: Locator) -> None:
    """Press Tab until `control` has the focus; all that has it on the way shows it."""
    for _ in range(60):
        page.keyboard.press("Tab")
        # A radio button is drawn by its neighbour.
        assert page.evaluate(
            """() => [document.activeElement, document.activeElement.nextElementSibling].some(
                (one) => one && getComputedStyle(one).outlineStyle === "solid")"""
        ), page.evaluate("() => document.activeElement.outerHTML")
        if control.evaluate("(one) => one === document.activeElement"):
            return
    raise AssertionError(f"Tab does not reach {control}")
