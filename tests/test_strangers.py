"""Checkpoints and run directories from strangers: nothing in them is executed, nothing outside is read, nothing fills the memory or hangs.

And texts from strangers: whatever a text holds, it gets an answer or one line.
"""
import gzip
import json
import os
import pickle
import re
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import ROOT, plain
from minbert.bert import BertModel
from minbert.core import UserError
from minbert.data import encode, load_tasks, load_tokenizer
from minbert.heads import HeadConfig, MultitaskBert, predict_logits
from minbert.runs import keep, stored_answers
from test_faults import TIMES, Forks

GB, LIMIT = 2**30, 90                               # of address space; seconds, after which a run counts as hanging


@pytest.fixture(scope="module")
def forks():
    started = Forks()
    yield started
    started.end()


@pytest.fixture
def stranger(run_dir, tmp_path):
    "A finished run of somebody else, with a list of hashes that agrees with nothing: it is left out, as a stranger would."
    mine = shutil.copytree(run_dir, tmp_path / "run")
    (mine / "model/SHA256SUMS").unlink()
    (tmp_path / "secret.json").write_text('{"model_type": "bert", "password": "hunter2"}')
    return mine


def ask(forks, folder, *argv):
    "A command with little memory and little time; what it said."
    got = forks(folder, [str(a) for a in argv], memory=8 * GB, signal=signal.SIGKILL, seconds=LIMIT, cwd=str(folder.parent),
                log=str(folder.parent / "log"))
    assert got["code"] in (0, 1) and "Traceback" not in got["said"], (argv, got["code"], got["said"][-2000:])
    assert "hunter2" not in got["said"]
    if got["code"]: assert plain(got["said"])[-1].startswith("minbert: "), got["said"]
    return got


class Shell:
    "What a pickle can do."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch '{self.path}'",)


def test_nothing_is_executed(stranger, tmp_path):
    "Neither from weights, in either form of a pickle, nor from names in the small files."
    folder, trace = stranger / "model", tmp_path / "executed"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for save in (torch.save, lambda x, p: torch.save(x, p, _use_new_zipfile_serialization=False), lambda x, p: p.write_bytes(pickle.dumps(x))):
        save(weights | {"x": Shell(trace)}, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="more than weights"): BertModel.from_pretrained(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    code = {"auto_map": {"AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tok", None]}, "custom_pipelines": {"x": {"impl": "evil.X"}}}
    (folder / "config.json").write_text(json.dumps(config | code))
    (folder / "evil.py").write_text(f"import os; os.system('touch {trace}')")
    BertModel.from_pretrained(folder)
    assert not trace.exists()


def as_pipe(path): os.mkfifo(path)
def as_link_out(path): path.symlink_to(path.parent.parent.parent / "secret.json" if path.parent.name == "model" else path.parent.parent / "secret.json")
def as_device(path): path.symlink_to("/dev/zero")
def as_loop(path): path.symlink_to(path.name)
def as_folder(path): path.mkdir()


def as_huge(path):
    "A terabyte of zeros that takes no room."
    with open(path, "wb") as f: f.truncate(2**40)


def as_deep(path): path.write_bytes(b"[" * 10**6)
def as_digits(path): path.write_text('{"dev": {"sst": ' + "9" * 10**6 + "}}")


files = ("model/config.json", "model/model.safetensors", "model/vocab.txt", "model/heads.json", "model/heads.safetensors",
         "model/tokenizer_config.json", "model/SHA256SUMS", "config.json", "result.json")
changes = (as_pipe, as_link_out, as_device, as_loop, as_folder, as_huge, as_deep, as_digits)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("change", changes, ids=lambda f: f.__name__)
def test_every_file_replaced(change, stranger, data_dir, forks):
    "Scoring, predicting and comparing end soon, with a plain line or without reading the file."
    for name in files if TIMES > 1 else files[changes.index(change) % 3::3]:
        path = stranger / name
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        change(path)
        if name == "result.json": got = ask(forks, stranger, "compare", stranger)
        else: got = ask(forks, stranger, "evaluate", stranger, data_dir / "ids-sst-dev.csv", "--task", "sst")
        assert got["code"] == 1 or name == "config.json" and change not in (as_pipe, as_link_out, as_device, as_loop), (name, got["said"])
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        if kept is not None: path.write_bytes(kept)


def test_an_untouched_directory_opens(stranger, data_dir, forks):
    assert ask(forks, stranger, "evaluate", stranger, data_dir / "ids-sst-dev.csv", "--task", "sst")["code"] == 0


def test_an_index_that_leads_elsewhere(stranger, tmp_path):
    folder = stranger / "model"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    for shard in ("../outside.safetensors", "../../outside.safetensors", str(tmp_path / "outside.safetensors"), "a/b", "..", ".", "", "a\\b", "x\0y"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, shard)}))
        with pytest.raises(UserError): BertModel.from_pretrained(folder)
    (folder / "part.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, "part.safetensors")}))
    with pytest.raises(UserError, match="leads out of its directory"): BertModel.from_pretrained(folder)


absurd = [("config.json", {key: n}) for n, key in ((10**7, "vocab_size"), (10**7, "hidden_size"), (10**12, "intermediate_size"),
          (10**7, "max_position_embeddings"), (10**12, "type_vocab_size"), (10**7, "num_hidden_layers"))]
absurd += [("config.json", dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 10**7)),
           ("config.json", {"num_hidden_layers": 100, "hidden_size": 10**6, "num_attention_heads": 1}),
           ("heads.json", {"max_length": 10**15}), ("heads.json", {"heads": [{}] * 10**5})]


def test_absurd_sizes(stranger, data_dir, forks):
    "Sizes that the weights do not have are refused before anything of that size is made."
    for name, sizes in absurd:
        path = stranger / "model" / name
        kept = path.read_text()
        path.write_text(json.dumps(json.loads(kept) | sizes))
        got = ask(forks, stranger, "evaluate", stranger, data_dir / "ids-sst-dev.csv", "--task", "sst")
        assert got["code"] == 1 or "max_length" in sizes, (sizes, got["said"])
        path.write_text(kept)


def test_a_tokenizer_that_never_ends(stranger, data_dir, forks):
    "Patterns that try two to the power of the text's length ways, and texts that double forty times."
    folder = stranger / "model"
    tokens = (folder / "vocab.txt").read_text().split("\n")[:-1]
    described = json.loads(load_tokenizer(tuple(tokens)).to_str())
    slow, twice = {"Regex": "^(a+)+$"}, {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    split = {"type": "Split", "pattern": slow, "behavior": "Isolated", "invert": False}
    places = {"searches": ("normalizer", {"type": "Replace", "pattern": slow, "content": "b"}), "splits": ("pre_tokenizer", split),
              "splits, within": ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [split]}),
              "doubles, forty times": ("normalizer", {"type": "Sequence", "normalizers": [twice] * 40}),
              "words without end": ("model", described["model"] | {"max_input_chars_per_word": 10**9})}
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (stranger.parent / "in.csv").write_text("id,sentence\n1," + "a" * 2000 + "!\n")
    again = ["predict", stranger, "sst", stranger.parent / "in.csv", stranger.parent / "out.csv"]
    for name, (place, part) in places.items():
        (folder / "tokenizer.json").write_text(json.dumps(described | {place: part}))
        got = ask(forks, stranger, *again)
        assert got["code"] == 1 and "not built in" in plain(got["said"])[-1], (name, got["said"])
    (folder / "tokenizer.json").write_text(json.dumps(described))
    assert ask(forks, stranger, *again)["code"] == 0


def test_predictions_that_unpack_to_gigabytes(stranger, tmp_path):
    path = tmp_path / "E9-pocket-s0-dev-sst.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as f:
        for _ in range(16): f.write(bytes(2**24))   # a quarter of a gigabyte
    assert path.stat().st_size < 2**21
    with pytest.raises(UserError, match="holds more than predictions for 3 rows"): stored_answers(path, ["a", "b", "c"])
    (stranger / "dev-sst.csv").unlink()
    (stranger / "dev-sst.csv").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match="leads out of its directory"): keep(stranger, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MultitaskBert(BertModel.from_pretrained("pocket"), [HeadConfig(t) for t in load_tasks("pocket").tasks.values()], 32).eval()


right_to_left = "שלום עולם مرحبا بالعالم ‮abc‬ ‏"
odd = st.one_of(st.text(max_size=60), st.text(st.characters(categories=("Cc", "Cf", "Co", "Cn", "Mn", "Zs", "Zl", "Zp")), max_size=40),
                st.sampled_from((right_to_left, "a" * 100_000, "é" * 100_000, "́" * 100_000, "字" * 20_000, "##" * 5_000, "[SEP]" * 300,
                                 "[CLS] a [MASK] [PAD]", "\0", "\u2028\u2029\x85", "\ufeff", "👩‍👩‍👧‍👦" * 50, "\U0010ffff", "\ud800", "a\udfffb")))


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_any_text_gets_an_answer_or_one_line(model, data):
    "Legal and finite, the same alone as among others, whatever is in the text; half a letter and an empty text are named."
    task = data.draw(st.sampled_from(tuple(model.configs.values()))).task
    texts = tuple(data.draw(odd) for _ in task.text)
    half, empty = (any("\ud800" <= c <= "\udfff" for t in texts for c in t), not all(t.strip() for t in texts))
    try:
        answer, other = model.predict(task.name, [texts, ("a good film",) * len(texts)])
    except UserError as e:
        assert (half or empty) and "\n" not in str(e) and "text 0" in str(e)
        return
    assert not half and not empty
    if task.kind == "score": assert np.isfinite(answer) and task.low <= answer <= task.high
    else: assert answer in task.answers(range(task.n_classes))
    assert other == model.predict(task.name, ("a good film",) * len(texts))[0] or task.kind == "score"


def test_a_long_word_is_one_unknown_token(model):
    "No more tokens than the model reads, and no time to speak of."
    tokenizer = load_tokenizer(model.bert.vocab)
    assert tokenizer.encode("a" * 100_000).tokens == ["[UNK]"]
    rows = load_tasks("pocket")["sst"]["dev"].take([0])
    long = encode(tokenizer, type(rows)(rows.task, "dev", ["1"], [("a b " * 50_000,)], None))
    assert predict_logits(model, "sst", long).isfinite().all()


def test_workflows_may_do_little_and_use_what_was_reviewed():
    "Actions by commit, tokens that read, and the right to publish only where no code of ours runs."
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        text = path.read_text()
        flow = yaml.safe_load(text)
        assert flow["permissions"] == {"contents": "read"}, path.name
        used = re.findall(r"uses: *(\S+)", text)
        assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", u) for u in used), used
        for job in flow["jobs"].values():
            writes = [k for k, v in job.get("permissions", {}).items() if v == "write"]
            assert not writes or not any("run" in step for step in job["steps"]), writes
        assert "pull_request_target" not in text and "${{ github.event" not in text
