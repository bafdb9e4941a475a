# SPDX-License-Identifier: Apache-2.0
"""What decides whether visual tokens may leave a language model for good."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.gather import gather


def exit_features(states: Tensor, text: Tensor | None = None) -> Tensor:
    """What an exit router reads of the text behind the visuals: the mean of all its tokens but the last, and the last one, [U, 2D].

    states [U, T, D]: hidden states of the text. text [U, T] bool: which of them count, at least one in each row; None: all.
    One token alone is its own mean.
    """
    states = states.float()
    if text is None:
        text = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    place = torch.arange(text.shape[1], device=text.device)
    end = torch.where(text, place, -1).amax(1, keepdim=True)
    last = gather(states, end)[:, 0]
    others = (text & (place != end)).to(states.dtype)
    count = others.sum(1, keepdim=True)
    mean = (others[:, None] @ states)[:, 0] / count.clamp_min(1)
    return torch.cat([torch.where(count > 0, mean, last), last], -1)


def router_logits(features: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Logits [U, 2] of (stay, leave) from features [U, 2D]: two linear layers w1 [H, 2D], w2 [2, H] with a GELU between."""
    return F.linear(F.gelu(F.linear(features.to(w1), w1)), w2)


def answer_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answer tokens of each sample, [B]; logits [B, T, V], labels [B, T], -100 where there is none."""
    wanted = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=-100, reduction="none")
    return losses.sum(1) / (wanted >= 0).sum(1)


def agreement(first: Tensor, second: Tensor, labels: Tensor, compat: str | None = None) -> Tensor:
    """At which part of its answer positions each sample has the same best token in two sets of logits [B, T, V], [B].

    `compat="reference"` leaves out answer tokens with id 0.
    """
    wanted = labels[:, 1:] > (0 if compat == "reference" else -1)
    same = first[:, :-1].argmax(-1) == second[:, :-1].argmax(-1)
    return (same & wanted).sum(1) / wanted.sum(1)


def exit_is_safe(agreed: Tensor, full: Tensor, left: Tensor, least: float = 0.99, factor: float = 1.03) -> Tensor:
    """Whether a sample does not miss its visual tokens, [B] bool: enough answer tokens agree, and the loss without them has not
    grown much."""
    return (agreed > least) & (left < factor * full)
