# SPDX-License-Identifier: Apache-2.0
"""vispruner (with fastervlm), holov."""

from __future__ import annotations

from typing import Any

import mmcompress as mm

from ..form import Arrays, Results, mask_of, runner, visuals


@runner("vispruner")
def vispruner(arrays: Arrays, params: dict[str, Any]) -> Results:
    features, attention = arrays["features"], arrays["cls_attention"].mean(1)
    signals = {"cls_attention": attention, "encoder_features": features}
    tokens = attention.shape[1]
    k = params["T"]
    kept = (
        mm.VisPruner(k, params["important_ratio"], params["removal_step"]).select(visuals(features, k, **signals)).keep
    )
    yield "kept", kept
    yield "mask", mask_of(kept, tokens)
    important = params["T_important"]
    yield "important", mm.FasterVLM(important).select(visuals(features, important, **signals)).keep
    yield "fastervlm_mask", mask_of(mm.FasterVLM(k).select(visuals(features, k, **signals)).keep, tokens)


@runner("holov", "holov_overflow")
def holov(arrays: Arrays, params: dict[str, Any]) -> Results:
    features, k = arrays["features"], params["K"]
    stage = mm.HoloV(k, params["num_strips"], params.get("alpha_variance", 0.09), compat="reference")
    selection = stage.select(visuals(features, k, cls_attention=arrays["attention"]))
    assert selection.assign is not None
    real = selection.assign.gather(1, selection.keep) >= 0
    yield "tokens_out", selection.apply(features)
    yield "positions", selection.keep.masked_fill(~real, -1)[0]
