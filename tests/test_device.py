"""Everything on another device: a tensor that stayed behind on the CPU is an error here.

The device is a GPU where there is one, and else one that refuses what a GPU refuses.
"""
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from minbert import fast
from minbert.bert import BertModel
from minbert.conflicts import Atlas, curvature_hessian, curvature_slopes, gradient, moved
from minbert.data import load_tasks
from minbert.electra import pretraining
from minbert.heads import HeadConfig, MultitaskBert, encoder_floor, head_for, predict_rows
from minbert.mixing import round_robin, summed
from minbert.mlm import MlmModel, reading_presets
from minbert.pcgrad import PCGrad, Surgery, pcgrad, weightings
from minbert.runs import RunDir, TrainConfig, load_state, save_state, train
from minbert.smart import Smart, settings
from minbert.train import Clip, TaskData, build, evaluate, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
small = load_tasks("pocket").limit(24)
cross = [head_for(t) for t in small.tasks.values()]


def pocket(dropout=0.):
    "The pocket BERT."
    bert = BertModel.from_pretrained("pocket")
    for m in bert.modules():
        if isinstance(m, nn.Dropout):
            m.p = dropout
    return bert


def model_and_data(heads=cross, mixing=summed, dropout=0.):
    "A model, and the three tasks in batches of four."
    heads = [replace(h, dropout=dropout) for h in heads]
    model, splits = build(pocket(dropout), small, heads, 32)
    return model, TaskData(splits, mixing, dict.fromkeys(model.configs, 4), 0, 12, {"row": "test"})


def first(data, model, n=1):
    "The first steps' batches."
    return [step for _, step in zip(range(n), data.steps(model, 0))]


def on_cpu(x):
    "As an ordinary tensor."
    return x.detach().cpu().clone()


def test_the_fake_refuses_what_a_gpu_refuses(away):
    x, here = torch.ones(2, 3).to(away), torch.ones(2, 3)
    assert x.device.type == away.type and not x.is_cpu
    assert torch.equal((x * 2 + torch.tensor(1.)).cpu(), here * 3)
    made = torch.zeros(3, device=away)
    assert (made + x).shape == (2, 3) and x[torch.tensor([1])].shape == (1, 3)
    for wrong in (lambda: x + here, lambda: here @ x.T, lambda: torch.cat([x, here]),
                  lambda: F.embedding(torch.tensor([[0]]), x),
                  lambda: torch.where(here > 0, x, x)):
        with pytest.raises(RuntimeError, match="two devices|same device"):
            wrong()
    with pytest.raises(RuntimeError, match="generator is on another device|device type"):
        torch.rand(2, device=away, generator=torch.Generator())
    g = torch.Generator(away).manual_seed(0)
    assert torch.rand(2, device=away, generator=g).device.type == away.type
    with pytest.raises((RuntimeError, TypeError), match="numpy"):
        x.numpy()
    net = nn.Linear(3, 2).to(away)
    with pytest.raises(RuntimeError, match="two devices|same device"):
        net(here)
    net(x).sum().backward()
    assert net.weight.grad.device.type == away.type


def test_the_encoder(away):
    "Same numbers, plain and with the kernels, forward and backward, in training and not."
    ids = torch.randint(5, 200, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = []
    for change in (fast.uninstall, fast.install):
        for device in ("cpu", away):
            bert = change(pocket()).to(device).train()
            out = bert(ids.to(device), mask.to(device), torch.zeros_like(ids).to(device))
            (out.last_hidden_state.square().mean() + out.pooler_output.sum()).backward()
            grad = bert.embeddings.word_embeddings.weight.grad
            found.append([on_cpu(x) for x in (out.last_hidden_state, grad)])
            fast.install(pocket(.1)).to(device).train()(ids.to(device)) # dropout draws there
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert_close(a, b, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="two devices|same device"):
        bert(ids, mask.to(away))


def heads_with(**pair):
    "Heads of the three tasks; pairs as said."
    return [HeadConfig(t, **(pair if t.pair else {})) for t in small.tasks.values()]


kinds = {"cross": cross,
         **{pool: heads_with(pool=pool) for pool in ("cls", "pooler")},
         **{f: heads_with(pairs="separate", features=f) for f in ("concat", "concat_diff")},
         **{loss: heads_with(pairs="separate", features="cosine", loss=loss)
            for loss in ("cosine_mse", "cosine_embedding", "mnrl")},
         "mse for two labels": [replace(h, loss="mse" if h.task.binary else h.loss) for h in cross]}


@pytest.mark.parametrize("kind", kinds)
def test_heads_and_losses(kind, away):
    found = {}
    for device in (torch.device("cpu"), away):
        model, data = model_and_data(kinds[kind])
        fast.install(model).to(device).train()
        assert next(model.heads.parameters(), torch.empty(0, device=device)).device == device
        for task, batch in first(data, model)[0]:
            out = model(task, batch)
            loss = model.loss(task, batch, out)
            loss.backward()
            found.setdefault(task, []).append((on_cpu(out.logits), on_cpu(loss)))
        answers = predict_rows(model, "sts", data.splits["dev"]["sts"])
        assert isinstance(answers, np.ndarray) and len(answers) == 24
        model.predict("sst", ["a warm film ."])
        found.setdefault("scores", []).append([torch.tensor(evaluate(model, data.splits["dev"])[0][
            "overall"])])
    for here, there in found.values():
        for a, b in zip(here, there):
            assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_an_encoders_own_cosine(away):
    here = encoder_floor(pocket(), small)
    there = encoder_floor(pocket().to(away), small)
    assert here.keys() == there.keys() and all(abs(here[k] - there[k]) < 1e-5 for k in here)


def steps_of(device, plugs=(), n=3, mixing=summed, dropout=0., form="handout"):
    "Losses and weights after a few steps."
    model, data = model_and_data(mixing=mixing, dropout=dropout)
    fast.install(model).to(device).train()
    optimizer = fast.make_optimizer(model, 1e-3, .01, form)
    live = [*(p.start(model, n) for p in plugs), Clip(model.parameters())]
    losses = list(fit(model, data.steps(model, 0), optimizer, n, live))
    return losses, [on_cpu(p) for p in model.parameters()], live


@pytest.mark.parametrize("form", ["handout", "paper"])
def test_the_loop(form, away):
    (a, weights, _), (b, moved, _) = (steps_of(d, form=form) for d in ("cpu", away))
    assert [x.keys() for _, x in a] == [x.keys() for _, x in b]
    for x, y in zip(weights, moved):
        assert_close(x, y, atol=2e-5, rtol=1e-3)
    steps_of(away, mixing=round_robin, dropout=.1, form=form)


@pytest.mark.parametrize("name", weightings)
def test_surgery(name, away):
    torch.manual_seed(0)
    x, net = torch.randn(8, 4), nn.Linear(4, 3)
    here, there = copy.deepcopy(net), copy.deepcopy(net).to(away)
    for model, device in ((here, "cpu"), (there, away)):
        torch.manual_seed(0)
        y = model(x.to(device))
        PCGrad(model.parameters(), name).backward(
            {t: (y[:, k] * (-1)**k).square().mean() + y[:, k].sum() for k, t in enumerate("abc")})
    assert_close(here.weight.grad, on_cpu(there.weight.grad))
    steps_of(away, [Surgery(name)])


smarts = {**settings, "two ascents": Smart(steps=2), "unprojected": Smart(project=False),
          "after the embeddings": Smart(at="embeddings"), "some tasks": Smart(on=("sts",))}


@pytest.mark.parametrize("name", smarts)
def test_smart(name, away):
    "Noise, ascent, teacher and penalty; dropout makes the second pass replay the first one's."
    losses, _, (plug, _) = steps_of(away, [smarts[name]], n=2, dropout=.1)
    assert all(np.isfinite(x) for _, values in losses for x in values.values())
    state = plug.state_dict()
    assert all(x.device.type == away.type for x in state.values() if x.dim())
    plug.load_state_dict({k: v.cpu() for k, v in state.items()})
    if smarts[name].mu:
        assert state and all(p.device.type == away.type for p in plug.teacher.parameters())


def test_the_atlas(away):
    _, _, (plug, *_) = steps_of(away, [Atlas(every=1), Surgery()], n=2)
    assert plug.metrics()


# a small model, so that numbers can be compared

class Tower(nn.Module):
    "One trunk, two heads."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.heads = nn.ModuleDict({t: nn.Linear(8, 1) for t in "ab"})

    def forward(self, task, batch):
        return self.heads[task](self.trunk(batch[0]))[:, 0]

    def loss(self, task, batch, out):
        return F.mse_loss(out, batch[1])

    def shared(self):
        return [*self.trunk.parameters()]


def rows(device):
    "Batches of two tasks, of which one occurs twice."
    rng = torch.Generator().manual_seed(1)
    numbers = [torch.randn(6, 5, generator=rng).to(device) for _ in "aba"]
    return [(t, (x[:, :4], x[:, 4])) for t, x in zip("aba", numbers)]


def gradients(device, weighting="pcgrad"):
    "What the adapter leaves in `.grad`, brought back."
    net = Tower().to(device).eval()
    torch.manual_seed(0)
    losses = ((t, net.loss(t, b, net(t, b))) for t, b in rows(device))
    PCGrad(net.shared(), weighting).backward(losses)
    assert {p.grad.device.type for p in net.parameters()} == {torch.device(device).type}
    return [p.grad.cpu() for p in net.parameters()]


def trained(device):
    "Weights after a few steps of the loop, and the atlas's looks."
    net = Tower().to(device).train()
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    atlas = Atlas(every=2).start(net, 4)
    plugs = [atlas, Surgery().start(net, 4), Clip(net.parameters(), 1.)]
    looks = []
    for _ in fit(net, iter(lambda: rows(device), None), opt, 4, plugs):
        looks += [look for look in [atlas.metrics()] if look]
    return [p.detach().cpu() for p in net.parameters()], looks


@pytest.mark.parametrize("weighting", weightings)
def test_gradients_of_a_tower(weighting, away):
    assert_close(gradients(away, weighting), gradients("cpu", weighting))


def test_pcgrad_on_a_matrix(away):
    J = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    order = [[1, 2], [2, 0], [0, 1]]
    far = pcgrad(J.to(away), order)
    assert far.device.type == away.type
    assert_close(far.cpu(), pcgrad(J, order))


def test_training_with_surgery_and_an_atlas(away):
    weights, looks = trained("cpu")
    far_weights, far_looks = trained(away)
    assert_close(far_weights, weights)
    assert [x["step"] for x in looks] == [0, 2]
    for a, b in zip(looks, far_looks):
        assert_close(torch.tensor(a["gram"]["rest"]), torch.tensor(b["gram"]["rest"]))
        assert abs(a["curvature"]["1,0"] / b["curvature"]["1,0"] - 1) < .01


def test_curvature(away):
    def both(device):
        net, (t, b) = Tower().to(device).eval(), rows(device)[0]
        theta = net.shared()
        step = [torch.full_like(p, .1) for p in theta]

        def loss():
            return net.loss(t, b, net(t, b))

        start = gradient(loss(), theta)
        with moved(theta, step, 1.):
            end = gradient(loss(), theta)
        return [curvature_slopes(start, end, step), curvature_hessian(loss, theta, step)]
    assert_close(both(away), both("cpu"), rtol=1e-4, atol=0)


def test_processes_talk_on_the_gradients_device(away, monkeypatch):
    "NCCL refuses a tensor on the CPU."
    sent = []

    def gather(out, mine):
        out[0] = mine

    def take(x, *_):
        sent.append(x.shape)
        if x.device.type != away.type:
            raise RuntimeError("No backend type associated with device type cpu")

    near = gradients("cpu")
    fakes = {"is_initialized": lambda: True, "get_world_size": lambda: 1,
             "all_gather_object": gather, "all_reduce": take, "broadcast": take}
    for name, fake in fakes.items():
        monkeypatch.setattr(dist, name, fake)
    assert_close(gradients(away), near)
    assert sent == [(40,), (40,), (2,)] # two tasks, the weights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
def test_surgery_through_nccl(tmp_path):
    near = gradients("cpu")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        assert_close(gradients("cuda"), near)
    finally:
        dist.destroy_process_group()


# pretraining, states and runs

def texts_job(kind, sharing, device):
    "A few steps of reading."
    much = replace(reading_presets["pocket"], steps=4, batch_size=4, held_texts=6, dropout=.1)
    model, data, fields = pretraining(pocket().to(device), small, kind, sharing, much, 0, "pocket")
    return model, data, TrainConfig(**fields, save_seconds=0)


@pytest.mark.parametrize("kind", ["mlm", "es", "nes", "gdes"])
def test_reading(kind, away):
    model, data, config = texts_job(*(("mlm", "") if kind == "mlm" else ("rtd", kind)), away)
    assert {p.device.type for p in model.parameters()} == {away.type}
    fast.install(model).train()
    optimizer = fast.make_optimizer(model, 1e-3)
    losses = list(fit(model, data.steps(model, 0), optimizer, config.steps, [Clip(
        model.parameters())]))
    assert len(losses) == config.steps
    look = data.look(model)
    assert look["sample"] and all(np.isfinite(x) for x in look.values() if not isinstance(x, str))
    bert = model.export().to(away)
    assert bert(torch.tensor([[2, 9, 3]], device=away)).last_hidden_state.device.type == away.type


def test_blanks(away):
    filled = MlmModel(pocket()).to(away).fill_blank("a [MASK] film .")
    assert len(filled[0]) == 5


def test_a_state_moves_between_devices(away, tmp_path):
    "Weights, moments and the teacher, there and back."
    model, data = model_and_data(dropout=.1)
    def parts(model, device):
        model = fast.install(model).to(device).train()
        optimizer = fast.make_optimizer(model, 1e-3)
        plug = Smart().start(model, 4)
        return {"model": model, "optimizer": optimizer, "plug.0": plug}
    one = parts(model, away)
    list(fit(one["model"], data.steps(one["model"], 0), one["optimizer"], 2, [one["plug.0"]]))
    save_state(tmp_path / "a", one, 2, {})
    two = parts(model_and_data()[0], "cpu")
    assert load_state(tmp_path / "a", two) == (2, {})
    save_state(tmp_path / "b", two, 2, {})
    three = parts(model_and_data()[0], away)
    load_state(tmp_path / "b", three)
    save_state(tmp_path / "c", three, 2, {})
    a, c = (load_file(tmp_path / name) for name in "ac")
    assert a.keys() == c.keys() and all(torch.equal(a[k], c[k]) for k in a)
    for x in (two, three):
        steps = data.steps(x["model"], 2)
        assert len(list(fit(x["model"], steps, x["optimizer"], 4, [x["plug.0"]], 2))) == 2


class Stop(Exception):
    "The run is interrupted."


class StopAfter:
    "The same data, but the run is stopped after some steps."
    def __init__(self, data, steps):
        self.data, self.stop = data, steps

    def __getattr__(self, name):
        return getattr(self.data, name)

    def steps(self, model, start):
        for _, batches in zip(range(start, self.stop), self.data.steps(model, start)):
            yield batches
        raise Stop


@pytest.mark.parametrize("there, back", [(True, False), (False, True)])
def test_a_run_goes_on_elsewhere(there, back, away, tmp_path, caplog):
    "Begun on one device, stopped, finished on another, then opened on the CPU."
    config = TrainConfig(6, lr=1e-3, evals=2, save_seconds=0)
    plugs = (Atlas(2), Surgery(), Smart())
    device = {True: away, False: torch.device("cpu")}
    model, data = model_and_data(dropout=.1)
    with pytest.raises(Stop):
        train(tmp_path / "run", model.to(device[there]), StopAfter(data, 4), config, plugs,
              progress=False)
    model, data = model_and_data(dropout=.1)
    got = train(tmp_path / "run", model.to(device[back]), data, config, plugs, True, False)
    assert got["device"] == device[back].type and got["steps"] == 6
    assert ("device was" in caplog.text) == (there != back)
    answers = MultitaskBert.from_pretrained(tmp_path / "run").predict("sst", ["a warm film ."])
    assert answers[0] in range(5)
    assert RunDir(tmp_path / "run").finished


def test_reading_runs_elsewhere(away, tmp_path):
    model, data, config = texts_job("rtd", "gdes", away)
    got = train(tmp_path / "run", model, data, config, progress=False)
    assert got["device"] == away.type and got["tokens"] > 0
    BertModel.from_pretrained(tmp_path / "run" / "model")
