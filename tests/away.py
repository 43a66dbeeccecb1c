"""A second device that any machine has: it computes like the CPU and refuses to mix the two."""
import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

AWAY = torch.device("meta") # the name that this device goes by; nothing else here uses it
aten = torch.ops.aten


class Away(torch.Tensor):
    "A tensor that says it lies on the other device; its numbers are kept in an ordinary one."
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=AWAY)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self, **_):
        return f"Away({self.inner})"

    def tolist(self):
        "As lists of numbers, which torch does not allow to tensors like this."
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


def inside(x):
    "The ordinary tensor."
    return x.inner if isinstance(x, Away) else x


def is_away(device):
    "Whether a device is the other one."
    return device is not None and torch.device(device).type == AWAY.type


def call(func, args, kwargs):
    "One operation, if all its tensors are on one device."
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    away = [x for x in tensors if isinstance(x, Away)]
    moves = func in (aten._to_copy.default, aten.copy_.default)
    if away and not moves:
        _refuse_mixture(func, args, [x for x in tensors if not isinstance(x, Away)])
    device, generator = kwargs.get("device"), kwargs.get("generator")
    to_away = bool(away) if device is None else is_away(device)
    if func is aten.copy_.default:
        to_away = isinstance(args[0], Away)
    if generator is not None and (generator._cdata in there) != to_away:
        raise RuntimeError(f"{func}: the generator is on another device")
    if is_away(device):
        kwargs = {**kwargs, "device": "cpu"}
    out = func(*tree_map(inside, args), **tree_map(inside, kwargs))
    if func._schema.name.endswith("_") and isinstance(out, torch.Tensor):
        return args[0] # it was changed in place
    if func is aten._to_copy.default and any(out is x.inner for x in away):
        out = out.clone()
    wrap = Away if to_away else lambda x: x
    return tree_map(lambda x: wrap(x) if isinstance(x, torch.Tensor) else x, out)


def _refuse_mixture(func, args, here):
    "As a GPU does: single numbers and indices may come from the CPU, nothing else."
    if func is aten.index.Tensor and isinstance(args[0], Away):
        return
    joins = func in (aten.cat.default, aten.stack.default)
    wrong = [tuple(x.shape) for x in here if x.dim() or joins]
    if wrong:
        raise RuntimeError(f"{func}: tensors on two devices; on the CPU is one of shape {wrong[0]}")


class Elsewhere(TorchDispatchMode):
    "Inside, tensors can be made on the other device and moved there."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        away = any(isinstance(x, Away) for x in tree_leaves((args, kwargs)))
        ours = away or is_away(kwargs.get("device")) or "generator" in kwargs
        return (call if ours else lambda f, a, k: f(*a, **k))(func, args, kwargs)


cpu_generator = torch.Generator
there = {} # the other device's sources of chance, kept so that no other gets their numbers


class Generator:
    "Makes a source of chance for either device."
    def __new__(cls, device="cpu"):
        made = cpu_generator()
        if is_away(device):
            there[made._cdata] = made
        return made


def autocast(device, *args, **kwargs):
    "No lower precision on the other device."
    return contextlib.nullcontext() if is_away(device) else real_autocast(device, *args, **kwargs)


def tensor(data, **kwargs):
    "Numbers on either device."
    made = real_tensor(data, **{k: v for k, v in kwargs.items() if k != "device"})
    return made.to(kwargs.get("device", "cpu"))


real_autocast, real_tensor = torch.autocast, torch.tensor


@pytest.fixture
def away(monkeypatch):
    "The other device, for the length of a test: a GPU where there is one."
    monkeypatch.setenv("MINBERT_PRECISION", "fp32")
    if torch.cuda.is_available():
        yield torch.device("cuda:0")
        return
    for name, ours in (("Generator", Generator), ("autocast", autocast), ("tensor", tensor)):
        monkeypatch.setattr(torch, name, ours)
    with Elsewhere():
        yield AWAY
    there.clear()
