"""The page of errata: every place of public code is named whole, its difference was measured, and its paper is in the bibliography."""
import ast
import json
import re

from conftest import ROOT

CELLS = json.loads((ROOT/"nbs/errata.ipynb").read_text(encoding="utf-8"))["cells"]


def facts():
    "The list of places, as the page holds it."
    for c in CELLS:
        text = "".join(c["source"])
        if c["cell_type"] == "code" and "\nfacts = [" in text:
            calls = ast.parse(text[text.index("facts = ["):]).body[0].value.elts
            return [{k.arg: ast.literal_eval(k.value) for k in call.keywords} for call in calls]
    raise AssertionError("the page has no list of places")


def rows():
    "Address of the file → measured difference, from the table that is stored."
    page = "".join("".join(o.get("data", {}).get("text/html", [])) for c in CELLS for o in c.get("outputs", []))
    found = re.findall(r'<tr data-size="([^"]+)"><td><b>([^<]+)</b><br><a href="([^"]+)">', page)
    return {name: (address, float(size)) for size, name, address in found}


def test_every_place_is_named_whole():
    assert len(facts()) >= 12
    for f in facts():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", f["repo"]), f
        assert re.fullmatch(r"[\w./-]+\.\w+", f["file"]) and not f["file"].startswith("/"), f
        assert re.fullmatch(r"[0-9a-f]{40}", f["commit"]), f
        assert f["does"] and f["says"] and f["place"], f


def test_every_method_has_its_places():
    assert {f["method"] for f in facts()} == {"BERT", "Pairs", "AdamW", "PCGrad", "SMART", "Masking", "RTD", "GDES"}


def test_what_is_said_to_differ_was_measured_to_differ():
    stored = rows()
    assert list(stored) == [f["name"] for f in facts()]
    for f in facts():
        address, size = stored[f["name"]]
        assert address == f"https://github.com/{f['repo']}/blob/{f['commit']}/{f['file']}"
        assert size < 1e-6 if f["same"] else size > 1e-6, (f["name"], size)


def test_every_paper_is_in_the_bibliography():
    known = re.findall(r"^@\w+\{([\w-]+),$", (ROOT/"nbs/references.bib").read_text(encoding="utf-8"), re.M)
    assert {f["key"] for f in facts()} <= set(known)
