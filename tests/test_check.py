"""`minbert check`: somebody's file, in a process of its own; and a handout's directory."""
import json
import re
from pathlib import Path

import pytest
import torch

from conftest import PROGRAM, ROOT, run

MINE = '''
import os
import time

import torch
import torch.nn.functional as F


def attention(query, key, value, mask):
    scores = query @ key.transpose(-1, -2)
    return F.softmax(scores.masked_fill(mask == 0, -1e9), dim=-1) @ value


def pcgrad(grads):
    left = grads.clone()
    for i, g in enumerate(left):
        for j in torch.randperm(len(grads)).tolist():
            if j != i and g @ grads[j] < 0:
                g -= (g @ grads[j]) / (grads[j] @ grads[j]) * grads[j]
    return left.sum(0)


def broken_pcgrad(grads):
    print("hello from here")
    return grads[0] + not_there


def late_pcgrad(grads):
    if len(grads) == 2 and grads.shape[1] == 2:
        raise ValueError("not two")
    return pcgrad(grads)


def slow_pcgrad(grads):
    if grads.shape[1] == 4:
        time.sleep(1000)
    return pcgrad(grads)


def ending_pcgrad(grads):
    if grads.shape[1] == 4:
        os._exit(3)
    return pcgrad(grads)


def calling_pcgrad(grads):
    import socket
    socket.create_connection(("127.0.0.1", 9))


def odd(x):
    return x


def train(n):
    return torch.arange(4.) * n


def resume(n, k):
    return torch.arange(4.) * (n if n == k else n + .5)
'''


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    "A file of somebody's."
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(MINE)
    return path


def check(*args):
    "Exit code, the JSON object, and standard error."
    got = run(PROGRAM, "check", *args, "--json", timeout=300)
    assert "Traceback" not in got.stderr, got.stderr
    assert got.returncode in (0, 1), got.stderr
    return got.returncode, json.loads(got.stdout), got.stderr


def failed(report):
    "The properties that failed."
    return [f for f in report["properties"] if f["passed"] is False]


def test_a_right_one_passes(mine):
    code, report, err = check(f"{mine}:pcgrad")
    assert (code, report["passed"], report["mistakes"]) == (0, True, [])
    assert "running the code in" in err and "without network" in err


def test_a_wrong_one_is_named(mine):
    got = run(PROGRAM, "check", f"{mine}:attention")
    assert got.returncode == 1 and "known mistake: does not divide by √d" in got.stdout
    assert "01_attention" in got.stdout and "smallest example" in got.stdout


def test_kind_can_be_given(mine):
    code, report, _ = check(f"{mine}:odd", "--kind", "pcgrad")
    assert code == 1 and report["kind"] == "pcgrad"


def test_two_functions(mine):
    code, report, _ = check(f"{mine}:train,resume", "--kind", "resume")
    assert code == 1 and failed(report)


@pytest.mark.parametrize("name, words", [
    ("broken_pcgrad", r"mine.py, line 25: NameError: name 'not_there'"),
    ("calling_pcgrad", "a check has no network"),
    ("not_in_it_pcgrad", "mine.py defines no not_in_it_pcgrad")])
def test_what_cannot_be_asked_is_a_finding(mine, name, words):
    code, report, _ = check(f"{mine}:{name}")
    assert code == 1 and words in report["properties"][0]["note"], report
    assert report["called"].startswith("expected: f(grads)")


def test_an_exception_is_a_finding_of_its_property(mine):
    code, report, _ = check(f"{mine}:late_pcgrad")
    notes = [f["note"] for f in failed(report)]
    assert code == 1 and "mine.py, line 30: ValueError: not two" in notes
    assert any(f["passed"] for f in report["properties"])


@pytest.mark.parametrize("name, words", [("slow_pcgrad", "did not finish within 3 s"),
                                         ("ending_pcgrad", "ended the process")])
def test_a_property_that_does_not_end(mine, name, words):
    code, report, _ = check(f"{mine}:{name}", "--limit", 3)
    assert code == 1 and [words in f["note"] for f in failed(report)] == [True]
    assert sum(f["passed"] is True for f in report["properties"]) >= 4


def test_a_file_that_does_not_load(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1\ny = (\n")
    code, report, _ = check(f"{bad}:pcgrad")
    assert code == 1 and "SyntaxError" in report["properties"][0]["note"]


def test_wrong_calls(mine, fails, tmp_path):
    fails("say what to check", "check")
    fails("say what to check", "check", mine)
    fails("no file", "check", f"{tmp_path}/none.py:pcgrad")
    fails("cannot guess from 'odd'", "check", f"{mine}:odd")
    fails("kind is 'spell'", "check", f"{mine}:odd", "--kind", "spell")
    fails("no directory", "check", "--handout", tmp_path / "none")


HANDOUT = {
    "utils.py": '''
import importlib_metadata
import requests
import torch

_version = importlib_metadata.version("torch")


def get_extended_attention_mask(mask, dtype):
    return (1 - mask[:, None, None].to(dtype)) * -10000.
''',
    "config.py": '''
from utils import *


class BertConfig:
    def __init__(self, **sizes):
        sizes.pop("name_or_path", None)
        for name, value in sizes.items():
            setattr(self, name, value)
''',
    "base_bert.py": '''
import torch
from torch import nn

from config import BertConfig
from utils import *


class BertPreTrainedModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.name_or_path = config, config.name_or_path

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def init_weights(self):
        for p in self.parameters():
            nn.init.normal_(p, std=self.config.initializer_range)
''',
    "bert.py": '''
import math

import torch
import torch.nn.functional as F
from torch import nn

from base_bert import BertPreTrainedModel
from utils import *


class BertSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def transform(self, x, layer):
        b, n = x.shape[:2]
        return layer(x).view(b, n, self.num_attention_heads, -1).transpose(1, 2)

    def attention(self, key, query, value, attention_mask):
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = self.dropout(F.softmax(scores + attention_mask, dim=-1))
        out = weights @ value
        return out.transpose(1, 2).contiguous().view(len(out), out.shape[2], -1)

    def forward(self, x, mask):
        q, k, v = (self.transform(x, f) for f in (self.query, self.key, self.value))
        return self.attention(k, q, v, mask)


class BertLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, wide = config.hidden_size, config.intermediate_size
        self.self_attention = BertSelfAttention(config)
        self.attention_dense, self.interm_dense = nn.Linear(d, d), nn.Linear(d, wide)
        self.attention_layer_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.attention_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.interm_af = F.gelu
        self.out_dense = nn.Linear(wide, d)
        self.out_layer_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.out_dropout = nn.Dropout(config.hidden_dropout_prob)

    def add_norm(self, input, output, dense_layer, dropout, ln_layer):
        return ln_layer(input + dropout(dense_layer(output)))

    def forward(self, x, mask):
        y = self.self_attention(x, mask)
        x = self.add_norm(x, y, self.attention_dense, self.attention_dropout,
                          self.attention_layer_norm)
        y = self.interm_af(self.interm_dense(x))
        return self.add_norm(x, y, self.out_dense, self.out_dropout, self.out_layer_norm)


class BertModel(BertPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        d = config.hidden_size
        self.word_embedding = nn.Embedding(config.vocab_size, d, config.pad_token_id)
        self.pos_embedding = nn.Embedding(config.max_position_embeddings, d)
        self.tk_type_embedding = nn.Embedding(config.type_vocab_size, d)
        self.embed_layer_norm = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.embed_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("position_ids", torch.arange(config.max_position_embeddings)[None])
        layers = [BertLayer(config) for _ in range(config.num_hidden_layers)]
        self.bert_layers = nn.ModuleList(layers)
        self.pooler_dense, self.pooler_af = nn.Linear(d, d), nn.Tanh()
        self.init_weights()

    def embed(self, input_ids):
        places = self.position_ids[:, :input_ids.shape[1]]
        types = torch.zeros_like(input_ids)
        x = self.word_embedding(input_ids) + self.pos_embedding(places)
        x = x + self.tk_type_embedding(types)
        return self.embed_dropout(self.embed_layer_norm(x))

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        mask = get_extended_attention_mask(attention_mask, self.dtype)
        for layer in self.bert_layers:
            x = layer(x, mask)
        pooled = self.pooler_af(self.pooler_dense(x[:, 0]))
        return {"last_hidden_state": x, "pooler_output": pooled}
''',
    "optimizer.py": '''
import math

import torch
from torch.optim import Optimizer


class AdamW(Optimizer):
    def __init__(self, params, lr=1e-3, betas=(.9, .999), eps=1e-6, weight_decay=0.,
                 correct_bias=True):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      correct_bias=correct_bias))

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad, (b1, b2) = self.state[p], p.grad.data, group["betas"]
                if not state:
                    state["t"], state["m"], state["v"] = 0, 0 * p.data, 0 * p.data
                state["t"] += 1
                state["m"] = b1 * state["m"] + (1 - b1) * grad
                state["v"] = b2 * state["v"] + (1 - b2) * grad**2
                rate = group["lr"]
                if group["correct_bias"]:
                    rate = rate * math.sqrt(1 - b2**state["t"]) / (1 - b1**state["t"])
                p.data -= rate * state["m"] / (state["v"].sqrt() + group["eps"])
                p.data -= group["lr"] * group["weight_decay"] * p.data
'''}


def handout(folder, *changes, without=()):
    "A directory laid out like the starter code; changes are (file, old, new)."
    files = dict(HANDOUT)
    for name, old, new in changes:
        assert old in files[name], old
        files[name] = files[name].replace(old, new)
    for name, text in files.items():
        if name not in without:
            (folder / name).write_text(text)
    return folder


def test_a_right_handout(tmp_path):
    code, found, _ = check("--handout", handout(tmp_path))
    assert code == 0 and found["passed"], found
    kinds = [r["kind"] for r in found["reports"]]
    assert kinds == ["adamw", "attention", "add_norm", "bert"]
    assert not list(tmp_path.glob("__pycache__")), "nothing is left behind"


def test_a_handout_with_a_mistake_in_every_part(tmp_path):
    changes = [("optimizer.py", 'p.data -= group["lr"] * group', "p.data -= rate * group"),
               ("bert.py", "out.transpose(1, 2).contiguous()", "out"),
               ("bert.py", "ln_layer(input + dropout(dense_layer(output)))",
                "dropout(ln_layer(input + dense_layer(output)))"),
               ("bert.py", "return self.embed_dropout(self.embed_layer_norm(x))", "return x")]
    code, found, _ = check("--handout", handout(tmp_path, *changes))
    assert code == 1
    named = [[m["mistake"] for m in r["mistakes"]] for r in found["reports"]]
    assert named[0] == ["decays by the bias-corrected rate"]
    assert named[1] == ["puts the heads together without transposing back"]
    assert named[2] == ["drops out after the LayerNorm instead of before the sum"]
    assert not found["reports"][3]["passed"]


def test_an_unfinished_handout(tmp_path):
    change = ("bert.py", "x = self.word_embedding(input_ids) + self.pos_embedding(places)",
              "raise NotImplementedError")
    folder = handout(tmp_path, change, without=["optimizer.py"])
    code, found, _ = check("--handout", folder)
    adamw, attention, add_norm, bert = found["reports"]
    assert code == 1 and adamw["properties"][0]["note"] == "optimizer.py is not there"
    assert attention["passed"] and add_norm["passed"]
    assert "NotImplementedError" in failed(bert)[0]["note"]
    assert "bert.py, line" in failed(bert)[0]["note"]


ARGV = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=1{})
args = parser.parse_args()


class AdamW"""


@pytest.mark.parametrize("old, new, words", [
    ("import math\n", "import math\nimport explainaugment\n",
     r"could not be tried: optimizer.py, line \d+: ModuleNotFoundError: .*explainaugment.*install"),
    ("\nclass AdamW", ARGV.format(""), "^right$"),
    ("\nclass AdamW", ARGV.format(", required=True"),
     r"could not be tried: optimizer.py, line \d+: SystemExit: 2 .*__name__ == '__main__'"),
    ("\nclass AdamW", "here = torch.ones(2).cuda()\n\n\nclass AdamW",
     r"could not be tried: optimizer.py, line \d+: .*there is none here: say .to"),
    ("state[\"t\"] += 1", "raise NotImplementedError",
     r"not finished: optimizer.py, line \d+: NotImplementedError$"),
    ("p.data -= rate * state", "continue; p.data -= rate * state", "^wrong: ")],
    ids=["package", "arguments", "needed arguments", "GPU", "unfinished", "does nothing"])
def test_what_stands_in_the_way(tmp_path, old, new, words):
    "What is usual in course projects is said in words that their author knows."
    if "cuda" in new and torch.cuda.is_available():
        pytest.skip("here is a GPU")
    (tmp_path / "my project").mkdir()
    folder = handout(tmp_path / "my project", ("optimizer.py", old, new))
    code, report, _ = check(f"{folder}/optimizer.py:AdamW")
    assert re.search(words, report["in_short"]), report["in_short"]
    assert code == (report["in_short"] != "right")


def test_a_module_is_asked_at_its_own_width(tmp_path):
    "What fails only with a mask has no small example without one."
    change = ("bert.py", "F.softmax(scores + attention_mask, dim=-1)",
              "F.softmax(scores, dim=-1) + attention_mask")
    _, report, _ = check(f"{handout(tmp_path, change)}/bert.py:BertSelfAttention")
    named = [m["mistake"] for m in report["mistakes"]]
    assert (named, report["example"]) == (["adds the additive mask after the softmax"], "")


def test_a_directory_in_short(tmp_path):
    "Each part in a line at the end."
    got = run(PROGRAM, "check", "--handout", handout(tmp_path, without=["optimizer.py"]))
    assert got.stdout.endswith("""In short:
  optimizer.py:AdamW: could not be tried: optimizer.py is not there
  bert.py:BertSelfAttention: right
  bert.py:add_norm: right
  bert.py:BertModel: right
"""), got.stdout


def test_a_report_in_a_notebook():
    "Words beside the marks; a mistake leads to the site; its cost is said, or not measured."
    from minbert.check import check_pcgrad, site
    html = check_pcgrad(lambda grads: grads.mean(0))._repr_html_()
    assert "✗ FAIL" in html and "✓ ok" in html and "Cost in score: not measured" in html
    section = f"{site}07_pcgrad.html#a-small-table-is-enough"
    assert f"<a href='{section}'><b>takes the mean instead of the sum</b></a>" in html
    summed = check_pcgrad(lambda grads: grads.sum(0))
    assert "±" in summed.as_dict()["mistakes"][0]["cost"]
    strange = check_pcgrad(lambda grads: 3 * grads[0])
    assert not strange.mistakes and f"<a href='{site}07_pcgrad.html'>" in strange._repr_html_()
    assert f"read: 07_pcgrad, {site}07_pcgrad.html" in repr(strange)


def test_an_empty_directory(tmp_path):
    code, found, _ = check("--handout", tmp_path)
    assert code == 1 and len(found["reports"]) == 4
    assert all("is not there" in failed(r)[0]["note"] for r in found["reports"])


def test_helpers_that_are_not_installed_stand_in(tmp_path, monkeypatch):
    "A handout's file may import what is missing here; other libraries that look for it get an answer, too."
    import importlib.util
    import sys
    from minbert import check as ours
    monkeypatch.setattr(ours, "_helpers", ("notinstalled", "notinstalled.metrics"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    path = tmp_path / "asks_for_helpers.py"
    path.write_text("from notinstalled.metrics import f1_score\nanswer = f1_score([1], [1])\n")
    try:
        assert ours._load(path).answer == ""
        assert importlib.util.find_spec("notinstalled") is not None
    finally:
        for name in ("notinstalled", "notinstalled.metrics", "asks_for_helpers"): sys.modules.pop(name, None)


def test_the_site_is_the_projects():
    import configparser
    from minbert.check import site
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini")
    assert site == cfg["DEFAULT"]["doc_host"] + cfg["DEFAULT"]["doc_baseurl"] + "/"


def test_what_a_report_names_to_read_is_there():
    from minbert.mistakes import catalogue
    for kind, mistakes in catalogue.items():
        for m in mistakes.values():
            page, section = m.read.split("#", 1)
            cells = json.loads((ROOT / "nbs" / f"{page}.ipynb").read_text())["cells"]
            text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
            heads = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
            assert section in heads, (kind, m.title, m.read)


def test_without_hypothesis_an_example_is_found_too(monkeypatch):
    import sys
    from minbert.check import check_pcgrad
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    report = check_pcgrad(lambda grads: grads.sum(0))
    assert report.mistakes == ("summed",) and "[[" in report.example


def test_json_has_no_infinity():
    import numpy as np
    from minbert.check import Finding, Report
    report = Report("pcgrad", "f", "called", (Finding("x", False, np.inf),))
    assert "Infinity" not in json.dumps(report.as_dict())
