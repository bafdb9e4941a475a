# SPDX-License-Identifier: Apache-2.0
"""Attention statistics without the attention map, and what ToMe adds to attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.attention import attention_received, attention_rows

__all__ = ["attention_received", "attention_rows", "proportional_bias"]


def proportional_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """What ToMe adds to the logits of a key that stands for `size` [n, T] patches: log(size) as [n, 1, 1, T]."""
    return size.float().log().to(dtype)[:, None, None, :]
