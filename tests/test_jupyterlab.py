"""JupyterLab for real: open a chapter in a browser, run all cells, follow links, leave no diff."""
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from conftest import ROOT, run

browsers = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
patience = 300_000 # milliseconds: a slow machine is no error
CHAPTER = "01_attention.ipynb" # quick, and it wants no data
WINDOW = {"@jupyterlab/notebook-extension": ("tracker", {"windowingMode": "none"}),
          "@jupyterlab/apputils-extension": ("notification", {"fetchNews": "false"})}


def settings(folder):
    "A home for JupyterLab that shows all cells of a notebook at once and asks no one for news."
    for plugin, (name, values) in WINDOW.items():
        place = folder / "lab" / "user-settings" / plugin
        place.mkdir(parents=True)
        (place / f"{name}.jupyterlab-settings").write_text(json.dumps(values))
    places = {f"JUPYTER_{k}_DIR": str(folder / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")}
    return {**places, "JUPYTERLAB_SETTINGS_DIR": str(folder / "lab" / "user-settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "lab" / "workspaces"),
            "IPYTHONDIR": str(folder / "ipython")}


@contextlib.contextmanager
def serving_lab(root, env, log):
    "JupyterLab on a free port of this machine; gives a function from a path to its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--allow-root",
               f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               "--LabApp.extension_manager=readonly", f"--ServerApp.root_dir={root}"]
    with open(log, "w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=root)
    try:
        for _ in range(patience // 500):
            with contextlib.suppress(OSError):
                urlopen(f"http://127.0.0.1:{port}/api?token={token}").close()
                break
            assert server.poll() is None, Path(log).read_text()[-3000:]
            time.sleep(.5)
        yield lambda path: f"http://127.0.0.1:{port}/lab/tree/{path}?token={token}&reset"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def copy(checkout):
    "A copy of the checkout that JupyterLab may write to."
    return checkout("lab")


@pytest.fixture(scope="module")
def lab(copy, tmp_path_factory):
    "A page of a browser in JupyterLab, and a function that opens a notebook in it."
    pytest.importorskip("jupyterlab")
    sync = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, browsers)), None)
    if not program:
        pytest.skip("no browser: install Debian's chromium to have this look")
    home = tmp_path_factory.mktemp("jupyter")
    env = {**os.environ, **settings(home), "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    env.pop("MINBERT_DATA", None)
    trusted = subprocess.run([sys.executable, "-m", "jupyter", "trust", "nbs/07_pcgrad.ipynb"],
                             cwd=copy, env=env, capture_output=True, text=True)
    assert trusted.returncode == 0, trusted.stderr
    with serving_lab(copy, env, home / "log") as address, sync.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(patience)
        yield page, lambda path: open_notebook(page, address(path))
        chromium.close()


def open_notebook(page, address):
    "Go there, and wait until its cells are shown and its kernel is ready."
    page.goto(address, wait_until="domcontentloaded")
    panel = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
    panel.locator(".jp-Cell").first.wait_for()
    page.locator(".jp-StatusBar-TextItem", has_text="| Idle").wait_for() # the kernel answers
    return panel


def choose(page, menu, item):
    "An item of the menu bar."
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.locator(".lm-Menu").get_by_text(item, exact=True).click()


def notebook(path):
    "A notebook as it is stored, and its code cells."
    nb = json.loads(path.read_text(encoding="utf-8"))
    return nb, [c for c in nb["cells"] if c["cell_type"] == "code"]


def without_values(path):
    "A notebook whose outputs are reduced to their kinds: numbers may differ between machines."
    nb, code = notebook(path)
    for c in code:
        c["outputs"] = [[o["output_type"], *sorted(o.get("data", {}))] for o in c["outputs"]]
    return nb


def wait_for_the_last(path, page):
    "Save until the file says that its last cell has run."
    for _ in range(patience // 1000):
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        _, cells = notebook(path)
        failed = [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
        assert not failed, "\n".join(failed[0]["traceback"])
        if cells[-1]["execution_count"]:
            return cells
    pytest.fail("the last cell has not run")


def test_a_chapter_runs(lab, copy):
    "Run All Cells: no error, every figure is there and shown, and nbdev_clean leaves no diff."
    page, go = lab
    path, committed = copy / "nbs" / CHAPTER, ROOT / "nbs" / CHAPTER
    panel = go(f"nbs/{CHAPTER}")
    choose(page, "Run", "Run All Cells")
    cells = wait_for_the_last(path, page)
    assert all(c["execution_count"] for c in cells if "".join(c["source"]).strip())
    figures = str(without_values(committed)).count("image/png")
    assert panel.locator(".jp-OutputArea-output img").count() == figures > 3
    assert page.evaluate("""[...document.querySelectorAll(".jp-OutputArea-output img")]
                            .every(x => x.complete && x.naturalWidth > 0)""")
    assert panel.locator('[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0

    assert without_values(path) != without_values(committed) # counts, at least
    assert "`nbdev_clean` removes them" in (ROOT / "README.md").read_text()
    got = run(Path(sys.executable).with_name("nbdev_clean"), cwd=copy)
    assert got.returncode == 0, got.stderr
    assert without_values(path) == without_values(committed)


def test_drawings_move_in_the_lab(lab):
    "A trusted notebook's stored drawing moves without running anything."
    page, go = lab
    panel = go("nbs/07_pcgrad.ipynb")
    box = panel.locator(".moving.gradient-surgery")
    box.scroll_into_view_if_needed()
    box.wait_for(state="visible")
    slider, svg = box.locator("input[type=range]"), box.locator("svg")
    before = svg.inner_html()
    slider.press("End")
    assert "polygon" in before and svg.inner_html() != before


def test_the_start_page_leads_to_the_chapters(lab, copy):
    "Every link of the front page to a notebook names one, and a click on one opens it in the lab."
    page, go = lab
    panel = go("nbs/index.ipynb")
    links = panel.locator(".jp-RenderedMarkdown a")
    addresses = links.evaluate_all("all => all.map(a => new URL(a.href).pathname)")
    named = {a.rsplit("/", 1)[-1] for a in addresses if a.endswith(".ipynb")}
    assert {p.name for p in (copy / "nbs").glob("[0-9]*.ipynb")} <= named
    assert not [n for n in named if not (copy / "nbs" / n).exists()]
    links.filter(has_text="01 Attention").first.click()
    title = page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) h1").first
    title.filter(has_text="Attention").wait_for()
