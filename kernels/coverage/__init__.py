# SPDX-License-Identifier: Apache-2.0
"""Maximum coverage: the tokens that together stand best for everything."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose


def soft_coverage(targets: Tensor, tokens: Tensor, temperature: float, *, implementation: str = "auto") -> Tensor:
    """How well each token covers each target, [U, R, N] float32: a softmax of cosines over the tokens, 1/R per target.

    targets [U, R, C], tokens [U, N, C], any floating types; temperature above 0. A zero vector has cosine 0. Cost R N C, half
    of that in plain torch where both are the same tensor; memory beside the result O(R + N) rows and a block. No gradient.
    Equal tokens have equal columns but for rounding: a matrix product of few targets may round its last columns differently.
    """
    for name, x in (("targets", targets), ("tokens", tokens)):
        if x.dim() != 3 or not x.is_floating_point() or x.device != tokens.device:
            raise ValueError(
                f"{name} are {x.dtype} {tuple(x.shape)} on {x.device}: give a floating-point tensor [U, N, C]"
            )
    if len(targets) != len(tokens) or targets.shape[2] != tokens.shape[2]:
        raise ValueError(
            f"targets {tuple(targets.shape)} and tokens {tuple(tokens.shape)}: give [U, R, C] and [U, N, C]"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: give a number above 0")
    own = None if targets is tokens else targets.detach()
    chosen = choose(implementation, tokens)
    run = torch.ops.mmcompress.soft_coverage if _as_op(chosen) else _soft
    table: Tensor = run(own, tokens.detach(), float(temperature), chosen)
    return table


def max_coverage(
    table: Tensor,
    k: int,
    last: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Greedy facility location: `k` tokens per visual in the order they are picked, [U, k] int64.

    table [U, R, N], at least 0: how well token n covers target r. A target is covered as well as by its best token, and each
    pick adds most to the sum over targets (monotone submodular, so at least 1 - 1/e of the best possible sum). last [U, N]
    bool, optional: tokens to take only when all others are taken, by index. weight [U, N] >= 0, optional: a factor of what
    each token adds (then the bound holds no more). No token twice; ties go to the lower index. No
    gradient; sums are float32, or float64 for such a table but in Triton.

    All gains are sums in one order (`naive.LANES`): equal columns have equal gains wherever they stand, and of one table all
    implementations make exactly the picks of computing all gains again for each pick ("naive", k R N and a second table).
    CPU: R N once, then only tokens that can be the next. GPU: k R N, one launch per pick; nothing waits for the device. Memory
    beside the table: its transpose on the CPU, on a GPU O(R + N) and a block.
    """
    if table.dim() != 3 or not table.is_floating_point():
        raise ValueError(f"table is {table.dtype} {tuple(table.shape)}: give a floating-point tensor [U, R, N]")
    if not 1 <= k <= table.shape[2]:
        raise ValueError(f"k={k}: {table.shape[2]} tokens, give a number from 1 to that")
    if last is not None and (
        last.dtype != torch.bool or last.shape != (len(table), table.shape[2]) or last.device != table.device
    ):
        raise ValueError(
            f"last is {last.dtype} {tuple(last.shape)} on {last.device}: give bool {len(table), table.shape[2]} on {table.device}"
        )
    if weight is not None and (weight.shape != (len(table), table.shape[2]) or weight.device != table.device):
        raise ValueError(
            f"weight is {tuple(weight.shape)} on {weight.device}: give one number per token, {len(table), table.shape[2]} on "
            f"{table.device}"
        )
    factor = None if weight is None else weight.detach().to(torch.promote_types(table.dtype, torch.float32))
    chosen = choose(implementation, table)
    run = torch.ops.mmcompress.max_coverage if _as_op(chosen) else _picks
    picks: Tensor = run(table.detach(), last, factor, k, chosen)
    return picks


def _as_op(chosen: str) -> bool:
    """Whether to call an operation that compilers know, which takes a tenth of a millisecond."""
    return chosen == "triton" or torch.compiler.is_compiling()


def _module(name: str) -> Any:
    return importlib.import_module(f".{name}", __name__)


@torch.library.custom_op(
    "mmcompress::soft_coverage",
    mutates_args=(),
    schema="(Tensor? targets, Tensor tokens, float temperature, str chosen) -> Tensor",
)
def _soft_coverage(targets: Tensor | None, tokens: Tensor, temperature: float, chosen: str) -> Tensor:
    return _soft(targets, tokens, temperature, chosen)


def _soft(targets: Tensor | None, tokens: Tensor, temperature: float, chosen: str) -> Tensor:
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        table: Tensor = _module(chosen).soft_coverage(targets, tokens, temperature)
    return table


@_soft_coverage.register_fake
def _(targets: Tensor | None, tokens: Tensor, temperature: float, chosen: str) -> Tensor:
    rows = tokens.shape[1] if targets is None else targets.shape[1]
    return tokens.new_empty(len(tokens), rows, tokens.shape[1], dtype=torch.float32)


@torch.library.custom_op(
    "mmcompress::max_coverage",
    mutates_args=(),
    schema="(Tensor table, Tensor? last, Tensor? weight, SymInt k, str chosen) -> Tensor",
)
def _max_coverage(table: Tensor, last: Tensor | None, weight: Tensor | None, k: int, chosen: str) -> Tensor:
    return _picks(table, last, weight, k, chosen)


def _picks(table: Tensor, last: Tensor | None, weight: Tensor | None, k: int, chosen: str) -> Tensor:
    if not len(table):
        return torch.empty(0, k, dtype=torch.int64, device=table.device)
    if chosen == "blocked" and table.device.type == "cpu":
        chosen = "lazy"  # the same in an order that reads values, which only waits where there is a device
    with torch.no_grad():
        picks: Tensor = _module(chosen).max_coverage(
            table if table.dtype == torch.float64 else table.float(), k, last, weight
        )
    return picks


@_max_coverage.register_fake
def _(table: Tensor, last: Tensor | None, weight: Tensor | None, k: int, chosen: str) -> Tensor:
    return table.new_empty(len(table), k, dtype=torch.int64)
