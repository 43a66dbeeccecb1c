"""Write README.md from nbs/index.ipynb: `python .ci/readme.py`; with --check, only say whether it is up to date.

`nbdev_readme` does the same with Quarto; this needs nothing but the standard library, and the tests use it.
"""
import base64
import configparser
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
images = "index_files/figure-commonmark"


def cell_text(n, cell, files):
    "One cell as markdown; its pictures are added to `files`."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return source
    directives = dict(re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", source, re.M))
    if "hide" in directives: return ""
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    alt = directives.get("fig-alt", "").strip('"')
    folded = directives.get("echo") == "false" or directives.get("code-fold") == "true"
    parts = [] if folded else [f"```python\n{code}\n```"]
    for k, out in enumerate(cell.get("outputs", []), 1):
        if "text/markdown" in out.get("data", {}): parts.append("".join(out["data"]["text/markdown"]))
        if "text" in out and out.get("name") == "stdout": parts.append("```\n" + "".join(out["text"]).rstrip() + "\n```")
        if "image/png" in out.get("data", {}):
            name = f"{images}/cell-{n}-output-{k}.png"
            files[name] = base64.b64decode(out["data"]["image/png"])
            parts.append(f"![{alt}]({name})")
    return "\n\n".join(parts)


def from_root(text):
    "Links to files beside the index, as they are seen from the root."
    return re.sub(r"\]\((?=[\w-]+\.ipynb|thumb_)", "](nbs/", text)


def badges():
    "Licence, Python and nbdev, after what settings.ini says."
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(root / "settings.ini", encoding="utf-8")
    cfg = cfg["DEFAULT"]
    shield = "https://img.shields.io/badge"
    return (f"[![licence: Apache 2.0]({shield}/licence-Apache--2.0-blue)](LICENSE) "
            f"[![Python {cfg['min_python']} or later]({shield}/python-%E2%89%A5{cfg['min_python']}-blue)](settings.ini) "
            f"[![made with nbdev]({shield}/made_with-nbdev-blue)](https://nbdev.fast.ai)")


def render():
    "README.md's text and its pictures."
    cells, files = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"], {}
    texts = [cell_text(n, c, files) for n, c in enumerate(cells, 1)]
    note = "<!-- made from nbs/index.ipynb by .ci/readme.py: edit there -->"
    title, *rest = [from_root(t) for t in texts if t]
    files["README.md"] = ("\n\n".join([note, title, badges(), *rest]) + "\n").encode()
    return files


if __name__ == "__main__":
    files = render()
    stale = [n for n, data in files.items() if not (root / n).exists() or (root / n).read_bytes() != data]
    if "--check" in sys.argv: sys.exit(f"out of date: {', '.join(stale)}; run python .ci/readme.py" if stale else 0)
    for old in (root / images).glob("*.png"): old.unlink()
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
