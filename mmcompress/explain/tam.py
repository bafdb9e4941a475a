# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of token activation maps (Li et al., "Token Activation Map to Visually Explain Multimodal LLMs", ICCV 2025,
arXiv 2506.23270), on tensors: no model here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.rank_filter import rank_filter

COMPAT = ("paper", "reference")


@dataclass(frozen=True, eq=False)
class Activation:
    """All steps for T targets on N cells, float32. raw, causal, maps [T, N]: activations, the same without what earlier tokens
    explain, and between 0 and 1 after the filter (0 at cells that are missing). scale [T]: how much of the interference was taken
    away. relevance [T, T]: of the text tokens, in the unit of `maps` before the filter; NaN behind the last one seen."""

    raw: Tensor
    causal: Tensor
    maps: Tensor
    scale: Tensor
    relevance: Tensor


def targets(
    question: Sequence[int], answer: Sequence[int], first: int, last_input: int, compat: str = "paper"
) -> list[int]:
    """Vocabulary classes of the P + A targets: of the first question token what the model would say behind it (`first`), then the
    question's tokens, then the answer's. `compat="reference"`: `last_input`, the last token of the prompt, in the place of the
    first answer token, as the authors' code has it."""
    if compat not in COMPAT:
        raise ValueError(f"compat={compat!r}: choose one of {', '.join(COMPAT)}")
    classes = [*question, *answer]
    if question:
        classes[0] = first
    if compat == "reference":
        classes[len(question)] = last_input
    return classes


def subtract_interference(
    current: Tensor, context: Tensor, weights: Tensor, cap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimated causal inference: take away from each map what its context explains.

    current [T, N], context [J, N], weights [T, J], all >= 0. The interference is the mean of the context by `weights` (divided by
    their sum + 1e-8); its least-squares part, `scale` times, is subtracted, and what would be negative is 0. `cap` bounds the
    scale (the paper has no bound). Returns (maps [T, N], interference [T, N], scale [T], 0 without interference), float32.
    """
    current, context, weights = current.float(), context.float(), weights.float()
    interference = (weights / (weights.sum(1, keepdim=True) + 1e-8)) @ context
    size = interference.double().square().sum(1)
    scale = (current.double() * interference).sum(1) / torch.where(size > 0, size, 1)
    scale = (scale if cap is None else scale.clamp_max(cap)).float()
    return (current - scale[:, None] * interference).relu(), interference, scale


def jointly_scaled(maps: Tensor, text: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [T, N] and text values [T, M] (NaN: none) brought to 0..1 together, by the smallest and the largest of both in each row;
    all 0 where they are equal. Cells outside `valid` [N] take no part and become 0."""
    inside = torch.cat([maps.masked_fill(~valid, float("nan")), text], 1)
    low = inside.nan_to_num(float("inf")).amin(1, keepdim=True)
    high = inside.nan_to_num(float("-inf")).amax(1, keepdim=True)
    unit = torch.where(high > low, high - low, 1)
    unit, low = unit.nan_to_num(1.0), torch.where(low.isfinite(), low, 0)
    return ((maps - low) / unit).masked_fill(~valid, 0), (text - low) / unit


def token_activation(
    raw: Tensor,
    relevance: Tensor,
    question: int,
    names: Sequence[object],
    grids: Sequence[Tensor],
    valid: Tensor | None = None,
    *,
    interference: bool = True,
    kernel: int = 3,
    cap: float | None = None,
) -> Activation:
    """Token activation maps of T = P + A targets from their activations.

    raw [T, N]: relu of each target's logit at the cells. relevance [T, T], entry [t, j]: of the class of target t at the place
    where token j is read (a question token at itself, an answer token where it was predicted). question: P. names: surface forms;
    tokens of the same name are never subtracted from each other. grids: of each picture or frame the numbers of its cells.
    valid [N] bool: cells that are there. Memory a few times T * N floats. Options: see `token_activation_map`.
    """
    count, device = len(raw), raw.device
    valid = torch.ones(raw.shape[1], dtype=torch.bool, device=device) if valid is None else valid.to(device)
    raw = raw.float().masked_fill(~valid, 0)
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    name = torch.tensor([number[n] for n in names], device=device)
    order = torch.arange(count, device=device)
    earlier = (order < order[:, None]) & (name != name[:, None])
    weights = relevance.float() * (earlier if interference else 0)
    causal, _, scale = subtract_interference(raw, raw, weights, cap)
    seen = order < order[:, None].clamp_min(question)  # question tokens are all read before the answer begins
    text = relevance.float().masked_fill(~seen, float("nan"))
    joint, text = jointly_scaled(causal, text, valid)
    maps = torch.zeros_like(joint)
    for cells in grids:
        cells = cells.to(device)
        maps[:, cells.flatten()] = rank_filter(joint[:, cells], kernel, valid[cells]).flatten(1)
    return Activation(raw, causal, maps.masked_fill(~valid, 0), scale, text)
