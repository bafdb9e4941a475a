# SPDX-License-Identifier: Apache-2.0
"""Every method crossed with what all of them promise, and with every family. A new method is in here by being registered."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmcompress.eval.cost.selection import Sizes, random_visuals
from torch import Tensor

import mmcompress as mm
from mmcompress.runtime.needs import names_of
from mmcompress.stage import InputStage, LayerStage, Selecting, Stage

from .families import FAMILIES, build, prompts
from .test_families import alone, samples
from .watch import NoWaiting, Watch

ROWS, COLUMNS = 12, 10
SIZES = Sizes(96, 96, 96, 2, 6)
TRAINED = ("dyvte",)
"""Methods that have nothing to decide by until they are trained for a model: see test_learned.py."""
KNOWN = mm.methods()
METHODS = [name for name, cls in KNOWN.items() if cls.__module__.startswith("mmcompress.") and name not in TRAINED]
"""All but these, and those that other tests register."""
WRITTEN = {name: f"{name}(dims=(3, 17))" for name in ("sink_correction", "var_attention_sink")}
"""Plans of methods that cannot do without an option: these need to know sink dimensions, which random models do not have."""
REFUSED: dict[str, set[str]] = {"vflowopt_cuts": set(FAMILIES)}
"""Families that a method refuses, by name; every other refusal is a failure. The cuts of vflowopt need an input stage with scores
before them."""
ALL_PAIRS = {
    "anchorprune": "a table of N^2", "eadp": "a table of N^2", "idpruner": "a table of N^2", "prunesid": "a table of N^2",
    "restore": "a table of N^2",
    "scope": "a table of N^2", "cdpruner": "a table of N^2", "cen_prune": "as the host",
    "divprune": "a table of N^2", "mmtok": "N (N + T) float32",
    "vispruner": "N^2 C",
}  # fmt: skip
"""Methods that may hold a matrix of all pairs of tokens, with the words of their docstrings that say so."""
ROUNDS = {"vispruner"}
"""Methods that remove a fixed number at a time, so that the rounds grow with N."""


def plans() -> Iterator[tuple[str, int, Stage]]:
    for name in METHODS:
        for part, stage in enumerate(mm.as_pipeline(WRITTEN.get(name, name)).parts):
            yield name, part, stage


STAGES = {
    f"{name}-{part}" if part else name: stage
    for name, part, stage in plans()
    if isinstance(stage, InputStage | LayerStage)
}


def some(stage: Stage, k: int, layout: mm.Layout | None = None, visuals: int = 2, smooth: float = 1.0) -> mm.Visuals:
    """Visuals with everything that `stage` reads; `smooth` 0: all tokens are equal."""
    return random_visuals(stage, k, layout or mm.Layout.raster(1, ROWS, COLUMNS), SIZES, visuals, smooth)


def chosen(stage: Selecting, visuals: mm.Visuals) -> mm.Selection:
    """The decision, checked for what every decision promises."""
    found = stage.select(visuals)
    assert found.keep.shape == (len(visuals.features), visuals.k)
    assert found.keep.dtype == torch.int64
    for row in found.keep.tolist():
        assert len(set(row)) == visuals.k and min(row) >= 0 and max(row) < visuals.n
    if found.assign is not None:
        assert found.assign.shape == (len(visuals.features), visuals.n)
        assert int(found.assign.min()) >= -1 and int(found.assign.max()) < visuals.k
    return found


def outputs(stage: Selecting, visuals: mm.Visuals) -> Tensor:
    """The tokens that the next stage gets."""
    return replace(visuals, signals={}).take(chosen(stage, visuals)).features


# ---------------------------------------------------------------------- every method by itself
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("k", [1, 2, 7, 31, ROWS * COLUMNS - 1, ROWS * COLUMNS])
def test_exact_budget_and_determinism(name: str, k: int) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    first, again = (outputs(stage, some(stage, k)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.isfinite().all()


@pytest.mark.parametrize("name", STAGES)
def test_batched_equals_alone(name: str) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    both = some(stage, 30)
    together = chosen(stage, both)
    for row in range(2):
        one = replace(
            both, features=both.features[row : row + 1], signals={n: s[row : row + 1] for n, s in both.signals.items()}
        )
        assert torch.equal(chosen(stage, one).keep, together.keep[row : row + 1])


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features(name: str, dtype: torch.dtype) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    visuals = some(stage, 30)
    half = replace(
        visuals, features=visuals.features.to(dtype), signals={n: s.to(dtype) for n, s in visuals.signals.items()}
    )
    made = outputs(stage, half)
    assert made.isfinite().all()


@pytest.mark.parametrize("name", STAGES)
def test_gradients_flow_through_what_is_kept(name: str) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    visuals = some(stage, 30)
    leaves = [visuals.features.requires_grad_()]
    leaves += [s.requires_grad_() for n, s in visuals.signals.items() if n.startswith("encoder_features")]
    outputs(stage, visuals).square().sum().backward()
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert found and all(g.isfinite().all() for g in found)
    assert min(int((g.abs().sum((0, 2)) > 0).sum()) for g in found if g.abs().sum() > 0) >= 1
    assert any(int((g[0].abs().sum(1) > 0).sum()) >= 29 for g in found)  # one may be a token of no patch (CLS)


@pytest.mark.parametrize("name", STAGES)
def test_nothing_waits_for_the_device(name: str) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    visuals = some(stage, 30)
    with NoWaiting():
        stage.select(visuals)


@pytest.mark.parametrize("name", STAGES)
def test_no_loop_over_tokens(name: str) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)

    def operations(rows: int, k: int) -> int:
        visuals = some(stage, k, mm.Layout.raster(1, rows, COLUMNS))
        stage.select(visuals)  # makes what is made once for all visuals that lie alike
        with Watch() as watch:
            stage.select(visuals)
        return len(watch.names)

    few = operations(12, 40)
    # few tokens are a matter of NumPy, then blocks and halvings add some; a loop takes at least one for each token
    assert operations(192, 40) < max((24 if name in ROUNDS else 2) * few, 192 * COLUMNS)
    assert operations(12, 80) <= 1.5 * few


@pytest.mark.parametrize("name", sorted(set(STAGES) - set(ALL_PAIRS)))
def test_no_matrix_of_all_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = (
        "kernels.match.blocked._TILE", "kernels.components.blocked._PAIRS", "kernels.density.blocked.ELEMENTS", "ops.levels.PAIRS",
    )  # fmt: skip
    for block in blocks:  # of constant size, for more tokens than there are here
        monkeypatch.setattr(f"mmcompress.{block}", 1 << 16)
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    visuals = some(stage, 24, mm.Layout.raster(1, 30, 30))

    class Largest(Watch):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple | list) else (made,):
                if isinstance(one, Tensor):
                    # expanded views hold nothing; 2 visuals
                    held = one.untyped_storage().nbytes() // one.element_size()
                    Largest.size = max(Largest.size, held // 2)
            return made

    with Largest():
        stage.select(visuals)
    assert Largest.size < 900 * 900 // 4, Largest.size


@pytest.mark.parametrize("name", ALL_PAIRS)
def test_methods_that_hold_all_pairs_say_so(name: str) -> None:
    assert ALL_PAIRS[name] in (KNOWN[name].__doc__ or "")


# ---------------------------------------------------------------------- degenerate input
@pytest.mark.parametrize("name", STAGES)
def test_all_tokens_equal(name: str) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    assert outputs(stage, some(stage, 9, smooth=0.0)).isfinite().all()


@pytest.mark.parametrize("name", STAGES)
def test_tokens_of_length_zero(name: str) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    visuals = some(stage, 9)
    none = replace(
        visuals,
        features=torch.zeros_like(visuals.features),
        signals={n: torch.zeros_like(s) for n, s in visuals.signals.items()},
    )
    assert outputs(stage, none).isfinite().all()


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("side", [1, 2, 3])
def test_tiny_grids(name: str, side: int) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    for k in range(1, side * side + 1):
        assert outputs(stage, some(stage, k, mm.Layout.raster(1, side, side))).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_that_are_not_finite_are_refused(family: str, value: float) -> None:
    model = mm.compress(build(family), "divprune", keep=0.5)
    inputs = prompts(model, family, samples(family))
    inputs["pixel_values"][-1] = value
    with pytest.raises(ValueError, match="batch row 1 are not finite"):
        model(**inputs)


# ---------------------------------------------------------------------- every method in every family
@functools.cache  # families change fastest: a small cache would build two models for every pair
def stock(family: str, dtype: torch.dtype) -> Any:
    return build(family, dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_in_every_family(name: str, family: str) -> None:
    model, text = stock(family, torch.float32), WRITTEN.get(name, name)
    inputs = prompts(model, family, samples(family))
    try:
        with mm.compressed(model, text):
            logits = model(**inputs).logits
            visuals = mm.trace(model).visuals
            cells = [visual.kept_cells().tolist() for visual in visuals]
            layers = [mm.trace(model).tokens_per_layer(row) for row in range(2)]
            assert torch.equal(model(**inputs).logits, logits)
            assert logits.isfinite().all()
            plan = mm.as_pipeline(text)
            for row in range(2):
                left = sum(v.kept for v in visuals if v.row == row)
                for stage in plan.layer_stages:
                    for layer, wanted in zip(stage.cuts(4), stage.budgets(left, 4), strict=True):
                        removed = sum(v.kept for v in visuals if v.row == row) - wanted
                        assert layers[row][layer] == layers[row][0] - removed
            for visual in visuals:
                wanted = visual.tokens
                for stage in plan.input_stages:
                    wanted = stage.budget(wanted)
                if not plan.encoder_stages and not plan.pixel_stages:
                    assert visual.kept == wanted
            first = 0
            for row, sample in enumerate(samples(family)):
                single = alone(model, family, sample, inputs, row)
                model(**single)
                own = [visual.kept_cells().tolist() for visual in mm.trace(model).visuals]
                assert own == cells[first : first + len(own)]
                first += len(own)
    except NotImplementedError:
        assert family in REFUSED.get(name, set())
        return
    assert family not in REFUSED.get(name, set())
    half = stock(family, torch.bfloat16)
    with mm.compressed(half, text):
        assert (
            half(**{n: x.to(torch.bfloat16) if x.is_floating_point() else x for n, x in inputs.items()})
            .logits.isfinite()
            .all()
        )


# ---------------------------------------------------------------------- compositions
EARLY = [
    "downsample(keep=0.5)",
    "tome(keep=0.5, proportional=False)",
]  # with proportional attention some signals are refused
INPUT = [name for name in METHODS if issubclass(KNOWN[name], InputStage)]
LAYER = [name for name in METHODS if issubclass(KNOWN[name], LayerStage) and name not in REFUSED]


def reads_tower(name: str) -> bool:
    return any(n not in ("text_embeddings", "clip_relevance") for n in names_of(mm.as_pipeline(name).parts[0].needs))


@st.composite
def plans_of_all_kinds(draw: st.DrawFn) -> str:
    early = draw(st.sampled_from([*EARLY, None]))
    inputs = draw(st.lists(st.sampled_from(INPUT), max_size=2))
    if early and early.startswith("downsample"):
        inputs = [name for name in inputs if not reads_tower(name)]
    layer = draw(st.sampled_from([*(WRITTEN.get(name, name) for name in LAYER), None]))
    keep = draw(st.sampled_from([0.3, 0.5, 0.77]))
    parts = [early, *(f"{name}(keep={keep})" for name in inputs), layer]
    return " >> ".join(part for part in parts if part) or "random(keep=0.5)"


@torch.no_grad()
@given(
    plans_of_all_kinds(),
    st.sampled_from(["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_input_stage_before_any_layer_stage(plan: str, family: str) -> None:
    model = stock(family, torch.float32)
    inputs = prompts(model, family, samples(family))
    with mm.compressed(model, plan):
        out = model.generate(**inputs, do_sample=False, max_new_tokens=2)
        again = model.generate(**inputs, do_sample=False, max_new_tokens=2)
        counts = [mm.trace(model).tokens_per_layer(row) for row in range(2)]
    assert torch.equal(out, again)
    assert all(row == sorted(row, reverse=True) for row in counts)
