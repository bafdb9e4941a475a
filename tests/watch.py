# SPDX-License-Identifier: Apache-2.0
"""Watching the operations of a method: on an accelerator some of them would wait for the device; and what spoils padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero")


class Watch(TorchDispatchMode):
    """Collects the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Fails at the first operation that waits, indexing by a mask included."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        word = func.__name__.partition(".")[0]
        assert word not in WAITING, word
        if word.startswith("index"):
            assert all(i is None or i.dtype != torch.bool for i in (args[1] if isinstance(args[1], list) else []))
        return func(*args, **(kwargs or {}))


def in_a_graph(run: Callable[[], Any]) -> Any:
    """What a CUDA graph of `run` leaves when it is replayed; it runs twice before, so that everything is compiled."""
    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.cuda.synchronize()
    return found


def spoiled(x: Tensor, gone: Tensor, copies: bool) -> Tensor:
    """`x` [..., n, d] with NaN in the rows that take no part, `gone` [..., n]; or with copies of rows that do, since a comparison
    with NaN is false and may hide that such a row was read."""
    gone = gone.expand(x.shape[:-1])
    if not copies:
        return x.masked_fill(gone[..., None], float("nan"))
    rows, there = x.flatten(0, -3), ~gone.flatten(0, -2)
    other = torch.multinomial(there.float() + 1e-30, there.shape[1], replacement=True)
    copy, out = rows.gather(1, other[..., None].expand_as(rows)).view(x.shape), x.clone()
    out[gone] = copy[gone]
    return out
