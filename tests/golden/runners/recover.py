# SPDX-License-Identifier: Apache-2.0
"""recoverable_compression: the numbers of tokens that the paper takes from the picture, and both outputs."""

from __future__ import annotations

from typing import Any

import torch

from mmcompress.methods.recoverable_compression import RecoverableCompression
from mmcompress.ops.attention import attention_rows
from mmcompress.ops.outliers import local_outlier_factor
from mmcompress.ops.ties import largest

from ..form import Arrays, Results, runner, visuals


@runner("recoverable_compression")
def recoverable_compression(arrays: Arrays, params: dict[str, Any]) -> Results:
    options = {"neighbours": params["merge_neighbours"], "text_weight": params["text_weight"]}
    fixed, stage = (RecoverableCompression(**options, compat=compat) for compat in (None, "reference"))
    features, query, keys = arrays["hidden"][:, 1:], arrays["query"], arrays["key"]
    joint = {"clip_patches_plain@-1": arrays["image_proj"][:, 1:], "clip_text_last": arrays["text_embed"]}
    a = attention_rows(query[:, None, :1], keys[:, None], keys.shape[2] ** -0.5)[:, 0, 0, 1:]
    t = stage.text_score(visuals(features, 1, **joint))
    visual, textual, _ = stage.counts(a, t)
    # the record has fewer centres than the card's rule gives (2 for 62 kept patches and 14 outliers of 163): taken from it
    centres = torch.full_like(visual, len(arrays["center_pos"]))
    by_a = largest(a, visual)
    covered = stage.covered(t, by_a)
    order, is_centre = stage.order(a, t, (visual, textual, centres))
    kept, middle, total = (int(x) for x in (visual + textual, centres, visual + textual + centres))
    is_rest = torch.ones_like(by_a).scatter(1, order[:, :kept], False)
    rest = is_rest[0].nonzero()[:, 0]
    factors = {
        "lof_vision": local_outlier_factor(a, params["knn_lof_vision"])[0],
        "lof_text": local_outlier_factor(covered, params["knn_lof_text"])[0],
        "lof_merge": local_outlier_factor(a, params["knn_lof_merge"], is_rest)[0, rest],
    }
    yield "cls_attn", a
    yield "text_sim", t
    yield "lof_text_input", covered[0]
    yield from ((name, factor.float()) for name, factor in factors.items())
    yield "ratios", torch.stack([(factor < -1.5).double().mean() for factor in factors.values()])
    yield "vision_idx", a.sort(dim=1, descending=True, stable=True).indices[0, : int(visual)]
    yield "text_idx", covered.sort(dim=1, descending=True, stable=True).indices[0, : int(textual)]
    yield "kept_idx", order[0, :kept]
    yield "rest_idx", rest
    places = torch.searchsorted(rest, order[0, kept:])
    yield "center_pos", places[:middle]
    yield "noncenter_pos", places[middle:].sort().values
    for name, made in (("out_ref", stage), ("out_fixed_keys", fixed)):
        tokens = made.merge(features, a, t, keys[:, 1:], order[:, :total], is_centre[:, :total])[0]
        yield name, tokens if middle else tokens[:, :-1]  # without a centre the reference has no last token either
