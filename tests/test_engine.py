# SPDX-License-Identifier: Apache-2.0
"""What the engine promises, each claim against a slow reference or the stock model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import mmcompress as mm
from mmcompress.budget import resolve
from mmcompress.plan import register
from mmcompress.runtime.cache import is_pruned
from mmcompress.stage import InputStage

from .flash import FlashStandIn
from .reference import image_runs, live_after_input, masked_keys, score, stock_on_kept
from .tiny import ALIKE, GREEDY, IMAGE, LAYERS, RAGGED, build, prompts, single

METHODS = ["random", "uniform", "divprune", "visionzip", "fastv", "tome"]
CUTS = {1: 0.7, 3: 0.4}
CUT_PLAN = "by_hidden(layer=1, keep=0.7) >> by_hidden(layer=3, keep=0.4)"
BOTH_PLAN = f"by_feature(keep=0.6) >> {CUT_PLAN}"
PLANS = ["by_feature(keep=0.4)", CUT_PLAN, BOTH_PLAN, "tome(keep=0.5) >> visionzip(keep=0.5)"]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 3e-4) -> None:
    assert (a - b).abs().max().item() < tolerance, (a - b).abs().max().item()


def follow_up(turn: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """A second user turn of four tokens behind the first answer."""
    more = torch.randint(5, 140, (len(turn), 4), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([turn, more], 1)
    ones = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, ones], 1)}


# ---------------------------------------------------------------------- nothing dropped: nothing changed
@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_keep_all_is_bit_identical(method: str, tower: str) -> None:
    model = build(tower)
    inputs = prompts(model, RAGGED)
    logits, generated = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    mm.compress(model, method, keep=1.0)
    assert torch.equal(model(**inputs).logits, logits)
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences, generated)
    assert not is_pruned(out.past_key_values)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [1, 2, 7, 15, 0.03, 0.2, 0.37, 0.5, 0.97])
def test_budgets_are_exact(method: str, keep: float | int) -> None:
    """What enters the LLM (or is left after the cut) is `resolve(keep, N)`, for every method, ratio and count."""
    if method == "tome" and resolve(keep, 16) < 2:
        pytest.skip("three blocks can at most halve 16 tokens three times")
    model = mm.compress(build(), method, keep=keep)
    model(**prompts(model, ALIKE))
    for visual in mm.trace(model).visuals:
        assert len(visual.kept_cells(LAYERS - 1)) == resolve(keep, 16)
    text = [7, 8]
    for row in range(2):
        assert mm.trace(model).tokens_per_layer(row)[-1] == text[row] + resolve(keep, 16)


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_text_only_prompt_is_untouched(plan: str) -> None:
    model = build()
    inputs = prompts(model, [[9]])
    logits, generated = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    mm.compress(model, plan)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), generated)


@torch.no_grad()
def test_uncompress_restores_everything() -> None:
    model = build()
    inputs = prompts(model, RAGGED)
    logits = model(**inputs).logits

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before, attributes = hooks(), (set(model.__dict__), set(model.model.__dict__))
    mm.compress(model, "tome(keep=0.75) >> visionzip(keep=0.5) >> fastv(layer=1, keep=0.5)")
    assert not torch.equal(model(**inputs).logits, logits)
    mm.uncompress(model)
    assert torch.equal(model(**inputs).logits, logits)
    assert hooks() == before
    assert (set(model.__dict__), set(model.model.__dict__)) == attributes
    mm.uncompress(model)  # once more does nothing


@torch.no_grad()
def test_compressed_block_brings_back_the_plan_before() -> None:
    model = build()
    inputs = prompts(model, RAGGED)
    mm.compress(model, "by_feature", keep=0.4)
    logits = model(**inputs).logits
    with mm.compressed(model, "uniform", keep=0.25):
        model(**inputs)
        assert mm.trace(model).visuals[0].kept == 4
    assert torch.equal(model(**inputs).logits, logits)


# ---------------------------------------------------------------------- the right tokens at the right places
@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_input_stage_equals_stock_model_on_kept_rows(attention: str, positions: str, side: str, tower: str) -> None:
    model = build(tower, attention=attention)
    inputs = prompts(model, RAGGED, side=side)
    # Without position_ids the stock model counts from the left edge of the batch, padding included.
    first = inputs["attention_mask"].argmax(1)
    ids = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    live, embeds = live_after_input(model, inputs, 0.4)
    expected = stock_on_kept(model, live, embeds, positions, start=first)
    mm.compress(model, "by_feature", keep=0.4, positions=positions)
    for use_cache in (True, False):
        logits = model(**inputs, position_ids=ids, use_cache=use_cache).logits
        assert logits.shape[:2] == inputs["input_ids"].shape
        for row, rows in enumerate(expected):
            close(logits[row, live[row]], rows)


@register("backwards")
@dataclass(frozen=True, repr=False)
class Backwards(InputStage):
    """As `by_feature`, in the opposite order."""

    keep: float | int = 0.5

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        return mm.Selection(mm.Selection.top(score(visuals.features), visuals.k).keep.flip(1))


@torch.no_grad()
def test_tokens_in_another_order_stand_at_the_places_that_are_left() -> None:
    """The first that a method names stands at the first place of those that it keeps."""
    model = build()
    inputs = prompts(model, RAGGED[1:])
    live, embeds = live_after_input(model, inputs, 0.4)
    own = torch.arange(live.shape[1])
    for image in image_runs(inputs["input_ids"][0], 16):
        kept = torch.tensor([place for place in image if live[0, place]])
        own[kept] = kept.flip(0)
    (expected,) = stock_on_kept(model, live, embeds[:, own], "reindex")
    mm.compress(model, "backwards", keep=0.4, positions="reindex")
    text = live[0] & (inputs["input_ids"][0] != IMAGE)
    close(model(**inputs).logits[0, text], expected[text[live[0]]])


@torch.no_grad()
@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_input_stage_without_mask_or_positions(positions: str) -> None:
    model = build()
    inputs = prompts(model, RAGGED[1:], mask=False)
    live, embeds = live_after_input(model, inputs, 0.4)
    (expected,) = stock_on_kept(model, live, embeds, positions)
    mm.compress(model, "by_feature", keep=0.4, positions=positions)
    for use_cache in (True, False):  # without a cache, gaps in positions must not be read as packed sequences
        close(model(**inputs, use_cache=use_cache).logits[0, live[0]], expected)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("cuts", [{2: 0.5}, CUTS])
def test_layer_cuts_equal_masked_keys(attention: str, early: bool, cuts: dict[int, float]) -> None:
    model = build(attention=attention)
    for samples, mask in ((RAGGED, True), (RAGGED[1:], False)):
        inputs = prompts(model, samples, mask=mask)
        live = live_after_input(model, inputs, 0.6)[0] if early else None
        alive, expected = masked_keys(model, inputs, cuts, live)
        plan = " >> ".join(f"by_hidden(layer={layer}, keep={keep})" for layer, keep in cuts.items())
        with mm.compressed(model, f"by_feature(keep=0.6) >> {plan}" if early else plan, positions="keep"):
            for use_cache in (True, False):
                logits = model(**inputs, use_cache=use_cache).logits
                close(logits[alive], expected[alive])


@torch.no_grad()
def test_merging_is_a_weighted_mean_of_embeddings() -> None:
    model = build()
    inputs = prompts(model, RAGGED)
    with mm.compressed(model, "pairs_mean", keep=0.5):
        compressed = model(**inputs).logits
        visual = mm.trace(model).visuals[2]
        assert visual.selection.assign is not None
        assert visual.selection.assign[0].tolist() == [i // 2 for i in range(16)]
    from .reference import captured

    with captured(model) as seen:
        model(**inputs)
    embeds, ids = seen["inputs_embeds"].clone(), inputs["input_ids"]
    live = inputs["attention_mask"].bool().clone()
    for row in range(2):
        places = (ids[row] == IMAGE).nonzero()[:, 0]
        embeds[row, places[::2]] = (embeds[row, places[::2]] + embeds[row, places[1::2]]) / 2
        live[row, places[1::2]] = False
    # left-padded without position_ids: the stock model counts from the left edge; reindexing keeps the first position
    for row, rows in enumerate(_stock_from_left_edge(model, live, embeds)):
        close(compressed[row, live[row]], rows)


def _stock_from_left_edge(model: Any, live: torch.Tensor, embeds: torch.Tensor) -> list[torch.Tensor]:
    logits = []
    for row in range(len(live)):
        kept = live[row].nonzero()[:, 0]
        positions = kept[0] + torch.arange(len(kept))
        hidden = model.model.language_model(
            inputs_embeds=embeds[row : row + 1, kept], position_ids=positions[None],
            attention_mask=torch.ones(1, len(kept), dtype=torch.long), use_cache=False,
        ).last_hidden_state  # fmt: skip
        logits.append(model.lm_head(hidden)[0])
    return logits


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_text_only_row_in_a_batch(plan: str) -> None:
    model = build()
    inputs = prompts(model, [[25], [3, "image", 2]])
    alone = model(**prompts(model, [[25]])).logits[0]
    mm.compress(model, plan)
    close(model(**inputs).logits[0, -25:], alone)
    a, b = (model.generate(**inputs, **GREEDY, use_cache=cached) for cached in (True, False))
    assert torch.equal(a, b)


# ---------------------------------------------------------------------- generation
@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_equals_uncached(plan: str, positions: str, attention: str) -> None:
    model = build(attention=attention)
    inputs = prompts(model, RAGGED)
    mm.compress(model, plan, positions=positions)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    a, b = (model.generate(**inputs, **options, use_cache=cached) for cached in (True, False))
    assert torch.equal(a.sequences, b.sequences)
    for one, other in zip(a.logits, b.logits, strict=True):
        close(one, other)
    cache = a.past_key_values
    assert is_pruned(cache)
    assert all(layer.get_seq_length() == inputs["input_ids"].shape[1] + 5 for layer in cache.layers)
    assert cache.layers[-1].keys.shape[-2] < cache.get_seq_length()


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_single_runs(method: str) -> None:
    model = mm.compress(build(), method, keep=0.5)
    inputs = prompts(model, RAGGED)
    batch = model.generate(**inputs, **GREEDY)[:, -6:]
    for row in range(2):
        assert torch.equal(model.generate(**single(inputs, row, [1, 2]), **GREEDY)[0, -6:], batch[row])


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("positions", ["keep", "reindex"])
def test_second_turn_and_copied_cache(plan: str, positions: str) -> None:
    model = mm.compress(build(), plan, positions=positions)
    inputs = prompts(model, RAGGED)
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turn = follow_up(first.sequences, inputs["attention_mask"])
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    whole = model.generate(**turn, pixel_values=inputs["pixel_values"], **options)
    for cache in (copy.deepcopy(first.past_key_values), first.past_key_values):
        out = model.generate(**turn, past_key_values=cache, **options)
        assert torch.equal(out.sequences, whole.sequences)
        for one, other in zip(out.logits, whole.logits, strict=True):
            close(one, other)


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("first", [[[5, "image", 3], [4, "image", 2]], [[9], [6]]])
def test_new_image_in_a_later_turn(plan: str, positions: str, first: list) -> None:
    """Image tokens of each turn are chosen among that turn's own, so one call with all of it must agree."""
    if "by_hidden" in plan and first[0] != [9]:
        pytest.skip("one budget per sample and layer: a later turn has its own")
    model = build()
    one, two = prompts(model, first), prompts(model, [[3, "image", 4], [6, "image", 1]], seed=5)
    mask = torch.cat([one["attention_mask"], two["attention_mask"]], 1)
    ids = (mask.cumsum(1) - 1).clamp_min(0)
    border = one["input_ids"].shape[1]
    mm.compress(model, plan, positions=positions)
    cache = model(**one, position_ids=ids[:, :border], use_cache=True).past_key_values
    two["attention_mask"] = mask
    out = model(**two, position_ids=ids[:, border:], past_key_values=cache).logits
    pixels = [turn["pixel_values"] for turn in (one, two) if "pixel_values" in turn]
    whole = torch.stack(pixels, 1).flatten(0, 1) if len(pixels) == 2 else pixels[0]
    everything = {"input_ids": torch.cat([one["input_ids"], two["input_ids"]], 1), "attention_mask": mask}
    expected = model(**everything, pixel_values=whole, position_ids=ids).logits[:, border:]
    real = (expected.abs().sum(-1) > 0) & two["attention_mask"][:, border:].bool()
    close(out[real], expected[real])


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_manual_loop_and_two_conversations(plan: str) -> None:
    """Decoding by hand without position_ids, two conversations in turn: the state lives in the caches."""
    model = mm.compress(build(), plan)
    a, b = (prompts(model, [sample], mask=False) for sample in RAGGED)
    expected = [model.generate(**x, **GREEDY)[0, -6:] for x in (a, b)]
    outs = [model(**x, use_cache=True) for x in (a, b)]
    tokens: list[list[torch.Tensor]] = [[], []]
    for _ in range(6):
        for i in (0, 1):
            logits = outs[i].logits[:, -1].clone()
            logits[:, IMAGE] = -torch.inf
            tokens[i].append(logits.argmax(-1))
            outs[i] = model(input_ids=tokens[i][-1][:, None], past_key_values=outs[i].past_key_values)
    for i in (0, 1):
        assert torch.equal(torch.cat(tokens[i]), expected[i])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("plan", PLANS)
def test_two_tokens_at_once_are_as_one_by_one(plan: str, attention: str) -> None:
    model = mm.compress(build(attention=attention), plan)
    out = model(**prompts(model, RAGGED[:1], mask=False), use_cache=True)
    cache = copy.deepcopy(out.past_key_values)
    both = model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache).logits
    for i, token in enumerate((7, 8)):
        out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
        close(both[:, i], out.logits[:, 0])


@torch.no_grad()
def test_cropping_into_dropped_tokens_is_refused() -> None:
    model = mm.compress(build(), "by_feature", keep=0.4)
    inputs = prompts(model, RAGGED[:1])
    cache = model(**inputs, use_cache=True).past_key_values
    cache.crop(-3)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] - 3
    with pytest.raises(ValueError, match="cannot crop a compressed cache"):
        cache.crop(-5)


@torch.no_grad()
def test_one_unpadded_sample_needs_no_mask() -> None:
    """With one sample the fused causal path stays on: no layer gets a mask, and decode steps have one query."""
    model = mm.compress(build(), BOTH_PLAN)
    seen = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(
            lambda m, a, k: seen.append((k.get("attention_mask") is None, a[0].shape[1])), with_kwargs=True
        )
    model.generate(**prompts(model, RAGGED[1:]), **GREEDY)
    assert all(none for none, _ in seen)
    assert {length for _, length in seen[LAYERS:]} == {1}


# ---------------------------------------------------------------------- outputs, training, copies
@torch.no_grad()
def test_outputs_in_every_form() -> None:
    model = mm.compress(build(), BOTH_PLAN)
    inputs = prompts(model, RAGGED)
    logits = model(**inputs).logits
    assert any(
        torch.is_tensor(x) and x.shape == logits.shape and torch.equal(x, logits)
        for x in model(**inputs, return_dict=False)
    )
    close(model(**inputs, logits_to_keep=3).logits, logits[:, -3:], 1e-5)
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == LAYERS + 1
    close(model.forward(**inputs).logits, logits, 1e-6)  # wrappers call .forward of the top model, past its hooks
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {k: v for k, v in inputs.items() if k != "input_ids"}
    close(model(**given, inputs_embeds=embeds).logits, logits, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("plan", ["fastv(layer=2, keep=0.5)", "tome(keep=0.5) >> visionzip(keep=0.5)"])
def test_checkpointing_changes_no_gradient(plan: str, reentrant: bool) -> None:
    model = mm.compress(build(), plan)
    inputs = prompts(model, RAGGED)
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids == IMAGE) | (inputs["attention_mask"] == 0), -100)
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    shared = [name for name in found[0] if name in found[1]]
    assert any("language_model.layers.0" in name for name in shared)
    if not reentrant:
        assert len(shared) == len(found[0])
    for name in shared:
        close(found[0][name], found[1][name], 1e-4 + 1e-3 * found[0][name].abs().max().item())


@torch.no_grad()
def test_two_models_are_independent() -> None:
    a, b = build(seed=0), build(seed=0)
    inputs = prompts(a, RAGGED)
    stock = a(**inputs).logits
    mm.compress(a, "by_feature", keep=0.25)
    assert torch.equal(b(**inputs).logits, stock)
    mm.compress(b, "uniform", keep=0.5)
    expected = a(**inputs).logits
    b(**inputs)
    assert torch.equal(a(**inputs).logits, expected)
    mm.uncompress(a)
    assert mm.trace(b).visuals[0].kept == 8


@torch.no_grad()
@pytest.mark.parametrize("plan", ["tome(keep=0.75) >> visionzip(keep=0.5) >> fastv(layer=2, keep=0.5)", BOTH_PLAN])
def test_deepcopy_and_save_while_compressed(plan: str, tmp_path: Any) -> None:
    model = mm.compress(build(), plan)
    inputs = prompts(model, RAGGED)
    logits = model(**inputs).logits
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()  # the copy must not look back at the original
    close(other(**inputs).logits, logits, 1e-5)
    other.generate(**inputs, **GREEDY)
    assert mm.report(other).plan == mm.report(model).plan
    other.save_pretrained(tmp_path)
    mm.uncompress(other)  # takes out the hooks of the copy, not those of the original
    assert not any(module._forward_pre_hooks for module in other.modules())
    assert any(module._forward_pre_hooks for module in model.modules())
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not any(module._forward_pre_hooks for module in loaded.modules())
    mm.compress(loaded, plan)
    close(loaded(**inputs).logits, logits, 1e-4)


# ---------------------------------------------------------------------- other attention back ends, compiled prefill
@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("rows", [1, 2])
def test_flash_attention_path_equals_sdpa(
    plan: str, positions: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mm.compress(build(), plan, positions=positions)
    inputs = prompts(model, RAGGED[-rows:], mask=rows == 2)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    expected = [model(**inputs, use_cache=cached).logits for cached in (True, False)]
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turn = follow_up(out.sequences, real.long())
    again = model.generate(**turn, past_key_values=copy.deepcopy(out.past_key_values), **GREEDY)
    flash = FlashStandIn(monkeypatch)
    flash.enable(model)
    for cached, logits in zip((True, False), expected, strict=True):
        close(model(**inputs, use_cache=cached).logits[real], logits[real])
    found = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(found.sequences, out.sequences)
    if rows == 1:
        assert set(flash.calls) == {"dense"}  # gaps in the positions are not taken for packed sequences
    assert torch.equal(model.generate(**turn, past_key_values=found.past_key_values, **GREEDY), again)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_compiled_prefill_gives_the_same_logits(plan: str) -> None:
    model = mm.compress(build(), plan)
    inputs = prompts(model, RAGGED)
    expected = model(**inputs).logits
    torch._dynamo.reset()
    close(torch.compile(model, backend="aot_eager")(**inputs).logits, expected)
