# SPDX-License-Identifier: Apache-2.0
"""Weighted merging of tokens by assignment."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose
from ..gather import gather


def merge(
    x: Tensor,
    assign: Tensor,
    count: int,
    weight: Tensor | None = None,
    *,
    mean: bool = False,
    implementation: str = "auto",
) -> Tensor:
    """Output j is the sum of weight * x over the slots that are assigned to it: [U, count, ...] in the type of `x`.

    x       [U, N, ...] floating.
    assign  [U, N] int64 in [-1, count): the output of each slot, -1 for slots that are gone; those are not read.
    weight  [U, N] floating, 1 without it.
    mean    divide by the sum of the weights of the output's slots (where that is 0: by 1).

    Sums run in float32 and in the order of the slots, so they are the same every time. Outputs without slots are 0. Gradients
    flow to `x` and `weight`. Cost: reading `x` once and a sort of `assign`; memory O(U N) and the output ("naive": a float32 copy
    of `x`).
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)} and type {x.dtype}: it has to be [U, N, ...], floating")
    if assign.shape != x.shape[:2] or assign.dtype != torch.int64:
        raise ValueError(
            f"assign of shape {tuple(assign.shape)} and type {assign.dtype}: expected {tuple(x.shape[:2])}, int64"
        )
    if weight is not None and (weight.shape != assign.shape or not weight.is_floating_point()):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} and type {weight.dtype}: expected {tuple(assign.shape)}, floating"
        )
    if count < 0:
        raise ValueError(f"count={count}: it is a number of outputs, 0 or more")
    chosen = choose(implementation, x)
    if not count:
        return x.new_zeros(len(x), 0, *x.shape[2:])
    rows = x.flatten(2) if x.dim() > 2 else x[..., None]
    learns = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    if chosen != "naive" and (chosen == "triton" or learns or torch.compiler.is_compiling()):
        found = torch.ops.mmcompress.merge(rows, assign, count, weight, mean, chosen)
    else:
        found = _run(rows, assign, count, weight, mean, chosen)
    return found if x.dim() == 3 else found.view(*found.shape[:2], *x.shape[2:])


def _run(x: Tensor, assign: Tensor, count: int, weight: Tensor | None, mean: bool, chosen: str) -> Tensor:
    found: Tensor = importlib.import_module(f".{chosen}", __name__).merge(x, assign, count, weight, mean)
    return found


@torch.library.custom_op("mmcompress::merge", mutates_args=())
def _merge(x: Tensor, assign: Tensor, count: int, weight: Tensor | None, mean: bool, chosen: str) -> Tensor:
    return _run(x, assign, count, weight, mean, chosen)


@_merge.register_fake
def _(x: Tensor, assign: Tensor, count: int, weight: Tensor | None, mean: bool, chosen: str) -> Tensor:
    return x.new_empty(len(x), count, x.shape[2])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, assign, ctx.count, weight, ctx.mean, _ = inputs
    reads = weight is not None and weight.requires_grad
    ctx.save_for_backward(assign, weight, x if reads else None, output if reads and ctx.mean else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Every slot gets the gradient of its output, times its share; the weight what that share changes."""
    assign, weight, x, output = ctx.saved_tensors
    gone = assign < 0
    target = assign.masked_fill(gone, 0)
    share = (torch.ones_like(assign, dtype=torch.float32) if weight is None else weight.float()).masked_fill(gone, 0)
    scale = None
    if ctx.mean:
        total = share.new_zeros(len(share), ctx.count).scatter_add(1, target, share)
        scale = torch.where(total == 0, 1, total).reciprocal().gather(1, target)
        share = share * scale
    mine = gather(grad, target)
    to_x = (mine * share[..., None]).to(grad.dtype) if ctx.needs_input_grad[0] else None
    to_weight = None
    if x is not None and ctx.needs_input_grad[3]:
        away = x.float().masked_fill(gone[..., None], 0)
        if output is not None:
            away = away - gather(output.float(), target)
        to_weight = (away * mine.float()).sum(2).masked_fill(gone, 0)
        to_weight = (to_weight if scale is None else to_weight * scale).to(weight.dtype)
    return to_x, None, None, to_weight, None, None


torch.library.register_autograd("mmcompress::merge", _backward, setup_context=_setup)
