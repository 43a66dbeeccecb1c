"""The site's settings: every key and type is one that Quarto 1.7.34 knows (it stops at `favicon: false`, which the stand-in renderer does not notice)."""
import configparser, json, re

import pytest
import yaml

from conftest import NOTEBOOKS, ROOT

TEXT, YES, NUMBER = str, bool, (int, float)
THEME = {"light": (str, list), "dark": (str, list)}
LINK = (str, {"href": TEXT, "text": TEXT})                                            # a page, with its title or with words of ours
ENTRY = (str, {"section": TEXT, "contents": [LINK]})
KNOWN = {
    "project": {"type": TEXT, "render": [TEXT], "resources": [TEXT]},
    "execute": {"enabled": YES},
    "format": {"html": {"theme": THEME, "toc": YES, "toc-depth": int, "code-copy": YES, "code-overflow": TEXT, "code-fold": YES, "code-summary": TEXT, "css": TEXT, "include-after-body": TEXT,
                        "html-math-method": TEXT, "lightbox": YES, "grid": {"sidebar-width": TEXT, "body-width": TEXT, "margin-width": TEXT}}},
    "website": {"favicon": TEXT, "page-navigation": YES, "back-to-top-navigation": YES, "search": YES, "open-graph": YES, "twitter-card": YES,
                "bread-crumbs": YES, "repo-subdir": TEXT, "repo-actions": [TEXT], "navbar": {"title": TEXT, "search": YES, "right": [dict], "left": [dict]}, "page-footer": (str, dict),
                "sidebar": {"style": TEXT, "contents": [ENTRY]}},
    "bibliography": TEXT,
    "metadata-files": [TEXT]}


def strange(value, known, path=""):
    "Keys that are not known, and values of another type."
    if isinstance(known, tuple) and dict in map(type, known):                           # text, or a mapping
        return [] if isinstance(value, str) else strange(value, known[-1], path)
    if isinstance(known, dict):
        if not isinstance(value, dict): return [f"{path}: {value!r} is no mapping"]
        return [x for k, v in value.items() for x in (strange(v, known[k], f"{path}.{k}") if k in known else [f"{path}.{k}: an unknown key"])]
    if isinstance(known, list):
        if not isinstance(value, list): return [f"{path}: {value!r} is no list"]
        return [x for i, v in enumerate(value) for x in strange(v, known[0], f"{path}[{i}]")]
    right = isinstance(value, known) and not (isinstance(value, bool) and known is not bool)
    return [] if right else [f"{path}: {value!r} is of another type"]


def load(name): return yaml.safe_load((ROOT/name).read_text(encoding="utf-8"))


def test_quarto_knows_every_key():
    for name in ("_quarto.yml", "nbs/sidebar.yml"): assert strange(load(name), KNOWN) == [], name


def test_what_stopped_the_build_is_noticed():
    assert strange({"website": {"favicon": False}}, KNOWN) == [".website.favicon: False is of another type"]
    assert strange({"website": {"favikon": "a.svg"}, "toc": True}, KNOWN) == [".website.favikon: an unknown key", ".toc: an unknown key"]


def test_an_entry_of_the_sidebar_is_checked_inside():
    wrong = {"website": {"sidebar": {"contents": [{"section": "A", "contents": [{"href": "a.ipynb", "txt": "A"}]}]}}}
    assert strange(wrong, KNOWN) == [".website.sidebar.contents[0].contents[0].txt: an unknown key"]


def test_files_that_the_settings_name_are_there():
    site = load("_quarto.yml")
    for name in (site["website"]["favicon"], site["format"]["html"]["css"], site["format"]["html"]["include-after-body"]): assert (ROOT/"nbs"/name).is_file(), name
    assert "*.qmd" in site["project"]["render"] and (ROOT/"nbs/404.qmd").is_file()
    assert (ROOT/"nbs/_quarto.yml").is_symlink() and (ROOT/"nbs/_quarto.yml").resolve() == ROOT/"_quarto.yml"
    assert site["metadata-files"] == ["nbdev.yml", "sidebar.yml"] and site["execute"] == {"enabled": False}
    assert "output-dir" not in site["project"]


def links():
    "The sidebar's pages in order: (file, words or None)."
    entries = load("nbs/sidebar.yml")["website"]["sidebar"]["contents"]
    flat = [link for e in entries for link in ([e] if isinstance(e, str) else e["contents"])]
    return [(link, None) if isinstance(link, str) else (link["href"], link["text"]) for link in flat]


def test_the_sidebar_names_every_notebook_once():
    assert sorted(name for name, _ in links()) == sorted(p.name for p in NOTEBOOKS)


@pytest.mark.parametrize("name, words", links(), ids=[name for name, _ in links()])
def test_the_sidebar_has_a_chapters_number_and_title(name, words):
    title = re.match(r"# ([^\n]+)", "".join(json.loads((ROOT/"nbs"/name).read_text(encoding="utf-8"))["cells"][0]["source"]))[1]
    number = re.match(r"(A?\d+[a-z]?)_", name)
    assert words == (f"{number[1]} {title}" if number else None)


def test_the_list_for_programs_names_every_notebook():
    "`python .ci/llms.py` writes it anew."
    text = (ROOT/"nbs/llms.txt").read_text(encoding="utf-8")
    missing = [p.name for p in NOTEBOOKS if f"/{p.name})" not in text]
    assert not missing, missing
    assert "llms.txt" in load("_quarto.yml")["project"]["resources"]


def test_settings_leave_the_sidebar_and_the_readme_alone():
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini")
    assert cfg["DEFAULT"]["custom_sidebar"] == "True" and "custom_quarto_yml" not in cfg["DEFAULT"]
    from nbdev.quarto import _doc_mtime_not_older                                     # what nbdev_docs asks before it writes
    assert _doc_mtime_not_older(ROOT/"README.md", ROOT/"nbs"/cfg["DEFAULT"]["readme_nb"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_quarto_can_read_the_options_of_every_cell(path):
    "A caption with a colon in it, unquoted, stops the build: options are YAML."
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        lines = [m[1] for m in re.finditer(r"^#\|\s*([\w-]+:(?:\s.*)?)$", "".join(cell["source"]), re.M)]
        try: options = yaml.safe_load("\n".join(lines)) or {}
        except yaml.YAMLError as e: pytest.fail(f"cell {i}: {e}")
        assert all(isinstance(v, (str, bool, int)) for v in options.values()), (i, options)
        assert len(options) == len(lines), (i, lines)
