# SPDX-License-Identifier: Apache-2.0
"""How unequally attention is shared out between text and another modality."""

from __future__ import annotations

import torch
from torch import Tensor


def modality_mass(rows: Tensor, columns: Tensor) -> Tensor:
    """Attention of all queries on the keys in `columns`, [...]: rows [..., G, S] (mean over heads), columns [..., S] bool."""
    return (rows * columns[..., None, :]).sum((-2, -1))


def modality_shares(text: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Masses of both modalities as parts of their sum, float64; nan where neither has any."""
    text, other = text.double(), other.double()
    return text / (text + other), other / (text + other)


def dominance(text: Tensor, other: Tensor, text_tokens: Tensor, other_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Modality dominance index, and the attention efficiency index of text and of the other modality, float64.

    text, other: mass of attention; text_tokens, other_tokens: how many keys it falls on; all of one shape. MDI is the attention per
    text token over that per other token: above 1 text dominates. AEI is the share of the attention over the share of the tokens;
    MDI is their ratio. Without attention on the other modality MDI is inf, without tokens of one of them nan.
    """
    text_share, other_share = modality_shares(text, other)
    tokens = (text_tokens + other_tokens).double()
    text_aei = text_share / (text_tokens / tokens)
    other_aei = other_share / (other_tokens / tokens)
    return text_aei / other_aei, text_aei, other_aei


def depth_stages(values: Tensor) -> Tensor:
    """Means over the first two, the middle two and the last two layers of `values` [..., L], [..., 3]."""
    layers = values.shape[-1]
    middle = slice(max(0, layers // 2 - 1), layers // 2 + 1)
    return torch.stack([values[..., part].mean(-1) for part in (slice(0, 2), middle, slice(-2, None))], -1)
