"""The notebooks as tests, each in a process of its own, and what is stored in them; the package and the settings that come from them."""
import ast, configparser, filecmp, json, re, subprocess, sys
from pathlib import Path

import pytest

from conftest import NOTEBOOKS, ROOT, run

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


@each
def test_runs(path):
    "nbdev's own test runner; cells flagged `slow` are left out, as settings.ini says."
    got = run(Path(sys.executable).with_name("nbdev_test"), "--path", path, "--n_workers", 0, timeout=600, cwd=ROOT, OMP_NUM_THREADS=None, MPLBACKEND="agg")
    assert got.returncode == 0 and "Success." in got.stdout, got.stderr[-6000:]


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(c): return "".join(c["source"])
def directives(c): return set(re.findall(r"^\s*#\|\s*([\w-]+)", source(c), re.M))
def text(outputs): return json.dumps([{**o, "data": {k: v for k, v in o.get("data", {}).items() if not k.startswith("image/png")}} for o in outputs])


def body(c):
    "The cell's statements, magics left out; none if it is not Python."
    try: return ast.parse(re.sub(r"^\s*[%!].*$", "pass", source(c), flags=re.M)).body
    except SyntaxError: return []


def at_top(nodes):
    "Nodes that run when the cell runs: all but the insides of functions and classes."
    for n in nodes:
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)): continue
        yield n
        yield from at_top(ast.iter_child_nodes(n))


def shows(c):
    "Whether running the cell surely prints, draws or displays something."
    nodes = body(c)
    calls = [ast.unparse(n.func) for n in at_top(nodes) if isinstance(n, ast.Call)]
    bare = nodes and isinstance(nodes[-1], ast.Expr) and isinstance(nodes[-1].value, (ast.Name, ast.Subscript, ast.DictComp, ast.ListComp, ast.BinOp))
    silent = source(c).rstrip().endswith(";")
    return any(f in ("print", "display", "plt.subplots", "plt.figure", "plt.show", "show_doc") for f in calls) or (bare and not silent)


@each
def test_stored_outputs(path):
    "Every cell that shows something has its output, none an error, none a path of a machine; no star import."
    wrong = []
    for i, c in enumerate(cells(path)):
        if c["cell_type"] != "code": continue
        where = f"{path.name}, cell {i}"
        if any(o["output_type"] == "error" for o in c["outputs"]): wrong.append(f"{where}: an error output")
        if not c["outputs"] and shows(c) and not directives(c) & {"export", "exports", "exporti", "hide", "eval"}: wrong.append(f"{where}: no output stored")
        place = re.search(r"(?<![\w.])/(work|tmp|root|home|Users|usr)/|site-packages", source(c) + text(c["outputs"]))
        if place: wrong.append(f"{where}: holds {place[0]}")
        if any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for s in body(c) for n in ast.walk(s)): wrong.append(f"{where}: star import")
        if re.search(r"^\s*#\|\s*exporti?s?:", source(c), re.M): wrong.append(f"{where}: a colon after the directive swallows the next line")
        if c.get("execution_count"): wrong.append(f"{where}: not cleaned")
    assert not wrong, "\n".join(wrong)


@each
def test_the_site_can_run_what_it_needs(path):
    "nbdev runs exported cells and cells with imports when it makes the pages, so imports stand apart from code that needs other cells."
    wrong = []
    for i, c in enumerate(cells(path)):
        if c["cell_type"] != "code" or directives(c) & {"export", "exports", "exporti", "hide"} or "nbdev_export" in source(c): continue
        nodes = body(c)
        imports = [n for s in nodes for n in ast.walk(s) if isinstance(n, (ast.Import, ast.ImportFrom))]
        first = i < 8 and all(n in nodes for n in imports)
        if imports and len(imports) != len(nodes) and not first: wrong.append(f"{path.name}, cell {i}: imports between other code")
    assert not wrong, "\n".join(wrong)


@each
def test_opens_and_closes_as_a_page(path):
    "A title and a one-line description come first; a numbered notebook names its module next."
    first, *rest = cells(path)
    if not path.stem[0].isdigit(): pytest.skip("not a numbered notebook")
    assert re.match(r"# .+\n+> [^\n$]+\s*$", source(first).split("\n\n", 2)[0] if "\n>" in source(first).split("\n\n", 2)[0] else "\n".join(source(first).splitlines()[:3]))
    assert any(re.search(r"^#\|\s*default_exp \w+$", source(c), re.M) for c in rest[:3])
    assert "nbdev_export()" in source(rest[-1]) and "hide" in directives(rest[-1])


def test_imports_only_lower_numbers():
    owner = {m[1]: p.stem for p in NOTEBOOKS for c in cells(p) if (m := re.search(r"^#\|\s*default_exp (\w+)$", source(c), re.M))}
    assert len(owner) == len([p for p in NOTEBOOKS if p.stem[0].isdigit()])
    for module, notebook in owner.items():
        tree = ast.parse((ROOT/"minbert"/f"{module}.py").read_text())
        for n in tree.body if module == "cli" else ast.walk(tree):                    # a command imports what it needs when it is called
            if isinstance(n, ast.ImportFrom) and n.module and (n.level or n.module.startswith("minbert.")):
                other = n.module.removeprefix("minbert.")
                assert owner[other] < notebook, f"{notebook} imports {other}"


def differences(a, b, pattern):
    "Names of files that are not the same in both folders."
    names = {p.name for p in [*a.glob(pattern), *b.glob(pattern)]}
    return sorted(set(names) - set(filecmp.cmpfiles(a, b, names, shallow=False)[0]))


def nbdev(command, folder, timeout=300):
    got = run(Path(sys.executable).with_name(command), cwd=folder, timeout=timeout)
    assert got.returncode == 0, got.stderr[-4000:]


def test_export_leaves_no_difference(checkout):
    copy = checkout()
    nbdev("nbdev_export", copy)
    assert differences(ROOT/"minbert", copy/"minbert", "*.py") == []
    assert not (copy/"pyproject.toml").exists()
    nbdev("nbdev_clean", copy)
    assert differences(ROOT/"nbs", copy/"nbs", "*.ipynb") == []


def test_a_changed_cell_makes_a_difference(checkout):
    "The comparison above can fail."
    copy = checkout()
    path = copy/"nbs"/"05_round_robin.ipynb"
    path.write_text(path.read_text().replace('"def single(', '"def one_only('))
    nbdev("nbdev_export", copy)
    assert differences(ROOT/"minbert", copy/"minbert", "*.py") == ["_modidx.py", "mixing.py"]


def test_the_readme_is_made_from_the_index():
    got = run(sys.executable, ROOT/".ci"/"readme.py", "--check")
    assert got.returncode == 0, got.stderr


def test_settings_that_matter():
    "What DESIGN found to break: each of these was tried."
    quarto = (ROOT/"_quarto.yml").read_text()
    assert (ROOT/"nbs"/"_quarto.yml").is_symlink() and (ROOT/"nbs"/"_quarto.yml").resolve() == ROOT/"_quarto.yml" and not (ROOT/"_quarto.yml").is_symlink()
    for line in ("type: website", '- "*.ipynb"', "enabled: false", "html-math-method: mathml", "metadata-files: [nbdev.yml, sidebar.yml]"): assert line in quarto, line
    assert "output-dir" not in quarto and "nbdev_filter" not in quarto
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini")
    cfg = cfg["DEFAULT"]
    assert cfg["nbs_path"] == "nbs" and cfg["tst_flags"] == "slow" and cfg["update_pyproject"] == "False" and "custom_quarto_yml" not in cfg
    assert "nbdev==2.4.14" in cfg["dev_requirements"] and "torch==2.13.0" in (ROOT/"constraints.txt").read_text()


def test_entry_points():
    from importlib.metadata import entry_points
    assert [e.value for e in entry_points(group="nbdev", name="minbert")] == ["minbert._modidx:d"]
    assert [e.value for e in entry_points(group="console_scripts", name="minbert")] == ["minbert.cli:main"]


def test_the_package_imports_without_the_tools():
    "A user without nbdev, pytest, transformers or matplotlib's pyplot can import all of it."
    code = ("import sys\nfor name in ('nbdev', 'execnb', 'pytest', 'hypothesis', 'transformers', 'IPython'): sys.modules[name] = None\n"
            "import importlib, pkgutil, minbert\nfor m in pkgutil.iter_modules(minbert.__path__):\n    if m.name != '_modidx': importlib.import_module('minbert.' + m.name)\n")
    got = run(sys.executable, "-c", code)
    assert got.returncode == 0, got.stderr[-2000:]


def test_git_ignores_what_is_made():
    got = subprocess.run(["git", "-C", ROOT, "check-ignore", "data", "runs/x", "nbs/runs/x", "_proc/x", "_docs/x", "nbs/nbdev.yml", "nbs/sidebar.yml"], capture_output=True, text=True)
    if "not a git repository" in got.stderr: pytest.skip("not a git checkout")
    assert len(got.stdout.split()) == 7, got.stdout
