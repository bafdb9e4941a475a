# SPDX-License-Identifier: Apache-2.0
"""dyvte, tokenflex, and weights on disk."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmcompress as mm
from mmcompress.learn import draw_share, exit_loss, exit_sample, flexible_loss, fresh_projector
from mmcompress.learn.dyvte import ExitAlways, prompt_text
from mmcompress.learn.tokenflex import weighted_loss
from mmcompress.methods.dyvte import ExitRouters
from mmcompress.methods.tokenflex import TokenFlexProjector
from mmcompress.ops.exits import agreement, answer_losses, exit_features, exit_is_safe
from mmcompress.ops.flexpool import columns_of, enlarged, flexible_pool, pooled_cells, window_weights
from mmcompress.stage import Pipeline
from mmcompress.weights import CONFIG, TENSORS, Saved, base_of, fingerprint

from .families import FAMILIES, IMAGE, build, prompts
from .reference import masked_keys
from .test_families import alone, kept_places, samples, visual_places
from .tiny import GREEDY
from .watch import NoWaiting


def routers_for(model: Any, seed: int = 0, width: int = 8) -> ExitRouters:
    torch.manual_seed(seed)
    config = model.config.get_text_config()
    return ExitRouters(config.num_hidden_layers - 1, config.hidden_size, width)


def constant(model: Any, leaves: list[bool]) -> ExitRouters:
    """Routers that say the same for every text: leave behind these layers. Their two units are u and -u, and gelu(u) + gelu(-u) is
    never negative."""
    routers = routers_for(model, width=2)
    with torch.no_grad():
        for layer, out in enumerate(leaves):
            routers.w1[layer, 1] = -routers.w1[layer, 0]
            routers.w2[layer] = torch.tensor([[0.0, 0.0], [1.0, 1.0]]) * (1 if out else -1)
    return routers


# ---------------------------------------------------------------------- weights on disk
def test_a_fingerprint_is_of_the_weights_alone(tmp_path: Path) -> None:
    model = build("llava")
    mine = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == mine == fingerprint(build("llava"))
    assert fingerprint(build("llava", seed=1)) != mine and fingerprint(build("llava_next")) != mine
    assert fingerprint(copy.deepcopy(model).half()) == fingerprint(copy.deepcopy(model).half().float())
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == mine
    with torch.no_grad():
        model.lm_head.weight += 0.1
    assert fingerprint(model) != mine
    assert fingerprint(torch.nn.Module()) != mine
    with pytest.raises(NotImplementedError, match="not in memory"):
        fingerprint(torch.nn.Linear(2, 2, device="meta"))


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    model = build("llava")
    saved = Saved("dyvte", base_of(model), dict(routers_for(model).state_dict()), {"width": 8}, {"why": "a test"})
    folder = saved.save(tmp_path / "w")
    again = Saved.load(folder, "dyvte")
    assert again.options == {"width": 8} and again.training == {"why": "a test"} and again.base == saved.base
    again.check(model)
    with pytest.raises(ValueError, match=r"no config\.json and no model\.safetensors there"):
        Saved.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="weights for 'dyvte', not for 'tokenflex'"):
        mm.compress(model, "tokenflex", weights=str(folder))
    with pytest.raises(ValueError, match="another model, a LlavaForConditionalGeneration, "):
        mm.compress(build("llava_next"), "dyvte", weights=str(folder))
    with pytest.raises(ValueError, match=r"another model \(fingerprint"):
        mm.compress(build("llava", seed=1), "dyvte", weights=folder)
    about = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**about, "mmcompress": 99}))
    with pytest.raises(ValueError, match="is of version 99"):
        Saved.load(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="does not describe"):
        Saved.load(folder)
    (folder / CONFIG).write_text(json.dumps(about))
    (folder / TENSORS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        Saved.load(folder)
    Saved("dyvte", saved.base, {"w1": torch.zeros(3, 8, 128)}).save(folder)
    with pytest.raises(ValueError, match="do not fit"):
        mm.compress(model, "dyvte", weights=folder)
    for bad in ("", 3):
        with pytest.raises(ValueError, match="give the folder"):
            mm.DyVTE(weights=bad)  # type: ignore[arg-type]
    assert mm.uncompress(model) is model


# ---------------------------------------------------------------------- dyvte
def test_features_of_the_text() -> None:
    states = torch.randn(2, 5, 3)
    text = torch.tensor([[True, True, False, True, False], [False, False, True, False, False]])
    found = exit_features(states, text)
    assert torch.allclose(found[0], torch.cat([states[0, :2].mean(0), states[0, 3]]))
    assert torch.equal(found[1], torch.cat([states[1, 2], states[1, 2]]))
    assert torch.allclose(exit_features(states)[0], torch.cat([states[0, :4].mean(0), states[0, 4]]), atol=1e-6)
    assert exit_features(states.half()).dtype == torch.float32


def test_when_leaving_is_safe() -> None:
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 2, 0, -100]])
    first = torch.randn(2, 4, 6)
    assert agreement(first, first, labels).tolist() == [1.0, 1.0]
    other = first.clone()
    other[1, 1] = -first[1, 1]
    assert agreement(first, other, labels).tolist() == [1.0, 0.5]
    assert agreement(first, other, labels, compat="reference").tolist() == [1.0, 1.0]  # which leaves out token 0
    losses = answer_losses(first, labels)
    assert float(losses[1]) == pytest.approx(float(F.cross_entropy(first[1, :2], labels[1, 1:3])))
    agreed, left = torch.tensor([1.0, 1.0, 0.98]), torch.tensor([1.02, 1.04, 1.0])
    assert exit_is_safe(agreed, torch.ones(3), left).tolist() == [True, False, False]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_visual_tokens_leave_as_in_the_masked_twin(family: str) -> None:
    model = build(family)
    inputs = prompts(model, family, samples(family))
    valid = inputs["attention_mask"].bool()
    stage = mm.DyVTE().holding(constant(model, [False, True, False]))
    with mm.compressed(model, stage):
        logits = model(**inputs).logits
        patches = visual_places(model, valid.shape)
        tokens = [mm.trace(model).tokens_per_layer(row) for row in range(2)]
        kept = kept_places(model, inputs, 2)
        out = model.generate(**inputs, **GREEDY)
        uncached = model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(out, uncached)
    for row in range(2):
        full, left = int(valid[row].sum()), int((valid & ~patches)[row].sum())
        assert tokens[row] == [full, full, left, left]
        assert kept[row].tolist() == (valid & ~patches)[row].nonzero()[:, 0].tolist()
    alive, wanted = masked_keys(model, inputs, {}, patches=patches)
    layers = model.model.language_model.layers

    def mask(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        length = valid.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None] & (valid & ~patches)[:, None]
        return args, {**kwargs, "attention_mask": (seen | torch.eye(length, dtype=torch.bool))[:, None]}

    handles = [layer.register_forward_pre_hook(mask, with_kwargs=True) for layer in layers[2:]]
    wanted = model(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    text = valid & ~patches
    behind = text & (patches.flip(1).cumsum(1).flip(1) == 0)
    assert (logits - wanted)[behind].abs().max() < 1e-4 * wanted[behind].abs().max()
    assert bool((alive == valid).all())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_each_sample_leaves_when_it_is_ready(family: str) -> None:
    """The decision in the model is that of the routers on states seen in the stock model; batched as alone."""
    model = build(family)
    inputs = prompts(model, family, samples(family))
    labels = torch.full_like(inputs["input_ids"], -100)
    text = prompt_text(model, {**inputs, "labels": labels})
    states = model(**inputs, output_hidden_states=True).hidden_states
    for seed in range(20):  # routers that tell the samples apart
        routers = routers_for(model, seed)
        gap = torch.stack([routers(exit_features(states[i + 1], text), i).diff(dim=1)[:, 0] for i in range(3)])
        first = [next((i for i in range(3) if gap[i, row] > 0), 3) for row in range(2)]
        if first[0] != first[1]:
            break
    assert first[0] != first[1]
    stage = mm.DyVTE().holding(routers)
    with mm.compressed(model, stage):
        logits = model(**inputs).logits
        patches = visual_places(model, labels.shape)
        tokens = [mm.trace(model).tokens_per_layer(row) for row in range(2)]
        for row, sample in enumerate(samples(family)):
            full = int(inputs["attention_mask"][row].sum())
            left = full - int(patches[row].sum())
            assert tokens[row] == [full if layer <= first[row] else left for layer in range(4)]
            mine = model(**alone(model, family, sample, inputs, row)).logits
            assert mm.trace(model).tokens_per_layer() == tokens[row]
            assert (mine[0, -1] - logits[row, -1]).abs().max() < 1e-4 * mine.abs().max()


@torch.no_grad()
def test_margins_first_layers_and_other_stages() -> None:
    model = build("llava")
    inputs = prompts(model, "llava", samples("llava"))
    stock = model(**inputs).logits
    routers = constant(model, [True, True, True])
    with mm.compressed(model, mm.DyVTE(margin=math.inf)):
        assert torch.equal(model(**inputs).logits, stock)
    for plan, wanted in [
        (mm.DyVTE().holding(routers), [25, 9, 9, 9]),
        (mm.DyVTE(layer=2).holding(routers), [25, 25, 9, 9]),
        (mm.DyVTE(layer=0.75).holding(routers), [25, 25, 25, 9]),
        (mm.DyVTE(margin=1e9).holding(routers), [25, 25, 25, 25]),
        (mm.DivPrune(keep=0.5) >> mm.DyVTE(layer=2).holding(routers), [17, 17, 9, 9]),
        (mm.FastV(layer=1, keep=0.25) >> mm.DyVTE().holding(routers), [25, 13, 9, 9]),
        (mm.DyVTE().holding(routers) >> mm.FastV(layer=2, keep=0.25), [25, 9, 9, 9]),
        (mm.FastV(layer=2, keep=0.25) >> mm.DyVTE(margin=1e9).holding(routers), [25, 25, 13, 13]),
    ]:
        with mm.compressed(model, plan):
            out = model.generate(**inputs, **GREEDY)
            assert mm.trace(model).tokens_per_layer() == wanted, plan
            assert out.shape[1] == inputs["input_ids"].shape[1] + 6
    text = prompts(model, "llava", [[5], [3]])
    before = model(**text).logits
    with mm.compressed(model, mm.DyVTE().holding(routers)):
        assert torch.equal(model(**text).logits, before)


def test_errors_of_dyvte() -> None:
    model = build("llava")
    with pytest.raises(ValueError, match="mmcompress learn dyvte"):
        mm.compress(model, "dyvte")
    with pytest.raises(ValueError, match="margin=nan"):
        mm.DyVTE(margin=math.nan)
    with pytest.raises(ValueError, match="layer=0"):
        mm.DyVTE(layer=0)
    with pytest.raises(ValueError, match="has routers for 1 layers"):
        mm.compress(model, mm.DyVTE().holding(ExitRouters(1, 64, 4)))
    with pytest.raises(ValueError, match="before one of 1 to 3"):
        mm.compress(model, mm.DyVTE(layer=4).holding(routers_for(model)))
    with pytest.raises(ValueError, match="one stage at which visual tokens leave"):
        Pipeline((mm.DyVTE(), mm.DyVTE()))
    assert repr(mm.as_pipeline("divprune(keep=0.5) >> dyvte(weights='x', margin=0.5)").stages[1]) == (
        "dyvte(weights='x', margin=0.5)"
    )


def test_saved_routers_decide_as_before(tmp_path: Path) -> None:
    model = build("qwen3_vl")
    inputs = prompts(model, "qwen3_vl", samples("qwen3_vl"))
    routers = constant(model, [False, True, True])
    Saved("dyvte", base_of(model), dict(routers.state_dict()), {"width": 2}).save(tmp_path)
    mm.compress(model, f"dyvte(weights={str(tmp_path)!r})")
    with torch.no_grad():
        model(**inputs)
    assert len(set(mm.trace(model).tokens_per_layer())) == 2
    assert "dyvte(weights=" in str(mm.report(model))
    assert mm.as_pipeline(mm.trace(model).plan.to_dict()).stages[0] == mm.DyVTE(weights=str(tmp_path))


def answered(model: Any, family: str, seed: int = 0) -> dict[str, Tensor]:
    inputs = prompts(model, family, samples(family), seed=seed)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "internvl"])
def test_training_of_routers(family: str) -> None:
    model = build(family)
    inputs = answered(model, family)
    text = prompt_text(model, inputs)
    for row in range(2):
        ids = inputs["input_ids"][row]
        after = int((ids == IMAGE).nonzero()[-1]) + (2 if family in ("qwen3_vl", "internvl") else 1)
        assert text[row].nonzero()[:, 0].tolist() == list(range(after, len(ids) - 2))
    with torch.no_grad():
        stock = model(**{n: x for n, x in inputs.items() if n != "labels"}, output_hidden_states=True)
    sample = exit_sample(model, inputs, 1)
    wanted = exit_features(stock.hidden_states[2], text)
    assert torch.allclose(sample.features, wanted, atol=1e-5)
    assert torch.allclose(sample.full, answer_losses(stock.logits, inputs["labels"]), rtol=1e-5)
    with torch.no_grad(), mm.compressed(model, ExitAlways(2)):
        left = model(**{n: x for n, x in inputs.items() if n != "labels"}).logits
    assert torch.allclose(sample.left, answer_losses(left, inputs["labels"]), rtol=1e-5)
    assert sample.safe.tolist() == exit_is_safe(sample.agreed, sample.full, sample.left).tolist()
    routers = routers_for(model)
    optimizer = torch.optim.AdamW(routers.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = exit_loss(routers, sample)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="a row has no answer"):
        exit_sample(model, {**inputs, "labels": torch.full_like(inputs["labels"], -100)}, 1)


# ---------------------------------------------------------------------- tokenflex
def slow_pool(x: Tensor, rows: int, columns: int) -> Tensor:
    """The paper's operator on one grid [H, W, C]."""
    height, width = x.shape[:2]
    big = (math.ceil(height / rows) * rows, math.ceil(width / columns) * columns)
    x = x.permute(2, 0, 1)[None]
    x = x if big == (height, width) else F.interpolate(x, big, mode="bilinear", align_corners=True)
    return F.avg_pool2d(x, (big[0] // rows, big[1] // columns))[0].flatten(1).T


@given(st.integers(1, 9), st.integers(1, 9), st.data())
@settings(deadline=None, max_examples=60)
def test_any_number_of_tokens(height: int, width: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, height * width))
    columns = columns_of(k, height, width)
    assert sum(columns) == k and max(columns) <= width and len(columns) <= height
    assert list(columns) == sorted(columns, reverse=True) and columns[0] - columns[-1] <= 1
    x = torch.randn(2, height, width, 3, generator=torch.Generator().manual_seed(k))
    found = flexible_pool(x, columns)
    if len(set(columns)) == 1:
        wanted = torch.stack([slow_pool(one, len(columns), columns[0]) for one in x])
        assert torch.allclose(found, wanted, atol=1e-5)
    middle, into = pooled_cells(height, columns, width)
    assert torch.equal(into[middle], torch.arange(k)) and (middle.diff() > 0).all()
    assert torch.allclose(window_weights(width, columns[0]).sum(1), torch.ones(columns[0]))
    same = flexible_pool(torch.ones(1, height, width, 1), columns)
    assert torch.allclose(same, torch.ones_like(same))


def test_square_numbers_on_square_grids() -> None:
    for side, root in [(27, 8), (27, 12), (27, 16), (24, 12), (14, 5)]:
        assert columns_of(root**2, side, side) == (root,) * root
    assert [enlarged(27, t) for t in (8, 12, 16, 27)] == [32, 36, 32, 27]
    even = torch.randn(1, 24, 24, 4)
    wanted = F.avg_pool2d(even.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    assert torch.allclose(flexible_pool(even, (12,) * 12), wanted, atol=1e-6)


def test_views_are_pooled_alone() -> None:
    views = (mm.View((4, 4), role="thumbnail"), mm.View((4, 8), role="tiles"), mm.View((4, 4)))
    features = torch.randn(2, 64, 3)
    pooled, keep, into = mm.TokenFlex.pool(features, views, 16)
    for first, place, (rows, columns), count in [(0, 0, (4, 4), 4), (16, 4, (4, 8), 8), (48, 12, (4, 4), 4)]:
        grid = features[:, first : first + rows * columns].unflatten(1, (rows, columns))
        assert torch.allclose(pooled[:, place : place + count], flexible_pool(grid, columns_of(count, rows, columns)))
    assert torch.equal(into[keep], torch.arange(16)) and len(set(keep.tolist())) == 16
    few = mm.TokenFlex.pool(features, views, 2)
    assert few[0].shape == (2, 2, 3) and int(few[2].max()) == 1 and few[1].tolist() == [5, 27]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_flexible_projectors_in_every_family(family: str, tmp_path: Path) -> None:
    model = build(family)
    inputs = prompts(model, family, samples(family))
    stock = model(**inputs).logits
    torch.manual_seed(4)
    projector = fresh_projector(model)
    Saved("tokenflex", base_of(model), dict(projector.state_dict())).save(tmp_path)
    made: dict[Any, Tensor] = {}
    for weights in (str(tmp_path), None):
        for keep in (0.3, 1, 1.0):
            with mm.compressed(model, "tokenflex", keep=keep, weights=weights):
                made[weights, keep] = model(**inputs).logits
                assert made[weights, keep].isfinite().all()
                for visual in mm.trace(model).visuals:
                    assert visual.kept == mm.TokenFlex(keep=keep).budget(visual.tokens)
                if keep == 0.3:
                    for row, sample in enumerate(samples(family)):
                        mine = model(**alone(model, family, sample, inputs, row)).logits
                        assert (mine[0, -1] - made[weights, keep][row, -1]).abs().max() < 1e-4 * mine.abs().max()
        assert torch.equal(made[weights, 1.0], stock)
    assert not torch.allclose(made[str(tmp_path), 0.3], made[None, 0.3], atol=1e-3)


@torch.no_grad()
def test_what_enters_the_language_model_of_a_llava() -> None:
    model = build("llava")
    inputs = prompts(model, "llava", [[5, ("image", 28, 28), 4]])
    projector = fresh_projector(model)
    seen: list[Tensor] = []
    with mm.compressed(model, mm.TokenFlex(keep=4).holding(projector)):
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    wanted = projector(torch.stack([slow_pool(one.unflatten(0, (4, 4)), 2, 2) for one in tower]))
    assert torch.allclose(seen[0][:, 5:9], wanted, atol=1e-5)


def test_tokenflex_is_pure_and_survives_anything() -> None:
    projector = TokenFlexProjector(6, 5)
    layout = mm.Layout.raster(1, 5, 7)
    for k in (1, 2, 34, 35):
        for features in (torch.randn(2, 35, 6), torch.zeros(2, 35, 6), torch.ones(2, 35, 6).half()):
            visuals = mm.Visuals(torch.zeros(2, 35, 5), layout, k, {"encoder_features": features})
            stage = mm.TokenFlex(keep=k).holding(projector)
            with NoWaiting():
                chosen = stage.select(visuals)
            assert chosen.rows is not None and chosen.rows.shape == (2, k, 5) and chosen.rows.isfinite().all()
            assert torch.equal(chosen.keep, stage.select(visuals).keep)
    with pytest.raises(ValueError, match="a ratio must lie in"):
        mm.TokenFlex(keep=0.0)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_training_of_a_projector(family: str) -> None:
    model = build(family).requires_grad_(False)
    inputs = answered(model, family)
    torch.manual_seed(0)
    projector = fresh_projector(model)
    optimizer = torch.optim.AdamW(projector.parameters(), 3e-3)
    losses, errors = [], []
    for _ in range(8):
        loss, error = flexible_loss(model, projector, inputs, 0.3)
        optimizer.zero_grad()
        (loss + error).backward()
        optimizer.step()
        losses.append((loss + error).item())
        errors.append(error.item())
    assert losses[-1] < 0.9 * losses[0] and errors[0] > 0
    assert float(flexible_loss(model, projector, inputs, 0.3, align=0.0)[1]) == 0
    assert "_notes" not in projector.__dict__
    assert all(p.grad is None for p in model.parameters())


def test_shares_and_weights_of_training() -> None:
    drawn = [draw_share(step) for step in range(2000)]
    assert drawn == [draw_share(step) for step in range(2000)] and draw_share(3) == drawn[3]
    for share, chance in zip((0.0878, 0.1975, 0.3512), (0.2, 0.3, 0.5), strict=True):
        assert drawn.count(share) / 2000 == pytest.approx(chance, abs=0.04)
    logits, labels = torch.randn(2, 4, 6), torch.tensor([[-100, -100, 3, 4], [-100, 2, -100, -100]])
    tokens = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    wanted = (tokens[:3].sum() / 2**0.5 + tokens[3:].sum()) / (2**0.5 + 1)
    assert float(weighted_loss(logits, labels)) == pytest.approx(float(wanted), rel=1e-5)
