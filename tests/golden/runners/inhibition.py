# SPDX-License-Identifier: Apache-2.0
"""var_attention_sink, vmtc_cmai (its attention masks; its tokens are elsewhere)."""

from __future__ import annotations

from typing import Any

import torch

from mmcompress.ops.focus import focus, unfocused
from mmcompress.ops.sinks import find_sinks, image_centric, redistribute, sink_magnitude

from ..form import Arrays, Results, runner


@runner("var_attention_sink")
def var_attention_sink(arrays: Arrays, params: dict[str, Any]) -> Results:
    dims = tuple(params["sink_dims"])
    rho, p = 1 - params["rho"], 1 - params["p"]  # the reference counts sinks, and what is kept
    sinks = find_sinks(arrays["hidden"], dims, params["tau"])[None]
    yield "phi", sink_magnitude(arrays["hidden"], dims)
    yield "sink_indices", sinks[0].nonzero()[:, 0]
    end = params["image_start"] + params["image_len"]
    for name, pairs in (("attn_prefill", "selected_head_query"), ("attn_decode", "selected_head_decode")):
        weights = arrays[name][None]
        columns = torch.arange(weights.shape[-1])
        visual = ((columns >= params["image_start"]) & (columns < end))[None]
        here = torch.nn.functional.pad(sinks, (0, weights.shape[-1] - sinks.shape[1]))
        chosen = image_centric(weights, visual, here, rho, params["min_image_mass"])
        yield pairs, chosen[0].nonzero()
        behind = torch.arange(weights.shape[2]) >= (end if name == "attn_prefill" else 0)
        yield f"{name}_out", redistribute(weights, visual, here, chosen & behind, p)[0]


@runner("vmtc_cmai")
def cmai_results(arrays: Arrays, params: dict[str, Any]) -> Results:
    images, attention = params["image_tokens"], arrays["llm_attn"][None]
    values = focus(attention[:, images:, images:], attention[:, images:, :images])
    yield "focus", values[0]
    yield "inhibit", unfocused(values, torch.ones(1, images, dtype=torch.bool), params["cmai_keep"])[0]
