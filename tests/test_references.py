"""Citations and glossary: every key that a notebook cites is in references.bib, every link into the glossary has its heading."""
import json
import re

from conftest import NOTEBOOKS, ROOT

KEY = r"@([a-z][\w-]*\w)"


def markdown(path):
    "A notebook's prose, code spans left out."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.S))


def cited(text):
    "Keys inside square brackets."
    return {key for group in re.findall(r"\[([^\]]*@[^\]]*)\]", text) for key in re.findall(KEY, group)}


def headings():
    "The glossary's terms, in their order."
    return re.findall(r"^## (.+)$", markdown(ROOT/"nbs/glossary.ipynb"), re.M)


def test_every_key_is_in_the_bibliography():
    known = set(re.findall(r"^@\w+\{([\w-]+),$", (ROOT/"nbs/references.bib").read_text(encoding="utf-8"), re.M))
    unknown = {p.name: sorted(cited(markdown(p)) - known) for p in NOTEBOOKS if cited(markdown(p)) - known}
    assert not unknown, unknown


def test_a_citation_is_seen():
    assert cited("so it is [see @yu2020; @he2023, table 2] and [-@report-e], not a@b.c") == {"yu2020", "he2023", "report-e"}


def test_links_into_the_glossary_have_their_heading():
    "Lower case, so that JupyterLab's anchor (as written) and the site's (lower case) are the same."
    terms = headings()
    anchors = {t.replace(" ", "-") for t in terms}
    assert terms == sorted(terms, key=str.lower) and all(t == t.lower() for t in terms)
    wanted = {(p.name, a) for p in NOTEBOOKS for a in re.findall(r"\(glossary\.ipynb#([^)]+)\)", markdown(p))}
    wanted |= {("glossary.ipynb", a) for a in re.findall(r"\(#([^)]+)\)", markdown(ROOT/"nbs/glossary.ipynb"))}
    assert not [w for w in wanted if w[1] not in anchors]


def test_every_term_names_its_chapter():
    parts = re.split(r"^## (.+)$", markdown(ROOT/"nbs/glossary.ipynb"), flags=re.M)[1:]
    bare = [term for term, text in zip(parts[::2], parts[1::2]) if not re.search(r"\]\(\w+\.ipynb\)", text)]
    assert not bare, bare


def test_every_promise_names_a_test_that_is_there():
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", (ROOT/"nbs/promises.ipynb").read_text(encoding="utf-8"))
    assert len(named) > 30
    gone = [f"{file}::{name}" for file, name in named if not (ROOT/"tests"/file).is_file() or (
        name and f"def {name}(" not in (ROOT/"tests"/file).read_text(encoding="utf-8"))]
    assert not gone, gone
