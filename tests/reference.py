# SPDX-License-Identifier: Apache-2.0
"""Slow, obvious references for the engine, and stages whose decisions a test can compute by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcompress import InputStage, LayerStage, Selection, Visuals, register
from mmcompress.budget import resolve

from .tiny import IMAGE

_WEIGHT = torch.randn(64, generator=torch.Generator().manual_seed(7))


def score(x: Tensor) -> Tensor:
    """A score per token that depends on the token alone, coarse enough that tiny numerical noise does not matter."""
    return (x.detach().float() @ _WEIGHT * 1e3).round()


@register("by_feature")
@dataclass(frozen=True, repr=False)
class ByFeature(InputStage):
    keep: float | int = 0.5

    def select(self, visuals: Visuals) -> Selection:
        return Selection.top(score(visuals.features), visuals.k)


@register("pairs_mean")
@dataclass(frozen=True, repr=False)
class PairsMean(InputStage):
    """Mean of neighbours 0 and 1, 2 and 3, ...: a merge with weights."""

    keep: float | int = 0.5

    def select(self, visuals: Visuals) -> Selection:
        count, n = visuals.features.shape[:2]
        keep = torch.arange(0, n, 2).expand(count, -1)
        return Selection(keep, (torch.arange(n) // 2).expand(count, -1), torch.full((count, n), 0.5))


@register("by_hidden")
@dataclass(frozen=True, repr=False)
class ByHidden(LayerStage):
    layer: int = 2
    keep: float | int = 0.5

    def select(self, visuals: Visuals) -> Selection:
        return Selection.top(score(visuals.features), visuals.k)


def best(scores: Tensor, wanted: Tensor, k: int) -> Tensor:
    """The k best of `wanted` (bool) in one row, as a bool mask; ties to the left."""
    order = scores.masked_fill(~wanted, float("-inf")).sort(descending=True, stable=True).indices[:k]
    return torch.zeros_like(wanted).scatter(0, order, True)


def image_runs(ids: Tensor, size: int) -> list[list[int]]:
    """Places of each image in one row."""
    places = (ids == IMAGE).nonzero()[:, 0].tolist()
    return [places[i : i + size] for i in range(0, len(places), size)]


def rows_shown(logits: Tensor, places: Tensor, ids: Tensor) -> Tensor:
    """Logits of the tokens at `places`, in the order of a packed row, as the rows of the output show them: the last place of a run
    of visual tokens is what text follows, so it shows the last of them that is left, whatever their order."""
    visual = (ids == IMAGE).long()
    found = logits.clone()
    for end in ((visual == 1) & (torch.cat([visual[1:], visual[:1] * 0]) == 0)).nonzero()[:, 0].tolist():
        text = ((places > end) & (visual[places] == 0)).nonzero()[:, 0]
        found[places == end] = logits[int(text[0]) - 1]
    return found


@contextmanager
def captured(model: Any) -> Iterator[dict[str, Any]]:
    """The keywords with which the language model is called."""
    seen: dict[str, Any] = {}
    handle = model.model.language_model.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def live_after_input(model: Any, inputs: dict[str, Tensor], keep: float, size: int = 16) -> tuple[Tensor, Tensor]:
    """By hand: which tokens `by_feature(keep)` leaves alive, [B, S] bool, and the embeddings that enter the LLM."""
    with captured(model) as seen, torch.no_grad():
        model(**inputs)
    embeds = seen["inputs_embeds"]
    ids = inputs["input_ids"]
    live = inputs.get("attention_mask", torch.ones_like(ids)).bool().clone()
    for row in range(len(ids)):
        for places in image_runs(ids[row], size):
            chosen = best(score(embeds[row, places]), torch.ones(size, dtype=torch.bool), resolve(keep, size))
            live[row, torch.tensor(places)[~chosen]] = False
    return live, embeds


@torch.no_grad()
def language_model_on(model: Any, seen: dict[str, Any], kept: list[Tensor]) -> list[Tensor]:
    """Logits of the stock language model, sample by sample, on some of the tokens that it was given in a run of the whole
    model (`seen`: its keywords there): positions and DeepStack levels follow. kept: places per row. [kept, V] each."""
    logits = []
    embeds, positions = seen["inputs_embeds"], seen["position_ids"]
    if positions is None:
        positions = torch.arange(embeds.shape[1])[None]
    for row, places in enumerate(kept):
        at = slice(row, row + 1)
        mine = positions[..., at if positions.shape[-2] > 1 else slice(None), :][..., places]
        more: dict[str, Any] = {}
        if seen.get("deepstack_visual_embeds") is not None:
            mask = seen["visual_pos_masks"]
            dense = [
                torch.zeros_like(embeds).masked_scatter(mask[..., None].expand_as(embeds), level)
                for level in seen["deepstack_visual_embeds"]
            ]
            mask = mask[at, places]
            more = {"visual_pos_masks": mask, "deepstack_visual_embeds": [d[at, places][mask] for d in dense]}
        hidden = model.model.language_model(
            inputs_embeds=embeds[at, places],
            position_ids=mine,
            attention_mask=torch.ones(1, len(places), dtype=torch.long),
            use_cache=False,
            **more,
        ).last_hidden_state
        logits.append(model.lm_head(hidden)[0])
    return logits


@torch.no_grad()
def stock_on_kept(
    model: Any, live: Tensor, embeds: Tensor, positions: str, start: Tensor | None = None
) -> list[Tensor]:
    """Logits of the stock language model run, sample by sample, on the kept rows alone: [kept, V] each."""
    logits = []
    for row in range(len(live)):
        kept = live[row].nonzero()[:, 0]
        at = kept - (start[row] if start is not None else 0)
        ids = torch.arange(len(kept)) if positions == "reindex" else at
        hidden = model.model.language_model(
            inputs_embeds=embeds[row : row + 1, kept],
            position_ids=ids[None],
            attention_mask=torch.ones(1, len(kept), dtype=torch.long),
            use_cache=False,
        ).last_hidden_state
        logits.append(model.lm_head(hidden)[0])
    return logits


def masked_keys(
    model: Any,
    inputs: dict[str, Tensor],
    cuts: dict[int, float],
    live: Tensor | None = None,
    patches: Tensor | None = None,
    mass: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of layer cuts in which nothing is removed: keys of dropped tokens are masked from the cut on.

    Returns (alive [B, S], logits [B, S, V]); logits of dropped rows mean nothing. `cuts` gives the ratio per layer of
    `by_hidden`; the visual tokens of a sample (`patches` [B, S], the image placeholders by default) share one budget. mass [B, S]:
    how many tokens each one stands for.
    """
    ids = inputs["input_ids"]
    length = ids.shape[1]
    alive = (inputs.get("attention_mask", torch.ones_like(ids)).bool() if live is None else live).clone()
    implementation = model.config.get_text_config()._attn_implementation

    def hook(layer: int) -> Any:
        def pre(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer in cuts:
                for row in range(len(ids)):
                    visual = (ids[row] == IMAGE if patches is None else patches[row]) & alive[row]
                    if visual.any():
                        stay = best(score(hidden[row]), visual, resolve(cuts[layer], int(visual.sum())))
                        alive[row] &= stay | ~visual
            seen = torch.ones(length, length, dtype=torch.bool).tril()[None] & alive[:, None, :]
            seen = (seen | torch.eye(length, dtype=torch.bool))[:, None]  # no row without keys; those are not compared
            if implementation == "eager" or mass is not None:
                bias = torch.zeros(1) if mass is None else mass.log()[:, None, None]
                mask = torch.where(seen, bias, torch.finfo(hidden.dtype).min).to(hidden.dtype)
            else:
                mask = seen
            return args, {**kwargs, "attention_mask": mask}

        return pre

    layers = model.model.language_model.layers
    handles = [layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return alive, logits
