# SPDX-License-Identifier: Apache-2.0
"""visionzip, divprune, fastv, tome."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmcompress.kernels.diverse import max_min
from mmcompress.kernels.diverse.blocked import nearest_distance
from torch import Tensor

import mmcompress as mm
from mmcompress.budget import merge_schedule, resolve
from mmcompress.ops import merge_mean, proportional_bias

from ..form import Arrays, Results, runner, visuals


@runner("visionzip")
def visionzip(arrays: Arrays, params: dict[str, Any]) -> Results:
    hidden = arrays["hidden_states"]
    dominant, contextual = params["dominant_arg"], params["contextual_arg"]
    stage = mm.VisionZip(keep=dominant + contextual, contextual=contextual)
    selection = stage.select(
        visuals(
            hidden[:, 1:],
            stage.budget(hidden.shape[1] - 1),
            cls_attention=arrays["cls_attention"].mean(1)[:, 1:],
            keys=arrays["key_metric"][:, 1:],
            encoder_features=hidden[:, 1:],
            cls_feature=hidden[:, 0],
        )
    )
    assert selection.rows is not None
    yield "tokens_out", selection.rows
    yield "dominant_patch_indices", selection.keep[:, 1:dominant]
    yield "contextual_target_patch_indices", selection.keep[:, dominant:]


@runner("divprune")
def divprune(arrays: Arrays, params: dict[str, Any]) -> Results:
    tokens = arrays["visual_tokens"][None]
    stage = mm.DivPrune(keep=params["ratio"])
    k = stage.budget(tokens.shape[1])
    yield "selected_order", max_min(tokens, k)[0]
    yield "selected_sorted", stage.select(visuals(tokens, k)).keep[0]
    yield "first_scores", nearest_distance(F.normalize(tokens, dim=-1))[0]


@runner("fastv")
def fastv(arrays: Arrays, params: dict[str, Any]) -> Results:
    first, count = params["image_start"], params["n_image"]
    hidden, attention = arrays["hidden_states"], arrays["attention"]
    image = slice(first, first + count)
    score = attention[:, :, -1].mean(1)[:, image]
    stage = mm.FastV(keep=1 - params["r"])
    k = stage.budget(count)
    kept = stage.select(visuals(hidden[:, image], k, last_attention=score)).keep[0]
    length = hidden.shape[1]
    keep = torch.cat([torch.arange(first), first + kept, torch.arange(first + count, length)])
    yield "score", score[0]
    yield "keep_indices", keep
    yield "hidden_states_out", hidden[:, keep]
    yield "position_ids_out", torch.arange(length)[None, keep]
    yield "budget", torch.tensor(resolve(1 - params["r"], count))


@runner("tome")
def tome(arrays: Arrays, params: dict[str, Any]) -> Results:
    stage, protected, heads = mm.ToMe(keep=0.5), int(params["class_token"]), params["heads"]
    x = arrays["x"]
    batch, tokens, channels = x.shape
    source = torch.arange(tokens).expand(batch, -1)

    def matrix(source: Tensor, count: int) -> Tensor:
        return F.one_hot(source, count).transpose(1, 2).float()

    target, count = stage.match(arrays["metric1"], params["r1"], protected)
    x, size = merge_mean(x, torch.ones(batch, tokens), target, count)
    source = target.gather(1, source)
    yield "x1", x
    yield "size1", size[..., None]
    yield "source1", matrix(source, count)

    qkv = F.linear(x, arrays["qkv_weight"], arrays["qkv_bias"]).view(batch, count, 3, heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=proportional_bias(size, x.dtype))
    out = F.linear(out.transpose(1, 2).reshape(batch, count, channels), arrays["proj_weight"], arrays["proj_bias"])
    yield "attn_out", out
    yield "metric2", k.mean(1)
    target, count = stage.match(k.mean(1), params["r2"], protected)
    x, size = merge_mean(x + out, size, target, count)
    source = target.gather(1, source)
    yield "x2", x
    yield "size2", size[..., None]
    yield "source2", matrix(source, count)
    if "parse_r" in arrays:
        blocks = arrays["parse_r"].shape[1]
        rows = [(8, 0.0), (8, -1.0), (8, 1.0), ((5, 4, 3), 0.0)]
        yield "parse_r", torch.tensor([merge_schedule(r, blocks, inflect) for r, inflect in rows])
