# SPDX-License-Identifier: Apache-2.0
"""aim, dart: tokens that are alike, merged or left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mmcompress as mm
from mmcompress.ops.bipartite import merge_in_steps
from mmcompress.ops.pagerank import attention_pagerank
from mmcompress.ops.pivots import least_similar

from ..form import Arrays, Results, mask_of, runner, visuals


def merged(metric: Tensor, r: int, *companions: Tensor) -> list[Tensor]:
    """The metric and its companions [n, T, C] after one step of at most `r` merges, in the order of the reference."""
    chosen = mm.Selection(*merge_in_steps(metric, [r]))
    return [chosen.apply(x) for x in (metric, *companions)]


@runner("aim")
def aim(arrays: Arrays, params: dict[str, Any]) -> Results:
    steps = params["video_r"]
    (once,) = merged(arrays["video_x"], steps[0])
    yield "video_merge1", once
    yield "video_merge2", mm.Selection(*merge_in_steps(arrays["video_x"], steps)).apply(arrays["video_x"])
    key, feature = arrays["image_key"], arrays["image_feat"]
    for number, r in enumerate(params["image_r"], start=1):
        key, feature = merged(key, r, feature)
        yield f"image_key_merge{number}", key
        yield f"image_feat_merge{number}", feature
    for name, r in zip(("half", "few", "over"), params["odd_r"], strict=True):
        yield f"odd_merge_{name}", merged(arrays["odd_x"], r)[0]

    layers, first, count = params["L"], params["n_system"], params["n_visual"]
    stage = mm.AIMPrune(params["l1"], params["l1"] + round(1 / params["step"]))
    logits = arrays["attn_logits"]
    tokens = logits.shape[-1]
    yield "retain_rate", torch.tensor(stage.rates(layers))
    pagerank = params["pagerank"]
    ranked = attention_pagerank(
        logits, torch.eye(tokens).expand(layers, 1, -1, -1), 1.0, causal=False, temperature=pagerank["temperature"],
        iterations=pagerank["iterations"],
    )  # fmt: skip
    yield "importance", ranked
    depth = max(layers, stage.ramp(layers)[1]) + 1  # the reference also cuts after the last layer
    budgets = dict(zip(stage.cuts(depth), stage.budgets(count, depth), strict=True))
    left, seen, totals = torch.arange(first, first + count), [], []
    for layer in range(layers):
        k = budgets.get(layer + 1, len(left))
        if k < len(left):
            shown = visuals(torch.zeros(1, len(left), 1), k, pagerank=ranked[layer : layer + 1, left])
            left = left[stage.select(shown).keep[0]]
        visible = mask_of(left[None], tokens)[0]
        visible[:first] = visible[first + count :] = True
        seen.append(visible)
        totals.append(len(left) + tokens - count)
    yield "mask_after_layer", torch.stack(seen)
    yield "keep_num_total", torch.tensor(totals)
    if "default_rate_qwen2_28" in arrays:
        yield "default_rate_qwen2_28", torch.tensor(mm.AIMPrune().rates(28))
        yield "default_rate_llama_32", torch.tensor(mm.AIMPrune(13, 21).rates(32))


@runner("dart")
def dart(arrays: Arrays, params: dict[str, Any]) -> Results:
    start, count = params["prefix"], params["n_image"]
    image, text = slice(start, start + count), slice(start + count, None)
    norms, states = arrays["keys"].abs().sum((1, 3)), arrays["states"]
    stage = mm.DART(keep=params["n_kept"], image_pivots=params["pivots_image"], text_pivots=params["pivots_text"])
    seen = visuals(
        states[:, image], params["n_kept"], key_norms=norms[:, image], text_key_norms=norms[:, text],
        final_states=states[:, image], text_final_states=states[:, text],
    )  # fmt: skip
    own, words = stage.pivots(seen)
    yield "image_pivots", own[0] + image.start
    yield "text_pivots", words[0] + text.start
    order = arrays["pivot_order"]
    counts = stage.counts(seen.k, own.shape[1], len(order))
    picks = least_similar(seen.features, states[:, order], own, counts)
    yield "kept", image.start + mm.Selection.of(torch.cat([own, picks], 1)).keep[0]
