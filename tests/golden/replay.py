# SPDX-License-Identifier: Apache-2.0
"""One runner per method: recorded inputs through the library's public functions, compared with recorded outputs.

Indices have to be equal, values within 1e-5 relative to the largest value of the array.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import mmcompress as mm
from mmcompress.budget import merge_schedule, resolve
from mmcompress.ops import max_min_diverse, merge_mean, proportional_bias
from mmcompress.ops.diversity import nearest_distance

Arrays = dict[str, Tensor]
Results = Iterator[tuple[str, Tensor]]


def visuals(features: Tensor, k: int, **signals: Tensor) -> mm.Visuals:
    """Visuals [U, N, D] in one row of cells, with nothing between encoder and LLM."""
    return mm.Visuals(features, mm.Layout.raster(1, 1, features.shape[1]), k, signals, road=lambda x: x)


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


def divprune(arrays: Arrays, params: dict[str, Any]) -> Results:
    tokens = arrays["visual_tokens"][None]
    stage = mm.DivPrune(keep=params["ratio"])
    k = stage.budget(tokens.shape[1])
    yield "selected_order", max_min_diverse(tokens, k)[0]
    yield "selected_sorted", stage.select(visuals(tokens, k)).keep[0]
    yield "first_scores", nearest_distance(F.normalize(tokens, dim=-1))[0]


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


RUNNERS: dict[str, Callable[[Arrays, dict[str, Any]], Results]] = {
    "divprune": divprune,
    "fastv": fastv,
    "tome": tome,
    "visionzip": visionzip,
}


def cases(folder: Path) -> list[tuple[str, str, Path]]:
    """(method, case, path) of every `<method>_<case>.npz` in `folder`."""
    return [(*path.stem.rsplit("_", 1), path) for path in sorted(folder.glob("*_*.npz"))]  # type: ignore[misc]


def replay(name: str, path: Path) -> str:
    """Run one case: "ok", or what differs."""
    if name not in RUNNERS:
        return "skipped: no runner for this name"
    with np.load(path) as loaded:
        arrays = {key: torch.from_numpy(np.asarray(loaded[key])) for key in loaded.files}
    params = json.loads(path.with_suffix(".json").read_text())["params"]
    wrong = [text for key, found in RUNNERS[name](arrays, params) if (text := compare(key, found, arrays[key]))]
    return " | ".join(wrong) or "ok"


def compare(key: str, found: Tensor, expected: Tensor) -> str:
    """What differs between an array and the recorded one, "" if nothing does."""
    if found.shape != expected.shape:
        return f"{key}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        wrong = int((found != expected).sum())
        return f"{key}: {wrong} of {expected.numel()} indices differ" if wrong else ""
    error = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    return f"{key}: off by {error:.1e} of the largest value" if not error <= 1e-5 else ""
