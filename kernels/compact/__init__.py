# SPDX-License-Identifier: Apache-2.0
"""One gather that moves everything that belongs to the tokens of a ragged batch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose


def compact(
    tensors: Sequence[Tensor], index: Tensor, valid: Tensor | None = None, *, implementation: str = "auto"
) -> list[Tensor]:
    """The tokens `index` of every tensor: each [B or 1, S, ...] becomes [B, M, ...], 0 (False) in padding.

    tensors  of any types and widths: features, positions, rotary tables, DeepStack levels, masks; a first axis of length 1 is
             shared by all samples. S may differ.
    index    [B, M] int64, in [0, S) where `valid`.
    valid    [B, M] bool: slots that hold a token; all without it. What `index` says elsewhere is not read.

    One launch for all tensors on a GPU, one row copy each on the CPU. Gradients flow to all floating tensors; a token that is
    taken several times gets the sum. Cost: reading and writing what is kept.
    """
    if index.dim() != 2 or index.dtype != torch.int64:
        raise ValueError(f"index of shape {tuple(index.shape)} and type {index.dtype}: it has to be [B, M], int64")
    if valid is not None and (valid.shape != index.shape or valid.dtype != torch.bool):
        raise ValueError(
            f"valid of shape {tuple(valid.shape)} and type {valid.dtype}: expected {tuple(index.shape)}, bool"
        )
    for x in tensors:
        if x.dim() < 2 or len(x) not in (1, len(index)):
            raise ValueError(
                f"a tensor of shape {tuple(x.shape)} with index {tuple(index.shape)}: it has to be [{len(index)} or 1, S, ...]"
            )
        if not x.shape[1] and index.numel():
            raise ValueError(f"a tensor of shape {tuple(x.shape)} has no tokens to take")
    chosen = choose(implementation, index)
    if chosen == "triton":
        found: list[Tensor] = torch.ops.mmcompress.compact(list(tensors), index, valid)
        return found
    found = importlib.import_module(f".{chosen}", __name__).compact(tensors, index, valid)
    return found


@torch.library.custom_op("mmcompress::compact", mutates_args=())
def _compact(tensors: Sequence[Tensor], index: Tensor, valid: Tensor | None) -> list[Tensor]:
    from .triton import compact as launch

    return launch(tensors, index, valid)


@_compact.register_fake
def _(tensors: Sequence[Tensor], index: Tensor, valid: Tensor | None) -> list[Tensor]:
    return [x.new_empty(*index.shape, *x.shape[2:]) for x in tensors]


def _setup(ctx: Any, inputs: tuple, output: Any) -> None:
    tensors, index, valid = inputs
    ctx.shapes = [x.shape for x in tensors]
    ctx.save_for_backward(index, valid)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, None, None]:
    index, valid = ctx.saved_tensors
    if valid is not None:
        index = index.masked_fill(~valid, 0)
    number = torch.arange(len(index), device=index.device)[:, None]
    found: list[Tensor | None] = []
    for shape, grad in zip(ctx.shapes, grads, strict=True):
        if grad is None or not grad.is_floating_point():
            found.append(None)
            continue
        if valid is not None:
            grad = grad.masked_fill(~valid.view(*valid.shape, *[1] * (grad.dim() - 2)), 0)
        at = index if shape[0] == 1 else index + number * shape[1]
        zeros = grad.new_zeros(shape[0] * shape[1], *shape[2:])
        found.append(zeros.index_add(0, at.flatten(), grad.flatten(0, 1)).view(shape))
    return found, None, None


torch.library.register_autograd("mmcompress::compact", _backward, setup_context=_setup)
