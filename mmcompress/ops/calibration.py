# SPDX-License-Identifier: Apache-2.0
"""What RESTORE adds to the logits of a prompt that is smaller than it was."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 2.0
"""The constant from which the closeness of two tokens is taken."""


@torch.no_grad()
def distance_bias(cos: Tensor, sin: Tensor) -> Tensor:
    """log(2 - D) of every pair of tokens, by rotary tables cos and sin [B, S, d]: [B, S, S] float32.

    D is the mean over the pairs of dimensions that turn of the cosine of the angle by which the two tokens are turned apart: 1 for
    a token and itself, less the farther they are. Where dimensions count along several axes (M-RoPE) each has its share. Tables
    may be scaled.
    """
    turned = torch.cat([cos, sin], -1).float()
    turned = turned / turned.norm(dim=-1, keepdim=True)
    return (FAR - turned @ turned.transpose(1, 2)).clamp_min_(FAR - 1).log_()
