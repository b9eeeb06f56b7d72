"""The gateway's page in headless Chromium: real gateway, real tritonserver, keyboard, eyes and screen reader."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateways import gateway
from pages import KEY, PATIENCE_MS, ask, done, download, drawn, eventually, saved, tab_to, visit
from playwright.sync_api import Browser, FileChooser, Page, Route, expect, sync_playwright
from served import Served

from volcast import Inpaint
from volcast.runtime.pipeline import load
from volcast.triton_repo.gateway.keys import Keys
from volcast.triton_repo.gateway.settings import Limits

CHROMIUM = shutil.which("chromium")
QUIET = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
WEBGL = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
ASKED: dict[str, Any] = {"steps": 12, "scheduler": "pndm", "guidance": 2.0, "condition": {"anterior": 0.25}}


@pytest.fixture(scope="module")
def address(served: Served, gaussian: Path) -> Iterator[str]:
    """A gateway with a key, whose volumes may have 1000 voxels, in front of the tests' server."""
    keys = Keys([("tests", KEY)])
    with gateway(gaussian, served, keys=keys, limits=Limits(voxels=1000), drain_s=1) as running:
        yield running.url


@pytest.fixture(scope="module")
def open_browser() -> Iterator[Callable[..., Browser]]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        yield lambda *more: playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*QUIET, *more], timeout=PATIENCE_MS
        )


@pytest.fixture(scope="module")
def browser(open_browser: Callable[..., Browser]) -> Iterator[Browser]:
    opened = open_browser(*WEBGL)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go: $VOLCAST_SCREENSHOTS, or a temporary folder."""
    folder = os.environ.get("VOLCAST_SCREENSHOTS")
    return Path(folder) if folder else tmp_path_factory.mktemp("pictures")


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    page = visit(browser, address)
    yield page
    page.context.close()
    # Chromium itself reports refused requests on the console.
    assert [fault for fault in page.faults if "Failed to load resource" not in fault] == []  # type: ignore[attr-defined]


@needs_chromium
def test_the_keyboard_alone_generates_and_downloads(page: Page, gaussian: Path, pictures: Path) -> None:
    page.locator("body").press("Home")
    for name, text in (("anterior", "0.25"), ("Steps", "12"), ("Guidance", "2"), ("Seed", "3")):
        control = page.get_by_label(name, exact=True)
        tab_to(page, control)
        page.keyboard.press("Control+A")
        page.keyboard.type(text)
        if name == "Steps":
            tab_to(page, page.get_by_label("Scheduler"))
            page.keyboard.type("pndm")
    tab_to(page, page.get_by_role("button", name="Generate"))
    page.keyboard.press("Enter")
    done(page)
    frames = page.locator("#frames input")
    assert frames.count() >= 2  # previews and the volume; a server that is busy may skip some previews
    assert frames.last.get_attribute("value") == "final"
    assert page.locator("#bar").evaluate("(bar) => bar.value") == 1
    expect(page.locator("#news")).to_contain_text("Done")
    drawn(page)
    page.screenshot(path=pictures / "done.png", full_page=True)
    tab_to(page, page.get_by_role("link", name="Download NIfTI"))
    found = download(page, page.get_by_role("link", name="Download NIfTI"))
    with load(gaussian, engine="onnxruntime", threads=1) as model:
        alone = model.sample(3, **ASKED)
    np.testing.assert_array_equal(found.array, alone.array)
    np.testing.assert_array_equal(found.affine, alone.affine)


@needs_chromium
def test_three_planes_and_3d_show_the_volume(page: Page, gaussian: Path, pictures: Path) -> None:
    ask(page)
    done(page)
    before = both = drawn(page)
    views = {}
    for name in ("Three planes", "3D"):
        page.get_by_label(name, exact=True).check()
        eventually(page, lambda: not np.array_equal(drawn(page), before))  # noqa: B023  (called at once)
        before = views[name] = drawn(page)
        page.screenshot(path=pictures / f"{name}.png")
    assert not np.array_equal(views["3D"], both)
    expect(page.get_by_label("Left–right")).to_be_hidden()
    page.get_by_label("Turn").press("ArrowRight")
    eventually(page, lambda: not np.array_equal(drawn(page), views["3D"]))
    page.get_by_label("Cut").press("End")
    expect(page.get_by_label("Cut")).to_have_attribute("aria-valuetext", "100 percent")

    page.get_by_label("Three planes").check()
    with load(gaussian, engine="onnxruntime", threads=1) as model:
        alone = model.sample(3, **ASKED)
    for name, key in (("Left–right", "Home"), ("Back–front", "End"), ("Bottom–top", "ArrowRight")):
        page.get_by_label(name).press(key)

    def told() -> bool:
        *place, value = map(float, re.findall(r"-?[\d.]+", page.locator("#place").inner_text()))
        voxel = np.rint((np.array(place) - alone.affine[:3, 3]) / alone.spacing_mm).astype(int)
        # Four digits after the point are shown.
        return [*voxel[:2]] == [0, 11] and abs(value - alone.array[tuple(voxel)]) <= 0.51e-4

    eventually(page, told)


@needs_chromium
def test_a_cancelled_run_ends_and_another_can_begin(page: Page) -> None:
    held: list[Route] = []
    page.route(
        "**/v1/volumes/*", lambda route: held.append(route)
    )  # the run cannot end before its preview has come
    ask(page)
    eventually(page, lambda: bool(held))
    expect(page.get_by_role("button", name="Generate")).to_have_attribute("aria-disabled", "true")
    page.get_by_role("button", name="Cancel").press("Enter")
    expect(page.locator("#state")).to_have_text("Cancelled")
    expect(page.locator("#news")).to_have_text("Cancelled")
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    expect(page.get_by_role("button", name="Cancel")).to_be_disabled()
    expect(page.get_by_role("link", name="Download NIfTI")).to_be_hidden()
    page.unroute("**/v1/volumes/*")
    page.keyboard.press("Enter")
    done(page)


@needs_chromium
def test_a_drawn_seed_is_shown_and_repeated(page: Page) -> None:
    page.get_by_label("Steps").fill("5")
    page.get_by_label("Steps").press("Enter")
    done(page)
    first = download(page, page.get_by_role("link", name="Download NIfTI"))
    seed = page.locator("#facts dd").first.inner_text()
    page.get_by_label("Steps").fill("7")
    page.get_by_role("button", name=f"Repeat: seed {seed}").press("Enter")
    expect(page.get_by_label("Seed", exact=True)).to_have_value(seed)
    expect(page.get_by_label("Steps")).to_have_value("5")
    page.get_by_role("button", name="Generate").press("Enter")
    expect(page.locator("#records li")).to_have_count(2)
    done(page)
    second = download(page, page.get_by_role("link", name=f"Download: seed {seed}").first)
    np.testing.assert_array_equal(first.array, second.array)


@needs_chromium
def test_errors_are_told_in_words_with_the_request_s_id(page: Page, pictures: Path) -> None:
    page.get_by_label("Seed").fill("18446744073709551616")
    page.get_by_role("button", name="Generate").press("Enter")
    expect(page.get_by_label("Seed")).to_be_focused()
    assert not page.get_by_label("Seed").evaluate("(one) => one.validity.valid")
    page.get_by_label("Seed").fill("18446744073709551615")
    page.get_by_text("More settings").press("Enter")
    page.get_by_label("Axis 1").fill("8")  # 16 x 12 x 8 voxels are more than 1000
    with page.expect_response("**/generate") as coming:
        page.get_by_role("button", name="Generate").press("Enter")
    expect(page.get_by_role("alert")).to_be_focused()
    expect(page.get_by_role("alert")).to_contain_text("This request is too large")
    expect(page.get_by_role("alert")).to_contain_text("this server makes up to 1000")
    assert coming.value.status == 413
    expect(page.locator("#error code")).to_have_text(coming.value.headers["x-request-id"])
    page.screenshot(path=pictures / "error.png")
    page.get_by_label("Axis 1").fill("")
    page.get_by_role("button", name="Generate").press("Enter")
    done(page)
    expect(page.locator("#error")).to_be_hidden()


@needs_chromium
def test_a_wrong_key_is_refused_and_the_right_one_lasts_as_long_as_the_tab(
    browser: Browser, address: str
) -> None:
    page = visit(browser, address, key=None)
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use").click()
    expect(page.get_by_role("alert")).to_contain_text("The server asks for an API key")
    expect(page.get_by_role("alert")).to_contain_text("Request id")
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Use").click()
    expect(page.locator("#generate")).to_be_enabled()
    page.reload()
    expect(page.locator("#generate")).to_be_enabled()
    assert page.evaluate("() => [localStorage.length, document.cookie]") == [0, ""]
    page.context.close()


@needs_chromium
def test_every_control_has_a_name(page: Page) -> None:
    ask(page)
    done(page)
    page.get_by_text("More settings").press("Enter")
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    controls = {
        "button",
        "textbox",
        "combobox",
        "slider",
        "spinbutton",
        "radio",
        "link",
        "progressbar",
        "image",
    }
    named: dict[str, list[str]] = {}
    for node in tree:
        role = node.get("role", {}).get("value")
        if role in controls and not node["ignored"]:
            named.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert set(named) == controls
    assert "" not in {name for names in named.values() for name in names}, named
    assert {"Generate", "Cancel"} <= set(named["button"])
    assert "Generated volume" in named["image"]
    levels = page.evaluate("() => [...document.querySelectorAll('h1, h2, h3')].map((one) => one.tagName)")
    assert levels.count("H1") == 1 and levels[0] == "H1"


@needs_chromium
def test_a_narrow_dark_window_scrolls_one_way_only(browser: Browser, address: str, pictures: Path) -> None:
    size = {"width": 360, "height": 740}
    page = visit(browser, address, viewport=size, color_scheme="dark", reduced_motion="reduce")
    page.get_by_text("More settings").press("Enter")
    ask(page, 2**64 - 1)
    done(page)
    drawn(page)
    page.screenshot(path=pictures / "narrow.png", full_page=True)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    moving = (
        "() => [...document.querySelectorAll('*')].map((one) => getComputedStyle(one).transitionDuration)"
    )
    assert set(page.evaluate(moving)) == {"0s"}
    page.context.close()


@needs_chromium
def test_without_webgl2_the_volume_can_be_downloaded(
    open_browser: Callable[..., Browser], address: str, gaussian: Path
) -> None:
    browser = open_browser("--disable-3d-apis")
    page = visit(browser, address)
    expect(page.locator("#empty")).to_contain_text("This browser cannot show volumes")
    ask(page)
    done(page)
    found = download(page, page.get_by_role("link", name="Download NIfTI"))
    with load(gaussian, engine="onnxruntime", threads=1) as model:
        np.testing.assert_array_equal(found.array, model.sample(3, **ASKED).array)
    browser.close()


@needs_chromium
def test_an_image_and_a_label_map_are_chosen_by_keyboard(
    browser: Browser, labelled: Served, masked_gaussian: Path, tmp_path: Path, pictures: Path
) -> None:
    numbers = np.random.default_rng(0)
    start = saved(tmp_path / "scan.nii.gz", numbers.normal(size=(8, 12, 8)))
    labels = saved(tmp_path / "labels.nii", numbers.integers(0, 3, (8, 12, 8)))
    with gateway(masked_gaussian, labelled, drain_s=1) as running:
        page = visit(browser, running.url, key=None)
        expect(page.locator("#generate")).to_be_enabled()
        expect(page.get_by_label("strength", exact=True)).to_be_hidden()
        choosers: list[FileChooser] = []
        page.on("filechooser", lambda one: choosers.append(one))
        page.locator("body").press("Home")
        for name, file in (("mask", "labels.nii"), ("Image", "scan.nii.gz")):
            tab_to(page, page.get_by_label(name, exact=True))
            page.keyboard.press("Enter")
            eventually(page, lambda: bool(choosers))
            choosers.pop().set_files(tmp_path / file)
        expect(page.locator("#size-0")).to_be_disabled()
        tab_to(page, page.get_by_role("button", name="Remove: Image"))
        tab_to(page, page.get_by_label("strength, slider"))
        page.keyboard.press("ArrowRight")
        strength = float(page.get_by_label("strength", exact=True).input_value())
        assert strength > 0.5
        page.screenshot(path=pictures / "files.png", full_page=True)
        page.get_by_label("Steps").fill("6")
        page.get_by_label("Seed", exact=True).fill("9")
        page.get_by_label("Seed", exact=True).press("Enter")
        done(page)
        expect(page.locator("#facts")).to_contain_text(
            f"from scan.nii.gz with strength {strength:g}, mask labels.nii"
        )
        first = download(page, page.get_by_role("link", name="Download NIfTI"))
        page.get_by_role("button", name="Remove: Image").press("Enter")
        expect(page.get_by_label("Image", exact=True)).to_be_focused()
        expect(page.locator("#size-0")).to_be_enabled()
        page.get_by_role("button", name="Remove: mask").press("Enter")
        page.get_by_role("button", name="Generate").press("Enter")
        expect(page.get_by_label("mask", exact=True)).to_be_focused()  # it is required
        page.get_by_role("button", name="Repeat: seed 9").press("Enter")
        page.get_by_role("button", name="Generate").press("Enter")  # the files are the form's again
        expect(page.locator("#records li")).to_have_count(2)
        done(page)
        second = download(page, page.get_by_role("link", name="Download NIfTI"))
        assert page.faults == []  # type: ignore[attr-defined]
        page.context.close()
    with load(masked_gaussian, engine="onnxruntime", threads=1) as model:
        alone = model.sample(9, steps=6, image=start, strength=strength, condition={"mask": labels})
    for found in (first, second):
        np.testing.assert_array_equal(found.array, alone.array)
        np.testing.assert_array_equal(found.affine, start.affine)


@needs_chromium
def test_a_part_is_painted_anew_at_several_weights(
    browser: Browser, labelled: Served, masked_gaussian: Path, tmp_path: Path
) -> None:
    start = saved(tmp_path / "scan.nii.gz", np.random.default_rng(0).normal(size=(8, 12, 8)))
    labels = saved(tmp_path / "labels.nii.gz", np.ones((8, 12, 8)))
    hidden = saved(tmp_path / "hidden.nii.gz", np.indices((8, 12, 8))[0] < 4)
    with gateway(masked_gaussian, labelled, drain_s=1) as running:
        page = visit(browser, running.url, key=None)
        inpaint = page.get_by_label("Paint anew", exact=True)
        expect(inpaint).to_be_hidden()
        page.get_by_label("mask", exact=True).set_input_files(tmp_path / "labels.nii.gz")
        page.get_by_label("Image", exact=True).set_input_files(tmp_path / "scan.nii.gz")
        inpaint.set_input_files(tmp_path / "hidden.nii.gz")
        expect(page.get_by_label("strength", exact=True)).to_have_value("1")
        page.get_by_text("Guide away from").press("Enter")
        page.get_by_label("negative anterior", exact=True).fill("0.75")
        page.get_by_label("Steps").fill("6")
        page.get_by_label("Seed", exact=True).fill("9")
        page.get_by_label("Guidance").fill("1, 2.5x")
        page.get_by_label("Guidance").press("Enter")
        expect(page.get_by_label("Guidance")).to_be_focused()
        assert "from 0 to 100" in page.get_by_label("Guidance").evaluate("(one) => one.validationMessage")
        page.get_by_label("Guidance").fill("1, 2.5")
        page.get_by_label("Guidance").press("Enter")
        done(page)
        expect(page.locator("#records li")).to_have_count(2)
        expect(page.locator("#frames span")).to_have_text(["w 1", "w 2.5"])
        expect(page.locator("#facts")).to_contain_text(
            "guidance 2.5, from scan.nii.gz with strength 1, painted anew by hidden.nii.gz, mask labels.nii.gz, "
            "negative anterior 0.75"
        )
        found = [download(page, page.get_by_role("link", name="Download: seed 9").nth(i)) for i in (1, 0)]
        page.get_by_role("button", name="Remove: Image").press("Enter")
        expect(inpaint).to_be_hidden()
        page.get_by_role("button", name="Repeat: seed 9").first.press("Enter")
        expect(page.get_by_label("Guidance")).to_have_value("2.5")
        page.get_by_role("button", name="Generate").press("Enter")
        expect(page.locator("#records li")).to_have_count(3)
        done(page)
        found.append(download(page, page.get_by_role("link", name="Download NIfTI")))
        assert page.faults == []  # type: ignore[attr-defined]
        page.context.close()
    with load(masked_gaussian, engine="onnxruntime", threads=1) as model:
        expected = list(
            model.sample_many(
                1, 9, steps=6, guidance=[1, 2.5], image=start, inpaint=Inpaint(hidden),
                condition={"mask": labels}, negative={"anterior": 0.75},
            )
        )  # fmt: skip
    for volume, alone in zip(found, [*expected, expected[1]], strict=True):
        np.testing.assert_array_equal(volume.array, alone.array)


@needs_chromium
def test_what_the_page_sends_as_a_file_is_refused_in_words(
    browser: Browser, labelled: Served, masked_gaussian: Path
) -> None:
    with gateway(masked_gaussian, labelled, limits=Limits(file_bytes=2**20, body_bytes=2**20)) as running:
        page = visit(browser, running.url, key=None)
        picker = page.get_by_label("mask", exact=True)
        expect(page.locator("#generate")).to_be_enabled()
        picker.set_input_files({"name": "large.nii", "mimeType": "", "buffer": bytes(2**20)})
        page.get_by_role("button", name="Generate").press("Enter")
        expect(picker).to_be_focused()
        assert picker.evaluate("(one) => one.validationMessage") == "A file of up to 0.75 MiB"
        picker.set_input_files({"name": "small.nii", "mimeType": "", "buffer": b"no file of this kind"})
        page.get_by_role("button", name="Generate").press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("mask: no NIfTI file; give a .nii or .nii.gz file")
        page.context.close()
