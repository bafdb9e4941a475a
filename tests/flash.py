# SPDX-License-Identifier: Apache-2.0
"""A torch stand-in for the flash-attn package: drives transformers' real FA2 code path on the CPU (the plumbing only)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as utils
from torch import Tensor


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Attention of one sequence: q [Q, heads, d], k and v [K, kv_heads, d]; the causal triangle ends bottom right."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).tril(k.shape[0] - q.shape[0])
        logits = logits.masked_fill(~seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)


class FlashStandIn:
    """`calls` lists which kernel each attention layer asked for: "dense" or "varlen"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        kernels = (self.dense, self.varlen, None, utils._pad_input, utils._unpad_input)
        monkeypatch.setattr(utils, "_lazy_imports", lambda *a, **k: kernels)
        monkeypatch.setattr(utils, "_loaded_implementation", None)  # forget the kernels of the test before

    def enable(self, model: Any) -> None:
        model.model.language_model.config._attn_implementation = "flash_attention_2"
        model.config.get_text_config()._attn_implementation = "flash_attention_2"

    def dense(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float = 1.0, causal: bool = False, **_: Any
    ) -> Tensor:
        self.calls.append("dense")
        return torch.stack([_one(*rows, softmax_scale, causal) for rows in zip(q, k, v, strict=True)])

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float = 1.0,
        causal: bool = False, **_: Any,
    ) -> Tensor:  # fmt: skip
        self.calls.append("varlen")
        out = torch.zeros_like(q)
        for i in range(len(cu_seqlens_q) - 1):
            rows, keys = slice(cu_seqlens_q[i], cu_seqlens_q[i + 1]), slice(cu_seqlens_k[i], cu_seqlens_k[i + 1])
            if rows.stop > rows.start:
                out[rows] = _one(q[rows], k[keys], v[keys], softmax_scale, causal)
        return out
