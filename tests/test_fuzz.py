"""Random damage: tables, checkpoints and run directories are read, or refused in one line.

Short by default; MINBERT_FUZZ=long runs 100,000 tables and 5,000 checkpoints of each kind,
MINBERT_FUZZ=3/20 the third of twenty parts of that.
"""
import contextlib
import csv
import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minbert.bert import BertConfig, BertModel
from minbert.checkpoints import load_tokenizer, specials
from minbert.cli import main
from minbert.core import UserError
from minbert.files import Rows, Task, read_rows, read_table, write_table
from minbert.heads import HeadConfig, MultitaskBert

LONG = os.environ.get("MINBERT_FUZZ", "").replace("long", "1/1")
PART, PARTS = map(int, LONG.split("/")) if LONG else (1, 1)
TABLES, CHECKPOINTS = (100_000 // PARTS, 5_000 // PARTS) if LONG else (400, 120)


@contextlib.contextmanager
def within(seconds):
    "An endless loop is an error, not a wait."
    def late(*_):
        raise TimeoutError(f"still at it after {seconds} s")
    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@pytest.fixture(autouse=True)
def quiet():
    "Thousands of warnings about rows without labels help nobody."
    log = logging.getLogger("minbert")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


def survey(n, call, what, capsys):
    "How often each outcome was seen; anything but an answer or a UserError is a failure."
    counts, begun, failures = Counter(), time.monotonic(), []
    for k in range((PART - 1) * n, PART * n):
        r = np.random.default_rng(k)
        with within(20):
            try:
                counts[call(r)] += 1
            except UserError as e:
                assert str(e).strip() and "Traceback" not in str(e), k
                counts["refused"] += 1
            except Exception as e:
                failures.append(f"number {k}: {type(e).__name__}: {str(e)[:200]}")
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(f"\n{n} {what}: {dict(counts)}; tracebacks, hangs and NaN answers: "
              f"{len(failures)}; {seconds:.0f} s")
    assert not failures, "\n".join(failures[:20])
    assert counts["refused"] and len(counts) > 1
    return counts


# tables

kinds = (Task("a", text=("text",), labels=("0", "1", "2")),
         Task("b", text=("one", "two"), label="same", labels=("no", "yes")),
         Task("c", "score", text=("one", "two"), label="score", range=(-1., 5.)))
words = "a film that is not good 3 . ' naïve 中文 \u2028 \ufeff é".split(" ")
odd_cells = ("", " ", "nan", "inf", "-0", "1e400", "3.0", " 3", "٣", "1_0", "0x1", "\"", "\"\"",
             "\0", "a\"b", "\"a", "a\tb", "\x1c", "NaN", "None", "1" * 400, "x" * 200_000, "+1",
             "1e-999999999", "-1", "²", "yes", "YES")
odd_bytes = (b"\0", b"\r", b"\n", b"\r\n", b"\t", b",", b";", b'"', b"'", b"\\", b"\xff\xfe",
             b"\xe9", b"\xef\xbb\xbf", b"\xed\xa0\x80", b" ", b"\x1a", b"\xc2\x85", b"#", b'""')


def pick(r, options):
    "One of them."
    return options[int(r.integers(len(options)))]


def make_table(r, task):
    "Header and rows of a task, still whole."
    header = [*task.text, task.label]
    if r.random() < .7:
        header.insert(0, "id")
    rows = []
    for k in range(int(r.integers(1, 9))):
        label = f"{r.uniform(-1, 5):.2f}" if task.kind == "score" else pick(r, task.labels)
        texts = [" ".join(r.choice(words, 4)) + " x" for _ in task.text]
        rows.append([str(k)] * (header[0] == "id") + [*texts, label])
    return header, rows


def damage_cells(r, header, rows):
    "Change, add, drop or double cells, columns and rows."
    how, at = int(r.integers(7)), int(r.integers(len(rows)))
    column = int(r.integers(len(header)))
    if how == 0:
        rows[at][column % len(rows[at])] = pick(r, odd_cells)
    elif how == 1:
        rows[at].append(pick(r, odd_cells))
    elif how == 2:
        rows[at].pop()
    elif how == 3:
        header[column] = pick(r, (*header, *odd_cells[:12]))
    elif how == 4:
        rows.append(list(pick(r, rows)))
    elif how == 5:
        rows.insert(at, [])
    else:
        rows[at] = [pick(r, odd_cells) for _ in header]
    rows[at] = rows[at] or [""]


def join_cells(r, rows):
    "A table's text, with or without quotes, whatever the cells need."
    delimiter, end = pick(r, "\t\t,,;;|"), pick(r, ("\n", "\n", "\r\n", "\r"))
    if r.random() < .7:
        rows = [[f'"{x.replace(chr(34), chr(34) * 2)}"' for x in row] for row in rows]
    return "".join(delimiter.join(row) + end for row in rows)


def damage_bytes(r, data):
    "Insert, remove, change or cut bytes."
    at, how = int(r.integers(len(data) + 1)), int(r.integers(6))
    if how == 0:
        return data[:at] + pick(r, odd_bytes) + data[at:]
    if how == 1:
        return data[:at] + data[at + int(r.integers(1, 20)):]
    if how == 2:
        return data.replace(pick(r, odd_bytes), pick(r, odd_bytes), int(r.integers(1, 4)))
    if how == 3:
        return data[:at]
    if how == 4:
        return data[:at] + bytes(r.integers(9, 127, 3).astype(np.uint8)) + data[at:]
    return data.decode("utf-8", "replace").encode(pick(r, ("utf-16", "latin-1", "utf-8-sig")),
                                                  "replace")


def test_damaged_tables(tmp_path, capsys):
    "What is read is finite, legal and whole; rows are neither merged nor dropped in silence."
    path = tmp_path / "table.csv"

    def call(r):
        task = pick(r, kinds)
        header, rows = make_table(r, task)
        for _ in range(int(r.integers(3))):
            damage_cells(r, header, rows)
        data = join_cells(r, [header, *rows]).encode()
        for _ in range(int(r.integers(3))):
            data = damage_bytes(r, data)
        path.write_bytes(data)
        split = pick(r, ("train", "test"))
        check_rows(read_rows(path, task, split), task, split, data)
        return "read"

    survey(TABLES, call, "damaged tables", capsys)


def check_rows(got, task, split, data):
    "Whether rows are what a file can have said."
    assert isinstance(got, Rows) and len(set(got.ids)) == len(got.ids) == len(got.texts) > 0
    assert all(len(t) == len(task.text) and all(x.strip() for x in t) for t in got.texts)
    if split == "train":
        assert np.isfinite(got.labels).all() and len(got.labels) == len(got.ids)
        assert (task.low <= got.labels).all() and (got.labels <= task.high).all()
    if b'"' not in data:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        lines = [x for x in text.split("\n") if x.strip()]
        assert len(got) + got.skipped == len(lines) - 1


def test_what_is_written_reads_back(tmp_path, capsys):
    "Any cells at all, through the writer and the reader."
    def call(r):
        header = [f"c{k}" for k in range(int(r.integers(1, 4)))]
        rows = []
        for _ in range(int(r.integers(1, 6))):
            rows.append([pick(r, (*odd_cells, *words)) + pick(r, ("", "\n", "\r", ",", "x"))
                         for _ in header])
        path = write_table(tmp_path / "t.csv", header, rows)
        with open(path, encoding="utf-8", newline="") as f:
            assert list(csv.reader(f)) == [header, *rows]
        got = read_table(path)
        assert list(got.header) == header and got.rows == rows
        return "read"

    limit = csv.field_size_limit(2**20)
    try:
        counts = survey(TABLES // 10, call, "tables of odd cells, written and read again", capsys)
    finally:
        csv.field_size_limit(limit)
    assert counts["read"] > TABLES // 20


# checkpoints

vocab = (*specials, *"abcdefghijklmnopqrstuvwxyz", *("##" + c for c in "abcdefghijklmno"))
odd_values = (None, True, "", "x", -1, 0, 1, 2.5, 1e308, float("nan"), float("inf"), 2**40, [], {},
              [1], {"a": 1}, "gelu", 3, 10**7, "8", -0.5)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    "A tiny BERT in every form that is read."
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("encoders")
    model = BertModel(BertConfig(len(vocab), 8, 1, 2, 16, max_position_embeddings=32)).eval()
    model.vocab = vocab
    model.save_pretrained(home / "plain")
    for form in ("bin", "old bin", "shards", "json"):
        shutil.copytree(home / "plain", home / form)
    weights = load_file(home / "plain" / "model.safetensors")
    for form, zipped in (("bin", True), ("old bin", False)):
        (home / form / "model.safetensors").unlink()
        torch.save(weights, home / form / "pytorch_model.bin",
                   _use_new_zipfile_serialization=zipped)
    (home / "shards" / "model.safetensors").unlink()
    names = list(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({k: weights[k] for k in keys}, home / "shards" / name)
    index = {"weight_map": {k: name for name, keys in parts.items() for k in keys}}
    (home / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    (home / "json" / "tokenizer.json").write_text(load_tokenizer(vocab).to_str())
    (home / "json" / "vocab.txt").unlink()
    return [home / form for form in ("plain", "bin", "old bin", "shards", "json")]


def damage_json(r, data):
    "Change one value somewhere inside."
    try:
        content = json.loads(data)
    except ValueError:
        return data
    places, stack = [], [content]
    while stack:
        x = stack.pop()
        keys = x.keys() if isinstance(x, dict) else range(len(x))
        for k in list(keys)[:60]:
            places.append((x, k))
            if isinstance(x[k], (dict, list)):
                stack.append(x[k])
    if not places:
        return data
    x, k = pick(r, places)
    if r.random() < .2 and isinstance(x, dict):
        del x[k]
    elif r.random() < .1 and isinstance(x, dict):
        x[pick(r, ("is_decoder", "hidden_act", "kind", "x", "strip_accents", "added_tokens"))] = \
            pick(r, odd_values)
    else:
        x[k] = pick(r, odd_values)
    return json.dumps(content).encode()


def damage_tensors(r, path):
    "Change one tensor of a file."
    weights = load_file(path)
    name = pick(r, list(weights))
    w, how = weights[name], int(r.integers(9))
    if how == 0:
        w.view(-1)[int(r.integers(w.numel()))] = pick(r, (float("nan"), float("inf"), 3e38, 1e30))
    elif how == 1:
        weights[name] = w[..., :-1].contiguous()
    elif how == 2:
        weights[name] = w.to(pick(r, (torch.float16, torch.bfloat16, torch.float64, torch.int8,
                                      torch.bool, torch.int64)))
    elif how == 3:
        del weights[name]
    elif how == 4:
        weights[name + pick(r, (".more", ".weight_scale"))] = w.clone()
    elif how == 5:
        weights[name] = w.reshape(1, *w.shape)
    elif how == 6:
        weights = {f"bert.{k}": v for k, v in weights.items()}
    elif how == 7:
        weights[name] = torch.zeros(0)
    else:
        weights[name] = w * float(10 ** r.uniform(0, 12))
    save_file(weights, path)


def damage_folder(r, folder):
    "Damage one file: its bytes, its values, its kind, or that it is there at all."
    path = pick(r, sorted(p for p in folder.rglob("*") if p.is_file()))
    data, how = path.read_bytes(), r.random()
    if path.suffix == ".json" and how < .6:
        path.write_bytes(damage_json(r, data))
    elif path.suffix == ".safetensors" and how < .5:
        damage_tensors(r, path)
    elif how < .65:
        path.write_bytes(data[:int(r.integers(len(data) + 1))])
    elif how < .7:
        path.unlink()
    elif how < .73:
        path.unlink()
        path.mkdir()
    elif how < .76:
        path.unlink()
        path.symlink_to(pick(r, ("nowhere", path.name)))
    elif how < .8:
        path.write_bytes(pick(r, (b"[]", b"{}", b"null", b"\xff\xfe{", b"[" * 100_000, b"1e999")))
    else:
        raw = bytearray(data)
        for _ in range(int(r.integers(1, 6))):
            raw[int(r.integers(min(len(raw), pick(r, (64, 10**9)))))] = int(r.integers(256))
        path.write_bytes(bytes(raw))


def copy(source, place):
    "A fresh copy."
    shutil.rmtree(place, ignore_errors=True)
    return shutil.copytree(source, place)


@pytest.fixture
def place(tmp_path):
    "A folder for copies, in memory where there is one."
    memory = "/dev/shm"
    if not os.access(memory, os.W_OK):
        yield tmp_path / "copy"
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder) / "copy"


def test_damaged_checkpoints(encoders, place, capsys):
    "Those that open give finite numbers for a text, or say why they cannot read one."
    def call(r):
        folder = copy(pick(r, encoders), place)
        damage_folder(r, folder)
        bert = BertModel.from_pretrained(folder)
        ids = load_tokenizer(bert.vocab, bert.lowercase).encode("a b, kiln").ids[:8]
        with torch.no_grad():
            out = bert(torch.tensor([ids or [0]]))
        assert all(x.isfinite().all() for x in out[:2])
        return "opened"

    survey(CHECKPOINTS, call, "damaged checkpoints", capsys)


@pytest.fixture(scope="module")
def small_run(encoders, tmp_path_factory):
    "A run directory as a run leaves it, with a head of each kind, and a file for each task."
    out = tmp_path_factory.mktemp("small") / "run"
    heads = [HeadConfig(kinds[0]), HeadConfig(kinds[1], "separate", features="cosine"),
             HeadConfig(kinds[2])]
    MultitaskBert(BertModel.from_pretrained(encoders[0]), heads, 16).save_pretrained(out / "model")
    (out / "config.json").write_text(json.dumps({"row": "x", "data_fingerprint": "own-1"}))
    files = {"a": "text,label\nab ce,1\nfab,2\n", "b": "one,two,same\na,b,no\nc,c,yes\n",
             "c": "one,two,score\na,b,1\nc,c,4\nd,e,0\n"}
    for name, text in files.items():
        (out.parent / f"{name}.csv").write_text(text)
    return out


def ask(model, r):
    "Answers of one task, each legal and finite."
    task = pick(r, tuple(model.configs.values())).task
    texts = [("ab", "ce"), ("fab", "kiln")] if task.pair else ["ab", "fab, kiln"]
    for x in model.predict(task.name, texts):
        legal = task.answers(range(task.n_classes)) if task.kind == "classify" else [x]
        assert x in legal and (task.kind == "classify" or task.low <= x <= task.high)


def test_damaged_run_directories(small_run, place, capsys):
    "Asked from Python and by the program: answers, or one line and exit code 1."
    def call(r):
        folder = copy(small_run, place)
        damage_folder(r, folder)
        task = pick(r, "abc")
        capsys.readouterr()
        code = main(["evaluate", str(folder), str(small_run.parent / f"{task}.csv"),
                     "--task", task, "--device", "cpu"])
        out, err = capsys.readouterr()
        assert code in (0, 1) and "Traceback" not in err
        if code == 0:
            assert all(np.isfinite(x) for x in json.loads(out).values()), out
        else:
            assert out == "" and any(x.startswith("minbert: ") for x in err.splitlines()), err
        ask(MultitaskBert.from_pretrained(folder), r)
        return "answered"

    counts = survey(CHECKPOINTS, call, "damaged run directories", capsys)
    assert counts["answered"] > CHECKPOINTS // 50
