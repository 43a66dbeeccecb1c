"""Rules that hold themselves: who may import what, what a chapter may weigh, and that outputs are fresh."""
import ast, html, json, re, subprocess, sys
from pathlib import Path

import pytest

from conftest import NOTEBOOKS, ROOT

ORDER = ("core files checkpoints stats data attention bert optim heads mixing train pcgrad conflicts smart mlm electra electra_study fast processes runs "
         "recipes results bench mistakes check cli").split()
ALONE = ("attention", "optim", "mixing", "pcgrad", "smart")      # to be lifted out: they import core at most
NAMES_TASKS = ("data", "recipes", "results")                     # all others work on any tasks


def sources(path):
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def module(path):
    return next((m[1] for _, s in sources(path) if (m := re.search(r"^#\|\s*default_exp\s+(\w+)", s, re.M))), None)


def exported(path):
    return [s for kind, s in sources(path) if kind == "code" and re.search(r"^#\|\s*exports?\s*$", s, re.M)]


MODULES = {m: p for p in NOTEBOOKS if (m := module(p))}


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER), set(MODULES) - set(ORDER)
    made = {p.stem for p in (ROOT/"minbert").glob("*.py")} - {"__init__", "_modidx"}
    assert made == set(MODULES), made ^ set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_no_import_against_the_order(name):
    "Strings count, too: a child process that imports what stands later is an import against the order."
    most = ORDER[:ORDER.index("core") + 1] if name in ALONE else ORDER[:ORDER.index(name)]
    for cell in exported(MODULES[name]):
        found = re.findall(r"(?:from|import)\s+minbert\.(\w+)", cell) + re.findall(r"from\s+minbert\s+import\s+(\w+)", cell)
        later = [m for m in found if m != name and m not in most]
        assert not later, f"{name} imports {later[0]}:\n{cell[:300]}"


def strings(tree):
    "String constants that are no docstrings."
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)) and n.body and isinstance(n.body[0], ast.Expr)}
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs]


@pytest.mark.parametrize("name", [m for m in MODULES if m not in NAMES_TASKS])
def test_no_task_is_wired_in(name):
    for cell in exported(MODULES[name]):
        wired = [s for s in strings(ast.parse(cell)) if re.search(r"\b(sst|para|sts)\b", s)]
        assert not wired, f"{name} names a task: {wired[0]!r}"


def test_the_records_of_the_tasks_stand_in_one_cell():
    cells = [c for c in exported(MODULES["data"]) if any(re.fullmatch("sst|para|sts", s) for s in strings(ast.parse(c)))]
    named = [c for c in cells if not re.search(r"def _?pocket", c)]                   # the pocket corpus is data, too
    assert len(named) <= 2, "\n---\n".join(named)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_is_readable(path):
    cells = sources(path)
    if path.name[0].isdigit(): assert len(cells) <= 60, len(cells)
    wide = [x for kind, s in cells if kind == "code" for x in s.splitlines() if len(x) > 100 and not x.lstrip().startswith("#|")]
    assert not wide, wide[0]
    assert not [s for kind, s in cells if kind == "code" and re.search(r"from\s+\S+\s+import\s+\*", s)]


def unfilled(text):
    "Placeholders of an f-string that reached a page: {name[...]}, {x:.3f}, {f(x)}."
    prose = re.sub(r"\$\$[\s\S]*?\$\$|\$[^$]*\$|`[^`]*`", "", text) # formulas and code may have braces
    return re.findall(r"\{[^{}\n]*[\[(:.=][^{}\n]*\}", prose) + re.findall(r"\{[a-z_]\w*\}", prose)


def test_no_placeholder_is_left_in_what_a_page_says():
    assert unfilled("It gained {-loss['para']:.3f} here.") and unfilled("in {excluded} of them")
    assert not unfilled(r"{BERT} is `{x:.2f}` or $a_{(i)}$")
    for path in NOTEBOOKS:
        for k, cell in enumerate(json.loads(path.read_text())["cells"]):
            said = ["".join(cell["source"])] if cell["cell_type"] == "markdown" and "```" not in "".join(cell["source"]) else []
            said += ["".join(o.get("data", {}).get("text/markdown", "")) for o in cell.get("outputs", [])]
            left = [x for text in said for x in unfilled(text)]
            assert not left, f"{path.name}, cell {k}: {left[0]}"


def objects(text):
    "Python objects that reached a page instead of what they stand for."
    return re.findall(r"functools\.partial\(|<function |<built-in|<bound method|<generator object| object at 0x", text)


def test_no_page_shows_a_python_object():
    "A name that a later cell gave to something else once printed a list of functions in the middle of a sentence."
    assert objects("alone, [(functools.partial(<function plan_later>, 'wide climb'), 1)] of 15") and objects("<x.Y object at 0x7f>")
    assert not objects("a function of its object at home: <b>built-in</b>")
    for path in NOTEBOOKS:
        for k, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            for o in cell.get("outputs", []):
                kinds = [v for kind, v in o.get("data", {}).items() if kind in ("text/plain", "text/markdown", "text/html")]
                shown = ["".join(x) for x in [o.get("text", ""), *kinds]]
                left = [x for text in shown for x in objects(html.unescape(text))]
                assert not left, f"{path.name}, cell {k}: {left[0]}"


def test_no_caption_holds_a_link():
    for path in NOTEBOOKS:
        for line in path.read_text().split("\\n"):
            assert not re.search(r'#\| fig-cap:.*\]\(', line), f"{path.name}: a caption shows a link as it is written"


def headings(path):
    "The anchors of a page: its headings as pandoc names them, and its labelled figures."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in cells)
    shown = ["".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", [])]
    heads = re.findall(r"^#{1,5} +(.+)$", "\n".join([text, *shown]), re.M)
    plain = (re.sub(r"[^\w\s.-]", "", h.replace("`", "")).strip().lower() for h in heads)
    return {re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", h)) for h in plain} | set(re.findall(r"#\| label: (\S+)", text)) | set(
        re.findall(r"\{#([\w-]+)", text))


def test_links_reach_a_heading():
    "A heading that is renamed takes every link to it along; the site's own test says the same, minutes later."
    there = {p.name: headings(p) for p in NOTEBOOKS}
    pages = [(p.name, "".join(s for _, s in sources(p))) for p in NOTEBOOKS] + [("README.md", (ROOT/"README.md").read_text(encoding="utf-8"))]
    found = [(name, page or name, anchor) for name, text in pages for page, anchor in re.findall(r"\]\((?:[^)\s]*/)?([\w.]+\.ipynb)?#([^)\s{}]+)\)", text)]
    assert len(found) > 100
    lost = [f"{name}: {page}#{anchor}" for name, page, anchor in found if page in there and anchor not in there[page]]
    assert not lost, lost


def is_patch(node):
    "Whether a function is a method that is taught after its class (fastcore's `@patch`)."
    return any("patch" in ast.unparse(d) for d in node.decorator_list)


@pytest.mark.parametrize("name", MODULES)
def test_public_names(name):
    tops = [n for c in exported(MODULES[name]) for n in ast.parse(c).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    own = [n.name for n in tops if not is_patch(n) and not n.name.startswith("command_")]    # commands are looked up by name
    assert len(own) <= 15, own
    assert not [n.name for n in tops if not ast.get_docstring(n)]


@pytest.mark.parametrize("name", [m for m in MODULES if m != "cli"])      # a command's options are its parameters
def test_no_function_takes_more_than_seven_parameters(name):
    functions = [n for c in exported(MODULES[name]) for n in ast.walk(ast.parse(c)) if isinstance(n, ast.FunctionDef) and n.name != "__init__"]
    many = [n.name for n in functions if sum(a.arg != "self" for a in n.args.args + n.args.kwonlyargs) > 7]
    assert not many, many


def test_no_printing_in_the_library():
    for name, path in MODULES.items():
        if name == "cli": continue
        calls = [n for c in exported(path) for n in ast.walk(ast.parse(c)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not calls, name


def test_an_encoder_comes_with_little_beside_torch():
    "Processor time and the largest packages that our own modules use elsewhere."
    code = """
import sys, time
import torch, fastcore.basics
start, before = time.process_time(), set(sys.modules)
import minbert.bert
took, new = time.process_time() - start, set(sys.modules) - before
heavy = new & {"pandas", "scipy", "matplotlib", "seaborn", "huggingface_hub", "pooch", "joblib", "tqdm"}
sys.exit(f"{took:.2f} s, {sorted(heavy)}" if heavy or took > .2 else 0)
"""
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr


def test_ruff():
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists(): pytest.skip("ruff is not installed")
    got = subprocess.run([ruff, "check", "--no-cache", "nbs"], cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 0, got.stdout[-3000:]


def test_outputs_are_fresh():
    "Each notebook was executed with the code and the stored results that it has now; `python .ci/execute.py` mends it."
    sys.path.insert(0, str(ROOT/".ci"))
    try: import execute
    finally: sys.path.pop(0)
    assert not execute.stale(), "\n".join(f"{n}: {w}" for n, w in execute.stale().items())
