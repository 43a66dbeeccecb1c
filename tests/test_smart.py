"""SMART in the training loop (tasks, encodings, places, loops, resuming), and its check."""
import copy
import math
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastcore.test import test_close as close
from fastcore.test import test_eq as equal
from torch import nn
from torch.testing import assert_close

from minbert.bert import BertModel
from minbert.check import check_smart
from minbert.core import Plug, UserError, log
from minbert.data import load_tasks, main_tasks, tasks
from minbert.fast import install, make_optimizer
from minbert.heads import HeadConfig, make_batch
from minbert.mixing import round_robin, summed
from minbert.pcgrad import Surgery
from minbert.runs import TrainConfig, train
from minbert.smart import (
    EmbeddingHook, Smart, SmartPlug, bernoulli_sym_kl, distance_for, same_dropout, settings,
    smart_penalty, smart_perturb, squared_error, sym_kl)
from minbert.train import Clip, TaskData, build, fit, load_batches, make_feeds

pocket = load_tasks("pocket")
encodings = {"cross": {}, "separate": {"pairs": "separate"},
             "concat_diff": {"pairs": "separate", "features": "concat_diff",
                             "pool": "cls"},
             "cosine": {"pairs": "separate", "features": "cosine",
                        "loss": "cosine_mse"}}


def pocket_model(seed=0, dropout=.3, names=main_tasks, **kw):
    "A small random BERT in training mode, and pocket rows; kw is for the pair heads."
    heads = []
    for t in names:
        more = kw if tasks[t].pair else {}
        heads.append(HeadConfig(tasks[t], dropout=dropout, **more))
    model, data = build(BertModel.from_pretrained("pocket"), pocket, heads, 64, seed)
    return install(model).train(), data


def step_of(model, data, n=8):
    "A batch of every task, of unequal lengths."
    rows = data["train"]
    return [(t, make_batch(model, t, rows[t], range(n))) for t in rows]


def trained(config=None, steps=20, mixing=round_robin, more=(), **kw):
    "A pocket model after some steps, SMART's live plug, and the losses of each step."
    model, data = pocket_model(**kw)
    plugs = [c.start(model, steps) for c in ((config,) if config else ()) + more]
    feeds = make_feeds(model, data["train"], dict.fromkeys(data["train"], 4), 0)
    batches = load_batches(model, data["train"], mixing(feeds))
    loop = fit(model, batches, make_optimizer(model, 1e-3, .01), steps, plugs)
    losses = [v for _, v in loop]
    return model, plugs[0] if config else None, losses


def same(a, b):
    "Whether two models have the same weights, to the bit."
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_radius_that_bf16_drowns_is_flagged():
    "In bf16 alone; 1e-4 at the embeddings only."
    plain = pocket_model()[0]
    told = []
    with pytest.MonkeyPatch.context() as patch:  # ε through bf16 is flagged
        patch.setattr(log, "warning", lambda text, eps: told.append(eps))
        cases = product(("bf16", "fp32"), (1e-5, 1e-4, 1e-3), ("words", "embeddings"))
        for precision, eps, at in cases:
            patch.setenv("MINBERT_PRECISION", precision)
            Smart(eps=eps, mu=0., at=at).start(plain, 1).hook.remove()
    equal(told, [1e-5, 1e-5, 1e-4])  # in bf16 alone; 1e-4 at the embeddings only


def test_the_teacher_is_its_closed_form():
    "A weighted sum of all weights that the student had."
    model, data = pocket_model()
    plug = Smart(betas=(.5, .9)).start(model, 20)
    assert same(model, plug.teacher) and not plug.teacher.training
    betas = [plug.beta(s) for s in range(20)]
    equal(betas, [.5] * 2 + [.9] * 18)
    feeds = make_feeds(model, data["train"], dict.fromkeys(main_tasks, 4), 0)
    batches = load_batches(model, data["train"], round_robin(feeds))
    path = [[p.detach().double().clone() for p in model.parameters()]]
    for _ in fit(model, batches, make_optimizer(model, 1e-3), 20, (plug,)):
        path.append([p.detach().double().clone() for p in model.parameters()])
    weights = [np.prod(betas)]
    for t in range(20):
        weights.append((1 - betas[t]) * np.prod(betas[t + 1:]))
    close(sum(weights), 1, 1e-12)  # of θ_0, θ_1, …, θ_20
    for k, slow in enumerate(plug.teacher.parameters()):
        closed = sum(w * theta[k] for w, theta in zip(weights, path))
        assert_close(slow.double(), closed, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in plug.teacher.parameters())


def test_unmoved_words_give_the_same_answer():
    "To the bit, and the random numbers go on as if nobody had asked."
    for kw in encodings.values():
        model, data = pocket_model(**kw)
        for at in ("words", "embeddings"):
            hook = EmbeddingHook(model, at)
            for task, batch in step_of(model, data):
                out = model(task, batch)
                before = torch.get_rng_state()
                assert torch.equal(hook.again(hook.clean(out), task, batch).logits, out.logits)
                assert torch.equal(before, torch.get_rng_state())
                assert not torch.equal(model(task, batch).logits, out.logits)
            hook.remove()


def test_every_task_encoding_and_place():
    "Both sentences move inside the box, padding stays, nothing else is touched."
    c = replace(settings["report S"], mu=0., lam=1.)
    padded = []

    def count_gradients(seen, module, args, out):
        "A forward hook that notes when a gradient comes back to an output."
        if out.requires_grad:
            out.register_hook(seen.append)

    for (kind, kw), at in zip([*encodings.items()] * 2, ["words"] * 4 + ["embeddings"] * 4):
        model, data = pocket_model(**kw)
        passes, looked, seen = [], [], []
        table = model.bert.embeddings.word_embeddings
        table.register_forward_hook(partial(count_gradients, looked))
        plugs = {k: replace(c, steps=k, at=at).start(model, 10) for k in (1, 3)}
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        plugs[1].hook.module.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
        for task, batch in step_of(model, data):
            out = model(task, batch)
            clean = seen[-1]
            torch.rand(3)  # somebody else draws in between
            before = torch.get_rng_state()
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            for k, plug in plugs.items():
                passes.clear()
                value = plug.penalty(task, batch, out)
                equal(len(passes), k + 1)
                assert value > 0 and torch.equal(before, torch.get_rng_state())
                assert all((p.grad == 1).all() for p in model.parameters())
            delta = seen[-1] - clean
            real = batch.attention_mask.bool()
            assert delta.abs().max() <= c.eps * 1.005
            assert (delta[real].abs().amax(-1) > .9 * c.eps).all()  # all tokens, both sentences
            padded.append(delta[~real].abs().amax().item() if (~real).any() else None)
            model.zero_grad(set_to_none=True)
            looked.clear()
            value.backward()
            equal(len(looked), 1)  # one gradient of the word table
            assert table.weight.grad.abs().max() > 0
    equal({x for x in padded if x is not None}, {0.})  # none of it lies on padding


def test_one_norm_for_both_sentences_and_halves_of_a_batch():
    "A pair is one example; a batch's penalty is the mean of its halves'."
    model, data = pocket_model(pairs="separate")
    hook = EmbeddingHook(model.eval())
    rows = data["train"]["sts"]

    def prepared(k):
        "A batch, its clean vectors, its answers, and the function of the words."
        batch = make_batch(model, "sts", rows, k)
        out = model("sts", batch)
        return batch, hook.clean(out), out.logits, lambda y: hook.again(y, "sts", batch).logits

    batch, x, y, f = prepared(range(8))
    start = hook.noise(1e-6)
    far = torch.zeros(8)  # far away: a slope everywhere
    short = Smart(eps=1., sigma=1e-6, eta=.01)
    delta = smart_perturb(f, x, far, squared_error, short, batch.attention_mask, start)
    way = delta.abs().flatten(1).amax(1).view(2, -1)  # (sentence, row)
    assert_close(way.amax(0), torch.full((8,), .01), rtol=1e-3, atol=0.)
    assert (way.amin(0) < .0099).any() and (way.amin(0) > 0).all()

    given = .01 * torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    def penalty_of(k):
        "R_s of some rows, the noise of a row (sentence, row, token, d) given."
        batch, x, y, f = prepared(k)
        noise = given[:, k, :x.shape[1]].flatten(0, 1)
        wide = Smart(eps=.01, eta=.1)
        return smart_penalty(f, x, y, squared_error, wide, batch.attention_mask, noise)

    halves = (penalty_of([0, 1, 2, 3]) + penalty_of([4, 5, 6, 7])) / 2
    close(penalty_of([*range(8)]).item(), halves.item(), 1e-7)
    assert penalty_of([0, 1, 2, 3]) > 1e-6


def test_the_gradient_is_that_of_finite_differences():
    "With the move held fixed, through both answers."
    model, data = pocket_model(names=("para",))
    (task, batch), = step_of(model, data, 4)
    c = Smart(lam=1., eps=.05, sigma=.05, eta=.5, mu=0.)
    plug = c.start(model, 1)
    weight = model.heads["para"].linear.weight
    out = model(task, batch)
    x = plug.hook.clean(out)

    def asked(y):
        "Logits for other words."
        return plug.hook.again(y, task, batch).logits

    start = plug.hook.noise(c.sigma)
    delta = smart_perturb(asked, x, out.logits, bernoulli_sym_kl, c, batch.attention_mask, start)
    def fixed():
        "R_s with δ held fixed; both sides are computed anew."
        return bernoulli_sym_kl(asked(x + delta), asked(x))

    def slope(i, h=.01):
        "Central difference with respect to one weight of the head."
        with torch.no_grad():
            weight[0, i] += h
            up = fixed()
            weight[0, i] -= 2 * h
            down = fixed()
            weight[0, i] += h
        return ((up - down) / (2 * h)).item()

    words = model.bert.embeddings.word_embeddings.weight  # the clean words are in both answers
    value = plug.penalty(task, batch, out)
    by_weight, by_words = torch.autograd.grad(value, (weight, words), retain_graph=True)
    assert_close(by_words, torch.autograd.grad(fixed(), words)[0], rtol=1e-3, atol=1e-6)
    for i in (0, 17, 42):
        close(by_weight[0, i].item(), slope(i), 2e-3 * by_weight.abs().max().item())
    assert fixed() > 0 and (by_weight[0, [0, 17, 42]].abs() > .02 * by_weight.abs().max()).any()


def test_distances_of_our_heads():
    "By what a head's output means."
    ells = [distance_for(None, pocket_model()[0], t) for t in main_tasks]
    equal(ells, [sym_kl, bernoulli_sym_kl, squared_error])
    cosine_head = {"pairs": "separate", "features": "cosine", "loss": "cosine_embedding"}
    for kw in (cosine_head, {"loss": "mse"}):
        equal(distance_for(None, pocket_model(names=("para",), **kw)[0], "para"), squared_error)


def test_switched_off_it_is_the_baseline():
    "Off, for another task, or hardly on."
    plain, _, bare = trained()
    off = Smart(lam=0., mu=0.).start(plain, 1)
    equal(off.penalty("sst", None, None), 0.)  # it does not look at the model
    assert same(plain, trained(replace(settings["paper"], on=("other",)))[0])
    assert not same(plain, trained(replace(settings["paper"], on=("sts",)))[0])
    assert trained(Smart(mu=0.), 1)[1].teacher is None
    faint = trained(Smart(lam=1e-12, mu=0.))[2]
    for a, b in zip(faint[:4], bare[:4]):
        close(list(a.values()), list(b.values()), 1e-4)
    with pytest.raises(UserError, match="the Bregman term .mu above 0. needs the number of steps"):
        settings["paper"].start(plain, 0)


def test_loops():
    "Round robin, the sum, and surgery, with every encoding."
    for kw in encodings.values():
        for loop in ({}, {"mixing": summed}, {"mixing": summed, "more": (Surgery("pcgrad"),)}):
            model, plug, losses = trained(settings["report S"], 3, **loop, **kw)
            for step in losses:
                assert all(math.isfinite(v) for v in step.values())
            assert not same(model, plug.teacher)


def test_surgery_sees_the_penalty():
    "Inside each task's own gradient."
    model, data = pocket_model()
    batches = step_of(model, data)
    plug = replace(settings["report S"], mu=0.).start(model, 1)

    def losses():
        "Each task's loss and penalty."
        torch.manual_seed(0)
        for t, batch in batches:
            out = model(t, batch)
            yield t, model.loss(t, batch, out) + plug.penalty(t, batch, out)

    by_hand = {t: torch.autograd.grad(loss, model.own(t)) for t, loss in losses()}
    Surgery("pcgrad").start(model, 1).combine(losses(), model.shared())
    for t in main_tasks:
        assert all(torch.equal(p.grad, g) for p, g in zip(model.own(t), by_hand[t]))


def test_one_clip_after_surgery():
    "Surgery first, then one clip."
    norms = []  # surgery first, then one clip
    class Looked(Plug):
        "Notes the norm of the whole gradient."
        def before_update(self, step):
            "After the plugs before it."
            norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()
                                       if p.grad is not None)))

    model, data = pocket_model()
    feeds = make_feeds(model, data["train"], dict.fromkeys(data["train"], 4), 0)
    plugs = (plug_of.start(model, 2) for plug_of in (settings["report S"], Surgery("pcgrad")))
    plugs = (*plugs, Looked(), Clip(model.parameters(), .01), Looked())
    for _ in fit(model, load_batches(model, data["train"], summed(feeds)), make_optimizer(model, 1e-3),
                 2, plugs):
        pass
    assert min(norms[::2]) > .1 and max(norms[1::2]) < .0101


class Bag(nn.Module):
    "The mean of the word vectors, and a linear layer."
    def __init__(self):
        super().__init__()
        self.word_embeddings = nn.Embedding(20, 8)
        self.drop = nn.Dropout(.2)
        self.linear = nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, task, batch):
        "Logits (b, 3)."
        return self.norm(self.linear(self.drop(self.word_embeddings(batch[0])).mean(1)))

    def loss(self, task, batch, out):
        "Cross-entropy."
        return F.cross_entropy(out, batch[1])

    def shared(self):
        "All of it."
        return list(self.parameters())


class Twice(Bag):
    "Reads its embedding twice."
    def forward(self, task, batch):
        "Logits (b, 3)."
        return super().forward(task, batch) + super().forward(task, batch)


def test_any_module_with_an_embedding():
    "A bag of words trains with it, and buffers come along."
    torch.manual_seed(0)
    bag = Bag()
    batch = torch.randint(0, 20, (5, 4)), torch.randint(0, 3, (5,))
    plug = replace(settings["paper"], lam=1e6).start(bag, 4)
    steps = [[("any", batch)]] * 4
    with_smart = list(fit(bag, steps, torch.optim.SGD(bag.parameters(), .1), 4, (plug,)))
    torch.manual_seed(0)
    bare_bag = Bag()
    list(fit(bare_bag, steps, torch.optim.SGD(bare_bag.parameters(), .1), 4))
    assert all(math.isfinite(v["any"]) for _, v in with_smart) and not same(bag, bare_bag)
    assert torch.equal(plug.teacher.norm.running_mean, bag.norm.running_mean)  # buffers come along


def test_wrong_use_is_said():
    "No such module, two of them, an old answer, an embedding that is read twice."
    torch.manual_seed(0)
    bag = Bag()
    batch = torch.randint(0, 20, (5, 4)), torch.randint(0, 3, (5,))
    plug = settings["paper"].start(bag, 4)
    with pytest.raises(UserError, match="at is 'embeddings', but no module .* ends in embeddings"):
        EmbeddingHook(bag, "embeddings")
    with pytest.raises(UserError, match="2 modules .0.word_embeddings, 1.word_embeddings."):
        EmbeddingHook(nn.ModuleList([Bag(), Bag()]))
    out = bag("any", batch)
    bag("any", batch)
    with pytest.raises(UserError, match="not the result of the model's last pass"):
        plug.penalty("any", batch, out)
    with torch.no_grad():
        out = bag("any", batch)
    with pytest.raises(UserError, match="not the result of the model's last pass with gradients"):
        plug.penalty("any", batch, out)

    model = Twice()
    plug = Smart(mu=0.).start(model, 1)
    with pytest.raises(UserError, match="must be read once in a pass, but it was read 2 times"):
        plug.penalty("any", batch, model("any", batch))


def test_a_copy_is_another_model():
    "A copy's pass is not the model's."
    torch.manual_seed(0)
    bag = Bag()
    batch = torch.randint(0, 20, (5, 4)), torch.randint(0, 3, (5,))
    plug = Smart(mu=0.).start(bag, 1)
    out = bag("any", batch)
    copied = copy.deepcopy(bag)
    copied("any", batch)  # a copy's pass is not the model's
    assert plug.penalty("any", batch, out) > 0
    plug.hook.remove()


def test_nothing_leaves_its_device():
    "On a device that refuses all others."
    meta = Bag().to("meta")  # a device that refuses all others
    plug = settings["paper"].start(meta, 4)
    batch = torch.zeros(5, 4, dtype=torch.long, device="meta"), torch.zeros(5, device="meta")
    out = meta("any", batch)
    x = plug.hook.clean(out)
    noise = 1e-5 * torch.randn_like(x)
    value = smart_penalty(lambda y: plug.hook.again(y, "any", batch), x, out, noise=noise)
    equal((value + plug.bregman("any", batch, out)).device.type, "meta")
    plug.after_step(0)
    equal({v.device.type for v in plug.state_dict().values()}, {"meta"})


class Stop(Exception):
    "Stands for a kill."


@dataclass(frozen=True)
class Killed:
    "Settings of a plug that stops the run; no field, so that they are the same when it resumes."
    def start(self, model, total):
        "A live plug."
        return KilledPlug()


class KilledPlug(Plug):
    step = None
    def after_step(self, step):
        if step == KilledPlug.step:
            raise Stop


class Forgetful(SmartPlug):
    def load_state_dict(self, state):
        "Goes on with a fresh teacher."


@dataclass(frozen=True)
class Kept(Smart):
    "Settings that keep their live plug at hand."
    live = {}
    def start(self, model, total):
        "A live plug, of the class that the test wants."
        Kept.live["plug"] = Kept.live["class"](self, model, total)
        return Kept.live["plug"]


def pocket_run(out, stop=None, resume=False, plug=SmartPlug):
    "Twelve steps with SMART, perhaps stopped after one of them."
    KilledPlug.step = stop
    Kept.live["class"] = plug
    heads = [HeadConfig(tasks[t], dropout=.3) for t in main_tasks]
    model, data = build(BertModel.from_pretrained("pocket"), pocket.limit(40), heads, 64)
    data = TaskData(data, round_robin, dict.fromkeys(main_tasks, 4), eval_rows=20)
    config = TrainConfig(12, lr=1e-3, evals=1, save_seconds=0)
    plugs = Kept(lam=5., eps=1e-4, sigma=1e-4, eta=1e-2, mu=9.), Killed()
    train(out, model, data, config, plugs, resume, progress=False)
    return model, Kept.live["plug"].teacher


def test_stopped_and_resumed():
    "The same weights to the bit, of the model and of the teacher; not with a fresh teacher."
    with tempfile.TemporaryDirectory() as d:
        whole = pocket_run(Path(d) / "whole")
        for plug in (SmartPlug, Forgetful):
            cut = Path(d) / plug.__name__
            with pytest.raises(Stop):
                pocket_run(cut, stop=7)
            resumed = pocket_run(cut, resume=True, plug=plug)
            assert all(same(a, b) for a, b in zip(whole, resumed)) == (plug is SmartPlug)


def penalty(norm="text", clamp="after", fixed=False, masked=True):
    "Somebody's penalty, right or with a mistake about the box."
    def smart(f, x, eps=1e-5, eta=1e-3, mask=None):
        def distance(a, b):
            if a.shape[-1] == 1:
                return squared_error(a, b)
            return sym_kl(a, b)
        f = same_dropout(f)
        y = f(x)
        keep = 1 if mask is None or not masked else mask[..., None]
        delta = (eps * torch.randn_like(x) * keep).requires_grad_()
        g, = torch.autograd.grad(distance(f(x + delta), y.detach()), delta)
        axes = {"text": (1, 2), "token": -1, "batch": (0, 1, 2)}[norm]
        delta = delta.detach()
        if clamp == "before":
            delta = delta.clamp(-eps, eps)
        delta = delta + eta * g / g.abs().amax(axes, keepdim=True).clamp(min=1e-30)
        if clamp == "after":
            delta = delta.clamp(-eps, eps)
        if clamp == "step":
            delta = delta.clamp(-eta, eta)
        return distance(f(x + (delta * keep if masked else delta)), y)
    if fixed:
        return lambda f, x: smart(f, x)
    return smart


@pytest.mark.parametrize("fixed", (False, True))
def test_the_check_passes_a_right_box(fixed):
    "With ε and η as parameters, or as constants inside."
    assert check_smart(penalty(fixed=fixed))


wrong = {"no clamp": ({"clamp": ""}, "unclamped", "walls"),
         "clamp before the step": ({"clamp": "before"}, "unclamped", "walls"),
         "clamp at the step's length": ({"clamp": "step"}, None, "walls"),
         "norm by token": ({"norm": "token"}, "by token", "its own text"),
         "norm of the batch": ({"norm": "batch"}, "by batch", "its own text"),
         "padding moves": ({"masked": False}, "moved padding", "padding")}


unseen = {"padding moves", "clamp at the step's length"} # without a mask, or an ε that can be set


@pytest.mark.parametrize(
    "name, fixed", [*product(wrong, (False,)), *product(sorted(wrong.keys() - unseen), (True,))])
def test_the_check_sees_the_box(name, fixed):
    "Each mistake about the box fails its own property and no other, and is called by its name."
    how, key, says = wrong[name]
    report = check_smart(penalty(fixed=fixed, **how))
    failed = [f.says for f in report.findings if f.passed is False]
    assert len(failed) == 1 and says in failed[0]
    assert key is None or report.mistakes == (key,)
