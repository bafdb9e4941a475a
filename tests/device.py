# SPDX-License-Identifier: Apache-2.0
"""An accelerator that is none: tensors that say they are on "cuda:0", hold their values on the CPU, and count what would wait.

What is seen: every ATen call on such a tensor goes by `Watched.__torch_dispatch__`, so whatever needs a value on the host is
noted with the line of code that asked for it. The rules are those of `torch.cuda.set_sync_debug_mode`:
- values that come to the host: `item`, `tolist`, `bool`, `.cpu()`, copies to CPU tensors;
- shapes that depend on values: nonzero, indexing by a mask, unique, `repeat_interleave` of a tensor without output_size;
- copies from the host that wait until they are done: `.to(device)`, `torch.tensor(..., device=)` and indices on the host, where
  `non_blocking` is not said.
And a call that mixes devices fails, as it would there.

What is not seen: the kernels themselves. Blocked torch runs where a GPU would run Triton, and what it asks is not counted; and what
CUDA's own implementation of a call waits for beyond these rules, or a library below it, only a GPU shows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from mmcompress.kernels.dispatch import preferring
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")
SHAPES = frozenset(
    {
        "nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2", "_unique", "unique", "bincount",
        "is_nonzero", "equal",
    }
)  # fmt: skip
"""Calls whose result, or its shape, has to be known on the host."""


class OnDevice(Tensor):
    """A tensor of the device; `held` is where its values are."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Any:
        held = held.detach()
        shape = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")  # what C++ sees
        made = Tensor._make_subclass(cls, shape, held.requires_grad, dispatch_device=True)
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return DEVICE
        raise AssertionError(f"{func} outside of `Watching`")


class Watching(TorchDispatchMode):
    """Runs what is asked of the device. reads: what came to the host; waits: copies to the device that are waited for; one entry
    each, with the lines of code that asked, innermost first."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.waits: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return DEVICE if isinstance(args[0], OnDevice) else args[0].device
        self.calls += 1
        flat = tree_flatten((args, kwargs))[0]
        tensors = [x for x in flat if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        name = func._schema.name.partition("::")[2]
        lands = target.type == DEVICE.type if target is not None else bool(ours)
        if name.startswith(("_local_scalar_dense", "_assert_scalar")) and ours:
            self._note(self.reads, name)
            lands = False
        elif ours:
            self._look(func, name, args, kwargs, ours, target)
        elif lands and tensors and not kwargs.get("non_blocking") and tensors[0].numel():
            self._note(self.waits, name)
        if target is not None and lands:
            kwargs = {**kwargs, "device": HOST}
        plain_args, plain = tree_map_only(OnDevice, lambda x: x.held, (args, kwargs))
        if name == "copy_" and isinstance(args[0], OnDevice):
            plain_args[0].copy_(plain_args[1])
            return args[0]
        made = func(*plain_args, **plain)
        if not lands:
            return made
        known = {id(x.held): x for x in ours}
        return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else OnDevice(x), made)

    @staticmethod
    def _note(where: list[str], what: str) -> None:
        lines = asked()
        own = [line for line in lines.split(" < ") if not line.startswith("kernels/ragged.py:")]  # asked for by kernels
        if "/blocked.py:" not in own[0]:
            where.append(f"{what} < {lines}")

    def _look(self, func: Any, name: str, args: Any, kwargs: Any, ours: list[OnDevice], target: Any) -> None:
        if target is not None and target.type == "cpu":
            self._note(self.reads, name)
        elif name == "copy_":
            to, source = args[0], args[1]
            if not isinstance(to, OnDevice):
                self._note(self.reads, name)
            elif (
                not isinstance(source, OnDevice)
                and source.dim()
                and not (kwargs.get("non_blocking") or (args[2:] and args[2]))
            ):
                self._note(self.waits, name)
        elif name in SHAPES or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self._note(self.reads, name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self._note(self.reads, f"{name} by a mask")
                elif index is not None and not isinstance(index, OnDevice):
                    self._note(self.waits, f"{name} by numbers on the host")
        else:
            for x in tree_flatten((args, kwargs))[0]:
                if isinstance(x, Tensor) and not isinstance(x, OnDevice) and x.dim():
                    raise RuntimeError(f"{func}: tensors on cuda:0 and cpu {asked()}")


def asked() -> str:
    """The lines of this project and of transformers that asked, innermost first."""
    frame: Any = sys._getframe(1)
    found: list[str] = []
    while frame is not None and len(found) < 4:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file != __file__ and "/torch/" not in file and "/site-packages/_" not in file:
            found.append(f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno} {name}")
        frame = frame.f_back
    return " < ".join(found)


class _Made(TorchFunctionMode):
    """`torch.tensor(..., device=)` fills a tensor on the host and copies it, out of sight of dispatch modes: here it is seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and not isinstance(args[0], Tensor):
            args = tree_map_only(OnDevice, lambda x: x.item(), args)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            if device.type == DEVICE.type:
                return func(*args, **{**kwargs, "device": HOST}).to(DEVICE)
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].cpu().tolist()
        if func is Tensor.new_tensor and args[0].device.type == DEVICE.type and "device" not in kwargs:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def a_device() -> Iterator[None]:
    """Within it names of the device are known, although there may be none."""
    torch._C._ensureCUDADeviceGuardSet()  # one that does nothing, where there is no such device
    with mock.patch.object(torch.cuda, "_lazy_init", lambda: None), preferring("blocked"), _Made():
        yield


def moved(model: Any) -> Any:
    """`model` on the device, in place."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None:
                    with torch.no_grad():
                        table[name] = _parameter(value) if table is module._parameters else OnDevice(value.detach())
    return model


def _parameter(value: Tensor) -> Any:
    made = OnDevice(value.detach())
    made._is_param = True
    return made
