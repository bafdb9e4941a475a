# SPDX-License-Identifier: Apache-2.0
"""fopru, flash_compression."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import mmcompress as mm
from mmcompress.ops.latents import latent_pool
from mmcompress.ops.marginals import attention_marginals

from ..form import Arrays, Results, runner, visuals


@runner("fopru")
def fopru(arrays: Arrays, params: dict[str, Any]) -> Results:
    tokens, side = arrays["tokens"], params["side"]
    layout = mm.Layout.raster(1, side, tokens.shape[1] // side)
    for score, kind in (("logit", "logits"), ("prob", "attention")):
        received, given = attention_marginals(
            arrays["query"], arrays["key"], params["scale"], prefix=1, softmax=score == "prob"
        )
        signals = {f"received_{kind}": received, f"given_{kind}": given}
        yield f"{score}_received", received
        yield f"{score}_given", given
        counts = {"rank": [(r, int(tokens.shape[1] * r)) for r in params["rank_ratios"]]}
        counts["row"] = [(r, int(side * r) * layout.views[0].grid[1]) for r in params["row_ratios"]]
        for strategy, wanted in counts.items():
            for ratio, count in wanted:
                stage = mm.FoPru(keep=max(1, count), strategy=strategy, score=score)
                seen = mm.Visuals(tokens, layout, stage.budget(tokens.shape[1]), signals)
                selection = stage.select(seen)
                assert selection.scores is not None
                name = f"{score}_{strategy}_{round(100 * ratio)}"
                yield f"{name}_idx", selection.keep
                if strategy == "rank":
                    yield f"{name}_out", seen.take(selection).features
        yield f"{score}_significance", selection.scores
        yield f"{score}_uses_received", (selection.scores == received).all(1)


@runner("flash_compression")
def flash_compression(arrays: Arrays, params: dict[str, Any]) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "queries.safetensors")
        save_file({"queries": arrays["queries"]}, path)
        stage = mm.FlashCompression(keep=params["C"], queries=path)
        selection = stage.select(visuals(arrays["visual"], stage.budget(params["N"])))
    assert selection.rows is not None and selection.scores is not None
    yield "compressed", selection.rows
    weights = latent_pool(arrays["queries"], arrays["visual"])[1]
    yield "weights", weights
    prefix, suffix = (torch.cat([arrays[f"embed_{p}"], arrays[f"hidden_{p}"]], -1) for p in ("pre", "post"))
    prefix, suffix = (torch.nn.functional.linear(x, arrays["fc_w"], arrays["fc_b"]) for x in (prefix, suffix))
    yield "draft_input", torch.cat([arrays["hidden_pre"], selection.rows, suffix], 1)
    yield "draft_input_uniform", torch.cat([prefix, selection.rows, suffix], 1)
