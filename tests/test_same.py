"""The same result whatever the machine does: bars and logs, how often is looked and saved, the atlas on or off change no bit.

Other evaluation batches and other numbers of threads add in another order, so they change the last digits; how many is held here.
There are no data workers: rows are in memory, and their order is drawn from the seed.
"""
import logging

import pytest
import torch

from minbert import heads
from minbert.core import log
from minbert.conflicts import Atlas
from minbert.data import load_tasks
from minbert.heads import decode, predict_logits
from minbert.recipes import Setup, compose
from minbert.runs import RunDir, TrainConfig, train
from minbert.train import TaskData

TOLERANCE = 1e-4                                    # of a score between 0 and 5; sums in another order give 1e-5
corpus = load_tasks("pocket").limit(60)


class LastKept(TaskData):
    "The model of the last step is kept, so that it can be compared."
    keeps_best = False

    def finish(self, model, run): return {"dev": {}}


def last_weights(out, row="S5", plugs=(), progress=False, **config):
    "Train a row for some steps; its weights, and the losses of each step."
    job = compose(row, corpus, Setup("pocket"))
    data = LastKept(job.data.splits, job.data.mixing, job.data.batch_sizes, 0, 20, job.data.info)
    train(out, job.model, data, TrainConfig(**({"steps": 9, "evals": 1, "seed": 0} | config)), (*plugs, *job.plugs), progress=progress)
    losses = [{k: v for k, v in x.items() if k.startswith("loss_")} for x in RunDir(out).lines()]
    return {k: v.clone() for k, v in job.model.state_dict().items()}, [x for x in losses if x]


def same(a, b): return a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1] == b[1]


@pytest.fixture(scope="module")
def usual(tmp_path_factory): return last_weights(tmp_path_factory.mktemp("usual") / "run")


def test_looks_saves_bars_and_logs_change_no_bit(usual, tmp_path, monkeypatch):
    assert same(usual, last_weights(tmp_path / "a", evals=4, save_seconds=0.))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    level = log.level
    log.setLevel(logging.DEBUG)
    try: assert same(usual, last_weights(tmp_path / "b", progress=True))
    finally: log.setLevel(level)
    assert not same(usual, last_weights(tmp_path / "c", seed=1))


@pytest.mark.parametrize("row", ("S5", "S9"))
def test_the_atlas_changes_no_bit(row, usual, tmp_path):
    "Surgery draws orders and SMART draws noise; the atlas measures between and draws for itself."
    without = usual if row == "S5" else last_weights(tmp_path / "without", row)
    assert same(without, last_weights(tmp_path / "with", row, (Atlas(2),)))


@pytest.mark.parametrize("row", ("E9", "E3"))
def test_evaluation_batches_change_no_answer(row, tmp_path, monkeypatch):
    "Whatever rows are read together: the same classes, and the same scores up to rounding."
    job = compose(row, corpus, Setup("pocket"))
    for task, encoded in job.data.splits["dev"].items():
        usual = predict_logits(job.model, task, encoded)
        for tokens in (1, 200, 10**6):
            by_tokens = heads._by_tokens
            monkeypatch.setattr(heads, "_by_tokens", lambda lengths: by_tokens(lengths, tokens))
            got = predict_logits(job.model, task, encoded)
            monkeypatch.undo()
            c = job.model.configs[task]
            a, b = decode(usual, c), decode(got, c)
            assert torch.equal(a, b) if c.task.kind == "classify" else torch.allclose(a, b, atol=TOLERANCE)


def test_threads_change_the_last_digits_only(tmp_path, monkeypatch):
    "The losses of nine steps, relative: what appendix A6 promises."
    monkeypatch.setenv("MINBERT_PRECISION", "fp32")
    found = {}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try: found[threads] = last_weights(tmp_path / str(threads))[1]
        finally: torch.set_num_threads(1)
    found["another seed"] = last_weights(tmp_path / "other", seed=1)[1]
    def off(x): return max(abs(a[k] / b[k] - 1) for a, b in zip(found[1], found[x], strict=True) for k in a)
    assert off(3) < 1e-4 < off("another seed")
