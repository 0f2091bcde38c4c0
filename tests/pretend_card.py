"""A card that is pretended: tensors stay in the CPU's memory, but refuse what tensors on a CUDA device refuse.

Under `PretendCard()` whatever is put on "cuda" is marked, and so is all that is computed from it. A function that is given a marked
tensor and one of the CPU (of at least one dimension), a CPU generator for marked numbers, or `.numpy()` of a marked tensor fails as
on a card; `.cpu()` and `.to("cpu")` take the mark away. So a forgotten `.to(device)` is found without a card, in real computations
with real values. What it cannot show: kernels that CUDA lacks or rounds otherwise, memory, streams and graphs, what happens inside
one function of torch, and what is computed again in the backward of gradient checkpointing.
"""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from elva_core.models import decoding

CARD = torch.device("cuda", 0)
HOST = ("numpy", "__array__", "__dlpack__")  # what needs the CPU's memory
READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "masked_select", "unique", "cpu")
CROSSES = ("copy_", "set_data", "_has_compatible_shallow_copy_type")  # from one device to another
INDEXED = ("__getitem__", "__setitem__", "index_put_", "index_put")  # indices may be on the CPU


def on_card(value) -> bool:
    return isinstance(value, torch.Tensor) and getattr(value, "_on_card", False)


def _real(device: torch.device) -> torch.device:
    """Where the numbers of a tensor on `device` are; "meta" has none, and stays."""
    return torch.device("cpu") if device.type == "cuda" else device


class PretendCard(TorchFunctionMode):
    """`with PretendCard() as card:`; card.reads counts how often the host had to wait for a value, card.pinned what was pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.pinned = 0
        self._parameter, self._recorded = torch.nn.Parameter.__new__, decoding._Step._recorded

    def __enter__(self):
        def parameter(kind, data=None, requires_grad=True):  # is made past all functions of torch
            made = self._parameter(kind, data, requires_grad)
            made._on_card = on_card(data)
            return made

        def recorded(step):  # runs what would be a CUDA graph, which must not hand a value to the host
            def replay():
                before = self.reads
                step._work()
                assert self.reads == before, "a recorded step of decoding waits for the host"

            return replay

        torch.nn.Parameter.__new__, decoding._Step._recorded = parameter, recorded
        return super().__enter__()

    def __exit__(self, *error):
        torch.nn.Parameter.__new__, decoding._Step._recorded = self._parameter, self._recorded
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        card = any(map(on_card, tensors))
        if name == "pin_memory":  # asks the driver
            self.pinned += 1
            return args[0]
        if name in ("__get__", "__set__"):
            return self._property(func, name, args, card)
        if card and name in HOST:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        masks = name in INDEXED and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in tree_leaves(args[1]))
        if card and (masks or name in READS):
            self.reads += 1
        if name in ("to", "cuda", "cpu"):
            return self._moved(func, name, args, kwargs)
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if device is not None:
            kwargs["device"] = _real(device)
        elif name not in CROSSES:
            self._same_device(name, args, kwargs, tensors)
        target = card if device is None else device.type == "cuda"
        generator = kwargs.get("generator")
        if target and generator is not None:
            raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
        return self._marked(func(*args, **kwargs), args, target)

    def _same_device(self, name, args, kwargs, tensors) -> None:
        if name in INDEXED:  # a card's tensor takes indices of the CPU, not the other way round
            index = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)]
            if not on_card(args[0]) and any(map(on_card, index)):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            tensors = [args[0], *(leaf for leaf in tree_leaves(args[2:]) if isinstance(leaf, torch.Tensor))]
        where = {on_card(t) for t in tensors if on_card(t) or t.ndim}
        if len(where) > 1:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")

    def _property(self, func, name, args, card):
        what = func.__self__.__name__
        if name == "__get__" and card:
            if what in ("device", "is_cuda", "is_cpu"):
                return {"device": CARD, "is_cuda": True, "is_cpu": False}[what]
            return self._marked(func(*args), args, True)
        out = func(*args)
        if name == "__set__" and what == "data":
            args[0]._on_card = on_card(args[1])
        return out

    def _moved(self, func, name, args, kwargs):
        source, rest = args[0], list(args[1:])
        goal = on_card(source)
        if name in ("cuda", "cpu"):
            goal = name == "cuda"
            out = source.detach().view_as(source) if goal == on_card(source) else source.clone()
            return self._marked(out, (), goal)
        for place, value in enumerate(rest):
            if isinstance(value, torch.Tensor):
                goal, rest[place] = on_card(value), value
            elif isinstance(value, (str, torch.device)):
                device = torch.device(value)
                goal, rest[place] = device.type == "cuda", _real(device)
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            goal, kwargs["device"] = device.type == "cuda", _real(device)
        out = func(source, *rest, **kwargs)
        if goal != on_card(source) and out is source:
            out = source.clone()  # another device has a copy
        return self._marked(out, (source,), goal)

    def _marked(self, out, args, target: bool):
        given = {id(leaf) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}

        def mark(value):
            if isinstance(value, torch.Tensor) and id(value) not in given:
                value._on_card = target
            return value

        return tree_map(mark, out)
