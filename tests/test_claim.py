"""`minbert claim` asks the stored runs, in a checkout and from an installed wheel without any data."""
import json
import re
import subprocess
import sys
import zipfile
from statistics import mean
from types import SimpleNamespace

import pytest

from conftest import ROOT, run
from minbert.cli import main
from minbert.results import verdict_words

STORED = [json.loads(p.read_text()) for p in sorted((ROOT / "nbs/results").glob("*-cpu-s*.json"))]


def scores(row, score):
    return [r["dev"][score] for r in STORED if r["row"] == row]


def claim(capsys, *args):
    capsys.readouterr()
    assert main(["claim", *args]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("score", ["sst", "para", "sts", "overall"])
def test_figures_are_those_of_the_stored_runs(capsys, score):
    got = json.loads(claim(capsys, "E9 > E7", "--score", score, "--json"))
    a, b = scores("E9", score), scores("E7", score)
    assert got["seeds"] == [len(a), len(b)]
    assert got["difference"] == pytest.approx(mean(a) - mean(b), abs=1e-9)
    assert got["low"] < got["difference"] < got["high"]
    assert got["verdict"] in ("better", "worse", "equal", "open")


def test_the_other_sign_asks_the_other_way_round(capsys):
    this, that = (json.loads(claim(capsys, words, "--json")) for words in ("E9 > E3", "E3<E9"))
    assert (this["row"], this["difference"]) == (that["row"], that["difference"])
    turned = json.loads(claim(capsys, "E3 > E9", "--json"))
    assert turned["difference"] == pytest.approx(-this["difference"])
    assert (this["verdict"], turned["verdict"]) == ("better", "worse")


def test_a_row_with_one_seed_gets_a_wider_interval(capsys):
    one = next(r for r in ("E18", "E1") if len(scores(r, "overall")) == 1)
    wide, narrow = (json.loads(claim(capsys, f"{x} > E11", "--json")) for x in (one, "E13"))
    assert wide["high"] - wide["low"] > narrow["high"] - narrow["low"]


@pytest.mark.parametrize("words, args", [
    ("give two rows", ["E9 beats E7"]), ("give two rows", ["E9 >"]), ("both sides", ["E9 > E9"]),
    ("unknown row 'E99'", ["E9 > E99"]), ("score is 'f1'", ["E9 > E7", "--score", "f1"]),
    ("E9 has no stored report run", ["E9 > E7", "--preset", "report"]),
    ("S1 has no overall score", ["S1 > S3"]),
    ("no such directory", ["E9 > E7", "--results", "nowhere"])])
def test_mistakes_are_one_line(fails, words, args):
    fails(words, "claim", *args)


def test_an_installed_wheel_knows_the_runs(checkout, tmp_path):
    built = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q",
                            "-w", str(tmp_path), "."], cwd=checkout("wheel"), capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-1500:]
    wheel, = tmp_path.glob("minbert-*.whl")
    with zipfile.ZipFile(wheel) as z: z.extractall(tmp_path / "site")
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    start = "import sys; from minbert.cli import main; sys.exit(main())"
    alone = {"PYTHONPATH": str(tmp_path / "site"), "MINBERT_DATA": None}
    got = run(sys.executable, "-P", "-c", start, "claim", "E9 > E7", "--score", "sts", cwd=empty, **alone)
    assert got.returncode == 0, got.stderr
    here = run(sys.executable, "-P", "-c", start, "claim", "E9 > E7", "--score", "sts", cwd=ROOT, PYTHONPATH=str(ROOT))
    assert got.stdout == here.stdout and re.search(r"verdict: \w+", got.stdout)
    table = run(sys.executable, "-P", "-c", start, "table", cwd=empty, **alone)
    assert table.returncode == 0 and "| E9" in table.stdout, table.stderr


def test_a_verdict_that_does_not_survive_the_correction_says_so():
    line = {"score": "overall", "verdict": "better", "ours": .008}
    words = [verdict_words(SimpleNamespace(**line, **more)) for more in ({}, {"holm": .01}, {"holm": .2})]
    assert words == ["better by 0.008", "better by 0.008", "better by 0.008, not after Holm"]
