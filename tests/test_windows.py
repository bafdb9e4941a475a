# SPDX-License-Identifier: Apache-2.0
"""Sliding windows: prompts that are longer than the window of a layer.

The reference is the stock model: its layers see of the kept tokens those that the masks of the whole prompt let them see. Gemma 3
has masks of its own, by which the tokens of a picture see each other, Cohere 2 leaves its masks to transformers, and every
layer of Mistral has a window.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import mmcompress as mm
from mmcompress.runtime.cache import CACHE, held_bytes, lengths
from mmcompress.runtime.windows import Window

from .architectures import IMAGE, OLDEST, build, prompts
from .exactness import Case, extended, masked, seeing, shortened, watched

pytestmark = pytest.mark.skipif(OLDEST, reason="configs and inputs are those of the newest transformers")

NAMES = ["gemma3", "cohere2_vision", "mistral3"]
EVERY = [*((name, "sdpa") for name in NAMES), ("gemma3", "eager")]
WINDOW = 24
PLANS = {
    "input": {"plan": "divprune(keep=0.5)", "positions": "keep"},
    "reindex": {"plan": "divprune(keep=0.5)", "positions": "reindex"},
    "layer": {"plan": "fastv(layer=1, keep=0.5)"},
    "both": {"plan": "divprune(keep=0.7) >> fastv(layer=2, keep=0.4)", "positions": "keep"},
}
ROW: list[int | str] = [4, "1", 3, "2", 6]
RAGGED: list[list[int | str]] = [[5, "3", 4], ROW]


def plan_of(model: Any, kind: str) -> Any:
    return mm.compress(model, PLANS[kind]["plan"], positions=PLANS[kind].get("positions"))


def words(count: int, seed: int = 1) -> Tensor:
    return torch.randint(5, 120, (1, count), generator=torch.Generator().manual_seed(seed))


def turns(model: Any, inputs: dict[str, Any], more: list[Tensor], cache: Any = None) -> list[Tensor]:
    """Logits of a prompt and of the turns behind it, on one cache."""
    mask = inputs["attention_mask"]
    inputs = {**inputs, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    out = model(**inputs, use_cache=True, **({} if cache is None else {CACHE: cache}))
    found, cache = [out.logits[:, -1]], out[CACHE]
    for ids in more:
        ids = ids.expand(len(mask), -1)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = {"position_ids": mask.cumsum(1)[:, -ids.shape[1] :] - 1}
        out = model(input_ids=ids, attention_mask=mask, **positions, **{CACHE: cache})
        found.append(out.logits[:, -ids.shape[1] :])
    return found


class Reference:
    """The stock model, told which tokens a compressed call has kept from which layer on."""

    def __init__(self, name: str, attention: str, row: dict[str, Any], groups: Any, kind: str) -> None:
        self.case = Case(name, "input", attention)
        self.row, self.kind, self.groups = row, kind, [group for group in groups if group.source is not None]

    def last(self, ids: Tensor, count: int) -> Tensor:
        """Logits of the last `count` tokens of the longer prompt `ids` [1, S]."""
        model, length = self.case.model, self.row["input_ids"].shape[1]
        inputs = {**extended(self.row, ids), "position_ids": torch.arange(ids.shape[1])[None]}
        more = torch.arange(length, ids.shape[1])
        first, last = self.groups[0].source[0], self.groups[-1]
        gone = torch.ones(length, dtype=torch.bool).index_fill(0, last.source[0], False)
        if self.kind == "layer":
            with masked(model, gone.nonzero()[:, 0], last.start):
                return model(**inputs).logits[:, -count:]
        here, start = torch.cat([first, more]), 0 if self.kind == "reindex" else None
        seen = self.case.layer_masks(inputs)
        if self.kind == "both":
            away = gone[None] & ~torch.eye(len(gone), dtype=torch.bool)
            away = torch.nn.functional.pad(away, (0, len(more), 0, 0))
            away = torch.cat([away, torch.nn.functional.pad(gone, (0, len(more)))[None].expand(len(more), -1)])
            seen[last.start :] = [without(mask, away) for mask in seen[last.start :]]
        with seeing(model, seen, here), shortened(model, here, ids, start, lambda x: x, {}):
            return model(**inputs).logits[:, -count:]


def without(mask: Any, away: Tensor) -> Tensor:
    """A mask less the keys that are `away` [S, S]."""
    mask = torch.ones(1, 1, *away.shape, dtype=torch.bool).tril() if mask is None else mask
    return mask & ~away if mask.dtype == torch.bool else mask.masked_fill(away, torch.finfo(mask.dtype).min)


def close(got: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(("name", "attention"), EVERY)
@pytest.mark.parametrize("kind", PLANS)
def test_prefill_steps_and_later_turns_see_what_the_whole_prompt_would_let_them(
    name: str, kind: str, attention: str
) -> None:
    model = build(name, attention=attention)
    row = prompts(model, [ROW])
    more = [words(1), words(1, 2), words(5, 3), words(1, 4), words(WINDOW + 3, 5), words(2, 6)]
    plan_of(model, kind)
    got = turns(model, row, more)
    groups = mm.trace(model).call.groups
    assert row["input_ids"].shape[1] > WINDOW + 10 and sum(groups[-1].counts) < row["input_ids"].shape[1]
    reference, ids = Reference(name, attention, row, groups, kind), row["input_ids"]
    close(got[0], reference.last(ids, 1)[:, 0], 0.0 if kind in ("input", "reindex") else 2e-5)
    for step, logits in zip(more, got[1:], strict=True):
        ids = torch.cat([ids, step], 1)
        close(logits, reference.last(ids, step.shape[1]))


@torch.no_grad()
@pytest.mark.parametrize(("name", "attention"), EVERY)
@pytest.mark.parametrize("kind", PLANS)
def test_a_padded_batch_does_what_its_rows_do_alone(name: str, kind: str, attention: str) -> None:
    model = plan_of(build(name, attention=attention), kind)
    more = [words(1), words(6, 2), words(1, 3), words(WINDOW, 4), words(1, 5)]
    together = turns(model, prompts(model, RAGGED), more)
    for i, sample in enumerate(RAGGED):
        for a, b in zip(turns(model, prompts(model, [sample], first=i), more), together, strict=True):
            close(a[0], b[i], 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_a_static_cache_and_one_without_windows_do_what_a_dynamic_one_does(name: str, kind: str) -> None:
    model = plan_of(build(name), kind)
    inputs = prompts(model, RAGGED)
    more = [words(1), words(6, 2), words(1, 3), words(WINDOW, 4), words(1, 5)]
    wanted = turns(model, inputs, more)
    config = model.config.get_text_config()
    for cache in (StaticCache(config=config, max_cache_len=128), DynamicCache()):
        for a, b in zip(turns(model, inputs, more, cache), wanted, strict=True):
            close(a, b, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}]
)
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_generate_does_what_it_does_without_a_cache(name: str, kind: str, options: dict[str, Any]) -> None:
    """Cuts of layers look at all text, which grows: there one cache is compared with another."""
    model = plan_of(build(name), kind)
    row = prompts(model, [ROW])
    settings = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9, "suppress_tokens": [IMAGE]}
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    wanted = model.generate(**row, **settings, **beams, use_cache=kind in ("layer", "both"))
    assert torch.equal(model.generate(**row, **settings, **options), wanted)


@torch.no_grad()
@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", NAMES)
def test_a_cropped_cache_goes_on_as_if_nothing_had_been(name: str, kind: str, record: bool) -> None:
    """Recorded or not, while the window has let nothing go."""
    model = build(name)
    plan = {**PLANS[kind], "plan": PLANS[kind]["plan"].replace("0.5", "2").replace("0.7", "3").replace("0.4", "2")}
    mm.compress(model, plan["plan"], positions=plan.get("positions"))
    row, ids = prompts(model, [[2, "1", 3] if kind == "layer" else ROW]), words(2)
    cache = DynamicCache(config=model.config.get_text_config())
    if record:
        cache.activate_past_recording()
    turns(model, row, [], cache)
    cache.crop(0)
    other, length = copy.deepcopy(cache), row["input_ids"].shape[1]
    mask = torch.ones(1, length + 2, dtype=torch.int64)
    wanted = model(input_ids=ids, attention_mask=mask, **{CACHE: other}).logits
    model(input_ids=words(2, 7), attention_mask=mask, **{CACHE: cache})
    cache.crop(-2)
    assert cache.get_seq_length() == length
    close(model(input_ids=ids, attention_mask=mask, **{CACHE: cache}).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_a_window_behind_the_first_call_lets_go_of_later_tokens_alone(options: dict[str, Any]) -> None:
    """The language model of Unlimited OCR, stock, on what is kept; generate() tells its cache how long the prompt is."""
    model = build("unlimited_ocr")
    row, seen = prompts(model, [ROW]), list[dict[str, Any]]()
    language_model, steps = model.model.language_model, WINDOW + 8
    mm.compress(model, "divprune(keep=0.5)", positions="reindex")
    made = model.generate(
        **row, **options, do_sample=False, max_new_tokens=steps, min_new_tokens=steps, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    kept = mm.trace(model).call.groups[-1].source[0]
    mm.uncompress(model)
    with watched(language_model, seen):
        model(**row)
    cache, embeds = DynamicCache(config=language_model.config), seen[0]["inputs_embeds"][:, kept]
    for logits, token in zip(made.logits, made.sequences[0, -steps:], strict=True):
        out = language_model(inputs_embeds=embeds, use_cache=True, **{CACHE: cache})
        close(logits, model.lm_head(out.last_hidden_state[:, -1]))
        embeds = model.get_input_embeddings()(token[None, None])
    assert len(kept) < row["input_ids"].shape[1]


@torch.no_grad()
def test_a_window_of_kept_tokens_would_be_something_else() -> None:
    """So that the tests here can tell them apart."""
    model = plan_of(build("cohere2_vision"), "input")
    row = prompts(model, [ROW])
    wanted = turns(model, row, [])
    stock = build("cohere2_vision")
    kept = mm.trace(model).call.groups[-1].source[0]
    with shortened(stock, kept, row["input_ids"], None, lambda x: x, {}):
        counted = stock(**row).logits[:, -1]
    assert (counted - wanted[0]).abs().max() > 0.05 * wanted[0].abs().max()


@torch.no_grad()
def test_what_is_told_of_a_cache_is_what_its_windows_hold() -> None:
    model = build("cohere2_vision")
    row = prompts(model, [ROW])
    length = row["input_ids"].shape[1]
    stock = held_bytes(model(**row, use_cache=True)[CACHE])
    plan_of(model, "input")
    cache = model(**row, use_cache=True)[CACHE]
    found, held = held_bytes(cache), mm.trace(model).tokens_per_layer()[0]
    assert found.now == sum(x.numel() * 4 for layer in cache.layers for x in (layer.keys, layer.values))
    assert found.full == stock.now == stock.full > found.now
    assert WINDOW < held < length
    near, far = (WINDOW - 1, WINDOW - 1), (held, length)
    kinds = model.config.get_text_config().layer_types
    assert lengths(cache, 4) == [far if kind == "full_attention" else near for kind in kinds]
    report = mm.report(model)
    assert report.kv_bytes == found.now and report.full_kv_bytes == found.full


def test_a_window_reaches_so_many_places() -> None:
    places = torch.tensor([[0, 1, 5, 6, 7]])
    assert Window(3).reaches(places, places)[0, 4].tolist() == [False, False, True, True, True]
