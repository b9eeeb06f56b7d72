"""The page's files: what was vendored, what the content security policy needs, colours."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

FILES = Path(__file__).parent.parent / "triton_repo" / "page"


def test_niivue_is_the_file_that_its_recipe_makes() -> None:
    digest, name = (FILES / "vendor" / "niivue.sha256").read_text().split()
    assert hashlib.sha256((FILES / name).read_bytes()).hexdigest() == digest
    assert (FILES / name).stat().st_size < 2_500_000
    locked = re.search(r'"node_modules/@niivue/niivue": {\s*"version": "([\d.]+)"', (FILES / "vendor" / "package-lock.json").read_text())  # fmt: skip
    assert locked is not None
    with open(FILES / name) as file:
        assert f"NiiVue {locked[1]}," in file.readline()
    assert f"NiiVue {locked[1]} " in (FILES / "niivue.LICENSE.txt").read_text()


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere() -> None:
    html = (FILES / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
    assert all("src=" in one for one in re.findall(r"<script[^>]*>", html))
    own = [
        path for path in FILES.iterdir() if path.suffix in {".html", ".js", ".css"} and path.stem != "niivue"
    ]
    assert len(own) >= 3
    for path in own:
        assert "://" not in path.read_text(), path


@pytest.mark.parametrize("scheme", [0, 1])
def test_texts_and_edges_have_contrast(scheme: int) -> None:
    roots = re.findall(r":root {(.*?)}", (FILES / "page.css").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", roots[scheme]))

    def luminance(name: str) -> float:  # WCAG 2.2, relative luminance
        parts = np.array([int(colours[name][i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    texts = [(text, ground) for text in ("ink", "soft", "accent") for ground in ("ground", "sheet")]
    texts += [("on-accent", "accent"), ("accent", "tint"), ("bad", "bad-tint"), ("ink", "bad-tint")]
    for text, ground in texts:
        assert contrast(text, ground) >= 4.5, (text, ground)  # 1.4.3, AA
    for ground in ("ground", "sheet"):
        assert contrast("edge", ground) >= 3, ground  # 1.4.11
