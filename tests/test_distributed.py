"""Several processes: everywhere the steps of one with all the data, one writer, one clear end."""
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from conftest import PROGRAM
from minbert.bert import pocket_bert
from minbert.conflicts import Atlas
from minbert.core import Plug, UserError, pick_device
from minbert.data import load_tasks
from minbert.electra import ClipParts, pretraining
from minbert.fast import install, make_optimizer
from minbert.heads import HeadConfig
from minbert.mixing import round_robin, summed
from minbert.mlm import reading_presets, set_dropout
from minbert.pcgrad import PCGrad, Surgery, SurgeryPlug
from minbert.processes import count_terms, fit_together, joined, take
from minbert.processes import rank as dist_rank
from minbert.runs import RunDir, TrainConfig, train
from minbert.smart import Smart
from minbert.train import TaskData, build, fit, sum_losses

NAMES = ("a", "b", "c")


def member(rank, n, port, f, args):
    "One of n processes."
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                      LOCAL_WORLD_SIZE=str(n),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["MINBERT_PRECISION"] = "fp32"
    torch.set_num_threads(1)
    with joined():
        f(*args)


def free_port():
    "A port that nobody listens at."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(n, f, *args):
    "Call a function in n processes at once; their exit codes."
    if n == 1:
        f(*args)
        return [0]
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minbert.recipes", "minbert.check"])
    group = [context.Process(target=member, args=(r, n, port, f, args)) for r in range(n)]
    for p in group:
        p.start()
    for p in group:
        p.join(120)
    return [p.exitcode for p in group]


def tower():
    "One shared layer, one never reached, and a head for each task."
    torch.manual_seed(0)
    heads = {t: nn.Linear(5, 1) for t in NAMES}
    return nn.ModuleDict({"shared": nn.Linear(4, 5), "idle": nn.Linear(4, 5), **heads})


def rows(t):
    "A task's eight rows: inputs and labels."
    torch.manual_seed(ord(t))
    return torch.randn(8, 4), torch.randn(8, 1)


def loss_of(model, t, at):
    "A task's loss on some of its rows."
    x, y = rows(t)
    return (model[t](model["shared"](x[at])) - y[at]).square().mean()


def step(model, parts, combine):
    "The shared gradients of one step; parts: (task, rows) in the order in which they come."
    shared = [*model["shared"].parameters(), *model["idle"].parameters()]
    losses = ((t, loss_of(model, t, at)) for t, at in parts)
    torch.manual_seed(7)
    combine(losses, shared)
    return [p.grad for p in shared]


def in_the_loop(losses, shared):
    "As the plug does it."
    SurgeryPlug("pcgrad").combine(losses, shared)


def by_itself(losses, shared):
    "As someone's own loop does it."
    PCGrad(shared).backward(losses)


def worker(folder):
    "One of two processes."
    rank = dist_rank()
    half = slice(0, 4) if rank == 0 else slice(4, 8)
    order = NAMES if rank == 0 else NAMES[::-1] # the tasks come in another order
    some = order if rank == 0 else order[:2] # rank 1 has no rows of "a"
    found = {}
    for name, combine in (("plug", in_the_loop), ("own", by_itself)):
        found[name, "even"] = step(tower(), [(t, half) for t in order], combine)
        found[name, "absent"] = step(tower(), [(t, slice(None)) for t in some], combine)
    torch.save({" ".join(k): v for k, v in found.items()}, f"{folder}/{rank}.pt")


def same(a, b, close=False):
    "Equal gradients, or none on both sides."
    if a is None or b is None:
        return a is b
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6) if close else torch.equal(a, b)


def test_two_processes(tmp_path):
    assert together(2, worker, tmp_path) == [0, 0]
    one, two = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    whole = step(tower(), [(t, slice(None)) for t in NAMES], by_itself)
    assert len(one) == 4 and one.keys() == two.keys()
    for name, grads in one.items():
        assert all(same(a, b) for a, b in zip(grads, two[name], strict=True)), name
        assert grads[2] is None and grads[3] is None # nobody reached it
    for name in ("plug even", "own even"):
        assert all(same(a, b, close=True) for a, b in zip(one[name], whole, strict=True)), name
    for name in ("plug absent", "own absent"): # half of task a's gradient is missing
        assert not torch.allclose(one[name][0], whole[0])


# Whole runs: N processes take the steps of one

class Stopping:
    "The same data, but the run is stopped in step 30."
    def __init__(self, data):
        self.data = data

    def __getattr__(self, name):
        return getattr(self.data, name)

    def steps(self, model, start):
        yield from islice(self.data.steps(model, start), 30 - start)
        raise UserError("stopped")


def fine_tuning(mixing, plugs=(), pairs="concat", dropout=0., rows=43):
    "Three tasks, whose batches do not divide evenly; one has fewer rows than there are processes."
    corpus = load_tasks("pocket").limit(rows)
    heads = [HeadConfig(corpus.tasks["sst"]), HeadConfig(corpus.tasks["para"]),
             HeadConfig(corpus.tasks["sts"], "separate", features=pairs,
                        loss="mnrl" if pairs == "cosine" else "")]
    model, splits = build(pocket_bert(), corpus, heads, 40)
    set_dropout(model, dropout)
    sizes = {"sst": 7, "para": 5, "sts": 4 if pairs == "cosine" else 2}
    return model.to(pick_device()), TaskData(splits, mixing, sizes, eval_rows=40), plugs


def reading(kind, dropout=0., sharing="es"):
    "Texts of the same tasks."
    much = replace(reading_presets["pocket"], dropout=dropout, batch_size=5)
    bert = pocket_bert().to(pick_device())
    model, data, _ = pretraining(bert, load_tasks("pocket").limit(60), kind, sharing, much)
    return model, data, (ClipParts(),) if kind == "rtd" else ()


RUNS = {"surgery": partial(fine_tuning, summed, (Atlas(20), Surgery())),
        "in turn": partial(fine_tuning, round_robin, (), "cosine"),
        "reading": partial(reading, "mlm")}
CONFIG = TrainConfig(50, lr=1e-3, evals=2)


def runs(folder, names, stop=False, resume=False):
    "Train each to the end, or into step 30."
    for name in names:
        model, data, plugs = RUNS[name]()
        data.keeps_best = False # so that the model that is kept is the one of the last step
        out = folder / name
        if stop:
            with pytest.raises(UserError, match="stopped"):
                train(out, model, Stopping(data), CONFIG, plugs, progress=False)
            continue
        train(out, model, data, CONFIG, plugs, resume, progress=False)
        torch.save(model.state_dict(), folder / f"{name}-{dist_rank()}.pt")


def close(a, b, tolerance=1e-5):
    "Nested numbers that agree; times, and what a computer is called, do not count."
    if isinstance(a, dict):
        skip = {"seconds", "wall_s", "cpu_s", "look_s", "peak_rss_mb", "processes"}
        assert a.keys() == b.keys()
        return all(close(a[k], b[k], tolerance) for k in a.keys() - skip)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y, tolerance) for x, y in zip(a, b))
    return a == pytest.approx(b, rel=tolerance, abs=tolerance) if isinstance(a, float) else a == b


def distance(a, b):
    "The largest difference of any weight."
    return max((a[k] - b[k]).abs().max().item() for k in a if a[k].is_floating_point())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The runs of one process."
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MINBERT_PRECISION", "fp32")
        runs(folder, RUNS)
    return folder


def same_run(folder, alone, name, n):
    "Weights of all processes, losses, the atlas, scores and counts are those of one process."
    weights = [torch.load(folder / f"{name}-{r}.pt") for r in range(n)]
    assert all(distance(weights[0], w) == 0 for w in weights)
    assert distance(weights[0], torch.load(alone / f"{name}-0.pt")) < 1e-5
    mine, theirs = (RunDir(place / name) for place in (folder, alone))
    for a, b in zip(mine.lines(), theirs.lines(), strict=True):
        atlas = [x.pop("atlas", {}) for x in (a, b)]
        assert close(a, b, 2e-5), (a, b)
        assert close(*atlas, 1e-3), atlas # curvature is a difference of nearly equal losses
    assert close(mine.result(), theirs.result(), 2e-5)
    assert mine.result()["processes"] == n


@pytest.mark.parametrize("n", [2, 3])
def test_a_run_of_several_processes_is_that_of_one(n, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("MINBERT_PRECISION", "fp32")
    assert together(n, runs, tmp_path, RUNS) == [0] * n
    for name in RUNS:
        same_run(tmp_path, alone, name, n)


def test_resumed_with_another_number_of_processes(alone, tmp_path, monkeypatch):
    monkeypatch.setenv("MINBERT_PRECISION", "fp32")
    assert together(2, runs, tmp_path, ["surgery"], True) == [0, 0]
    assert (tmp_path / "surgery/state/last.safetensors").exists()
    assert together(3, runs, tmp_path, ["surgery"], False, True) == [0, 0, 0]
    same_run(tmp_path, alone, "surgery", 3)


# With random draws: N processes against one that computes their parts with their draws

class Lanes:
    "A step's parts, process by process, each under the random state and with the samples of its process."
    def __init__(self, parts, model, carried):
        self.parts = parts # per process: (task, batch)
        self.model, self.carried = model, carried # per process: what RTD keeps for its next step

    def __iter__(self):
        first = torch.initial_seed()
        for rank, part in reversed([*enumerate(self.parts)]): # the writer's state goes on
            torch.manual_seed(first + (rank << 52))
            self.model._carried = self.carried[rank]
            yield from part
            self.carried[rank] = self.model._carried


class OneByOne(Plug):
    "Does alone what n processes do together."
    def __init__(self, model, n, combine=sum_losses):
        self.model, self.n, self.inner = model, n, combine

    def split(self, steps):
        carried, cut = [getattr(self.model, "_carried", None)] * self.n, {}
        for step in steps:
            parts, self.shares = [[] for _ in range(self.n)], []
            cut = {k: x for k, x in cut.items() if any(x[0] is b for _, b in step)}
            for rank, mine in reversed([*enumerate(parts)]):
                for task, batch in step:
                    rows = np.arange(rank, len(batch), self.n)
                    if len(rows): # steps that share a batch share its parts
                        _, part = cut.setdefault((rank, id(batch)), (batch, take(batch, rows)))
                        mine.append((task, part))
                        whole = count_terms(self.model, task, batch)
                        self.shares.append(count_terms(self.model, *mine[-1]) / whole)
            yield Lanes(parts, self.model, carried)

    def combine(self, losses, shared):
        self.inner(((t, loss * w) for (t, loss), w in zip(losses, self.shares)), shared)


# 45 rows: one after another, the parts then bring the tasks in the order of the whole step
DRAWN = {"smart": partial(fine_tuning, summed, (Smart(lam=1.), Surgery()), dropout=.1, rows=45),
         **{f"replaced tokens, {s}": partial(reading, "rtd", .1, s) for s in ("es", "nes", "gdes")}}


def drawn(name, n=0):
    "Weights after 50 steps: n processes in turn in this one, or this one of several."
    model, data, settings = DRAWN[name]()
    plugs = [p.start(model, 50) for p in settings]
    model, optimizer = install(model).train(), make_optimizer(model, 1e-3, .01)
    if n:
        methods = [p for p in plugs if p.combine]
        alone = OneByOne(model, n, *(p.combine for p in methods))
        rest = [p for p in plugs if p not in methods]
        steps = fit(model, alone.split(data.steps(model, 0)), optimizer, 50, [alone, *rest])
    else:
        steps = fit_together(model, data.steps(model, 0), optimizer, 50, plugs)
    for _ in steps:
        pass
    return model.state_dict()


def save_drawn(folder, name):
    "One of several processes."
    torch.save(drawn(name), folder / f"{dist_rank()}.pt")


@pytest.mark.parametrize("n, name", [(2, "replaced tokens, es"), (2, "replaced tokens, nes"),
                                     (2, "replaced tokens, gdes"), (3, "smart")])
def test_with_draws_each_process_has_its_own(n, name, tmp_path, monkeypatch):
    monkeypatch.setenv("MINBERT_PRECISION", "fp32")
    assert together(n, save_drawn, tmp_path, name) == [0] * n
    weights = [torch.load(tmp_path / f"{r}.pt") for r in range(n)]
    assert all(distance(weights[0], w) == 0 for w in weights)
    assert distance(weights[0], drawn(name, n)) < 1e-5 < .001 < distance(weights[0], drawn(name, 1))


# As a user starts it

def torchrun(n, *args, cwd):
    "The program in n processes, in a group of its own."
    launch = [PROGRAM.with_name("torchrun"), "--nproc-per-node", n, "--master-port", free_port()]
    return subprocess.Popen([str(a) for a in (*launch, "-m", "minbert.cli", *args)], cwd=cwd,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def child(parent, rank):
    "The process of a rank."
    pids = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found = [p for p in pids if f"RANK={rank}\0" in Path(f"/proc/{p}/environ").read_text()]
    return int(found[0])


def ours(err):
    "Our own lines among those of torchrun."
    return [x for x in err.splitlines() if x.startswith("minbert: ")]


ROW = ["run", "S5", "--preset", "pocket", "--data", "pocket", "--limit", "60", "--out", "S5"]


def training(tmp_path):
    "The program in two processes that have taken some steps."
    started = torchrun(2, *ROW, cwd=tmp_path)
    metrics = tmp_path / "S5/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()
        time.sleep(.05)
    return started


def goes_on(tmp_path):
    "Resumed, it ends with every step taken once: one process writes."
    again = torchrun(2, *ROW, "--resume", cwd=tmp_path)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    result = json.loads((tmp_path / "S5/result.json").read_text())
    assert json.loads(out) == result["dev"] and result["processes"] == 2
    steps = [x["step"] for x in RunDir(tmp_path / "S5").lines() if "loss_sst" in x]
    assert steps == [*range(1, result["steps"] + 1)]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks into /proc")
def test_a_killed_process_ends_the_others(tmp_path):
    started = training(tmp_path)
    os.kill(child(started.pid, 1), signal.SIGKILL)
    killed = time.monotonic()
    out, err = started.communicate(timeout=120)
    assert time.monotonic() - killed < 60 and started.returncode
    assert out == "" and len(ours(err)) == 1, err
    assert "another process of this run has ended" in ours(err)[0] and "--resume" in err
    assert not any("minbert/" in x for x in err.splitlines() if x.startswith("  File")), err
    goes_on(tmp_path)


def test_a_signal_ends_all_after_their_step(tmp_path):
    "One line says how to go on; the state is that of the last step that was written."
    started = training(tmp_path)
    started.terminate()
    out, err = started.communicate(timeout=120)
    assert started.returncode and len(ours(err)) == 1, err
    assert "stopped; go on with" in ours(err)[0] and "--resume" in ours(err)[0]
    with safe_open(tmp_path / "S5/state/last.safetensors", "pt") as f:
        saved = int(f.metadata()["step"])
    assert saved == max(x["step"] for x in RunDir(tmp_path / "S5").lines())
    goes_on(tmp_path)
