# SPDX-License-Identifier: Apache-2.0
"""ARank of gamma-MoD: the rank of attention maps, which finds layers that do little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..api import _stock


def attention_rank(attention: Tensor) -> Tensor:
    """Rank of what each head [..., N, N] gives earlier tokens (the strict lower triangle), [...] int64, with the default tolerance
    for float32."""
    return torch.linalg.matrix_rank(attention.float().tril(-1))


@torch.no_grad()
def attention_ranks(model: Any, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean rank of the attention maps of each LLM layer, over heads and samples; the lowest are the most redundant.

    inputs: what the processor made of a few prompts of about the same length; one batch, or several. Ranks depend on length and
    precision: compare layers of one run only. Whole maps are computed (eager attention), so memory grows with S^2, and the time
    with S^3 per head. Rows of padding are left out.
    """
    stock = _stock(model)
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not batches:
        raise ValueError("give at least one batch of inputs")
    language_model = getattr(stock, stock.base_model_prefix).language_model
    before = language_model.config._attn_implementation
    sums: list[float] = []
    samples = 0
    stock.set_attn_implementation({"text_config": "eager"})
    try:
        for batch in batches:
            maps = stock(**batch, use_cache=False, output_attentions=True).attentions
            mask = batch.get("attention_mask")
            real = torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()
            sums = sums or [0.0] * len(maps)
            for layer, weights in enumerate(maps):
                seen = real.to(weights.device)
                inside = weights * (seen[:, None, :, None] & seen[:, None, None])
                sums[layer] += float(attention_rank(inside).float().mean(1).sum())
            samples += len(real)
    finally:
        stock.set_attn_implementation({"text_config": before})
    return [total / samples for total in sums]
