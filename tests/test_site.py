"""The site: every operation is derived, the pages build without a warning, and a reader's browser fetches nothing from elsewhere.

The derivations check themselves: each runs its worked example when the site is built, and raises where a gradient differs from finite
differences.
"""

from __future__ import annotations

import functools
import html
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minilora import functional as F
from minilora import kernels

ROOT = Path(__file__).resolve().parents[1]
DERIVATIONS = ROOT / "docs" / "derivations"
COPIES = ("embedding", "take_rows", "mse", "softmax")  # operations with a gradient that are not in the table of kernels
NO_GRADIENT = ("dropout_mask", "adamw")


@pytest.mark.parametrize("name", [*kernels.TABLE, *COPIES])
def test_every_operation_has_a_derivation(name):
    text = (DERIVATIONS / f"{name}.md").read_text(encoding="utf-8")
    assert re.match(rf"# .*`{name}`", text), "the title names the operation"
    assert "$$" in text.partition("## ")[0], "the equation comes first"
    assert re.search(r"^## The numbers$.*session=", text, re.MULTILINE | re.DOTALL)
    if name not in ("add", "multiply"):
        assert f"<!-- code {name} -->" in text
    if name in kernels.TABLE:
        assert f"<!-- facts {name} -->" in text
    if name not in NO_GRADIENT:
        assert "gradient" in text
        assert re.search(r"check\(", text), "no finite differences"
        assert re.search(r"^## What is saved$", text, re.MULTILINE)
    assert f"derivations/{name}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), "not in the navigation"


def test_every_public_pair_has_a_derivation():
    pairs = {name.removesuffix("_backward") for name in dir(F) if name.endswith("_backward")}
    assert pairs <= {path.stem for path in DERIVATIONS.glob("*.md")}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the built site."""
    for package in ("mkdocs", "material", "mkdocstrings", "markdown_exec", "math_core"):
        pytest.importorskip(package, reason="needs: pip install 'minilora[docs]'")
    folder = tmp_path_factory.mktemp("site")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "left as is" not in done.stderr, done.stderr[-3000:]
    return folder


def test_no_page_loads_anything_from_elsewhere(site):
    loads = re.compile(
        r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\ssrc=["']?(?:https?:)?//[^>]*|<link\b[^>]*\shref=["']?(?:https?:)?//[^>]*"""
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 100
    found = {str(page.relative_to(site)): loads.findall(page.read_text(encoding="utf-8")) for page in pages}
    assert {page: links for page, links in found.items() if links} == {}
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", style.read_text(encoding="utf-8")), style


def test_formulas_are_mathml_and_numbers_were_computed(site):
    for path in sorted(DERIVATIONS.glob("*.md")):
        page = (site / "derivations" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert "<math" in page
        assert "merror" not in page
        assert "arithmatex" not in page
        assert "<!-- " not in page.partition("<article")[2].partition("</article>")[0], "a mark was not filled in"
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "derivations" / "lora_linear.html").read_text(encoding="utf-8")))
    rows = re.findall(r"d(x|A|B)\[\d, \d\] +(-?\d+\.\d{6}) +(-?\d+\.\d{6}) +(\d)e-(\d\d), of", page)
    assert [row[0] for row in rows] == ["x", "A", "B"]
    assert all(by_hand == by_difference and int(exponent) >= 8 for _, by_hand, by_difference, _, exponent in rows)


def test_links_into_the_repository_lead_to_listings(site):
    page = (site / "reading.html").read_text(encoding="utf-8")
    targets = re.findall(r'href="(source/minilora/[^"]+)"', page)
    assert len(targets) > 30
    assert all((site / target).exists() for target in targets)
    assert "def lora_linear" in re.sub(r"<[^>]+>", "", (site / "source/minilora/functional/lora.py.html").read_text(encoding="utf-8"))


EXPLAINED = importlib.util.find_spec("minilora.explain") is not None


@pytest.mark.skipif(not EXPLAINED, reason="minilora explain is not there yet")
def test_explained_pages_are_linked(site):
    for name in ("lora_linear", "attention", "layer_norm"):
        assert (site / "explained" / f"{name}.html").stat().st_size > 10_000
        assert f"../explained/{name}.html" in (site / "derivations" / f"{name}.html").read_text(encoding="utf-8")
    page = (site / "explained.html").read_text(encoding="utf-8")
    assert {"explained/step.html", "explained/block.html"} <= set(re.findall(r'href="([^"]+)"', page))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(site, dark):
    browser = pytest.importorskip("browser")
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    expected = {
        "index.html": "finite differences [-1.38212362",
        "lora-gradient.html": "LoRA as in part 5",
        "derivations/index.html": "Softmax: softmax",
        "derivations/attention.html": "largest error, relative",
        "course/02_mlp_boundary.html": "accuracy, new points",
        "choosing.html": "at twice the rate",
        "api/functional.html": "Gradients of y = x W + b",
        "api/layers.html": "Layer",
    }
    if EXPLAINED:
        expected |= {"explained.html": "A whole step", "explained/step.html": "→", "explained/lora_linear.html": "by finite difference"}
    try:
        with browser.chromium() as chromium:
            for name, text in expected.items():
                page = chromium.open(here + name, dark=dark, inside=here)
                assert text in page.text(), name
                if not name.startswith("explained/"):
                    assert page.js("document.body.dataset.mdColorScheme") == ("slate" if dark else "default")
                assert page.problems() == [], name
                assert page.violations() == [], name
            page = chromium.open(here, dark=dark, inside=here)
            assert "Skip to content" in page.press("Tab")
    finally:
        server.shutdown()
        server.server_close()
