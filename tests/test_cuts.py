# SPDX-License-Identifier: Apache-2.0
"""Stages that cut several times inside the LLM, renumber positions there and merge: against the stock layers run by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from mmcompress.assets import MODELS, model_path
from mmcompress.eval.synthetic import items
from mmcompress.eval.synthetic.benchmark import load, prompt, takes_any_shape
from torch import Tensor

import mmcompress as mm
from mmcompress.budget import resolve
from mmcompress.ops.transitions import transition, transition_value
from mmcompress.runtime.cache import PrunedLayer, is_pruned

from .families import FAMILIES, IMAGE, QWEN, Part, build, image, prompts
from .flash import FlashStandIn
from .reference import best, captured, rows_shown, score
from .test_engine import close, follow_up
from .test_families import alike, kept_places, samples, visual_places
from .tiny import GREEDY, OLDEST

SOME = ("llava", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl")
PLAIN = [family for family in SOME if family not in QWEN]
LOGITS: dict[str, Any] = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}


@mm.register("steps")
@dataclass(frozen=True, repr=False)
class Steps(mm.LayerStage):
    """Cuts at `layers` to `keeps` of what came to the first cut, by `score` of the hidden states.

    merge "mean": the last token is the mean of all that go; "rows": the sum of them, made by the method; it stands last and
    has the slot of the first of them.
    """

    keep: float | int = 0.5
    layers: tuple[int, ...] = (1, 3)
    keeps: tuple[float, ...] = (0.6, 0.3)
    merge: str = ""

    def __post_init__(self) -> None:
        pass

    def cuts(self, depth: int) -> tuple[int, ...]:
        return self.layers

    def budgets(self, tokens: int, depth: int) -> tuple[int, ...]:
        return tuple(resolve(keep, tokens) for keep in self.keeps)

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        order = score(visuals.features).sort(dim=1, descending=True, stable=True).indices
        if not self.merge:
            return mm.Selection.of(order[:, : visuals.k])
        keep, rest = order[:, : visuals.k - 1].sort(dim=1).values, order[:, visuals.k - 1 :].sort(dim=1).values
        place = torch.arange(visuals.k - 1).expand_as(keep)
        assign = torch.full_like(order, visuals.k - 1).scatter(1, keep, place)
        weight = torch.full(order.shape, 1 / rest.shape[1]).scatter(1, keep, 1.0)
        keep = torch.cat([keep, rest[:, :1]], 1)
        if self.merge == "mean":
            return mm.Selection(keep, assign, weight)
        summed = mm.Selection(keep, assign, torch.ones_like(weight)).apply(visuals.features)
        return mm.Selection(keep, assign, rows=summed)


@mm.register("steps_reindex")
@dataclass(frozen=True, repr=False)
class StepsReindex(Steps):
    positions: ClassVar[str] = "reindex"


@dataclass
class Run:
    """One sample by hand. places [n]: the place in the prompt of each token that is left; pools [n]: which budget it is
    under, -1 for text; positions [..., 1, n]; logits [n, V]."""

    hidden: Tensor
    positions: Tensor
    places: Tensor
    pools: Tensor
    levels: list[Tensor]
    counts: list[int] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def cut(self, keep: float, entered: dict[int, int], merge: str, reindex: bool) -> None:
        for pool, tokens in entered.items():
            mine = (self.pools == pool).nonzero()[:, 0]
            k = resolve(keep, tokens)
            if k >= len(mine):
                continue
            chosen = best(score(self.hidden[0, mine]), torch.ones(len(mine), dtype=torch.bool), k - bool(merge))
            out, slots = [self.hidden[0, t] for t in mine[chosen]], mine[chosen].tolist()
            if merge:
                rest = self.hidden[0, mine[~chosen]]
                out.append(rest.mean(0) if merge == "mean" else rest.sum(0).detach())
                slots.append(int(mine[~chosen][0]))
            source, made, left = [], [], dict(zip(sorted(slots), zip(slots, out, strict=True), strict=True))
            for t in range(len(self.places)):
                if t in left:
                    source.append(left[t][0])
                    made.append(left[t][1])
                elif self.pools[t] != pool:
                    source.append(t)
                    made.append(self.hidden[0, t])
            self.hidden = torch.stack(made)[None]
            # the gap closes: as many ids as there are tokens, from where they began
            self.positions = self.positions[..., : len(source)] if reindex else self.positions[..., source]
            self.places, self.pools = self.places[source], self.pools[source]


def by_hand(
    model: Any, seen: dict[str, Any], row: int, real: Tensor, pools: Tensor, stage: Steps, *reindex: bool
) -> Run:
    """The stock decoder layers, one by one, on what the stock language model was given (`seen`), for the tokens `real` of a row.
    pools [S]: as in `Run`. reindex: before the LLM, and in the layers."""
    language_model = model.model.language_model
    embeds, positions = seen["inputs_embeds"], seen["position_ids"]
    if positions is None:
        positions = torch.arange(embeds.shape[1])[None]
    first = positions[..., row if positions.shape[-2] > 1 else 0, :][..., None, real]
    if reindex[0]:  # the stock positions of a sample without gaps
        first = first[..., :1] + torch.arange(len(real))
    levels = []
    if seen.get("deepstack_visual_embeds") is not None:
        where = seen["visual_pos_masks"][..., None].expand_as(embeds)
        levels = [torch.zeros_like(embeds).masked_scatter(where, x)[row] for x in seen["deepstack_visual_embeds"]]
    run = Run(embeds[row : row + 1, real], first, real, pools[real], levels)
    entered = {int(p): int((run.pools == p).sum()) for p in run.pools.unique() if p >= 0}
    for i, layer in enumerate(language_model.layers):
        if 0 < i <= len(levels):
            run.hidden = run.hidden + levels[i - 1][run.places]
        if i in stage.layers:
            run.cut(stage.keeps[stage.layers.index(i)], entered, stage.merge, reindex[1])
        run.counts.append(len(run.places))
        tables = language_model.rotary_emb(run.hidden, run.positions)
        out = layer(run.hidden, attention_mask=None, position_embeddings=tables, use_cache=False)
        run.hidden = out[0] if isinstance(out, tuple) else out
    run.logits = model.lm_head(language_model.norm(run.hidden))[0]
    return run


def pooled(patches: Tensor) -> Tensor:
    """All visual tokens of a row share one budget."""
    return torch.where(patches, 0, -1)


PLANS = {
    "keep": ("steps()", None, (False, False)),
    "reindex": ("steps_reindex()", None, (False, True)),
    "reindex_all": ("by_feature(keep=0.6) >> steps_reindex()", None, (True, True)),
    "reindex_before": ("by_feature(keep=0.6) >> steps()", None, (True, False)),
    "forced": ("steps()", "reindex", (False, True)),
    "forced_keep": ("by_feature(keep=0.6) >> steps_reindex()", "keep", (False, False)),
    "mean": ("steps_reindex(merge='mean')", None, (False, True)),
    "mean_keep": ("steps(merge='mean')", None, (False, False)),
    "mean_early": ("by_feature(keep=0.6) >> steps_reindex(merge='mean', layers=(1, 2, 3), keeps=(.7, .5, .2))", None, (True, True)),
    "rows": ("steps_reindex(merge='rows')", None, (False, True)),
}  # fmt: skip


def planned(name: str, family: str) -> tuple[mm.Pipeline, Steps, tuple[bool, bool]]:
    text, positions, reindex = PLANS[name]
    if family in QWEN:  # M-RoPE always keeps
        positions, reindex = None, (False, False)
    plan = mm.as_pipeline(text, positions=positions)
    stage = plan.parts[-1]
    assert isinstance(stage, Steps)
    return plan, stage, reindex


# ---------------------------------------------------------------------- one forward pass
@torch.no_grad()
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", SOME)
def test_cuts_equal_layers_by_hand(family: str, name: str) -> None:
    model = build(family)
    side = "right" if name in ("mean", "keep") else "left"
    inputs = prompts(model, family, samples(family), side=side)
    with captured(model) as seen:
        model(**inputs)
    plan, stage, reindex = planned(name, family)
    mm.compress(model, plan)
    cached, plain = (model(**inputs, use_cache=use).logits for use in (True, False))
    real, patches = kept_places(model, inputs), visual_places(model, inputs["input_ids"].shape)
    layers = [mm.trace(model).tokens_per_layer(row) for row in range(2)]
    left = kept_places(model, inputs, layer=3)
    mm.uncompress(model)
    for row in range(2):
        run = by_hand(model, seen, row, real[row], pooled(patches[row]), stage, *reindex)
        assert layers[row] == run.counts and run.counts[3] < run.counts[0]
        assert left[row].tolist() == sorted(run.places.tolist())
        for logits in (cached, plain):
            close(logits[row, run.places], rows_shown(run.logits, run.places, inputs["input_ids"][row]))


@torch.no_grad()
def test_the_test_sees_positions() -> None:
    """What the comparison above rests on: another numbering, or a mean instead of a sum, moves the logits by far more."""
    model = build("llava")
    inputs = prompts(model, "llava", [[5, image("llava"), 4]])
    found = {}
    for name in ("keep", "reindex", "mean", "rows"):
        with mm.compressed(model, planned(name, "llava")[0]):
            found[name] = model(**inputs).logits[0, -1]
    names = list(found)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert (found[one] - found[other]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["reindex", "mean_early"])
@pytest.mark.parametrize("family", PLAIN)
def test_a_batch_equals_its_rows_alone(family: str, name: str) -> None:
    """Ragged rows, also when one has no picture at all."""
    model = build(family)
    both = [[9], [5, image(family), 4]]
    inputs = prompts(model, family, both)
    mm.compress(model, planned(name, family)[0])
    logits = model(**inputs).logits
    single = {n: x[1:] if len(x) == 2 else x for n, x in inputs.items()}
    length = int(single["attention_mask"].sum())
    along = ("input_ids", "attention_mask")
    single = {n: x[:, -length:] if n in along else x for n, x in single.items()}
    expected = model(**single).logits
    alive = expected[0].abs().sum(1) > 0
    close(logits[1, -length:][alive], expected[0][alive])


# ---------------------------------------------------------------------- caches
@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "name"),
    [(f, "mean_early") for f in FAMILIES] + [("llava", n) for n in ("reindex", "reindex_all", "mean", "rows")],
)
def test_cached_equals_uncached(family: str, name: str) -> None:
    model = mm.compress(build(family), planned(name, family)[0])
    inputs = prompts(model, family, samples(family))
    a, b = (model.generate(**inputs, **LOGITS, use_cache=cached) for cached in (True, False))
    assert torch.equal(a.sequences, b.sequences)
    for one, other in zip(a.logits, b.logits, strict=True):
        close(one, other)
    layers = a.past_key_values.layers
    assert all(isinstance(layer, PrunedLayer) for layer in layers)
    shifts = [layer.ledger.shift for layer in layers]
    if family in QWEN:
        assert all(shift is None for shift in shifts)
    else:  # what the rows have lost by then; later layers more
        assert (shifts[3] > shifts[1]).all() and (shifts[1] > (shifts[0] if shifts[0] is not None else 0)).all()


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["reindex", "mean_early"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "qwen2_5_vl"])
def test_beams(family: str, name: str, options: dict[str, Any]) -> None:
    model = mm.compress(build(family), planned(name, family)[0])
    inputs = prompts(model, family, alike(family) if OLDEST else samples(family))
    outs = [model.generate(**inputs, **GREEDY, **options, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*outs)


@torch.no_grad()
@pytest.mark.parametrize("way", ["reorder_cache", "batch_select_indices"])
def test_rows_of_a_cache_change_places(way: str) -> None:
    """With what each of them has lost: the rows have unequal numbers of pictures."""
    model = mm.compress(build("llava"), planned("mean_early", "llava")[0])
    inputs = prompts(model, "llava", samples("llava"))
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    found = []
    for order in ([0, 1], [1, 0]):
        cache = model(**inputs, use_cache=True).past_key_values
        getattr(cache, way)(torch.tensor(order))
        step = {"input_ids": torch.tensor([[7, 9], [8, 11]])[order], "attention_mask": mask[order]}
        found.append(model(**step, past_key_values=cache).logits)
    close(found[0], found[1][[1, 0]])


@torch.no_grad()
@pytest.mark.parametrize("name", ["reindex", "mean_early"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "qwen2_5_vl"])
def test_second_turn(family: str, name: str) -> None:
    """A turn of text behind a cache whose layers have numbered positions anew; from a copy of the cache too."""
    model = mm.compress(build(family), planned(name, family)[0])
    inputs = prompts(model, family, samples(family))
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turn = follow_up(first.sequences, inputs["attention_mask"])
    pixels = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask")}
    if family in QWEN:
        types = pixels.pop("mm_token_type_ids")
        pixels["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, turn["input_ids"].shape[1] - types.shape[1]))
    for cache in (copy.deepcopy(first.past_key_values), first.past_key_values):
        out = model.generate(**turn, past_key_values=cache, **LOGITS)
        whole = model.generate(**turn, **pixels, **LOGITS)
        assert torch.equal(out.sequences, whole.sequences)
        for one, other in zip(out.logits, whole.logits, strict=True):
            close(one, other)


@torch.no_grad()
@pytest.mark.parametrize("name", ["reindex", "reindex_all", "mean", "mean_keep"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "qwen2_5_vl"])
def test_new_image_in_a_later_turn(family: str, name: str) -> None:
    """Each turn has its own budget; by hand in one run. Then two steps of text, on both shifts together."""
    model = build(family)
    parts: list[list[Part]] = [[5, image(family), 3], [3, image(family), 4], [6]]
    turns = [prompts(model, family, [part], seed=i) for i, part in enumerate(parts)]
    along = ("input_ids", "mm_token_type_ids", "attention_mask")
    names = turns[1].keys()
    joined = {n: torch.cat([t[n] for t in turns if n in t], 1 if n in along else 0) for n in names}
    ends = torch.tensor([t["input_ids"].shape[1] for t in turns]).cumsum(0).tolist()
    with captured(model) as seen:
        model(**joined)
    positions = seen["position_ids"] if family in QWEN else torch.arange(ends[-1])[None]
    plan, stage, reindex = planned(name, family)
    mm.compress(model, plan)
    start, cache, outs, kept = 0, None, [], []
    for turn, end in zip(turns, ends, strict=True):
        spans = [(start, end)] if end < ends[-1] else [(start, start + 1), (start + 1, end)]
        for a, b in spans:
            out = model(
                **{n: x[:, a - start : b - start] if n in along else x for n, x in turn.items() if n != "attention_mask"},
                attention_mask=joined["attention_mask"][:, :b],
                position_ids=positions[..., a:b],
                past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            cache = out.past_key_values
            outs.append(out.logits[0])
        if "pixel_values" in turn:
            kept.append(kept_places(model, turn)[0] + start)
        start = end
    pools = torch.full((ends[-1],), -1)
    for pool, visuals in enumerate(turns[:2]):
        where = (visuals["input_ids"][0] == IMAGE).nonzero()[:, 0] + (0, ends[0])[pool]
        pools[where] = pool
    if "newline" in "".join(n for n, _ in model.named_parameters()):  # structural tokens are text here
        mm.uncompress(model)
        mm.compress(model, "steps")
        for pool, visuals in enumerate(turns[:2]):
            model(**visuals)
            mine = visual_places(model, visuals["input_ids"].shape)[0]
            first = (0, ends[0])[pool]
            pools[first : first + len(mine)] = torch.where(mine, pool, -1)
    mm.uncompress(model)
    real = torch.cat([*kept, torch.arange(ends[1], ends[2])])
    run = by_hand(model, seen, 0, real, pools, stage, *reindex)
    logits = torch.cat(outs)
    close(logits[run.places], rows_shown(run.logits, run.places, joined["input_ids"][0]))
    assert is_pruned(cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["reindex_all", "mean_early"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "qwen2_5_vl"])
def test_static_cache(family: str, name: str) -> None:
    model = mm.compress(build(family), planned(name, family)[0])
    inputs = prompts(model, family, samples(family))
    a = model.generate(**inputs, **GREEDY)
    assert torch.equal(a, model.generate(**inputs, **GREEDY, cache_implementation="static"))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_prompt_lookup(family: str) -> None:
    """The cache is cropped after every draft that is not accepted."""
    model = mm.compress(build(family), planned("mean_early", family)[0])
    inputs = prompts(model, family, samples(family)[:1])
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=10)
    found = model.generate(**inputs, do_sample=False, max_new_tokens=10, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
def test_flash_attention_path(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mm.compress(build(family), planned("mean_early", family)[0])
    inputs = prompts(model, family, samples(family)[-rows:], mask=rows == 2)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    expected, generated = model(**inputs).logits[real], model.generate(**inputs, **GREEDY)
    flash = FlashStandIn(monkeypatch)
    flash.enable(model)
    close(model(**inputs).logits[real], expected)
    assert torch.equal(model.generate(**inputs, **GREEDY), generated)


@torch.no_grad()
def test_compiled_static_decode() -> None:
    from transformers import CompileConfig

    model = mm.compress(build("llava"), planned("reindex_all", "llava")[0])
    inputs = prompts(model, "llava", samples("llava"))
    expected = model.generate(**inputs, **GREEDY)
    torch._dynamo.reset()
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    out = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
    assert torch.equal(out, expected)


# ---------------------------------------------------------------------- training
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["reindex", "mean_early"])
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
def test_gradients_equal_layers_by_hand(family: str, name: str, checkpointing: bool) -> None:
    """Through merged tokens too."""
    model = build(family)
    inputs = prompts(model, family, [[5, image(family), 4]])
    plan, stage, reindex = planned(name, family)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mm.compress(model, plan)
    model(**inputs).logits[0, -4:].square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    (real,), patches = kept_places(model, inputs), visual_places(model, inputs["input_ids"].shape)
    mm.uncompress(model)
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_disable()
    with captured(model) as seen:
        model(**inputs, use_cache=False)
    run = by_hand(model, seen, 0, real, pooled(patches[0]), stage, *reindex)
    run.logits[-4:].square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None:
            close(found[parameter_name], parameter.grad, 2e-3 * parameter.grad.abs().max().item() + 1e-4)
    assert any("vis" in n and g.abs().max() > 0 for n, g in found.items())


# ---------------------------------------------------------------------- changes of tokens
@mm.register("change_spy")
@dataclass(frozen=True, repr=False)
class ChangeSpy(Steps):
    """Keeps what it is shown, and cuts like `steps`."""

    start: str = "0"
    needs: ClassVar[tuple] = ("transitions@0.26", "absolute_transitions@0", "transitions@9")
    shown: ClassVar[list[mm.Visuals]] = []

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        self.shown.append(visuals)
        return super().select(visuals)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_changes_of_tokens_equal_hooks_on_stock_modules(family: str) -> None:
    """Sums over layers with all tokens, then with those that are left; a start behind the first cut is moved before it."""
    model = build(family)
    inputs = prompts(model, family, samples(family))
    ChangeSpy.shown.clear()
    with mm.compressed(model, "change_spy(layers=(2, 3))"):
        model(**inputs)
        places = [kept_places(model, inputs, layer) for layer in range(4)]
        patches = visual_places(model, inputs["input_ids"].shape)
        for row in range(2):
            assert mm.trace(model).tokens_per_layer(row) == [len(places[layer][row]) for layer in range(4)]
    shown = sorted(ChangeSpy.shown, key=lambda v: (v.cut, v.n))
    assert [v.cut for v in shown] == [0, 0, 1, 1]

    layers = model.model.language_model.layers
    taken: dict[Any, Any] = {}
    handles = []
    for i, layer in enumerate(layers):
        for part in (layer.self_attn, layer.mlp):

            def keep(module: Any, args: Any, kwargs: Any, out: Any, key: Any = (i, part is layer.mlp)) -> None:
                given = args[0] if args else kwargs["hidden_states"]
                taken.setdefault(key, []).append((given, out[0] if isinstance(out, tuple) else out))

            handles.append(part.register_forward_hook(keep, with_kwargs=True))
    with captured(model) as seen:
        model(**inputs)
    rows = sorted(range(2), key=lambda row: len(places[0][row]))
    for number, row in enumerate(rows):
        taken.clear()
        real = places[0][row]
        by_hand(model, seen, row, real, pooled(patches[row]), Steps(layers=(2, 3)), False, False)
        for cut, layer in enumerate((2, 3)):
            visuals = shown[2 * cut + number]
            for name, start, absolute in (
                ("transitions@0.26", 1, False),
                ("absolute_transitions@0", 0, True),
                ("transitions@9", 1, False),
            ):
                expected: dict[int, float] = {}
                for i in range(start, layer):
                    for mlp in (False, True):
                        ((before, after),) = taken[i, mlp]
                        value = transition_value(*transition(before, after), absolute=absolute)[0]
                        for place, x in zip(places[i][row].tolist(), value.tolist(), strict=True):
                            expected[place] = expected.get(place, 0.0) + x
                own = [p for p in places[layer - 1][row].tolist() if patches[row, p]]
                close(visuals[name][0], torch.tensor([expected[p] for p in own]), 1e-4)
    for handle in handles:
        handle.remove()


# ---------------------------------------------------------------------- the methods on the embedded models
METHODS = [
    "pyramiddrop",
    "sparsevlm",
    "transprune",
    "pyramiddrop(keep=0.4)",
    "sparsevlm(version='2.0', keep=0.6)",
    "transprune(keep=0.5, absolute=True)",
    "divprune(keep=0.5) >> sparsevlm(keep=0.6)",
]


class Frozen:
    """The decisions of the first forward pass, again in every later one: uncached steps would decide anew, since they read a
    longer text. Rows that `generate` repeats get copies of them."""

    def __init__(self, stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decisions: list[mm.Selection] = []
        self.calls, self.frozen = 0, False
        own = type(stage).select

        def select(stage: Any, visuals: mm.Visuals) -> mm.Selection:
            if not self.frozen:
                self.decisions.append(own(stage, visuals))
                return self.decisions[-1]
            self.calls += 1
            then = self.decisions[(self.calls - 1) % len(self.decisions)]
            copies = len(visuals.features) // len(then.keep)
            parts = (then.keep, then.assign, then.weight)
            return mm.Selection(*(None if x is None else x.repeat_interleave(copies, 0) for x in parts))  # type: ignore[arg-type]

        monkeypatch.setattr(type(stage), "select", select)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "plan"), [(n, p) for n in MODELS for p in (METHODS if n == MODELS[0] else METHODS[1:3])]
)
def test_methods_on_the_embedded_models(name: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of two prompts: cached equals uncached, also with beams, and a second turn equals all of it in one call."""
    model, processor = load(model_path(name))
    model.generation_config.eos_token_id = None
    chosen = items(2, stretched=takes_any_shape(model))
    texts = [prompt(processor, item.question.text) for item in chosen]
    pictures = [item.picture for item in chosen]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True, padding_side="left")
    mm.compress(model, plan)
    freeze = Frozen(mm.as_pipeline(plan).parts[-1], monkeypatch)
    model(**inputs)
    freeze.frozen = True
    counts = mm.trace(model).tokens_per_layer(0)
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 4
    options = {**LOGITS, "max_new_tokens": 3}
    cached, uncached = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        close(one, other)
    assert is_pruned(cached.past_key_values)
    if not OLDEST:  # 5.17 repeats tiles wrongly
        beams = [model.generate(**inputs, **{**options, "num_beams": 2}, use_cache=use) for use in (True, False)]
        assert torch.equal(beams[0].sequences, beams[1].sequences)

    ids = torch.cat([cached.sequences, inputs["input_ids"][:, -5:]], 1)  # the end of the prompt again
    more = (0, ids.shape[1] - inputs["input_ids"].shape[1])
    turn = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], more, value=1)}
    pixels = {n: x for n, x in inputs.items() if n not in turn}
    if "mm_token_type_ids" in pixels:
        pixels["mm_token_type_ids"] = torch.nn.functional.pad(pixels["mm_token_type_ids"], more)
    out = model.generate(**turn, past_key_values=cached.past_key_values, **options)
    whole = model.generate(**turn, **pixels, **options)
    for one, other in zip(out.logits, whole.logits, strict=True):
        close(one, other)
