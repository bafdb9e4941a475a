# SPDX-License-Identifier: Apache-2.0
"""scope, idpruner, anchorprune, eadp, prunesid, restore."""

from __future__ import annotations

from typing import Any

import torch
from mmcompress.kernels.diverse import max_min

import mmcompress as mm
from mmcompress.ops.calibration import distance_bias
from mmcompress.ops.relevance import direction
from mmcompress.visuals import View

from ..form import Arrays, Results, mask_of, runner, visuals


@runner("scope")
def scope(arrays: Arrays, params: dict[str, Any]) -> Results:
    features, attention, k = arrays["features"], arrays["attention"], params["k"]
    stage = mm.SCOPE(k, params["alpha"])
    seen = visuals(features, k, cls_attention=attention, encoder_features=features)
    yield "selected_order", stage.picks(features, attention, k)
    yield "kept", stage.select(seen).keep
    yield "selected_order_alpha_half", mm.SCOPE(k, 0.5).picks(features, attention, k)
    yield "selected_order_add", mm.SCOPE(k, combine="add").picks(features, attention, k)
    few = arrays["selected_order_no_saliency"].shape[1]
    yield "selected_order_no_saliency", mm.SCOPE(k, 0.0).picks(features, attention, few)


@runner("idpruner")
def idpruner(arrays: Arrays, params: dict[str, Any]) -> Results:
    features, scores, k = arrays["features"][None], arrays["scores"][None], params["k"]
    stage = mm.IDPruner(k, params["mmr_lambda"])
    importance = stage.importance(scores)
    yield "importance", importance[0]
    yield "selected_order", stage.picks(features, importance, k)[0]
    yield "kept", stage.select(visuals(features, k, received_attention=scores)).keep[0]
    yield "selected_order_low", mm.IDPruner(k, params["mmr_lambda_low"]).picks(features, importance, k)[0]
    parallel = mm.IDPruner(k, params["mmr_lambda"], params["parallel_k"])
    yield "selected_order_parallel", parallel.picks(features, importance, k)[0]


@runner("anchorprune")
def anchorprune(arrays: Arrays, params: dict[str, Any]) -> Results:
    k, least, most = params["k"], params["k_min"], params["kmax_ratio"]
    features, importance = arrays["features"][None], arrays["importance"][None]
    text = direction(arrays["text"])[None]
    signals = {"clip_patches": arrays["clip_patches"][None], "clip_text": text}
    seen = visuals(features, k, **signals, cls_attention=importance, encoder_features=features)
    usual = {"tau": params["tau"], "patience": params["patience"]}
    for tag, given in (
        ("", {}),
        ("_cap", {"tau": params["tau_cap"]}),
        ("_loose", {"tau": params["tau_loose"], "patience": params["patience_loose"]}),
    ):
        options = {**usual, **given}
        stage = mm.AnchorPrune(k, least, options["tau"], options["patience"], most)
        relevance, compared = stage.relevance(seen)
        if not tag:
            yield "relevance", relevance[0]
        start, size = stage.anchor(relevance, compared, k)
        yield f"anchor{tag}", start[0, : size[0]]
        yield f"selected{tag}", stage.select(seen).keep[0]
    alone = stage.expansion(features, importance, k, start, torch.zeros_like(size))
    yield "selected_no_anchor", alone[0].sort().values
    stage = mm.AnchorPrune(k, least, params["tau"], params["patience"], most)
    tokens, words = arrays["qwen_features"][None], arrays["qwen_query"][None]
    mass = torch.empty(tokens.shape[1])
    mass[arrays["qwen_window_index"]] = arrays["qwen_mass"].view(tokens.shape[1], -1).mean(1)
    seen = visuals(tokens, k, text_embeddings=words, received_attention=mass[None])
    yield "qwen_selected", stage.select(seen).keep[0]
    yield "qwen_selected_no_mass", stage.select(visuals(tokens, k, text_embeddings=words)).keep[0]


@runner("eadp")
def eadp(arrays: Arrays, params: dict[str, Any]) -> Results:
    k, alpha, words = params["k"], params["alpha"], params["entropy_keep_ratio"]
    text, states, side = arrays["text"][None], arrays["text_tokens"][None], params["side"]
    for beta, name, order in (
        (params["beta"], "importance", "selected_order"),
        (params["beta_two"], "importance_beta_two", "selected_order_beta_two"),
    ):
        stage = mm.EADP(k, alpha, beta, words)
        raw = stage.relevance(arrays["embeds"], text, states)
        importance = stage.importance(raw, (View((side, side)),))
        yield name, importance
        picks = stage.picks(arrays["features"], importance, k)
        yield order, picks
        if order == "selected_order":
            yield "kept", picks[0].sort().values
    crops, small = params["crops"], params["crop_side"]
    stage = mm.EADP(k, alpha, params["beta"], words)
    raw = stage.relevance(arrays["crop_embeds"], text.expand(crops, -1, -1), states.expand(crops, -1, -1, -1))
    importance = stage.importance(raw.view(1, -1), (View((small, small)),) * crops).view(crops, -1)
    yield "crop_importance", importance
    most = arrays["crop_order"].shape[1]
    yield "crop_order", stage.picks(arrays["crop_features"], importance, most)
    stage = mm.EADP(params["qwen_k"], alpha, params["qwen_beta"], words)
    tokens, given = arrays["qwen_features"][None], {"text_embeddings": arrays["qwen_text_tokens"]}
    layout = mm.Layout.raster(1, *params["qwen_grid"])
    found = stage.select(mm.Visuals(tokens, layout, stage.keep, given, road=lambda x: x))  # type: ignore[arg-type]
    yield "qwen_importance", found.scores
    yield "qwen_kept", found.keep[0]


@runner("prunesid")
def prunesid(arrays: Arrays, params: dict[str, Any]) -> Results:
    k, groups, attention = params["K"], params["groups"], arrays["cls_attention"]
    patches, stage = arrays["hidden"][:, 1:], mm.PruneSID(params["K"])
    yield "loadings", stage.loadings(patches, groups)
    group = arrays["loadings"].argmax(2)
    bound = stage.threshold(patches, k, True)
    yield "nms_threshold", bound
    alive = stage.survivors(patches, group, attention, bound)
    yield "nms_survivors", torch.stack([(alive & (group == i)).sum(1) for i in range(groups)], 1)
    ranking, taken = stage.shares(patches, group, attention, bound, k, groups, first=1)  # one is CLS
    yield "taken", taken
    cls = torch.zeros_like(taken[:, :1])
    yield "selected", torch.cat([cls, stage.picks(group, ranking, taken, k - 1) + 1], 1)
    tokens, loadings, k = arrays["qwen_tokens"][None], arrays["qwen_loadings"][None], params["qwen_K"]
    yield "qwen_loadings", stage.loadings(tokens, params["qwen_groups"])[0]
    group, bound = loadings.argmax(2), stage.threshold(tokens, k, False)
    ranking, taken = stage.shares(tokens, group, loadings.amax(2), bound, k, params["qwen_groups"])
    yield "qwen_selected", stage.picks(group, ranking, taken, k)[0]


@runner("restore")
def restore(arrays: Arrays, params: dict[str, Any]) -> Results:
    features, k = arrays["features"], params["n_vis"]
    stage = mm.Restore(keep=k, share=params["n_kept"] / k)
    alone = stage.alone(visuals(features, k))
    yield "kept_order", max_min(features, params["n_kept"])[0]
    free = mask_of(alone, params["N"]).logical_not()[0]
    rest = free.nonzero()[:, 0]
    yield "rest", rest
    yield "density", stage.density(features[:, rest])[0]
    yield "anchors", rest[stage.anchors(features[:, rest], k - params["n_kept"])[0]]
    found = stage.select(visuals(features, k))
    yield "group", found.assignment(params["N"])[0]
    yield "size", torch.bincount(found.assignment(params["N"])[0], minlength=k).float()
    yield "tokens", found.apply(features)[0]
    prefix, end = params["prefix"], params["prefix"] + params["N"]
    suffix = torch.arange(end, end + params["suffix"])
    yield "positions", torch.cat([torch.arange(prefix), prefix + found.keep[0], suffix])
    positions, theta = (
        arrays["positions"],
        params["rope_base"] ** -(torch.arange(0, params["rope_dim"], 2) / params["rope_dim"]),
    )
    angles = (positions[:, None] * torch.cat([theta, theta]))[None]
    apart = distance_bias(angles.cos(), angles.sin())[0].tril()
    sizes = torch.ones(params["S"])
    sizes[prefix : prefix + k] = params["N"] / k
    yield "bias_layer0", (apart + sizes.log()).tril()
    sizes[prefix : prefix + k] = found.sizes(torch.ones(1, params["N"]))[0]
    yield "bias", (apart + sizes.log()).tril()
    holov = mm.Restore("holov(strips=16)", k, params["n_kept"] / k)
    found = holov.select(visuals(features, k, cls_attention=arrays["holov_attention"]))
    yield "holov_tokens", found.apply(features)[0]
    yield "holov_positions", prefix + found.keep[0]
