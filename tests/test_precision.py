# SPDX-License-Identifier: Apache-2.0
"""Comparisons are no narrower than what they compare: tokens that differ behind the seventh digit only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmcompress as mm
from mmcompress.ops.pivots import least_similar
from mmcompress.ops.precision import wide
from mmcompress.ops.relevance import mean_cosine

from . import tiny


def near(n: int, seed: int, gap: float = 1e-6) -> Tensor:
    """Tokens [1, n, 16] around one of unit length, so close that their cosines are all 1 in float32."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, n, 16, dtype=torch.float64, generator=generator)
    return F.normalize(torch.ones(1, 1, 16, dtype=torch.float64), dim=-1) + gap * noise


def thinned(features: Tensor, order: list[int], left: int, step: int) -> set[int]:
    """vispruner's rest in float64, by loops."""
    unit = F.normalize(features.double(), dim=-1)
    table = (unit @ unit.T).tolist()
    while len(order) > left:
        even, odd = order[::2], order[1::2]
        alike = sorted(range(len(even)), key=lambda i: (-max(table[even[i]][j] for j in odd), i))
        gone = alike[: min(step, len(order) - left, len(even))]
        order = [even[i] for i in alike[len(gone) :]] + odd
    return set(order)


@pytest.mark.parametrize("seed", range(6))
def test_vispruner_compares_in_the_type_of_the_features(seed: int) -> None:
    features = near(64, seed, 1e-5)
    score = torch.rand(1, 64, generator=torch.Generator().manual_seed(seed))
    signals = {"cls_attention": score, "encoder_features": features}
    seen = mm.Visuals(features, mm.Layout.raster(1, 8, 8), 24, signals)
    kept = mm.VisPruner(keep=24, important=0.25, step=4).select(seen).keep[0].tolist()
    order = score[0].sort(descending=True, stable=True).indices.tolist()
    assert set(kept) == set(order[:6]) | thinned(features[0], order[6:], 18, 4)


def test_shared_comparisons_see_the_eighth_digit() -> None:
    features, none = near(40, 7), torch.zeros(1, 0, dtype=torch.int64)
    unit = F.normalize(features, dim=-1)
    assert torch.equal(
        least_similar(features, features[:, :1], none, [5])[0], (unit[0] @ unit[0, 0]).argsort(stable=True)[:5]
    )
    cosine = mean_cosine(features, features[:, :3])
    torch.testing.assert_close(cosine, (unit @ unit[:, :3].transpose(1, 2)).mean(2), rtol=1e-14, atol=0)
    assert wide(features.half()).dtype == torch.float32 and wide(features.bfloat16(), features).dtype == torch.float64


METHODS = (
    "vispruner", "prumerge", "prumerge(plus=True)", "holov", "cen_prune", "divprune", "dart", "vmtc", "visionzip", "sparsevlm",
    "transprune", "token_correlation", "hiprune", "fopru", "fastv(layer=2, keep=0.5)", "aim", "mmtok",
)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_methods_run_on_a_float64_model(method: str) -> None:
    model = tiny.build(dtype=torch.float64)
    try:
        mm.compress(model, method)
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert model(**tiny.prompts(model, tiny.RAGGED)).logits.dtype == torch.float64
