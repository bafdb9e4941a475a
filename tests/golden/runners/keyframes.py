# SPDX-License-Identifier: Apache-2.0
"""keyframes: which frames of a video AKS chooses by their scores, several videos in a case."""

from __future__ import annotations

from typing import Any

import torch

from mmcompress.ops.keyframes import keyframes, leaves

from ..form import Arrays, Results, runner


@runner("keyframes")
def chosen(arrays: Arrays, params: list[dict[str, Any]]) -> Results:  # type: ignore[misc]
    for i, given in enumerate(params):
        scores, frames = arrays[f"scores{i}"].tolist(), arrays[f"frames{i}"]
        assert len(scores) == given["candidates"]
        most, settings = given["max_frames"], (given["t1"], given["max_depth"], given["t2"])
        kept = keyframes(scores, most, "aks", *settings, compat="reference")
        low, high = min(scores), max(scores)
        level = [(score - low) / (high - low) for score in scores]
        found = leaves(level, most, *settings) if len(scores) >= most else []
        results = {
            f"selected{i}": frames[kept] if kept else torch.empty(0),
            f"leaf_depth{i}": torch.tensor([leaf.depth for leaf in found]),
            f"leaf_start_len{i}": torch.tensor([[int(frames[leaf.start]), leaf.length] for leaf in found]),
        }
        for name, found_ in results.items():
            if len(found_) or len(arrays[name]):
                yield name, found_
