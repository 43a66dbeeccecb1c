"""The notebooks as tests, each in a process of its own; what is stored in them and made of them."""
import ast
import configparser
import filecmp
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from conftest import NOTEBOOKS, ROOT, run

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
threads = str(max(1, os.cpu_count() // workers)) # the cores are shared out


@each
def test_runs(path):
    "nbdev's own test runner; cells flagged slow are left out, as settings.ini says."
    got = run(Path(sys.executable).with_name("nbdev_test"), "--path", path, "--n_workers", 0,
              timeout=900, cwd=ROOT, OMP_NUM_THREADS=threads, MPLBACKEND="agg")
    assert got.returncode == 0 and "Success." in got.stdout, got.stderr[-6000:]


def cells(path):
    "A notebook's cells."
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_cells(path):
    "Its code cells with their numbers."
    return [(i, c) for i, c in enumerate(cells(path)) if c["cell_type"] == "code"]


def source(c):
    "A cell's text."
    return "".join(c["source"])


def directives(c):
    "What nbdev and Quarto are told about a cell."
    return set(re.findall(r"^\s*#\|\s*([\w-]+)", source(c), re.M))


def text(outputs):
    "Outputs without their pictures."
    plain = []
    for o in outputs:
        data = {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/png")}
        plain.append({**o, "data": data})
    return json.dumps(plain)


def body(c):
    "The cell's statements, magics left out; none if it is not Python."
    try:
        return ast.parse(re.sub(r"^\s*[%!].*$", "pass", source(c), flags=re.M)).body
    except SyntaxError:
        return []


later = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ExceptHandler)
displays = ("print", "display", "plt.subplots", "plt.figure", "plt.show", "show_doc")
values = (ast.Name, ast.Subscript, ast.DictComp, ast.ListComp, ast.BinOp)


def at_top(nodes):
    "Nodes that surely run with the cell: not the insides of functions, classes and handlers."
    for n in nodes:
        if not isinstance(n, later):
            yield n
            yield from at_top(ast.iter_child_nodes(n))


def shows(c):
    "Whether running the cell surely prints, draws or displays something."
    nodes = body(c)
    calls = [ast.unparse(n.func) for n in at_top(nodes) if isinstance(n, ast.Call)]
    bare = nodes and isinstance(nodes[-1], ast.Expr) and isinstance(nodes[-1].value, values)
    return any(f in displays for f in calls) or (bare and not source(c).rstrip().endswith(";"))


silent = {"export", "exports", "exporti", "hide", "eval"}
machine = r"(?<![\w.])/(work|tmp|root|home|Users|usr)/|site-packages"


@each
def test_stored_outputs(path):
    "What shows something has its output, none is an error, none names a path of a machine."
    wrong = []
    for i, c in code_cells(path):
        if any(o["output_type"] == "error" for o in c["outputs"]):
            wrong.append(f"cell {i}: an error output")
        if not c["outputs"] and shows(c) and not directives(c) & silent:
            wrong.append(f"cell {i}: no output stored")
        if place := re.search(machine, source(c) + text(c["outputs"])):
            wrong.append(f"cell {i}: holds {place[0]}")
        if re.search(r"^\s*#\|\s*exporti?s?:", source(c), re.M):
            wrong.append(f"cell {i}: a colon after the directive swallows the next line")
        if c.get("execution_count"):
            wrong.append(f"cell {i}: not cleaned")
    assert not wrong, "\n".join([path.name, *wrong])


@each
def test_the_site_can_run_what_it_needs(path):
    "nbdev runs cells with imports when it makes the pages, so imports stand apart from other code."
    wrong = []
    for i, c in code_cells(path):
        if directives(c) & {"export", "exports", "exporti", "hide"}:
            continue
        nodes = body(c)
        imports = [n for s in nodes for n in ast.walk(s)
                   if isinstance(n, (ast.Import, ast.ImportFrom))]
        first = i < 8 and all(n in nodes for n in imports)
        if imports and len(imports) != len(nodes) and not first:
            wrong.append(f"cell {i}: imports between other code")
    assert not wrong, "\n".join([path.name, *wrong])


@each
def test_opens_as_a_page(path):
    "A title and a one-line description come first; one that exports names its module next."
    if path.stem == "index":
        pytest.skip("the front page has a form of its own")
    first, *rest = cells(path)
    assert re.match(r"# [^\n]+\n+> [^\n$]+\s*$", source(first).strip()), source(first)
    module = [m for c in rest[:3] if (m := re.search(r"^#\|\s*default_exp \w+$", source(c), re.M))]
    exports = any(directives(c) & {"export", "exports", "exporti"} for _, c in code_cells(path))
    assert len(module) == exports, "a module without exports, or exports without a module"


@each
def test_every_figure_has_its_words(path):
    "A label to refer to, a caption, and a text for those who do not see the picture."
    bare = []
    for i, c in code_cells(path):
        if any("image/png" in o.get("data", {}) for o in c["outputs"]):
            said = dict(re.findall(r"^#\|\s*(label|fig-cap|fig-alt): *(\S.*)$", source(c), re.M))
            if len(said) < 3 or not said["label"].startswith("fig-"):
                bare.append(f"cell {i}: {sorted(said)}")
    assert not bare, "\n".join([path.name, *bare])


@each
def test_folded_cells_say_what_they_hold(path):
    "A first line in plain words: on the site to click on, in JupyterLab to read before the code."
    dumb = []
    for i, c in code_cells(path):
        words = re.search(r'^#\|\s*(code-summary|fig-cap|tbl-cap): *\S', source(c), re.M)
        if re.search(r"^#\|\s*code-fold: *true", source(c), re.M) and not words:
            dumb.append(f"cell {i}: {source(c)[:80]!r}")
    assert not dumb, "\n".join([path.name, *dumb])


def differences(a, b, pattern):
    "Names of files that are not the same in both folders."
    names = {p.name for p in [*a.glob(pattern), *b.glob(pattern)]}
    return sorted(names - set(filecmp.cmpfiles(a, b, names, shallow=False)[0]))


def nbdev(command, folder, timeout=300):
    "One of nbdev's commands."
    got = run(Path(sys.executable).with_name(command), cwd=folder, timeout=timeout)
    assert got.returncode == 0, got.stderr[-4000:]


def test_export_leaves_no_difference(checkout):
    copy = checkout()
    nbdev("nbdev_export", copy)
    assert differences(ROOT / "minbert", copy / "minbert", "*.py") == []
    assert differences(ROOT, copy, "*.toml") == []
    nbdev("nbdev_clean", copy)
    assert differences(ROOT / "nbs", copy / "nbs", "*.ipynb") == []


def test_a_changed_cell_makes_a_difference(checkout):
    "The comparison above can fail."
    copy = checkout()
    path = copy / "nbs" / "05_round_robin.ipynb"
    changed = path.read_text().replace('"def single(', '"def one_only(')
    assert changed != path.read_text()
    path.write_text(changed)
    nbdev("nbdev_export", copy)
    assert differences(ROOT / "minbert", copy / "minbert", "*.py") == ["_modidx.py", "mixing.py"]


def test_the_readme_is_made_from_the_index():
    got = run(sys.executable, ROOT / ".ci" / "readme.py", "--check")
    assert got.returncode == 0, got.stderr


def test_settings_that_matter():
    "What DESIGN found to break: each of these was tried."
    real, link = ROOT / "_quarto.yml", ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() and link.resolve() == real and not real.is_symlink()
    quarto = real.read_text()
    for line in ("type: website", '"*.ipynb"', "enabled: false", "html-math-method: mathml",
                 "metadata-files: [nbdev.yml, sidebar.yml]"):
        assert line in quarto, line
    assert "output-dir" not in quarto and "nbdev_filter" not in quarto
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini")
    cfg = cfg["DEFAULT"]
    assert cfg["nbs_path"] == "nbs" and cfg["tst_flags"] == "slow"
    assert cfg["update_pyproject"] == "False" and "custom_quarto_yml" not in cfg
    assert "nbdev==2.4.14" in cfg["dev_requirements"]
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text()


def test_entry_points():
    modules = entry_points(group="nbdev", name="minbert")
    assert [e.value for e in modules] == ["minbert._modidx:d"]
    programs = entry_points(group="console_scripts", name="minbert")
    assert [e.value for e in programs] == ["minbert.cli:main"]


def test_the_package_imports_without_the_tools():
    "A user without nbdev, pytest, transformers or the like can import all of it."
    code = """
import sys
for name in ("nbdev", "execnb", "pytest", "hypothesis", "transformers", "IPython"):
    sys.modules[name] = None
import importlib, pkgutil, minbert
for m in pkgutil.iter_modules(minbert.__path__):
    if m.name != "_modidx":
        importlib.import_module("minbert." + m.name)
"""
    got = run(sys.executable, "-c", code)
    assert got.returncode == 0, got.stderr[-2000:]


def test_git_ignores_what_is_made():
    made = ["data", "runs/x", "nbs/runs/x", "_proc/x", "_docs/x", "nbs/nbdev.yml"]
    got = subprocess.run(["git", "-C", ROOT, "check-ignore", *made], capture_output=True, text=True)
    if "not a git repository" in got.stderr:
        pytest.skip("not a git checkout")
    assert len(got.stdout.split()) == len(made), got.stdout
