# SPDX-License-Identifier: Apache-2.0
"""ToMe inside the tower: against the same blocks run by hand on the short sequence, with the paper's steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmcompress as mm
from mmcompress.budget import exact_merge_schedule
from mmcompress.ops import bipartite_match

from .tiny import GREEDY, RAGGED, build, prompts


def paper(model: Any, pixels: Tensor, schedule: list[int], proportional: bool) -> tuple[Tensor, Tensor]:
    """Output of the feature block after merging, [n, T, C], and which token of it each tower token is in, [n, T0].

    Attention with log(size), residual, merge on the keys, MLP: written out with one-hot matrices.
    """
    tower = model.model.vision_tower
    clip = hasattr(tower, "pre_layrnorm")
    x = tower.embeddings(pixels)
    x = tower.pre_layrnorm(x) if clip else x
    size = torch.ones(x.shape[:2])
    source = torch.arange(x.shape[1]).expand(x.shape[:2])
    for layer, r in zip(tower.encoder.layers, schedule, strict=False):
        attention = layer.self_attn
        normed = layer.layer_norm1(x)
        q, k, v = (
            project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = q @ k.transpose(2, 3) * attention.scale
        if proportional:
            logits = logits + size.log()[:, None, None]
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + attention.out_proj(mixed)
        if r:
            target, count = bipartite_match(k.mean(1), r, int(clip))
            table = F.one_hot(target, count).float().transpose(1, 2) * size[:, None]
            x, size = table @ x / table.sum(-1, keepdim=True), table.sum(-1)
            source = target.gather(1, source)
        x = x + layer.mlp(layer.layer_norm2(x))
    return x, source


@torch.no_grad()
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("proportional", [True, False])
def test_tome_equals_the_paper_by_hand(tower: str, attention: str, proportional: bool) -> None:
    model = build(tower, attention=attention)
    inputs = prompts(model, RAGGED)
    protected = 1 if tower == "clip" else 0
    with mm.compressed(model, mm.ToMe(r=(3, 4, 2), proportional=proportional)):
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    expected, source = paper(model, inputs["pixel_values"], [3, 4, 2], proportional)
    full = expected.gather(1, source[..., None].expand(-1, -1, expected.shape[-1]))
    assert expected.shape[1] == 16 + protected - 9
    assert (states[3] - full).abs().max() < 1e-4


@torch.no_grad()
def test_merging_nothing_changes_nothing() -> None:
    model = build()
    inputs = prompts(model, RAGGED)
    logits = model(**inputs).logits
    with mm.compressed(model, "tome", r=0):
        assert torch.equal(model(**inputs).logits, logits)


@torch.no_grad()
def test_blocks_run_on_fewer_tokens() -> None:
    model = mm.compress(build(), mm.ToMe(r=(3, 4, 2)))
    lengths: list[int] = []
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda m, a, k: lengths.append(k["hidden_states"].shape[1]), with_kwargs=True
        )
        layer.mlp.register_forward_pre_hook(lambda m, a: lengths.append(a[0].shape[1]))
    model(**prompts(model, RAGGED))
    assert lengths == [17, 14, 14, 10, 10, 8, 8, 8]


@torch.no_grad()
def test_merged_patches_leave_the_llm_too() -> None:
    """One token per cluster enters the LLM, at its median member; all members are assigned to it."""
    model = mm.compress(build(), "tome", keep=7)
    inputs = prompts(model, RAGGED)
    generated = model.generate(**inputs, **GREEDY)
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 6
    visuals = mm.trace(model).visuals
    mm.uncompress(model)  # the reference runs the same modules
    _, source = paper(model, inputs["pixel_values"], exact_merge_schedule(16, 7, 3, 1), True)
    for i, visual in enumerate(visuals):
        clusters = source[i, 1:].tolist()
        members = {c: [slot for slot, other in enumerate(clusters) if other == c] for c in clusters}
        medians = sorted(m[(len(m) - 1) // 2] for m in members.values())
        assert visual.kept == 7 == len(medians)
        assert visual.kept_cells().tolist() == medians
        assign = visual.selection.assign
        assert assign is not None
        for slot, c in enumerate(clusters):
            m = members[c]
            assert medians[int(assign[0, slot])] == m[(len(m) - 1) // 2]


@torch.no_grad()
def test_later_stages_see_clusters_and_their_signals() -> None:
    """tome >> visionzip: CLS attention of a cluster stands at all its members, the budget chains."""
    model = mm.compress(build(), "tome(keep=0.5) >> visionzip(keep=0.5)")
    inputs = prompts(model, RAGGED)
    model(**inputs)
    assert [v.kept for v in mm.trace(model).visuals] == [4, 4, 4]


def test_flash_attention_with_proportional_bias_is_refused() -> None:
    model = build()
    model.config.vision_config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotImplementedError, match=r"proportional.*flash_attention_2.*proportional=False"):
        mm.compress(model, "tome", keep=0.5)
    assert not hasattr(model, "_mmcompress_engine")
