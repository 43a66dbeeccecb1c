"""Write nbs/llms.txt, the list of pages for programs that read text: `python .ci/llms.py`; with --check, only say whether it is up to date.

Sections and order are the sidebar's, titles and descriptions are the notebooks' own (https://llmstxt.org).
"""
import json
import re
import sys
from pathlib import Path

import yaml

root = Path(__file__).resolve().parent.parent
file = root / "nbs/llms.txt"
where = "https://github.com/minbert/minbert/blob/main/nbs/"


def head(name):
    "Title and one-line description of a notebook."
    first = "".join(json.loads((root / "nbs" / name).read_text(encoding="utf-8"))["cells"][0]["source"])
    return re.match(r"# ([^\n]+)\n+> ([^\n]+)", first).groups()


def make():
    "The text of the file."
    sidebar = yaml.safe_load((root / "nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    lines = ["# minbert", "", f"> {head('index.ipynb')[1]}", "",
             f"Notebooks that are a Python package, its tests and its site; start with [the front page]({where}index.ipynb)."]
    for entry in sidebar:
        if isinstance(entry, str): continue
        lines += ["", f"## {entry['section']}", ""]
        for page in entry["contents"]:
            name = page if isinstance(page, str) else page["href"]
            title, text = head(name)
            lines.append(f"- [{title}]({where}{name}): {text}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv: sys.exit(0 if file.exists() and file.read_text(encoding="utf-8") == make() else "nbs/llms.txt is old: run python .ci/llms.py")
    file.write_text(make(), encoding="utf-8")
