# SPDX-License-Identifier: Apache-2.0
"""ToMe inside the tower: against the same blocks run by hand on the short sequence, with the paper's steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmcompress as mm
from mmcompress.budget import exact_merge_schedule, resolve
from mmcompress.ops import bipartite_match

from . import families
from .families import FAMILIES, PINPOINTS, QWEN, VIDEO_FAMILIES
from .reference import captured
from .tiny import GREEDY, RAGGED, build, prompts


def paper(
    model: Any, pixels: Tensor, schedule: list[int], proportional: bool, maps: list[tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, Tensor]:
    """Output of the feature block after merging, [n, T, C], and which token of it each tower token is in, [n, T0].

    maps takes of each block the mean of the attention over heads [n, T, T], and which of these T each tower token is in.

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
        if maps is not None:
            maps.append((logits.softmax(-1).mean(1), source))
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
    """The budget chains, and a later stage reads the CLS attention of a cluster: that of the feature block."""
    model = mm.compress(build(), "tome(keep=0.5) >> visionzip(keep=0.5, contextual=0)")
    inputs = prompts(model, RAGGED)
    model(**inputs)
    visuals, maps = mm.trace(model).visuals, list[tuple[Tensor, Tensor]]()
    assert [v.kept for v in visuals] == [4, 4, 4]
    mm.uncompress(model)
    paper(model, inputs["pixel_values"], exact_merge_schedule(16, 8, 3, 1), True, maps)
    attention, source = maps[-1]
    for i, visual in enumerate(visuals):
        of_patches = attention[i, 0, source[i, 1:]]
        decision = visual.span.decisions[-1]
        clusters = decision.before.keep[visual.span.selection_row]
        assert decision.scores is not None
        assert torch.allclose(decision.scores[visual.span.selection_row], of_patches[clusters], atol=1e-6)
        best = of_patches[clusters].argsort(descending=True, stable=True)[:3]  # CLS is the fourth
        assert set(clusters[best].tolist()) <= set(visual.kept_cells().tolist())


def test_flash_attention_with_proportional_bias_is_refused() -> None:
    model = build()
    model.config.vision_config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotImplementedError, match=r"proportional.*flash_attention_2.*proportional=False"):
        mm.compress(model, "tome", keep=0.5)
    assert not hasattr(model, "_mmcompress_engine")


# ---------------------------------------------------------------------- every family
@torch.no_grad()
@pytest.mark.parametrize("plan", ["tome(keep=0.5)", "tome(keep=0.25)", "tome(keep=5)"])
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("family", FAMILIES)
def test_clusters_are_tokens_with_equal_features(family: str, kind: str, plan: str) -> None:
    """The facade shows a cluster at all its members: those that the selection calls merged have equal LLM tokens, others
    have not, and as many are left as the plan says."""
    if kind == "video" and family not in VIDEO_FAMILIES:
        pytest.skip("no video in this family")
    model = families.build(family)
    part = families.image(family, True) if kind == "image" else families.video(family)
    inputs = families.prompts(model, family, [[4, part, 3]])
    mm.compress(model, plan)
    with captured(model) as seen:  # the hooks of this one see what came from the encoder
        model(**inputs)
    (visual,) = mm.trace(model).visuals
    views, per_view = len(visual.layout.views), visual.layout.views[0].cells
    if family.startswith("internvl") or family in QWEN:
        assert visual.kept == views * resolve(5 if "=5" in plan else float(plan[10:-1]), per_view)
    assert visual.kept == len(visual.kept_cells())
    mm.uncompress(model)
    assert seen["inputs_embeds"].shape[1] == inputs["input_ids"].shape[1] - visual.tokens + visual.kept
    tokens = features_of(model, plan, inputs)[visual.layout.patch_tokens()]
    assign = visual.selection.assign
    assert assign is not None
    if (kind == "video" and family in PINPOINTS) or (family in PINPOINTS and visual.tokens != len(tokens)):
        return  # pooling mixes clusters
    same = (tokens[:, None] - tokens[None]).abs().amax(-1) < 1e-5
    assigned = assign[0][:, None] == assign[0][None]
    there = (assign[0] >= 0)[:, None] & (assign[0] >= 0)[None]
    assert (same | ~assigned | ~there)[there].all()
    if family not in PINPOINTS:  # cropped tiles can have clusters that more than one token is kept of
        assert torch.equal(same[there], assigned[there])


def features_of(model: Any, plan: str, inputs: dict[str, Tensor]) -> Tensor:
    """All LLM tokens of the first visual as the compressed encoder gives them."""
    pixels = next(n for n in inputs if n.startswith("pixel_values"))  # by position: 5.17 has other names for it
    more = {n: inputs[n] for n in inputs if n.startswith(("image_", "video_"))}
    encode = model.model.get_video_features if pixels == "pixel_values_videos" else model.model.get_image_features
    with mm.compressed(model, plan):
        output = encode(inputs[pixels], **more, return_dict=True).pooler_output
    return torch.cat([features.flatten(0, -2) for features in output])  # 5.17 keeps the frames of NeXT-Video apart


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_nothing_changes_nothing_in_any_family(family: str) -> None:
    model = families.build(family)
    inputs = families.prompts(model, family, [[5, families.image(family), 4], [3, families.image(family, True), 6]])
    logits = model(**inputs).logits
    with mm.compressed(model, "tome", r=0):
        assert torch.equal(model(**inputs).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in PINPOINTS])
def test_equal_pictures_merge_without_a_trace(family: str) -> None:
    """All patches alike and no positions: merging with proportional attention, or without, gives the same tokens."""
    model = families.build(family)
    for name, parameter in model.named_parameters():
        if "position_embedding" in name or "pos_embed" in name:
            parameter.zero_()
    inputs = families.prompts(model, family, [[4, families.image(family), 3]])
    inputs["pixel_values"] = torch.ones_like(inputs["pixel_values"]) * 0.3
    if family in QWEN:
        inputs["pixel_values"] = inputs["pixel_values"][:1].expand_as(inputs["pixel_values"]).clone()
    stock = features_of(model, "tome(r=0)", inputs)
    merged = features_of(model, "tome(keep=0.5)", inputs)
    assert (stock - merged).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", [*QWEN, "internvl"])
def test_whole_units_run_in_the_blocks(family: str) -> None:
    """Blocks really see fewer patches, in multiples of the 2x2 units; segments of packed pictures shrink each by itself."""
    model = mm.compress(families.build(family), "tome(keep=0.5)")
    inputs = families.prompts(model, family, [[4, families.image(family), 3, families.image(family, True), 2]])
    lengths: list[int] = []
    for block in model._mmcompress_engine.facade.blocks:
        block.attention.register_forward_pre_hook(
            lambda m, a, k: lengths.append((a[0] if a else k["hidden_states"]).shape[-2]), with_kwargs=True
        )
    model(**inputs)
    whole = lengths[0]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < whole
    unit_tokens = [n if family in QWEN else n - 1 for n in lengths]
    assert all(n % 4 == 0 for n in unit_tokens)


@torch.no_grad()
def test_proportional_attention_that_a_family_cannot_take_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"proportional.*Qwen2-VL.*proportional=False"):
        mm.compress(families.build("qwen3_vl"), "tome(keep=0.5, proportional=True)")
