# SPDX-License-Identifier: Apache-2.0
"""prumerge (with prumerge_plus), token_correlation: the numbers of tokens that the papers take from the picture."""

from __future__ import annotations

from typing import Any

import torch

from mmcompress.methods.prumerge import PruMerge
from mmcompress.methods.token_correlation import TokenCorrelation
from mmcompress.ops.attention import attention_rows
from mmcompress.ops.correlation import similar_count
from mmcompress.ops.outliers import iqr_threshold

from ..form import Arrays, Results, runner


def merged(plus: bool, arrays: Arrays, params: dict[str, Any]) -> Results:
    stage = PruMerge(plus=plus, neighbours=params["neighbours"])
    attention, keys = arrays["cls_attention"], arrays["keys"]
    joint = attention_rows(arrays["query_cls"][:, None, None], keys[:, None], keys.shape[2] ** -0.5)
    yield "cls_attention", joint[:, 0, 0, 1:]
    ratio = None if params["adaptive"] else params["given_ratio"]
    centres = stage.adaptive(attention, ratio, compat="reference")
    yield "ratio", torch.tensor(stage.outlier_share(attention) if ratio is None else ratio)
    yield "centers", centres
    yield "tokens_out", stage.merge(arrays["features"], attention, keys[:, 1:], centres)[0]


@runner("prumerge")
def prumerge(arrays: Arrays, params: dict[str, Any]) -> Results:
    yield from merged(False, arrays, params)


@runner("prumerge_plus")
def prumerge_plus(arrays: Arrays, params: dict[str, Any]) -> Results:
    yield from merged(True, arrays, params)


@runner("token_correlation")
def token_correlation(arrays: Arrays, params: dict[str, Any]) -> Results:
    stage = TokenCorrelation(tau=params["tau"], alpha=params["count_limit"], outlier=params["iqr_factor"])
    keys, low, deep = arrays["keys"], arrays["attn_low"], arrays["attn_deep"]
    redundant = stage.redundant(keys)
    kept, tokens = stage.adaptive(arrays["features"], keys, low, deep)
    yield "similar_count", similar_count(keys, stage.tau)
    yield "redundant", redundant
    yield "density", 1 - redundant.float().mean(1)
    yield "iqr_threshold", iqr_threshold(deep, stage.outlier)[:, 0]
    yield "global_mask", stage.outliers(deep)
    yield "local_count", stage.local_count(keys)
    yield "kept_count", kept.sum(1)
    yield "kept_idx", kept.nonzero()[:, 1]
    yield "merged", tokens[kept]
