# SPDX-License-Identifier: Apache-2.0
"""dyvte, tokenflex, p_mod, gamma_mod: what has to be trained."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmcompress as mm
from mmcompress.learn import GammaMoD, PMoD, attention_rank
from mmcompress.learn.depth import Routed, Seen, gathered, put_back
from mmcompress.methods.dyvte import ExitRouters
from mmcompress.methods.tokenflex import TokenFlexProjector
from mmcompress.ops.exits import agreement, answer_losses, exit_features, exit_is_safe
from mmcompress.ops.flexpool import columns_of, enlarged, flexible_pool
from mmcompress.runtime.packing import pack, renumbered
from mmcompress.selection import gather

from ..form import Arrays, Results, runner


@runner("dyvte")
def dyvte(arrays: Arrays, params: dict[str, Any]) -> Results:
    hidden, layers = arrays["hidden"], params["layers"]
    begin, length = params["visual_start"], params["seq"]
    end = begin + params["n_visual"]
    routers = ExitRouters(layers, params["hidden"], arrays["w1"].shape[1])
    routers.load_state_dict({"w1": arrays["w1"], "w2": arrays["w2"]})
    with torch.no_grad():
        logits = torch.cat([routers(exit_features(hidden[i : i + 1, end:]), i) for i in range(layers)])
    yield "gate_logits", logits
    leaves = mm.DyVTE().exits(logits).long()
    out = int(leaves.argmax()) if bool(leaves.any()) else -1
    yield "exit_layer", torch.tensor(out)
    places = torch.arange(length)[None].clone()
    if out >= 0:
        places[:, begin:end] = -1
    yield "keep_after_exit", pack(places, [int((places >= 0).sum())]).source[0]
    full, left, labels = arrays["logits_full"], arrays["logits_exit"], arrays["labels"]
    losses = [answer_losses(x, labels) for x in (full, left)]
    same = agreement(full, left, labels, compat="reference")
    yield "loss_full", losses[0]
    yield "loss_exit", losses[1]
    yield "agreement", same
    yield "gate_label", exit_is_safe(same, *losses, params["agreement_threshold"], params["loss_factor"])


@runner("tokenflex")
def tokenflex(arrays: Arrays, params: dict[str, Any]) -> Results:
    side, x = params["grid_side"], arrays["x"]
    projector = TokenFlexProjector(params["vit_dim"], params["llm_dim"], params["mlp_ratio"])
    names = {"w_layernorm": "layernorm", "w_f1": "f1", "w_f2": "f2", "w_g": "g"}
    state = {f"{to}.{kind}": arrays[f"{old}_{kind}"] for old, to in names.items() for kind in ("weight", "bias")}
    projector.load_state_dict(state)
    for count in params["token_counts"]:
        if count <= side**2:
            stage = mm.TokenFlex(keep=count).holding(projector)
            layout = mm.Layout.raster(1, side, side)
            seen = mm.Visuals(x.new_zeros(*x.shape[:2], 1), layout, stage.budget(side**2), {"encoder_features": x})
            rows, columns = stage.select(seen).rows, columns_of(count, side, side)
        else:  # more tokens than patches: no stage of a plan can ask for that
            columns = (math.isqrt(count),) * math.isqrt(count)
            rows = projector(flexible_pool(x.unflatten(1, (side, side)), columns))
        assert rows is not None
        yield f"out_{count}", rows.detach()
        height, width = len(columns), columns[0]
        yield f"grid_{count}", torch.tensor([enlarged(side, height), enlarged(side, width), height, width])


def stand_in(x: Tensor, arrays: Arrays, seen: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """The recorded stand-in of a decoder layer on states [B, M, D]; seen [B, M, M]: which pairs; weights [B, M] of the MLP."""
    logits = (x @ arrays["qk"]) @ x.transpose(1, 2)
    logits = logits if bias is None else logits + bias
    attention = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
    z = x + attention @ x @ arrays["o"]
    return z + weights[..., None] * torch.tanh(z @ arrays["m"])


def through(
    hidden: Tensor, arrays: Arrays, routed: Routed, valid: Tensor, slope: float = 0.0, reindex: bool = False
) -> Tensor:
    """The stand-in layer, run by the tokens that a router chose, as a converted layer is."""
    packed = gathered(routed.runs, routed.runs.sum(1).tolist())
    places = torch.where(routed.runs, torch.arange(hidden.shape[1]), -1)
    positions, _ = renumbered(torch.arange(hidden.shape[1])[None], places, packed, valid, reindex)
    real = torch.ones_like(packed.source, dtype=torch.bool) if packed.valid is None else packed.valid
    seen = torch.ones(packed.source.shape[1], packed.source.shape[1], dtype=torch.bool).tril() & real[:, None]
    bias = slope * (positions[:, :, None] - positions[:, None]).float()
    made = stand_in(gather(hidden, packed.source), arrays, seen, routed.mlp.gather(1, packed.source), bias)
    return put_back(hidden, made, packed, routed.passing)


@runner("p_mod")
def p_mod(arrays: Arrays, params: dict[str, Any]) -> Results:
    _, scale, one = params["weight_norm"].split("_")
    assert float(one) == 1
    config = PMoD(scale=float(scale))
    depth = len(arrays["prd_cos_raw"])
    yield "prd_cos_raw", torch.tensor(config.raw(depth))
    yield "prd_linear_raw", torch.tensor(PMoD(schedule="linear").raw(depth))
    converted = set(config.converted(depth))
    yield "prd_is_mod_layer", torch.tensor([i in converted for i in range(depth)])
    ratios = config.ratios(depth)
    yield "prd_effective", torch.tensor(ratios)
    yield "prd_tokens_576", torch.tensor([config.kept(576, ratio) for ratio in ratios])
    hidden, visual, valid = arrays["hidden"], arrays["target_mask"], arrays["attention_mask"]
    logits = F.linear(hidden, arrays["router_w"][None], arrays["router_b"])[..., 0]
    yield "router_logits", logits
    yield "weights", torch.where(visual, config.weights(logits), torch.ones(()))
    routed = config.choose(Seen.of(visual, valid), logits, params["ratio"])
    yield "kept_visual_mask", routed.runs & visual
    yield "output", through(hidden, arrays, routed, valid, slope=0.05)


@runner("gamma_mod")
def gamma_mod(arrays: Arrays, params: dict[str, Any]) -> Results:
    hidden, config = arrays["hidden"], GammaMoD(threshold=params["infer_threshold"])
    valid = torch.ones(hidden.shape[:2], dtype=torch.bool)
    prefix = torch.arange(hidden.shape[1]).expand(len(hidden), -1) < params["prefix_len"]
    logits = hidden @ arrays["router_w"].T
    yield "route_prob", logits.softmax(-1)[..., 1]
    training = config.choose(Seen.of(prefix, valid, training=True), logits, compat="reference")
    packed = gathered(training.runs, training.runs.sum(1).tolist())
    assert training.loss is not None
    yield "top_k", torch.tensor(packed.source.shape[1])
    yield "selected", packed.source
    yield "output_train", through(hidden, arrays, training, valid, reindex=True)
    yield "aux_loss", training.loss
    inference = config.choose(Seen.of(prefix[:1], valid[:1]), logits[:1])
    yield "selected_infer_mask", inference.runs[0]
    yield "output_infer", through(hidden[:1], arrays, inference, valid[:1], reindex=True)[0]
    ranks = attention_rank(arrays["arank_attention"])
    yield "arank_per_head", ranks
    yield "arank", ranks.float().mean()
