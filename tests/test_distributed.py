"""Gradient surgery on several processes: everywhere the step of one with all the data."""
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from minbert.pcgrad import PCGrad, SurgeryPlug

NAMES = ("a", "b", "c")


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


def worker(rank, folder):
    "One of two processes."
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    half = slice(0, 4) if rank == 0 else slice(4, 8)
    order = NAMES if rank == 0 else NAMES[::-1] # the tasks come in another order
    some = order if rank == 0 else order[:2] # rank 1 has no rows of "a"
    found = {}
    for name, combine in (("plug", in_the_loop), ("own", by_itself)):
        found[name, "even"] = step(tower(), [(t, half) for t in order], combine)
        found[name, "absent"] = step(tower(), [(t, slice(None)) for t in some], combine)
    torch.save({" ".join(k): v for k, v in found.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def same(a, b, close=False):
    "Equal gradients, or none on both sides."
    if a is None or b is None:
        return a is b
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6) if close else torch.equal(a, b)


def test_two_processes(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
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
