# SPDX-License-Identifier: Apache-2.0
"""mmtok, cdpruner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from mmcompress.kernels.coverage import max_coverage
from mmcompress.kernels.diverse import greedy_map

import mmcompress as mm
from mmcompress.ops.relevance import direction
from mmcompress.visuals import View

from ..form import Arrays, Results, mask_of, runner, visuals


@runner("mmtok")
def mmtok(arrays: Arrays, params: dict[str, Any]) -> Results:
    stage = mm.MMTok(params["k"], params["alpha"], params["tv_temp"], params["vv_temp"])
    tokens, excluded = arrays["projected"][None], set(arrays["excluded"].tolist())
    seen = visuals(
        tokens,
        stage.budget(tokens.shape[1]),
        encoder_features=arrays["vision"][None],
        text_embeddings=arrays["text"][None],
    )
    # a view of one cell for every token: inside the picture, or beside it where there is padding
    inside, beside = (0.0, 0.0, 1.0, 1.0), (1.0, 0.0, 2.0, 1.0)
    views = tuple(View((1, 1), beside if i in excluded else inside) for i in range(tokens.shape[1]))
    padding = torch.tensor([[i in excluded for i in range(tokens.shape[1])]])
    table = stage.coverage(seen)
    yield "combined", table[0]
    yield "selected_order", max_coverage(table, stage.keep, padding)[0]
    yield "kept", stage.select(replace(seen, layout=mm.Layout(views))).keep[0]


@runner("cdpruner")
def cdpruner(arrays: Arrays, params: dict[str, Any]) -> Results:
    stage = mm.CDPruner(params["T"], compat="reference")
    tokens, text = arrays["projected_features"], arrays["text_embeds"]
    joint = {"clip_patches": arrays["image_embeds"], "clip_text": direction(text).expand(len(tokens), -1)}
    seen = visuals(tokens, stage.budget(tokens.shape[1]), **joint)
    quality = stage.relevance(seen)
    yield "relevance", quality
    yield "selected_order", greedy_map(tokens, quality.log(), seen.k)
    yield "mask", mask_of(stage.select(seen).keep, tokens.shape[1])
