"""The site: the notebooks as pages, their links, anchors and pictures, and one look in a real browser."""
import functools
import html.parser
import json
import re
import shutil
import statistics
import sys
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from conftest import NOTEBOOKS, run, serving


@pytest.fixture(scope="module")
def processed(checkout):
    "The notebooks as nbdev hands them to Quarto, in a copy of the checkout."
    copy = checkout("site")
    program = "from nbdev.quarto import refresh_quarto_yml\nfrom nbdev.serve import proc_nbs\nif __name__ == '__main__':\n    refresh_quarto_yml()\n    proc_nbs(n_workers=1)"
    got = run(sys.executable, "-c", program, cwd=copy, timeout=400)
    assert got.returncode == 0, got.stderr[-1500:]
    assert "Warning" not in got.stderr, got.stderr[:1500]
    return copy/"_proc"


@pytest.fixture(scope="module")
def rendered(processed):
    "What smalldocs says while it makes the pages from the same `_quarto.yml`."
    got = run(Path(sys.executable).with_name("smalldocs"), "render", processed, timeout=300)
    assert got.returncode == 0, got.stderr + got.stdout
    return (got.stdout + got.stderr).splitlines()


@pytest.fixture(scope="module")
def site(rendered, processed):
    "The folder of the pages."
    return next(p for p in (processed/"_site", processed/"_docs", processed.parent/"_docs") if p.is_dir())


class Page(html.parser.HTMLParser):
    "Links, targets, pictures and the running text of a page, without code."
    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.pictures, self.text, self.inside, self.code = [], set(), [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get("id"): self.ids.add(a["id"])
        if a.get("name") and tag == "a": self.ids.add(a["name"])
        if tag in ("a", "link") and a.get("href"): self.links.append(a["href"])
        if tag == "script" and a.get("src"): self.links.append(a["src"])
        if tag == "img": self.pictures.append(a.get("src", ""))
        if tag in ("code", "pre", "script", "style", "math"): self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag: self.inside.pop()

    def handle_data(self, data): (self.code if self.inside else self.text).append(data)


@pytest.fixture(scope="module")
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob("*.html")}


def test_no_warnings_but_the_known_ones(rendered):
    known = ("execute.enabled", "html-math-method", "lightbox", "html.grid", "output-file is not read", "metadata-files", "unknown key bibliography")      # Quarto's own, which smalldocs does not have
    notes = [x for x in rendered if x.startswith("warning") and not any(k in x for k in known)]
    assert not notes, "\n".join(notes)


def test_building_says_nothing_of_data(pages):
    "Cells that run while the site is built load no data: nobody should read what that would say."
    said = "none could be fetched: using the pocket corpus"
    assert not [name for name, p in pages.items() if said in "".join(p.text + p.code)]


def test_every_notebook_is_a_page(pages, site):
    assert {p.stem + ".html" for p in NOTEBOOKS} <= set(pages)
    assert all(len("".join(p.text)) > 500 for name, p in pages.items() if re.match(r"\d\d[a-z]?_", name))


def target(href):
    "Quarto names the page of `00_data.ipynb` data.html, smalldocs 00_data.html: known, so either name counts."
    names = {re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem.lower()): p.stem for p in NOTEBOOKS}
    stem = Path(href).stem
    return href if not href.endswith(".html") or stem not in names else href.replace(stem, names[stem])


def test_links_and_anchors(pages, site):
    broken = []
    for name, page in pages.items():
        for link in page.links:
            u = urlsplit(link)
            if u.scheme or link.startswith("//"):
                own = "github.io/minbert/" in link
                if not own or u.path.rstrip("/") in ("/minbert", ""): continue
                path, anchor = target(u.path.removeprefix("/minbert/")), u.fragment      # nbdev's links to the published site
            else: path, anchor = target(unquote(u.path)), u.fragment
            there = (site/name).parent/path if path else site/name
            if there.is_dir(): there = there/"index.html"
            other = pages.get(there.resolve().relative_to(site.resolve()).as_posix()) if there.resolve().is_relative_to(site.resolve()) else None
            if not there.exists(): broken.append(f"{name}: {link}")
            elif anchor and other and anchor not in other.ids: broken.append(f"{name}: no anchor {link}")
    assert not broken, "\n".join(sorted(set(broken)))


def test_pictures(pages, site, processed):
    for name, page in pages.items():
        for src in page.pictures:
            if src.startswith("data:"): assert len(src) > 500, name
            elif not urlsplit(src).scheme: assert ((site/name).parent/unquote(src)).is_file(), f"{name}: {src}"
            else: pytest.fail(f"{name}: a picture from elsewhere, {src}")
    for nb in NOTEBOOKS:
        stored = sum("image/png" in o.get("data", {}) for c in json.loads((processed/nb.name).read_text())["cells"] for o in c.get("outputs", []))
        assert len(pages[nb.stem + ".html"].pictures) >= stored, f"{nb.stem}: a figure is not on its page"


def test_nothing_is_left_raw(pages):
    wrong = []
    for name, page in pages.items():
        words = "".join(page.text)
        for pattern in (r"\{#\w+", r":::", r"#\|", r"\{\.[a-z-]+\}", r"\[\[(?![-\d])", r"\]\(", r"\*\*\w", r"Traceback \(most recent", r"nbdev_export"):
            if m := re.search(pattern, words): wrong.append(f"{name}: {words[max(0, m.start() - 40):m.end() + 40]!r}")
        if m := re.search(r"^\s*#\|.*$", "".join(page.code), re.M): wrong.append(f"{name}: {m[0]!r} in a code cell")
    assert not wrong, "\n".join(wrong)


def test_exported_names_have_their_parameters(pages):
    "What a notebook exports is documented on its page, with the docments' text."
    for name, words in (("06_train", ("fit", "steps of the whole run")),
                        ("A6_runs", ("train", "the run directory", "how long, how fast"))):
        page = pages[f"{name}.html"]
        text = "".join(page.text + page.code)
        assert all(w in text for w in words), name


browsers = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCREEN = 900                                                                      # pixels high
WIDTHS = (1280, 768, 390)                                                         # a laptop, a tablet, a phone
LOOK = """() => {
  const main = document.querySelector("main"), box = e => e.getBoundingClientRect();
  const code = [...main.querySelectorAll("div.sourceCode")].filter(e => !e.closest("details:not([open])"));
  const first = main.querySelector("img, svg, canvas");
  return {
    images: Array.from(document.images).map(i => [i.naturalWidth, box(i).width]),
    height: box(main).height,
    bare: [...main.querySelectorAll("img:not([src^=thumb_])")].filter(i => !i.alt || !i.closest("figure")?.querySelector("figcaption")?.innerText).map(i => i.alt),
    folds: [...main.querySelectorAll("details.code-fold:not([open]) > summary")].map(e => e.innerText),
    defined: code.filter(e => box(e).height).flatMap(e => [...e.textContent.matchAll(/^(?:class|def) (\\w+)/gm)].map(m => m[1])),
    code: code.reduce((sum, e) => sum + box(e).height, 0) / box(main).height,
    solutions: [...main.querySelectorAll("details.code-fold > summary")].filter(e => /^Solution/.test(e.innerText)).map(e => [...e.closest(".cell").querySelectorAll(".cell-output")].filter(o => !o.closest("details:not([open])")).length),
    figure: first && (box(first).top + scrollY)};
}"""
AXE = """async (skip) => (await axe.run(skip ? {exclude: [skip]} : document, {resultTypes: ["violations"],
    runOnly: ["color-contrast", "image-alt", "link-name", "document-title", "html-has-lang"]}))
  .violations.flatMap(v => v.nodes.map(n => `${v.id}: ${n.html.slice(0, 120)}: ${n.any.map(a => a.message).join()}`))"""
AXED = {"index.html": None, "404.html": None, "glossary.html": None, "12b_own_row.html": None,          # page → what is left out there:
        "07_pcgrad.html": "div.sourceCode"}                                      # thousands of words of code, in the colours of the page before


@pytest.fixture(scope="module")
def looks(pages, site):
    "What a real browser sees on each page: page → its figures, heights, contrasts and complaints."
    program = next(filter(None, map(shutil.which, browsers)), None)
    if not program: pytest.skip("no browser: install Debian's chromium to have this look")
    sync = pytest.importorskip("playwright.sync_api")
    axe = Path(pytest.importorskip("axe_playwright_python").__file__).with_name("axe.min.js").read_text(encoding="utf-8")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

    def found(page, name):
        page.evaluate(axe)
        return page.evaluate(AXE, AXED[name])

    seen = {}
    with serving(functools.partial(Quiet, directory=str(site))) as url, sync.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": WIDTHS[0], "height": SCREEN}, color_scheme="light")
        context.route(lambda u: not u.startswith(url), lambda r: r.abort())       # nothing from elsewhere is needed, and nothing is asked for
        for name in sorted(pages):
            page, errors = context.new_page(), []
            page.on("pageerror", lambda e: errors.append(str(e)))
            page.on("console", lambda m: errors.append(m.text) if m.type == "error" and "ERR_FAILED" not in m.text and "favicon" not in (m.location or {}).get("url", "") else None)
            page.on("response", lambda r: errors.append(f"{r.status} {r.url}") if r.status >= 400 and "favicon" not in r.url else None)
            assert page.goto(url + name, wait_until="load", timeout=60_000).ok
            assert page.locator("h1").first.is_visible() and page.title()
            look = seen[name] = page.evaluate(LOOK)
            look["links"] = page.evaluate("Array.from(document.querySelectorAll('.notebook-links a')).map(a => a.href)")
            if name == "index.html":
                page.route("https://raw.githubusercontent.com/**", lambda r: r.fulfill(body="{}", headers={"Access-Control-Allow-Origin": "*"}))
                with page.expect_download() as got: page.get_by_text("Download the notebook").click()
                look["downloaded"] = got.value.suggested_filename
            if name in AXED:
                look["light"] = found(page, name)
                page.emulate_media(color_scheme="dark")
                page.reload(wait_until="load")
                look["dark"] = found(page, name)
                look["cards"] = page.evaluate("Array.from(document.querySelectorAll('main img')).map(i => getComputedStyle(i).backgroundColor)")
            look["too wide"] = {}
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": SCREEN})
                look["too wide"][width] = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            look["errors"] = [e for e in errors if "katex" not in e.lower()]      # smalldocs asks a CDN for KaTeX, Quarto does not
            page.close()
        browser.close()
    return seen


def test_pages_load_without_complaints_and_show_their_figures(looks, pages):
    for name, look in looks.items():
        assert not look["errors"], f"{name}: {look['errors']}"
        assert len(look["images"]) == len(pages[name].pictures), name
        assert all(natural > 0 and shown > 0 for natural, shown in look["images"]), f"{name}: a figure is not displayed: {look['images']}"


def test_every_picture_has_alternative_text_and_a_caption(looks):
    "But the front page's thumbnails: their captions are the links under them."
    assert not {name: look["bare"] for name, look in looks.items() if look["bare"]}


def test_no_page_scrolls_sideways(looks):
    wide = [f"{name} at {width}: {by} pixels" for name, look in looks.items() for width, by in look["too wide"].items() if by > 1]
    assert not wide, "\n".join(wide)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_contrast_and_alternative_text(looks, mode):
    "What axe-core finds against WCAG AA."
    found = [f"{name}: {x}" for name in AXED for x in looks[name][mode]]
    assert not found, f"{len(found)} found\n" + "\n".join(found[:20])


def test_figures_stand_on_white_in_dark_mode(looks):
    assert {card for name in AXED for card in looks[name]["cards"]} == {"rgb(255, 255, 255)"}


def test_each_notebooks_page_offers_it_in_colab_and_for_download(looks):
    for nb in NOTEBOOKS:
        place = f"minbert/minbert/blob/main/nbs/{nb.name}"
        assert looks[f"{nb.stem}.html"]["links"] == [f"https://colab.research.google.com/github/{place}",
                                                     f"https://raw.githubusercontent.com/{place.replace('blob/', '')}"], nb.name
    assert looks["index.html"]["downloaded"] == "index.ipynb"


def test_imports_and_long_sources_are_folded(looks):
    "What a card documents is seen once: a short source, or the one a chapter is about, stands for the card's first lines; a long one is closed."
    look = looks["02_bert.html"]
    assert {"Imports", "Source of BertConfig"} <= set(look["folds"])
    assert not {"Source of Pooler", "Source of BertModel"} & set(look["folds"])
    assert look["defined"].count("BertModel") == look["defined"].count("Pooler") == 1, look["defined"]
    script = (NOTEBOOKS[0].parent/"after-body.html").read_text()
    heart = re.findall(r'"(\w+)"', re.search(r"const heart = \[(.*?)\]", script)[1])
    defined = {name for look in looks.values() for name in look["defined"]}
    assert heart and set(heart) <= defined, set(heart) - defined


def test_what_a_solution_prints_stays_closed_with_it(looks):
    open_ones = {name: look["solutions"] for name, look in looks.items() if look["solutions"]}
    assert len(open_ones) > 12 and not any(sum(n) for n in open_ones.values()), open_ones


def test_a_chapter_shows_more_than_code_and_soon_a_figure(looks):
    "Folded cells closed, as a reader meets the page."
    chapters = {name: look for name, look in looks.items() if re.match(r"\d\d[a-z]?_", name)}
    assert all(look["figure"] for look in chapters.values()), [name for name, look in chapters.items() if not look["figure"]]
    table = "\n".join(f"{name:24} {look['height']:7.0f} px  code {look['code']:4.0%}  first figure after {look['figure']/SCREEN:.1f} screens" for name, look in chapters.items())
    print("\n" + table)
    assert statistics.median(look["code"] for look in chapters.values()) < .45, table
    assert all(look["figure"] < 2*SCREEN for look in chapters.values()), table
