"Gradient surgery on several processes takes the same step everywhere, and the step of one process with all the data."
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from minbert.pcgrad import pcgrad_weights, surgery

NAMES = ("a", "b", "c")


def tower():
    "One shared layer, one never reached, and a head a task."
    torch.manual_seed(0)
    return nn.ModuleDict({"shared": nn.Linear(4, 5), "idle": nn.Linear(4, 5), **{t: nn.Linear(5, 1) for t in NAMES}})


def rows(t):
    torch.manual_seed(ord(t))
    return torch.randn(8, 4), torch.randn(8, 1)


def step(model, parts):
    "The shared gradients of one step; `parts`: (task, rows) in the order in which they come."
    shared = [*model["shared"].parameters(), *model["idle"].parameters()]
    losses = ((t, (model[t](model["shared"](rows(t)[0][at])) - rows(t)[1][at]).square().mean()) for t, at in parts)
    torch.manual_seed(7)
    surgery(pcgrad_weights)(losses, shared)
    return [p.grad for p in shared]


def worker(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    half = slice(0, 4) if rank == 0 else slice(4, 8)
    order = NAMES if rank == 0 else NAMES[::-1]                           # the tasks come in another order
    even = step(tower(), [(t, half) for t in order])
    absent = step(tower(), [(t, slice(None)) for t in (order if rank == 0 else order[:2])])      # rank 1 has no rows of "a"
    torch.save({"even": even, "absent": absent}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path/f"{r}.pt", weights_only=True) for r in (0, 1))
    whole = step(tower(), [(t, slice(None)) for t in NAMES])
    plain = tower()
    for name in ("even", "absent"):
        for a, b in zip(one[name], two[name]): assert (a is None and b is None) or torch.equal(a, b)
        assert one[name][2] is None and one[name][3] is None              # nobody reached it
    for a, b in zip(one["even"], whole): assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one["absent"][0], whole[0])                 # half of task a's gradient is missing
