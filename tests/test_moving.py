"""Drawings that move, in a real browser: by keyboard, on a phone, in the dark, without scripts."""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from conftest import NOTEBOOKS, run

browsers = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pieces(path):
    "Names of the moving drawings among a notebook's stored outputs, and their sizes in bytes."
    found = {}
    for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for o in c.get("outputs", []):
            html = "".join(o.get("data", {}).get("text/html", ""))
            if m := re.match(r'<div class="moving ([\w-]+)"', html):
                found[m[1]] = len(html.encode())
    return found


MOVING = {p: found for p in NOTEBOOKS if (found := pieces(p))}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The chapters with moving drawings as pages, with the site's theme."
    folder = tmp_path_factory.mktemp("moving")
    for path in MOVING:
        shutil.copy(path, folder)
    (folder / "_quarto.yml").write_text(
        "project:\n  type: website\nformat:\n  html:\n    theme: {light: cosmo, dark: darkly}\n")
    got = run(Path(sys.executable).with_name("smalldocs"), "render", folder, timeout=300)
    assert got.returncode == 0, got.stderr
    return folder / "_site"


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, browsers)), None)
    if not program:
        pytest.skip("no browser: install Debian's chromium to have this look")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, site, path, errors, **options):
    "A chapter's page with nothing from elsewhere; what goes wrong in it is added to errors."
    context = browser.new_context(**options)
    context.route(lambda u: not u.startswith("file:"), lambda r: r.abort())
    page = context.new_page()
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error"
            and "ERR_FAILED" not in m.text else None)
    page.goto((site / f"{path.stem}.html").as_uri(), wait_until="load", timeout=120_000)
    return page


def settled(page):
    "Let the page draw twice."
    page.evaluate("() => new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))")


def drawn(box):
    "What a drawing shows now: its shapes and its words."
    return box.locator("svg").inner_html(), box.locator("[aria-live]").inner_text()


def test_the_drawings_are_there_and_small():
    every = {name: size for found in MOVING.values() for name, size in found.items()}
    assert {"gradient-surgery", "conflict-atlas", "smart-box"} <= set(every)
    assert max(every.values()) < 60_000, every


@pytest.mark.parametrize("path", MOVING, ids=lambda p: p.stem)
def test_they_move(browser, site, path):
    "Each control, worked by keyboard, changes the drawing; on a wide page and in the dark."
    errors = []
    page = opened(browser, site, path, errors, viewport={"width": 1280, "height": 900},
                  color_scheme="dark")
    for name in MOVING[path]:
        box = page.locator(f".moving.{name}")
        assert box.is_visible() and box.locator("svg").get_attribute("aria-label"), name
        controls = box.locator("input, select").all()
        for control in controls:
            control.press("End")
        for control in controls:
            assert control.evaluate("x => x.labels.length && x.labels[0].textContent.trim()"), name
            seen = []
            for key in ("Home", "ArrowRight", "End"):
                control.press(key)
                seen.append(drawn(box))
            assert len({svg for svg, _ in seen}) > 1, f"{name}: the drawing stays as it is"
            assert len({words for _, words in seen}) > 1, f"{name}: the words stay as they are"
        shown = re.sub("data:image[^\"]*", "", "".join(drawn(box)))  # a picture's letters say nothing
        assert "NaN" not in shown and "undefined" not in shown, name
    assert not errors, errors


@pytest.mark.parametrize("path", MOVING, ids=lambda p: p.stem)
def test_they_fit_a_phone(browser, site, path):
    "Nothing of a drawing stands out of a narrow page, and its letters keep their size."
    errors = []
    page = opened(browser, site, path, errors, viewport={"width": 390, "height": 844})
    for name in MOVING[path]:
        settled(page)
        box = page.locator(f".moving.{name}")
        out = box.evaluate("""box => [...box.querySelectorAll("*")].filter(x => {
          const r = x.getBoundingClientRect();
          return r.width && (r.right > window.innerWidth + 1 || r.left < -1);
        }).map(x => x.outerHTML.slice(0, 99))""")
        assert not out, f"{name}: {out[:3]}"
        letters = box.evaluate("""box => [...box.querySelectorAll("svg text")].map(
          x => x.getScreenCTM().a * parseFloat(getComputedStyle(x).fontSize))""")
        assert min(letters, default=12) >= 12, f"{name}: letters of {min(letters)} pixels"
    assert not errors, errors


@pytest.mark.parametrize("path", MOVING, ids=lambda p: p.stem)
def test_without_javascript_the_picture_is_there(browser, site, path):
    page = opened(browser, site, path, [], java_script_enabled=False)
    for name in MOVING[path]:
        box = page.locator(f".moving.{name}")
        assert box.count() == 1 and not box.is_visible(), name
        twin = box.locator("xpath=preceding::img[1]") # the figure above it says the same
        assert twin.is_visible() and twin.get_attribute("alt"), name
    page.close()
