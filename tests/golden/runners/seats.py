# SPDX-License-Identifier: Apache-2.0
"""seats: windows of time with and without attention, and the ratios of its later drops."""

from __future__ import annotations

from typing import Any

import torch

import mmcompress as mm
from mmcompress.budget import resolve
from mmcompress.methods.seats import Seats, keep_ratios

from ..form import Arrays, Results, mask_of, runner


@runner("seats")
def seats(arrays: Arrays, params: dict[str, Any]) -> Results:
    tokens = params["sec_in_audio_window"] * params["audio_tokens_per_second"]
    layouts = {
        "video": mm.Layout.raster(params["T"], params["rows"], params["cols"]),
        "audio": mm.Layout((mm.View((1, params["audio_tokens"]), role="audio"),)),
    }
    for name, layout in layouts.items():
        stage = Seats(params[f"{name}_ratio"], params["grid_in_window"], tokens)
        features, attention = arrays[name][None], arrays[f"{name}_attention"][None]
        window, k = torch.tensor(stage.windows(layout)), resolve(stage.keep, layout.cells)
        edges = [0, *(window.diff().nonzero()[:, 0] + 1).tolist(), layout.cells]
        yield f"{name}_windows", torch.tensor([edges[:-1], edges[1:]]).T
        for suffix, signals in (("", {"received_attention": attention}), ("_no_attention", {})):
            if name + "_keep" + suffix in arrays:
                chosen = stage.select(mm.Visuals(features, layout, k, signals))
                yield f"{name}_keep{suffix}", mask_of(chosen.keep, layout.cells)[0]
    rows = []
    for row in arrays["schedule"]:
        layers, gone, *drops = (int(x) for x in row[[0, 3, 4, 5, 6]])
        ratios = keep_ratios(layers, drops, gone, params["encoder_ratio_scale"])
        rows.append([*row[:7].tolist(), *ratios, *ratios])
    yield "schedule", torch.tensor(rows)
