# SPDX-License-Identifier: Apache-2.0
"""globalcom2, hiprune."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from mmcompress.adapters.layouts import AnyRes
from torch import Tensor, nn

import mmcompress as mm
from mmcompress.methods.globalcom2 import LOGITS, GlobalCom2, global_scores
from mmcompress.methods.hiprune import HiPrune
from mmcompress.runtime.adapter import Adapter, Block, Encoded
from mmcompress.runtime.scope import ENCODE, Scope, enter, leave
from mmcompress.runtime.signals import VisionTap

from ..form import Arrays, Results, mask_of, runner, visuals


class Heads(nn.Module):
    """Queries and keys of an attention module, which is all that its signals need."""

    def __init__(self, wq: Tensor, wk: Tensor) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(*w.T.shape, bias=False) for w in (wq, wk))
        self.q.weight.data, self.k.weight.data = wq, wk

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(hidden), self.k(hidden)


class OneBlock(Adapter):
    """An encoder that is one attention module, with a CLS token."""

    prefix = 1

    def __init__(self, module: Heads, heads: int) -> None:
        self.module, self.heads = module, heads

    @property
    def blocks(self) -> list[Block]:
        at, none = self.module, nn.Identity()
        scale = (at.q.out_features // self.heads) ** -0.5
        return [Block(at, none, at, none, none, self.heads, scale, at.q, at.k)]

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        return list(rows)

    @torch.no_grad()
    def signal(self, name: str, hidden: Tensor) -> Tensor:
        tap = VisionTap(self, self, {name}, None)
        tap.install()
        enter(Scope(self, ENCODE))
        self.module(hidden)
        found = tap.collect(Encoded("image", []), {})[name]
        leave(self, ENCODE)
        return torch.stack(found)


@runner("globalcom2")
def globalcom2(arrays: Arrays, params: dict[str, Any]) -> Results:
    for name, case in params["configs"].items():
        own = {key.removeprefix(f"{name}_"): x for key, x in arrays.items() if key.startswith(f"{name}_")}
        for key, found in one_picture(own, case):
            yield f"{name}_{key}", found
    if "nocls_x" in arrays:
        x = arrays["nocls_x"][None]
        selection = GlobalCom2(1, score="cosine").select(visuals(x, 1, encoder_features=x))
        assert selection.scores is not None
        yield "nocls_score", selection.scores[0]


def one_picture(arrays: Arrays, case: dict[str, Any]) -> Results:
    """What is recorded of one picture; the sequence that the reference makes of it (misplaced where padded) is left out."""
    side, tiles, (width, height) = case["side"], (case["gh"], case["gw"]), case["orig"]
    cut = AnyRes((height, width), ((tiles[0] * side, tiles[1] * side),), side, 1)
    layout = cut.layout()
    if len(layout.views) > 1:  # tiles that are nothing but padding count too
        seams = [
            tuple(float(min(max(start - pad, 0), shown)) for start in range(side, count * side, side))
            for count, pad, shown in zip(tiles, cut.pads, cut.shown, strict=True)
        ]
        layout = replace(layout, views=(layout.views[0], replace(layout.views[1], seams=(seams[0], seams[1]))))
    crops, patches = tiles[0] * tiles[1], side * side
    logits = OneBlock(Heads(arrays["wq"], arrays["wk"]), case["H"]).signal(LOGITS, arrays["hidden"])
    yield "cls_logit", logits

    score, features = cut.pack(logits[..., None])[:, 0][None], cut.pack(arrays["features"])[None]
    ids = cut.pack(torch.arange((1 + crops) * patches).view(1 + crops, patches, 1), nearest=True)[:, 0] - patches
    shown, crop_by_crop = ids[patches:], ids[patches:].argsort()
    valid = torch.zeros(crops * patches, dtype=torch.bool).index_fill(0, shown, True).view(crops, patches)
    yield "unpad_mask", valid
    yield "valid_count", valid.sum(1)
    yield "local_score", score[0, patches:][crop_by_crop]
    yield "global_score", global_scores(layout.views, score)[0, patches:][crop_by_crop]
    k = len(arrays["thumb_idx"]) + int(arrays["kept_count"].sum())
    stage = GlobalCom2(k, tau=case["tau"])
    yield "crop_ratio", (case["R"] * stage.weights(layout.views, score)[0]).clamp_max(1)
    selection = stage.select(mm.Visuals(features, layout, k, {LOGITS: score}))
    assert selection.scores is not None
    kept, (mixed,) = selection.keep[0], selection.scores
    best = kept[mixed[kept].argsort(descending=True, stable=True)]
    thumbnail, others = best[best < patches], ids[best[best >= patches]]
    yield "thumb_idx", thumbnail
    yield "thumb_out", features[0, thumbnail]
    yield "kept_count", torch.bincount(others // patches, minlength=crops)
    yield "kept_true", others[(others // patches).argsort(stable=True)]
    sequence = torch.full((layout.tokens,), -1)
    place = torch.tensor(layout.patch_tokens())
    sequence[place] = ids
    stays = torch.ones(layout.tokens, dtype=torch.bool)
    stays[place] = mask_of(selection.keep, layout.cells)[0]
    yield "fixed_seq", sequence[patches:][stays[patches:]]


@runner("hiprune")
def hiprune(arrays: Arrays, params: dict[str, Any]) -> Results:
    stage = HiPrune(params["per_image"], params["alpha"], params["object_layer"] - 1, clamp="reference")
    middle, deep = (arrays[f"{which}_attention"].mean(1)[:, 1:] for which in ("object", "deep"))
    side = params["grid"]
    given = mm.Visuals(
        torch.zeros(*deep.shape, 1),
        mm.Layout.raster(1, deep.shape[1] // side, side),
        params["per_image"],
        {str(stage.needs[0]): middle, "received_attention": deep},
    )
    kept = stage.select(given).keep
    yield "kept", kept
    yield "mask", mask_of(kept, deep.shape[1])
    yield "anchors", stage.anchors(given)
