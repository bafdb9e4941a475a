# SPDX-License-Identifier: Apache-2.0
"""vmtc_cmai (its tokens; the attention masks of cmai are elsewhere), vflowopt, language_overrules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mmcompress as mm
from mmcompress.methods.vflowopt_cuts import VFlowOptCuts, last_ratio
from mmcompress.methods.vflowopt_prune import VFlowOptPrune, importance
from mmcompress.methods.vmtc import VMTC
from mmcompress.ops.dominance import depth_stages, dominance, modality_mass, modality_shares
from mmcompress.ops.entropy import patch_entropy
from mmcompress.ops.kmeans import cluster_means
from mmcompress.ops.marginals import attention_marginals, hub_attention, hubs
from mmcompress.ops.recycle import grid_cells
from mmcompress.visuals import View

from ..form import Arrays, Results, mask_of, runner, visuals


@runner("vmtc_cmai")
def vmtc(arrays: Arrays, params: dict[str, Any]) -> Results:
    features, score = arrays["features"][None], arrays["cls_attn"].mean(0)[None]
    kept, clusters = params["k"], params["clusters"]
    label = VMTC.partition(score, features, kept, clusters)
    rest = (label[0] >= 0).nonzero()[:, 0]
    yield "ips", score[0]
    yield "kept_idx", (label[0] < 0).nonzero()[:, 0]
    yield "rest_idx", rest
    yield "cluster_of_rest", label[0, rest]
    by_first = list(dict.fromkeys(label[0, rest].tolist()))
    merged = cluster_means(features, score, label, clusters)[0, by_first]
    yield "merged", merged
    output = torch.cat([features[0, label[0] < 0], merged])
    if len(by_first) == clusters:  # else the library keeps more patches, so that its budget stays exact
        k = kept + clusters
        seen = visuals(features, k, cls_attention=score, encoder_features=features)
        rows = VMTC(k, clusters).select(seen).rows
        assert rows is not None
        output = rows[0]
    yield "output", output


@runner("vflowopt")
def vflowopt(arrays: Arrays, params: dict[str, Any]) -> Results:
    entropy = patch_entropy((arrays["pixels"] * 255).to(torch.uint8), params["patch"])
    yield "entropy", entropy
    attention = arrays["vit_attention"]
    q, k = attention.clamp_min(1e-38).log(), torch.eye(attention.shape[2]).expand_as(attention)  # whose map is given
    received, _ = attention_marginals(q, k, 1.0)
    for name, alpha in (("main", params["alpha_main"]), ("t_only", 0.0)):
        t = params["t_main" if name == "main" else "t_only"]
        yield f"n_reference_tokens_{name}", hubs(received, t).sum(1)
        yield f"importance_{name}", importance(hub_attention(q, k, 1.0, t), entropy.flatten(1), alpha)
    yield from recycled(arrays, params)
    yield from cuts(arrays["rec_out_importance"], params)
    solved = [last_ratio(average, r1, r1 * r2, (9, 9, 10)) for average, r1, r2 in arrays["constraint_in"].tolist()]
    yield "constraint_R3", torch.tensor(solved)


def recycled(arrays: Arrays, params: dict[str, Any]) -> Results:
    """The number of tokens is the reference's; which these are and what they become is the library's decision. Newlines are cells
    of the tiles here, as in the reference."""
    score, features, cell = arrays["rec_importance"][None], arrays["rec_features"][None], params["grid_cell_a"]
    grids = [tuple(params["base_grid"]), tuple(params["tile_grid"])]
    tokens = score.shape[1]
    gone, more = round(tokens * (1 - params["keep_ratio_R1"])), int(tokens / cell**2)
    low = score[0].argsort()[: gone + more]
    groups = grid_cells(grids, cell)[0][low].unique().numel()
    yield "rec_low_count", torch.tensor([gone, more, len(low), groups])
    stage = VFlowOptPrune(tokens - len(low) + groups, 0.0, cell)
    layout = mm.Layout((View(grids[0], role="thumbnail"), View(grids[1], role="tiles")))
    given = mm.Visuals(features, layout, stage.budget(tokens), {str(stage.needs[0]): score})
    selection = stage.select(given)
    assert selection.scores is not None
    yield "rec_keep_mask", mask_of(selection.keep, tokens)[0]
    yield "rec_out_features", given.take(selection).features[0]
    yield "rec_out_importance", selection.scores.gather(1, selection.keep)[0]


def cuts(scores: Tensor, params: dict[str, Any]) -> Results:
    start, after = params["llm_image_start"], params["llm_text_after"]
    sequence, end = torch.arange(start + len(scores) + after), start + len(scores)
    left = torch.arange(len(scores))
    for number, ratio in enumerate(params["llm_ratios"]):
        k = len(left) - round(len(left) * (1 - ratio))
        seen = visuals(torch.zeros(1, len(left), 1), k, input_scores=scores[left][None])
        left = left[VFlowOptCuts().select(seen).keep[0]]
        yield f"llm_keep_stage{number}", torch.cat([sequence[:start], start + left, sequence[end:]])


@runner("language_overrules")
def language_overrules(arrays: Arrays, params: dict[str, Any]) -> Results:
    rows = arrays["attn"].float().mean(1)[:, arrays["output_idx"]]
    sets = [arrays[f"{name}_mask"].expand(len(rows), -1) for name in ("text", "image")]
    masses, tokens = [modality_mass(rows, s) for s in sets], [s.sum(1) for s in sets]
    yield from zip(("A_T", "A_O"), modality_shares(*masses), strict=True)
    mdi, text, image = dominance(*masses, *tokens)
    yield "mdi", mdi
    yield "aei_text", text
    yield "aei_image", image
    yield "stage_mdi", depth_stages(mdi)
    yield "stage_aei", depth_stages(text)
    features, k = arrays["features"], params["T"]
    given = visuals(features, k, cls_attention=arrays["cls_attn"].mean(1))
    selection = mm.LanguageOverrules(k).select(given)
    yield "kept_idx", selection.keep
    yield "kept_out", given.take(selection).features
