# SPDX-License-Identifier: Apache-2.0
"""Merged tokens that weigh in attention what they stand for."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import transformers.integrations.flex_attention as integration
from torch import Tensor

import mmcompress as mm
from mmcompress.ops.attention import capped_rows
from mmcompress.plan import as_pipeline, methods
from mmcompress.runtime.cache import PrunedLayer
from mmcompress.stage import Selecting

from .families import FAMILIES, build, prompts
from .reference import captured, masked_keys
from .test_crossed import STAGES, some
from .test_families import GREEDY, IMAGES, KINDS, close, samples, visual_places


def by_hand(model: Any, seen: dict[str, Any], mask: Tensor) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Embeddings and DeepStack levels with the means of cells, which tokens are left, and how many each stands for, by the trace
    of the last call."""
    changed: dict[str, Any] = {"inputs_embeds": seen["inputs_embeds"].clone()}
    levels = [level.clone() for level in seen.get("deepstack_visual_embeds") or []]
    if levels:
        changed["deepstack_visual_embeds"] = levels
        number = seen["visual_pos_masks"].flatten().cumsum(0).view(mask.shape) - 1
    live, mass = mask.bool() & ~visual_places(model, mask.shape), torch.ones(mask.shape)
    for visual in mm.trace(model).visuals:
        places, row = visual.span.patches, visual.row
        assign = visual.selection.assignment(visual.tokens)[0]
        for output, cell in enumerate(visual.kept_cells().tolist()):
            members, at = places[assign == output], places[cell]
            changed["inputs_embeds"][row, at] = seen["inputs_embeds"][row, members].mean(0)
            for level, old in zip(levels, seen.get("deepstack_visual_embeds") or [], strict=True):
                level[number[row, at]] = old[number[row, members]].mean(0)
            live[row, at], mass[row, at] = True, len(members)
    return changed, live, mass


@torch.no_grad()
@pytest.mark.parametrize("cuts", [{}, {1: 0.5, 3: 0.5}])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_equals_stock_with_a_bias_on_the_keys(family: str, kind: str, attention: str, cuts: dict[int, float]) -> None:
    if kind != IMAGES and attention == "eager":
        pytest.skip("videos: sdpa")
    model = build(family, attention=attention)
    inputs = prompts(model, family, samples(family, kind))
    with captured(model) as seen:
        model(**inputs)
    plan = " >> ".join(["voronoi(keep=0.4)", *(f"by_hidden(layer={i}, keep={k})" for i, k in cuts.items())])
    mm.compress(model, plan)
    logits, patches = model(**inputs).logits, visual_places(model, inputs["input_ids"].shape)
    changed, live, mass = by_hand(model, seen, inputs["attention_mask"])
    assert mass.max() > 2
    mm.uncompress(model)
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, **changed}), with_kwargs=True
    )
    alive, expected = masked_keys(model, inputs, cuts, live, patches, mass)
    weightless = masked_keys(model, inputs, cuts, live, patches)[1]
    handle.remove()
    close(logits[alive], expected[alive])
    assert (logits[alive] - weightless[alive]).abs().max() > 0.1


@torch.no_grad()
def test_a_token_of_mass_s_equals_s_copies_of_itself() -> None:
    """In every layer of a stock language model: copies at one position that see each other, against one token with log s."""
    model = build("llava", attention="eager").model.language_model
    generator = torch.Generator().manual_seed(0)
    distinct, sizes = torch.randn(1, 7, 64, generator=generator), torch.tensor([1, 3, 1, 5, 2, 1, 1])
    number = torch.repeat_interleave(torch.arange(7), sizes)
    sees = number[:, None] >= number[None]

    def run(embeds: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        return model(inputs_embeds=embeds, position_ids=positions[None], attention_mask=mask, use_cache=False)[0]

    least = torch.finfo(torch.float32).min
    copies = run(distinct[:, number], number, torch.where(sees, 0.0, least)[None, None])
    bias = sizes.log().expand(7, 7)
    one = run(distinct, torch.arange(7), torch.where(torch.ones(7, 7).tril().bool(), bias, least)[None, None])
    close(copies, one[:, number])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "plan",
    ["voronoi(keep=0.4)", "voronoi(keep=0.4, place=0.5)", "absorb(keep=0.4)", "restore(keep=0.4)", "tome(keep=0.4)"],
)
def test_sizes_sum_to_all_tokens(family: str, plan: str) -> None:
    model = mm.compress(build(family), plan, mass=True)
    model(**prompts(model, family, samples(family)))
    for visual in mm.trace(model).visuals:
        assert visual.sizes.sum() == visual.tokens and len(visual.sizes) == visual.kept
        if "tome" not in plan:
            assert visual.sizes.max() > 1


@torch.no_grad()
def test_stages_in_a_row_add_masses_up() -> None:
    model = build("llava")
    inputs = prompts(model, "llava", samples("llava"))
    mm.compress(model, "voronoi(keep=0.5) >> voronoi(keep=0.5, place=0.5)")
    model(**inputs)
    for visual in mm.trace(model).visuals:
        assert visual.sizes.sum() == visual.tokens
        group = visual.call.groups[0]
        assert group.mass[visual.row].sum() > group.physical - 1
    mm.compress(model, "voronoi(keep=0.5) >> sparsevlm")
    model(**inputs)
    last = mm.trace(model).visuals[0].call.groups[-1]
    assert last.start > 0 and last.mass.max() > mm.trace(model).visuals[0].call.groups[0].mass.max()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_a_cache_with_masses_stands_on_its_own(family: str) -> None:
    """Pickled or copied it decodes as it was; without its engine it says what to do."""
    model = mm.compress(build(family), "voronoi(keep=0.4)")
    inputs = prompts(model, family, samples(family))
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    stream = io.BytesIO()
    torch.save(first.past_key_values, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    step = {
        "input_ids": torch.tensor([[7], [8]]),
        "attention_mask": torch.ones(2, first.sequences.shape[1], dtype=torch.long),
    }
    step["attention_mask"][:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    a, b = (model(**step, past_key_values=copy.deepcopy(cache)).logits for cache in (first.past_key_values, loaded))
    assert torch.equal(a, b)
    bare = copy.deepcopy(first.past_key_values)
    for layer in bare.layers:
        if isinstance(layer, PrunedLayer) and layer.leads:
            layer.ledger.mass = None
    assert (model(**step, past_key_values=bare).logits - a).abs().max() > 1e-2
    mm.uncompress(model)
    with pytest.raises(RuntimeError, match="its tokens weigh what they stand for"):
        model(**step, past_key_values=loaded)


@pytest.mark.slow  # what it imports takes twenty seconds
@torch.no_grad()
def test_flex_attention_takes_masses(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, not compiled."""
    plain = integration.flex_attention

    def run(*args: Any, training: bool = False, **given: Any) -> Any:
        return plain(*args, **given)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", run)
    model = build("llava")
    inputs = prompts(model, "llava", samples("llava"))
    mm.compress(model, "voronoi(keep=0.4)")
    wanted = model(**inputs).logits
    mm.uncompress(model).model.language_model.config._attn_implementation = "flex_attention"
    mm.compress(model, "voronoi(keep=0.4)")
    real = inputs["attention_mask"].bool()
    close(model(**inputs).logits[real], wanted[real], 1e-4)


@torch.no_grad()
def test_signals_behind_merged_tokens_are_those_of_weighed_attention() -> None:
    """FastV behind voronoi keeps what the eager layer, with its masses, attends to most."""
    model = build("llava", attention="eager")
    inputs = prompts(model, "llava", samples("llava"))
    mm.compress(model, "voronoi(keep=0.6) >> fastv(layer=2, keep=0.5)")
    weights: list[Tensor] = []
    attention = model.model.language_model.layers[1].self_attn
    handle = attention.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    model(**inputs)
    handle.remove()
    call = mm.trace(model).visuals[0].call
    for row in range(2):
        source, after = (
            [
                place if real else -1
                for place, real in zip(g.source[row].tolist(), (g.place[row] >= 0).tolist(), strict=True)
            ]
            for g in call.groups
        )
        patches = {int(p) for v in mm.trace(model).visuals if v.row == row for p in v.span.patches}
        columns = [i for i, place in enumerate(source) if place in patches]
        found = weights[0][row, :, -1].mean(0)[columns]
        left = [source[columns[i]] for i in found.argsort(descending=True)[: sum(place in patches for place in after)]]
        assert sorted(left) == sorted(place for place in after if place in patches)


def test_rows_with_a_bias() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    bias, mask = torch.rand(1, 1, 1, 5), torch.rand(1, 1, 3, 5) < 0.8
    mask[..., 0] = True
    logits = (q @ k.transpose(2, 3) * 0.3 + bias).masked_fill(~mask, -torch.inf)
    close(capped_rows(q, k, 0.3, mask, bias=bias), logits.softmax(-1))
    capped = (2 * torch.tanh(q @ k.transpose(2, 3) * 0.15) + bias).masked_fill(~mask, -torch.inf)
    close(capped_rows(q, k, 0.3, mask, softcap=2.0, bias=bias), capped.softmax(-1))


@pytest.mark.parametrize("name", STAGES)
def test_methods_that_merge_say_which_tokens_went_where(name: str) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    found = [stage.select(some(stage, 30, layout)) for layout in (None, mm.Layout.raster(4, 4, 9))]
    merging = [one.assign is not None for one in found]  # a method may merge in videos alone, or in pictures
    assert any(merging) == stage.merging or name == "sparsevlm"


# ---------------------------------------------------------------------- what cannot be
def test_what_cannot_weigh_is_refused() -> None:
    with pytest.raises(ValueError, match="no stage of this plan merges tokens"):
        as_pipeline("divprune", mass=True)
    with pytest.raises(ValueError, match="mass='yes': choose True, False, 'mask', 'channel' or None"):
        as_pipeline("voronoi", mass="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mass=True and mass=False in one plan"):
        as_pipeline("plan(voronoi, mass=True)") >> as_pipeline("plan(voronoi, mass=False)")
    with pytest.raises(ValueError, match="give one method that selects"):
        as_pipeline("absorb(host='tome')")
    with pytest.raises(ValueError, match="give keep to absorb, not to its host"):
        as_pipeline("absorb(host='divprune(keep=0.5)')")
    with pytest.raises(ValueError, match="merges tokens itself"):
        as_pipeline("absorb(host='visionzip')")


def test_plans_with_mass_are_written_and_read() -> None:
    for text in (
        "voronoi(keep=0.25)",
        "plan(voronoi(keep=0.25), mass=False)",
        "plan(tome(keep=0.5) >> divprune(keep=0.5), mass=True)",
    ):
        plan = as_pipeline(text)
        assert as_pipeline(repr(plan)) == plan == as_pipeline(plan.to_dict())
    assert "mass" not in as_pipeline("voronoi").to_dict() and "mass" in as_pipeline("voronoi", mass=True).to_dict()
    assert {name for name, cls in methods().items() if cls.mass} == {"voronoi", "absorb", "restore"}
