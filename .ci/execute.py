"""Run notebooks top to bottom, slow cells included, store their outputs, and record what they were made from.

    python .ci/execute.py                # every notebook whose record is old
    python .ci/execute.py 07 A4 index    # those whose names begin so, whatever their record says
    python .ci/execute.py --list         # say which records are old, and why

`nbs/executed.json` holds, for each notebook, a hash of its code cells and of every file below `nbs/results` that they read.
A run wants the real data: set MINBERT_DATA to them.
"""
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import colab

root = Path(__file__).resolve().parent.parent
nbs, record = root / "nbs", root / "nbs/executed.json"

WATCH = """
import os as _os, sys as _sys
_read = set()
def _hook(event, args, place=_os.path.realpath("results") + _os.sep):
    if event == "open" and isinstance(args[0], (str, bytes)) and not (args[2] or 0) & (_os.O_WRONLY | _os.O_RDWR):
        path = _os.path.realpath(_os.fsdecode(args[0]))
        if path.startswith(place): _read.add(path[len(place):])
_sys.addaudithook(_hook)
"""


def sha(data):
    return hashlib.sha256(data).hexdigest()[:16]


def code_hash(path):
    "A hash of a notebook's code cells, without the line that only Colab runs and the options that say how a cell is shown."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [re.sub(r"^#\|(?! *(slow|eval)).*\n?", "", "".join(c["source"]), flags=re.M).strip() for c in cells if c["cell_type"] == "code"]
    return sha("\0".join(colab.without(sources)).encode())


def file_hash(name):
    "A hash of a stored file; of nothing where it is gone."
    path = nbs / "results" / name
    return sha(path.read_bytes()) if path.is_file() else "gone"


def stale():
    "Notebook → why its outputs are old; nothing where they are fresh."
    known, why = json.loads(record.read_text()) if record.exists() else {}, {}
    for path in sorted(nbs.glob("*.ipynb")):
        mine = known.get(path.name)
        if mine is None: why[path.name] = "never executed by this command"
        elif mine["code"] != code_hash(path): why[path.name] = "its code cells changed since it was executed"
        else:
            other = [f for f, h in mine["files"].items() if file_hash(f) != h]
            if other: why[path.name] = f"results/{other[0]} changed since it was executed"
    return why


def is_bar(output):
    "Whether an output is a progress bar: a widget that is dead once the run is over."
    return bool(re.search(r"\[\d\d:\d\d[<,]", "".join(output.get("data", {}).get("text/plain", "")))
                and "application/vnd.jupyter.widget-view+json" in output["data"])


def execute(path):
    "Run one notebook in a kernel of its own, store its outputs; gives the stored files that it read."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, as_version=4)
    skip = [c for c in nb.cells if c.cell_type == "code" and re.search(r"^#\|\s*eval:\s*false", c.source, re.M)]
    for c in skip: c.cell_type = "raw"
    with tempfile.TemporaryDirectory() as d:
        seen = Path(d) / "read.json"
        first = nbformat.v4.new_code_cell(WATCH)
        last = nbformat.v4.new_code_cell(f"import json as _json\nopen({str(seen)!r}, 'w').write(_json.dumps(sorted(_read)))")
        nb.cells = [first, *nb.cells, last]
        NotebookClient(nb, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(nbs)}}).execute()
        read = json.loads(seen.read_text())
    nb.cells = nb.cells[1:-1]
    nb.metadata.pop("widgets", None)      # the state of the bars that are dropped below
    for c in skip: c.cell_type = "code"
    for c in nb.cells:
        if "outputs" in c: c["outputs"] = [o for o in c["outputs"] if not is_bar(o)]
        for o in c.get("outputs", []):
            if any(place and place in json.dumps(o) for place in (str(root), os.environ.get("MINBERT_DATA"))):
                raise SystemExit(f"{path.name}: an output shows a path of this machine: {json.dumps(o)[:300]}")
    nbformat.write(nb, path)
    return read


def main(args):
    if not os.environ.get("MINBERT_DATA") and "--list" not in args: sys.exit("set MINBERT_DATA to the real data")
    why = stale()
    if "--list" in args: return print("\n".join(f"{n}: {w}" for n, w in why.items()) or "every notebook is fresh")
    chosen = [p for p in sorted(nbs.glob("*.ipynb")) if (any(p.name.startswith(a) for a in args) if args else p.name in why)]
    from filelock import FileLock
    from nbdev.clean import nbdev_clean
    for path in chosen:
        print(path.name, flush=True)
        read = execute(path)
        nbdev_clean(str(path))
        with FileLock(Path(tempfile.gettempdir()) / "minbert-executed.lock"):      # two of these commands may run at once
            known = json.loads(record.read_text()) if record.exists() else {}
            known[path.name] = {"code": code_hash(path), "files": {f: file_hash(f) for f in read}}
            there = {p.name for p in nbs.glob("*.ipynb")}
            record.write_text(json.dumps({k: known[k] for k in sorted(known) if k in there}, indent=1) + "\n")


if __name__ == "__main__": main(sys.argv[1:])
