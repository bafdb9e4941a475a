# SPDX-License-Identifier: Apache-2.0
"""Token activation maps and attention explanations of models, against slow and obvious twins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mmcompress as mm
from mmcompress.explain.panes import panes
from mmcompress.explain.tam import token_activation

from . import reference  # noqa: F401 - registers by_feature, pairs_mean, by_hidden
from .families import FAMILIES, QWEN, VIDEO_FAMILIES, build, image, prompts, video

ANSWER = [31, 77, 31, 58]


@mm.register("pairs_in_layer")
@dataclass(frozen=True, repr=False)
class PairsInLayer(mm.LayerStage):
    """Neighbours 1 and 2, 3 and 4, ... become one at the place of the second, in shares of 1 : 3; token 0 is dropped."""

    layer: int = 2
    keep: float | int = 0.5

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        count, n = visuals.features.shape[:2]
        slot = torch.arange(n)
        keep = (slot[: visuals.k] * 2 + 2).clamp_max(n - 1)
        assign = torch.where(slot > 0, (slot - 1) // 2, -1)
        weight = torch.where(slot % 2 == 1, 0.25, 0.75)
        if n % 2 == 0:
            weight[-1] = 1.0  # the last one is alone
        return mm.Selection(*(x.expand(count, -1) for x in (keep, assign, weight)))


def prompt(model: Any, family: str, *parts: Any, seed: int = 3) -> dict[str, Tensor]:
    return prompts(model, family, [list(parts) or [3, image(family), 6]], seed=seed)


def with_answer(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prompt and answer but its last token in one row."""
    more = torch.tensor([ANSWER[:-1]])
    longer = {"input_ids": torch.cat([inputs["input_ids"], more], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(more)], 1)
    return {**inputs, **longer}


# ---------------------------------------------------------------------- the obvious twin of the arithmetic
def filtered(grid: list[list[float]], there: list[list[bool]], size: int = 3) -> list[list[float]]:
    """The rank filter on plain lists."""
    rows, columns = len(grid), len(grid[0])

    def reflect(i: int, n: int) -> int:
        return 0 if n == 1 else abs(i) if i < n else 2 * (n - 1) - i

    out = [[0.0] * columns for _ in range(rows)]
    for y in range(rows):
        for x in range(columns):
            reach = range(-(size // 2), size // 2 + 1)
            window = [(reflect(y + a, rows), reflect(x + b, columns)) for a in reach for b in reach]
            values = sorted(grid[i][j] for i, j in window if there[i][j])
            mean = sum(values) / len(values) if values else 0.0
            if not there[y][x] or mean <= 0:
                continue
            sigma = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)) / mean
            if sigma == 0:
                out[y][x] = mean
                continue
            far = [(i - (len(values) - 1) / 2) ** 2 for i in range(len(values))]
            weights = [math.exp((min(far) - d) / (2 * sigma**2)) for d in far]
            out[y][x] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    return out


def twin_maps(
    states: Tensor,
    weight: Tensor,
    ids: list[int],
    read: list[int],
    questions: int,
    first: int,
    rows: list[int],
    grids: list[Tensor],
) -> Tensor:
    """Token activation maps token by token in float64: states [N, D], weight [V, D]; rows: place of each cell's token."""
    states, weight = states.double(), weight.double()
    classes = [first if i == 0 and questions else token for i, token in enumerate(ids)]
    there = torch.tensor([r >= 0 for r in rows])
    raws, maps = [], []
    for t, c in enumerate(classes):
        raw = torch.tensor(
            [max(0.0, float(states[r] @ weight[c])) if r >= 0 else 0.0 for r in rows], dtype=torch.float64
        )
        text = [max(0.0, float(states[p] @ weight[c])) for p in read]
        context = [j for j in range(t) if ids[j] != ids[t]]
        map_ = raw
        if context:
            total = sum(text[j] for j in context) + 1e-8
            interference = sum(text[j] / total * raws[j] for j in context)
            size = float(interference[there] @ interference[there])
            scale = float(raw[there] @ interference[there]) / size if size else 0.0
            map_ = (raw - scale * interference).clamp_min(0)
        raws.append(raw)
        seen = text[: max(t, questions)]
        low, high = min([*map_[there].tolist(), *seen]), max([*map_[there].tolist(), *seen])
        map_ = (map_ - low) / (high - low) if high > low else torch.zeros_like(map_)
        out = torch.zeros(len(rows), dtype=torch.float64)
        for cells in grids:
            out[cells.flatten()] = torch.tensor(
                filtered(map_[cells].tolist(), there[cells].tolist()), dtype=torch.float64
            ).flatten()
        maps.append(out.masked_fill(~there, float("nan")))
    return torch.stack(maps)


def check_against_twin(
    model: Any, inputs: dict[str, Tensor], states: Tensor, rows: list[int], found: mm.Explanation
) -> None:
    ids = inputs["input_ids"][0]
    length, weight = len(ids), model.lm_head.weight.detach()
    questions = sum(t.part == "question" for t in found.tokens)
    places = [*range(length - questions, length), *range(length - 1, length - 1 + len(ANSWER))]
    first = int((states[places[0]] @ weight.T).argmax())
    grids, begin = [], 0
    for seen in found.visuals:
        grids += [begin + pane.cells for pane in panes(seen.layout)]
        begin += seen.layout.cells
    tokens = [*ids[length - questions :].tolist(), *ANSWER]
    expected = twin_maps(states, weight, tokens, places, questions, first, rows, grids)
    torch.testing.assert_close(found.maps.double(), expected, atol=2e-4, rtol=1e-3, equal_nan=True)


def cells_of(found: mm.Explanation) -> list[int]:
    """Places of all cells in the prompt."""
    return [int(p) for v in found.trace.visuals for p in v.span.patches]


# ---------------------------------------------------------------------- token activation maps
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_maps_of_every_family(family: str) -> None:
    model = build(family)
    inputs = prompt(model, family)
    found = mm.token_activation_map(model, None, inputs=inputs, answer=ANSWER)
    states = model.model(**with_answer(inputs)).last_hidden_state[0]
    check_against_twin(model, inputs, states, cells_of(found), found)
    assert found.coverage == 1.0 and found.plan == "" and found.answer_ids == ANSWER
    assert len(found.layers) == 4 and set(found.layers) == {inputs["input_ids"].shape[1]}
    assert not hasattr(model, "_mmcompress_engine")  # a stock model is stock again
    answered = mm.token_activation_map(model, None, inputs=inputs, max_new_tokens=4)
    mm.compress(model, "uniform(keep=1.0)")
    again = mm.token_activation_map(model, None, inputs=inputs, max_new_tokens=4)
    assert again.plan == "uniform(keep=1.0)"
    assert torch.equal(again.maps, answered.maps) and again.answer_ids == answered.answer_ids
    read = mm.token_activation_map(model, None, inputs=inputs, answer=again.answer_ids)
    torch.testing.assert_close(read.maps, again.maps, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compressed_maps_of_every_family(family: str) -> None:
    """Half the tokens before the language model, half of those in it: other cells are missing, all else is as in the twin."""
    model = build(family)
    inputs = prompt(model, family, 3, image(family), 2, image(family, other=True), 6)
    mm.compress(model, "by_feature(keep=0.5) >> by_hidden(layer=2, keep=0.5)")
    found = mm.token_activation_map(model, None, inputs=inputs, answer=ANSWER)
    states = found_states(model, inputs)
    rows = []
    for visual, seen in zip(found.trace.visuals, found.visuals, strict=True):
        kept = set(visual.kept_cells(3).tolist())
        rows += [int(p) if i in kept else -1 for i, p in enumerate(visual.span.patches)]
        assert seen.valid.nonzero()[:, 0].tolist() == sorted(kept) and torch.equal(seen.kept, seen.valid)
    assert 0 < sum(r >= 0 for r in rows) < len(rows)
    check_against_twin(model, inputs, states, rows, found)
    assert found.layers[0] > found.layers[3]


def found_states(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Last hidden states of prompt and answer, the answer read token by token."""
    out = model.model(**inputs, use_cache=True)
    parts = [out.last_hidden_state[0]]
    for token in ANSWER[:-1]:
        out = model.model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.last_hidden_state[0])
    return torch.cat(parts)


@torch.no_grad()
def test_a_merged_token_shows_in_all_its_cells() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    mm.compress(model, "pairs_mean(keep=0.5)")
    found = mm.token_activation_map(model, None, inputs=inputs, answer=ANSWER)
    places = cells_of(found)
    rows = [places[i - i % 2] for i in range(len(places))]  # 0 and 1 are token 0, 2 and 3 token 2, ...
    check_against_twin(model, inputs, found_states(model, inputs), rows, found)
    assert found.coverage == 1.0 and found.visuals[0].kept.float().mean() == 0.5
    plain = mm.token_activation_map(model, None, inputs=inputs, answer=ANSWER, kernel=1)
    assert torch.equal(plain.maps[:, ::2], plain.maps[:, 1::2])
    assert not torch.equal(plain.maps[:, 0], plain.maps[:, 2])


@torch.no_grad()
def test_tokens_merged_in_a_layer_show_in_all_their_cells() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    mm.compress(model, "by_feature(keep=0.75) >> pairs_in_layer(layer=2, keep=0.5)")
    found = mm.token_activation_map(model, None, inputs=inputs, answer=ANSWER, kernel=1)
    kept, valid = found.visuals[0].kept, found.visuals[0].valid
    assert torch.equal(kept.nonzero()[:, 0], found.trace.visuals[0].kept_cells(3))
    assert found.trace.call.groups[-1].merges and bool((valid & ~kept).any())
    values = set(found.maps[-1, kept].tolist())
    assert set(found.maps[-1, valid & ~kept].tolist()) <= values


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@torch.no_grad()
def test_videos(family: str) -> None:
    model = build(family)
    inputs = prompt(model, family, 2, video(family), 5)
    found = mm.token_activation_map(model, None, inputs=inputs, answer=ANSWER)
    states = model.model(**with_answer(inputs)).last_hidden_state[0]
    check_against_twin(model, inputs, states, cells_of(found), found)
    (seen,) = found.visuals
    assert seen.modality == "video" and [p.frame for p in seen.panes] == list(range(2 if family in QWEN else 3))
    last = found.grids(found.token_map(-1))[-1]
    assert torch.equal(last[1], found.fused(found.token_map(-1), frame=len(seen.panes) - 1)[1])


def test_without_interference_the_maps_are_other_ones_and_references_begin_elsewhere() -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    paper, plain, authors = (
        mm.token_activation_map(model, None, inputs=inputs, answer=ANSWER, **more).maps
        for more in ({}, {"interference": False}, {"compat": "reference"})
    )
    first = len(paper) - len(ANSWER)
    assert torch.equal(paper[0], plain[0]) and not torch.allclose(paper[1:], plain[1:])
    assert torch.equal(paper[:first], authors[:first]) and not torch.allclose(paper[first], authors[first])


def test_maps_survive_empty_and_equal_values() -> None:
    zero = token_activation(torch.zeros(3, 4), torch.zeros(3, 3), 1, [1, 2, 3], [torch.arange(4).view(2, 2)])
    assert torch.equal(zero.maps, torch.zeros(3, 4)) and torch.equal(zero.scale, torch.zeros(3))
    same = token_activation(torch.ones(2, 4), torch.ones(2, 2), 1, [5, 5], [torch.arange(4).view(2, 2)])
    assert bool(same.maps.isfinite().all())  # the same word twice: nothing to subtract
    one = token_activation(torch.tensor([[3.0]]), torch.ones(1, 1), 0, [1], [torch.zeros(1, 1, dtype=torch.int64)])
    assert one.maps.tolist() == [[0.0]]  # one cell and nothing to compare it with


class Largest(TorchDispatchMode):
    """Remembers how many rows of logits of the whole vocabulary there were in one tensor."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.vocabulary, self.width, self.rows = vocabulary, width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.dim() and x.shape[-1] == self.vocabulary:
                rows = x.numel() // self.vocabulary
                self.rows = max(self.rows, rows if rows != self.width else 0)  # not the weight itself
        return out


@torch.no_grad()
def test_no_logits_of_all_tokens() -> None:
    model = build("llava", vocab_size=1009)
    inputs = prompt(model, "llava", 30, image("llava"), 40)
    with Largest(1009, 64) as seen:
        model(**inputs)
    assert seen.rows == inputs["input_ids"].shape[1]  # the watch sees them
    with Largest(1009, 64) as seen:
        found = mm.token_activation_map(model, None, inputs=inputs, max_new_tokens=6)
    assert seen.rows == 16 and len(found.tokens) == 46


# ---------------------------------------------------------------------- attention
def rollout(maps: list[Tensor], cuts: dict[int, Tensor]) -> Tensor:
    """The whole product of layers; maps [S, S] per layer, cuts: before a layer, the slots that go on."""
    product = torch.eye(len(maps[0]), dtype=torch.float64)
    for i, attention in enumerate(maps):
        if i in cuts:
            product = product[cuts[i]]
        product = (0.5 * attention.double() + 0.5 * torch.eye(len(attention))) @ product
    return product


def scaled(values: Tensor, text: Tensor, asked: int) -> Tensor:
    """Rows of values [T, N] with the text seen so far [T, T] brought to 0..1."""
    found = []
    for t in range(len(values)):
        seen = torch.cat([values[t][~values[t].isnan()], text[t, : max(t, asked)]])
        found.append((values[t] - seen.min()) / (seen.max() - seen.min()))
    return torch.stack(found).float()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_of_every_family(family: str) -> None:
    model = build(family, attention="eager")
    inputs = prompt(model, family)
    out = model.model(**with_answer(inputs), output_attentions=True)
    maps = [a[0].mean(0) for a in out.attentions]
    rolled = mm.attention_rollout(model, None, inputs=inputs, answer=ANSWER)
    last = mm.last_attention(model, None, inputs=inputs, answer=ANSWER)
    early = mm.last_attention(model, None, inputs=inputs, answer=ANSWER, layer=1)
    length, asked = inputs["input_ids"].shape[1], len(last.tokens) - len(ANSWER)
    read = torch.tensor([*range(length - asked, length), *range(length - 1, length - 1 + len(ANSWER))])
    cells = torch.tensor(cells_of(last))
    for found, whole in ((last, maps[-1]), (early, maps[1]), (rolled, rollout(maps, {}))):
        expected = scaled(whole[read][:, cells], whole[read][:, read], asked)
        torch.testing.assert_close(found.maps, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_attention_of_a_compressed_model() -> None:
    model = build("llava", attention="eager")
    inputs = prompt(model, "llava")
    mm.compress(model, "by_feature(keep=0.5) >> by_hidden(layer=2, keep=0.5)")
    answer = [44]  # read at the last place of the prompt: one forward pass shows it all
    rolled = mm.attention_rollout(model, None, inputs=inputs, answer=answer)
    each = [mm.last_attention(model, None, inputs=inputs, answer=answer, layer=layer) for layer in range(4)]
    last = mm.last_attention(model, None, inputs=inputs, answer=answer)
    assert torch.equal(last.maps.nan_to_num(-1), each[-1].maps.nan_to_num(-1))
    maps = [a[0].mean(0) for a in model.model(**inputs, output_attentions=True).attentions]
    groups = rolled.trace.call.groups
    assert [len(m) for m in maps] == [groups[0].physical] * 2 + [groups[1].physical] * 2
    cut = groups[1].from_previous[0]
    asked = len(rolled.tokens) - 1
    shown = [(one, maps[i], groups[i >= 2]) for i, one in enumerate(each)]  # layer 2 has what its cut leaves
    for found, whole, group in ((rolled, rollout(maps, {2: cut}), groups[0]), *shown):
        (visual,) = found.trace.visuals
        source = group.source[0].tolist()
        slots = [source.index(int(p)) if int(p) in source else -1 for p in visual.span.patches]
        there = torch.tensor(slots) >= 0
        assert torch.equal(there, found.visuals[0].valid)
        row = whole[-1]
        expected = scaled(row[slots].masked_fill(~there, float("nan"))[None], row[None, -asked:], asked)[0]
        torch.testing.assert_close(found.maps[-1], expected, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert rolled.coverage == 0.5 and [one.coverage for one in each] == [0.5, 0.5, 0.25, 0.25]


@torch.no_grad()
def test_rollout_through_a_merge_shares_by_weight() -> None:
    """All that merged tokens get is handed on: a row still sums to 1, cut or not."""
    from mmcompress.explain.cells import before_cut

    model = build("llava", attention="eager")
    inputs = prompt(model, "llava")
    mm.compress(model, "by_feature(keep=0.75) >> pairs_in_layer(layer=2, keep=0.5)")
    groups = mm.attention_rollout(model, None, inputs=inputs, answer=ANSWER).trace.call.groups
    before, group = groups[-2], groups[-1]
    assert group.merges
    rows = torch.eye(group.physical)
    back = before_cut(rows, before, group)
    hidden = torch.randn(1, before.physical, 5)
    torch.testing.assert_close(back @ hidden[0], group.enter(hidden)[0])


def test_two_pictures_are_two_visuals_and_prompts_of_other_kinds_are_refused() -> None:
    model = build("qwen2_vl")
    inputs = prompt(model, "qwen2_vl", 2, image("qwen2_vl"), image("qwen2_vl", other=True), 3)
    found = mm.token_activation_map(model, None, inputs=inputs, answer=ANSWER)
    assert [v.layout.cells for v in found.visuals] == [24, 16]
    assert torch.equal(torch.cat([found.token_map(5, 0), found.token_map(5, 1)]), found.maps[5])
    assert found.word_map(0, 1).shape == (16,) and found.explained(0)
    text = prompt(model, "qwen2_vl", 9)
    for explain in (
        mm.token_activation_map,
        mm.attention_rollout,
        mm.gradient_relevance,
        mm.grad_cam,
        mm.last_attention,
    ):
        with pytest.raises(ValueError, match="no image in the prompt"):
            explain(model, None, inputs=text)
        with pytest.raises(ValueError, match="answer is empty"):
            explain(model, None, inputs=inputs, answer=[])
    two = {n: torch.cat([x, x]) if n in ("input_ids", "attention_mask") else x for n, x in inputs.items()}
    with pytest.raises(ValueError, match=r"one prompt at a time.*here are input_ids of shape \[2, "):
        mm.token_activation_map(model, None, inputs=two)
    padded = {**inputs, "attention_mask": inputs["attention_mask"].clone().index_fill(1, torch.tensor([0]), 0)}
    with pytest.raises(ValueError, match="padded"):
        mm.token_activation_map(model, None, inputs=padded)
    with pytest.raises(ValueError, match="not both"):
        mm.token_activation_map(model, None, "x.png", inputs=inputs)
    with pytest.raises(ValueError, match="compat='best'"):
        mm.token_activation_map(model, None, inputs=inputs, compat="best")
    with pytest.raises(ValueError, match="kernel=2"):
        mm.token_activation_map(model, None, inputs=inputs, kernel=2)
    with pytest.raises(ValueError, match="layer=4"):
        mm.last_attention(model, None, inputs=inputs, answer=ANSWER, layer=4)
    with pytest.raises(ValueError, match="normalise='max'"):
        mm.attention_rollout(model, None, inputs=inputs, normalise="max")
    assert not model._forward_hooks and not model.model.language_model._forward_hooks


def test_a_prompt_as_long_as_the_context_is_refused() -> None:
    model = build("llava", max_position_embeddings=25)
    with pytest.raises(ValueError, match="has 25 tokens, and the context of the model 25"):
        mm.token_activation_map(model, None, inputs=prompt(model, "llava", 3, image("llava"), 6))
    short = mm.token_activation_map(model, None, inputs=prompt(model, "llava", 3, image("llava"), 4))
    assert len(short.answer_ids) == 2  # no more than fit
    with pytest.raises(ValueError, match="answer= 3, and the context of the model 25"):
        mm.token_activation_map(model, None, inputs=prompt(model, "llava", 3, image("llava"), 4), answer=ANSWER[:3])


@torch.no_grad()
def test_one_token_that_is_left_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llava")
    inputs = prompt(model, "llava")
    mm.compress(model, "by_feature(keep=1)")
    one = mm.token_activation_map(model, None, inputs=inputs, answer=ANSWER)
    assert one.coverage == 1 / 16 and int(one.maps[-1].isnan().sum()) == 15
    whole = mm.attention_rollout(model, None, inputs=inputs, answer=ANSWER)
    assert torch.equal(whole.visuals[0].valid, one.visuals[0].valid)
    monkeypatch.setattr(
        "mmcompress.explain.session.rows_in_layer", lambda visual, layer: torch.full((visual.tokens,), -1)
    )
    with pytest.raises(ValueError, match="leaves no visual token in the layer that is read"):
        mm.token_activation_map(model, None, inputs=inputs, answer=ANSWER)
