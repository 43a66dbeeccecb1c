"""Give each notebook with code the line that fetches the rest of the project on Colab: `python .ci/colab.py`; with --check, only name those without it.

The line stands in a cell that the site hides: the first code cell where it holds no code to show, else a new one under the title.
"""
import json
import re
import sys
from pathlib import Path

nbs = Path(__file__).resolve().parent.parent / "nbs"
line = "![ $COLAB_RELEASE_TAG ] && curl -sL https://github.com/minbert/minbert/raw/main/.ci/colab | sh"
cell = f"#| hide\n{line}"


def without(sources):
    "Sources of code cells as they are without the line: what runs everywhere."
    return [s.replace(f"\n{line}", "") for s in sources if s != cell]


def add(nb):
    "Put the line into a notebook that has code and not yet the line; says whether it did."
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    if not code or any(line in "".join(c["source"]) for c in code): return False
    source = "".join(code[0]["source"])
    if hidden := re.match(r"#\| (default_exp \w+|hide)(?=\n(?!#\|)|$)", source):
        code[0]["source"] = source.replace(hidden[0], f"{hidden[0]}\n{line}", 1).splitlines(keepends=True)
    else:
        nb["cells"].insert(1, {"cell_type": "code", "execution_count": None, "id": "on-colab", "metadata": {}, "outputs": [], "source": cell.splitlines(keepends=True)})
    return True


if __name__ == "__main__":
    missing = []
    for path in sorted(nbs.glob("*.ipynb")):
        nb = json.loads(path.read_text(encoding="utf-8"))
        if not add(nb): continue
        missing.append(path.name)
        if "--check" not in sys.argv: path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    if "--check" in sys.argv and missing: sys.exit(f"no line for Colab: {', '.join(missing)}; run python .ci/colab.py")
