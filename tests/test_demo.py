"""The demo's own numbers: what a newcomer sees first must be true, and good."""
import re

import pytest

from minbert.bert import BertModel
from minbert.cli import main
from minbert.core import UserError
from minbert.data import floors, load_tasks
from minbert.heads import encoder_floor

NUMBER = r"(-|[\d.]+)"
LINE = re.compile(rf"^ *(.+?) +(\d+) +{NUMBER} +{NUMBER} +{NUMBER} +([\d.]+) +([+-][\d.]+) ± ([\d.]+) +(.+)$")


def table(text):
    "Task title → rows, the three floors, trained, gain, error, verdict, as printed."
    found = {}
    for line in text.splitlines():
        if got := LINE.match(line):
            title, *cells, verdict = got.groups()
            found[title] = [float("-inf" if x == "-" else x) for x in cells] + [verdict]
    return found


@pytest.fixture(scope="module")
def minilm():
    "MiniLM, where it is at hand."
    try:
        return BertModel.from_pretrained("minilm")
    except UserError as e:
        pytest.skip(str(e))


def test_every_task_ends_above_all_its_floors(minilm, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = load_tasks("pocket")
    assert main(["demo", "--data", "pocket"]) == 0
    out, err = capsys.readouterr()
    rows = table(out)
    counted, cosine = floors(corpus), encoder_floor(minilm, corpus)
    for name, task in corpus.tasks.items():
        n, commonest, shared, encoder, trained, gain, error, verdict = rows[task.title]
        assert n == len(corpus[name]["dev"])
        assert trained > max(commonest, shared, encoder), out
        assert verdict.startswith("above") and ("less than the error" in verdict) == (gain <= error)
        if task.kind == "classify":                                 # the floors are the real ones
            assert commonest == pytest.approx(counted.loc["majority", name], abs=6e-4)
        if task.pair:
            assert shared == pytest.approx(counted.loc["word overlap", name], abs=6e-4)
            assert encoder == pytest.approx(cosine[name], abs=.009)  # one row of 126, in bf16
    assert out.count("before") >= 3 and "minbert train" in out
    assert len(err.splitlines()) <= 3 and "%|" not in err, "no bar in a log file"
    assert (tmp_path / "runs/demo-1/curves.png").stat().st_size > 10_000


def test_each_demo_gets_a_directory_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = []
    for _ in range(2):
        assert main(["demo", "--data", "pocket", "--init", "pocket", "--rows", "20"]) == 0
        said.append(table(capsys.readouterr().out))
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["demo-1", "demo-2"]
    assert said[0] == said[1] and len(said[0]) == 3, "and prints the same"
