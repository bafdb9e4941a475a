# SPDX-License-Identifier: Apache-2.0
"""Costs: counts equal torch's counter, conventions equal published totals, clocks and the command."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from mmcompress.eval.cost import clock as clock_module
from mmcompress.eval.cost import latency
from mmcompress.eval.cost.clock import Spread, Subject, clock
from mmcompress.eval.cost.counts import Counts, count
from mmcompress.eval.cost.latency import count_flops
from mmcompress.eval.cost.record import costs
from mmcompress.eval.machine import commit
from mmcompress.kernels.dispatch import preferring
from transformers import LlavaConfig, LlavaNextConfig

import mmcompress as mm
from mmcompress.cli import main
from mmcompress.runtime import engine as engine_module
from mmcompress.stage import ExitStage
from mmcompress.trace import Shape, prefill_flops

from . import architectures
from .families import FAMILIES, build, image, prompts

PLANS = ("uniform(keep=0.5)", "visionzip(keep=0.5)", "divprune(keep=0.25)", "fastv(layer=1, keep=0.5)")


def one(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model = build(family)
    return model, prompts(model, family, [[5, image(family), 4]], mask=False)


@dataclass(frozen=True, repr=False)
class ByPlace(mm.LayerStage):
    """Keeps the first tokens: a cut that computes nothing."""

    name: ClassVar[str] = "by_place"  # not registered: other tests go through all methods
    layer: int = 1
    keep: float = 0.5

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        places = torch.arange(visuals.n, 0, -1.0, device=visuals.features.device)
        return mm.Selection.top(places.expand(len(visuals.features), -1), visuals.k)


@dataclass(frozen=True, repr=False)
class Leave(ExitStage):
    """All visual tokens leave before a layer: an exit that computes nothing."""

    name: ClassVar[str] = "leave"
    layer: int = 2

    def layers(self, depth: int) -> range:
        return range(1, depth)

    def leave(self, visuals: mm.Visuals, layer: int) -> torch.Tensor:
        return torch.full((len(visuals.features),), layer >= self.layer)


def layers_of(stage: Any, tokens: int, depth: int) -> list[int]:
    """Visual tokens in every layer, as a stage of ours cuts them."""
    found = [tokens] * depth
    for cut, left in zip(stage.cuts(depth), stage.budgets(tokens, depth), strict=True):
        found[cut:] = [left] * (depth - cut)
    return found


@pytest.mark.parametrize(
    ("config", "plan", "published"),
    [
        (LlavaConfig(), None, 3.82),
        (LlavaNextConfig(), None, 20.8),
        (LlavaConfig(), mm.PyramidDrop(), 1.78),
        (LlavaConfig(), mm.PyramidDrop(layers=(10, 20), ratios=(0.5, 0.25)), 2.13),
        (LlavaNextConfig(), mm.PyramidDrop(), 9.46),
    ],
)
def test_published_totals(config: Any, plan: Any, published: float) -> None:
    """LLaVA-1.5-7B, LLaVA-NeXT-7B and PyramidDrop from their configs, in 10^12 multiply-adds of visual tokens."""
    text, vision = config.text_config, config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 * (5 if config.model_type == "llava_next" else 1)
    assert (tokens, text.hidden_size, text.num_hidden_layers) in ((576, 4096, 32), (2880, 4096, 32))
    layers = [tokens] * 32 if plan is None else layers_of(plan, tokens, 32)
    found = prefill_flops(Shape.of(text), layers, "swiglu_mac") / 1e12
    assert found == pytest.approx(published, abs=0.06 if published > 20 else 0.006)


@pytest.mark.parametrize(("k", "part", "ratio"), [(2, 0.5, 0.552), (3, 0.5, 0.567), (2, 0.75, 0.332), (2, 0.9, 0.203)])
def test_published_ratios_of_fastv(k: int, part: float, ratio: float) -> None:
    """With 36 tokens of text; its README rounds the second to 57 %."""
    shape = Shape.of(LlavaConfig().text_config)
    layers = [36 + n for n in layers_of(mm.FastV(layer=k, keep=1 - part), 576, 32)]
    found = prefill_flops(shape, layers, "fastv") / prefill_flops(shape, [612] * 32, "fastv")
    assert found == pytest.approx(ratio, abs=0.001)
    if (k, part) == (3, 0.5):
        assert round(100 * found) == 57


KINDS: dict[str, Any] = {
    "pixel": mm.Downsample(keep=0.25),
    "encoder": mm.ToMe(keep=0.5),
    "input": mm.Uniform(keep=0.5),
    "layer": ByPlace(),
    "exit": Leave(),
    "input, layer": mm.Uniform(keep=0.5) >> ByPlace(2),
    "encoder, input, layer, exit": mm.ToMe(keep=0.5) >> mm.Uniform(keep=0.5) >> ByPlace(2) >> Leave(3),
}
"""A plan of every kind that computes nothing of its own: all that torch counts has to be in the formula."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula_is_what_torch_counts_for_every_kind_of_plan(family: str) -> None:
    model, inputs = one(family)
    stock = count(model, inputs)
    shape = Shape.of(model.config.get_text_config())
    for kind, plan in KINDS.items():
        found = count(model, inputs, plan, stock)
        with mm.compressed(model, plan), preferring("naive"):
            counted = count_flops(model, inputs)
        assert found.overhead == 0, kind
        assert counted == found.vision + prefill_flops(shape, found.layers) + found.rotary + found.head, kind
        assert sum(found.layers) < sum(stock.layers), kind
        assert (found.vision < stock.vision) == (kind.split(",")[0] in ("pixel", "encoder")), kind
    left = count(model, inputs, KINDS["exit"], stock).layers
    assert left[:2] == stock.layers[:2] and len(set(left[2:])) == 1 and left[2] < stock.layers[2]
    attention, cut = count(model, inputs, "cmai", stock), count(model, inputs, "fastv(layer=1, keep=0.5)", stock)
    assert attention.layers == stock.layers and attention.overhead > 0
    n = stock.layers[0]  # FastV: the query of the last token, and its products with the keys that the cache has
    heads = shape.heads * shape.head_dim
    assert cut.overhead == 2 * shape.hidden * heads + 2 * n * heads


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_torch(family: str) -> None:
    """What is not vision, layers, rotary tables or logits is compression: nothing in the stock model, and where tokens are
    dropped by their place."""
    model, inputs = one(family)
    stock = count(model, inputs)
    assert stock.overhead == 0 and stock.flops["exact"]["full"] == prefill_flops(
        Shape.of(model.config.get_text_config()), stock.layers
    )
    assert len(set(stock.layers)) == 1 and stock.layers[0] == stock.text + stock.visual == inputs["input_ids"].shape[1]
    found = {plan: count(model, inputs, plan, stock) for plan in PLANS}
    assert "_mmcompress_engine" not in model.__dict__
    assert found[PLANS[0]].overhead == 0
    for plan in PLANS[1:]:
        assert found[plan].overhead > 0, plan
    half, cut = found[PLANS[0]], found[PLANS[3]]
    kept = half.layers[0]
    assert cut.layers == [stock.layers[0]] + [kept] * 3
    for counts in (stock, half, cut):
        per_token = 2 * 2 * 16 * 4  # keys and values, two heads of 16, float32
        assert counts.kv_bytes == sum(counts.layers) * per_token
        assert counts.flops["swiglu_mac"]["visual_only"] < counts.flops["swiglu_mac"]["full"]
    assert 0 < half.total < cut.total < stock.total and half.vision == stock.vision
    assert stock.vision_share < half.vision_share < 1


def test_overhead_of_a_selection_is_that_of_its_definition() -> None:
    model, inputs = one("llava")
    found = count(model, inputs, "divprune(keep=0.25)")
    assert found.overhead == 2 * 16**2 * 64  # all cosines of 16 tokens of 64 features


def test_a_stage_in_the_tower_or_before_it_makes_vision_cheaper() -> None:
    model, inputs = one("qwen2_5_vl")
    stock = count(model, inputs)
    for plan in ("tome(keep=0.5)", "downsample(keep=0.25)"):
        found = count(model, inputs, plan, stock)
        assert found.vision < stock.vision and found.visual == stock.visual and found.overhead == 0


def test_batches_and_refusals() -> None:
    model = build("llava")
    pair = prompts(model, "llava", [[5, image("llava"), 4]] * 2)
    with pytest.raises(ValueError, match="one prompt, not of 2"):
        count(model, pair)
    with pytest.raises(ValueError, match="new_tokens=1"):
        clock(model, {}, [Subject("stock")], 1, 0, 1)
    inputs = prompts(model, "llava", [[5, image("llava"), 4]])
    with pytest.raises((NotImplementedError, ValueError)):
        costs(model, inputs, ["fastv(layer=9)"], 1, 0, 2)
    assert "_mmcompress_engine" not in model.__dict__


class Clockwork:
    """A clock that moves only where the model does: by 1 s in the vision tower, 2 s in a prefill of the language model, 0.25 s in
    each of its steps, and half a second where a plan chooses; all `factor` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any, *modules: Any) -> None:
        self.now, self.factor = 0.0, 1.0
        for module in (*modules, engine_module):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        select = mm.Uniform.select
        monkeypatch.setattr(mm.Uniform, "select", lambda *given: (self.pass_by(0.5), select(*given))[1])
        model.model.vision_tower.register_forward_hook(lambda *_: self.pass_by(1.0))
        model.model.language_model.register_forward_hook(
            lambda module, args, kwargs, out: self.pass_by(2.0 if kwargs["inputs_embeds"].shape[1] > 1 else 0.25),
            with_kwargs=True,
        )

    def pass_by(self, seconds: float) -> None:
        self.now += self.factor * seconds


def test_each_part_of_a_run_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds; what a plan chooses is no prefill; a step of decoding is what n - 1 of them took, divided."""
    model, inputs = one("llava")
    clockwork = Clockwork(monkeypatch, model, clock_module)

    def faster(round_: int) -> None:
        clockwork.factor = 1.0 + round_ % 2

    stock, plan = clock(
        model, inputs, [Subject("stock"), Subject(PLANS[0])], repeats=4, warmup=1, new_tokens=5, show=faster
    )
    for times, chosen in ((stock, 0.0), (plan, 500.0)):
        factors = (2.0, 1.0, 2.0, 1.0)  # the first round warms up
        parts = {"vision": 1000.0, "compress": chosen, "prefill": 2000.0, "ttft": 3000.0 + chosen, "decode": 250.0}
        for part, value in parts.items():
            assert getattr(times, part) == [factor * value for factor in factors], part
        assert times.spread("decode") == Spread(375.0, 250.0)


def test_latency_reached_and_its_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reached: the speed-up over what the FLOPs promise; decode: overhead of a step, in percent; ±: half of the middle half."""
    model, inputs = one("llava")
    clockwork = Clockwork(monkeypatch, model, latency)
    monkeypatch.setattr(latency, "one_image_prompt", lambda model: inputs)
    rounds = iter([1.0, 1.0, 2.0, 3.0, 4.0])
    compress = mm.compress

    def slower(model: Any, plan: str, **more: Any) -> Any:
        clockwork.factor = next(rounds, 1.0) if more.get("timing") else 1.0
        return compress(model, plan, **more)

    monkeypatch.setattr(mm, "compress", slower)
    uncompress = mm.uncompress

    def steady(model: Any) -> Any:
        clockwork.factor = 1.0
        return uncompress(model)

    monkeypatch.setattr(mm, "uncompress", steady)
    stock, plan = latency.measure(model, ["stock", PLANS[0]], repeats=4, warmup=1, new_tokens=8)
    assert (stock.prefill_ms, stock.prefill_iqr_ms, stock.decode_ms_per_token, stock.select_ms) == (
        3000.0,
        0.0,
        250.0,
        0.0,
    )
    assert (plan.prefill_ms, plan.decode_ms_per_token, plan.select_ms) == (3500.0 * 2.5, 250.0 * 2.5, 500.0 * 2.5)
    quarters = 3500.0 * 2.5  # of 1, 2, 3, 4 times: from 1.25 to 3.75
    assert plan.prefill_iqr_ms == quarters and plan.decode_iqr_ms == 250.0 * 2.5
    full, left = count(model, inputs), count(model, inputs, PLANS[0])
    assert plan.flops_ratio == full.total / left.total and plan.kv_bytes == left.kv_bytes
    assert plan.prefill_speedup == 3000.0 / 8750.0
    assert plan.speedup_over_flops_ratio == pytest.approx(3000.0 / 8750.0 * left.total / full.total)
    assert plan.decode_overhead_percent == pytest.approx(150.0) and stock.decode_overhead_percent == 0.0
    cells = dict(zip(plan.HEADINGS, plan.cells(), strict=True))
    assert cells["prefill ms"] == "8750 ± 4375" and cells["speed-up"] == "0.34x" and cells["decode"] == "+150.0 %"
    assert cells["reached"] == f"{100 * plan.speedup_over_flops_ratio:.0f} %" and cells["selection ms"] == "1250.0"
    assert cells["decode ms"] == "625.0" and cells["FLOPs ratio"] == f"{full.total / left.total:.2f}x"


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = one("llava")
    seen: list[str] = []
    compress = mm.compress
    monkeypatch.setattr(mm, "compress", lambda m, plan, **more: (seen.append(plan), compress(m, plan, **more))[1])
    subjects = [Subject("stock"), Subject(PLANS[0]), Subject(PLANS[3])]
    rounds: list[int] = []
    found = clock(model, inputs, subjects, repeats=4, warmup=2, new_tokens=3, show=rounds.append)
    assert rounds == [1, 2, 3, 4, 5, 6] and len(seen) == 12
    assert all(set(seen[i : i + 2]) == {PLANS[0], PLANS[3]} for i in range(0, 12, 2))
    for times in found:
        assert len(times.ttft) == len(times.decode) == 4 and min(times.decode) > 0
        assert min(*times.vision, *times.prefill) > 0
    assert found[0].compress == [0.0] * 4 and min(found[1].compress) > 0
    assert Spread.of([1.0, 2.0, 3.0, 4.0]) == Spread(2.5, 2.5) and Spread.of([7.0]) == Spread(7.0, 0.0)


def test_a_second_baseline_with_the_fastest_attention() -> None:
    model, inputs = one("llava")
    model.set_attn_implementation("eager")
    rows = costs(model, inputs, [PLANS[0], PLANS[0], "stock"], 2, 0, 2)
    assert [row.label for row in rows] == ["stock", "stock (sdpa)", PLANS[0]]
    assert model.config._attn_implementation == "eager"
    assert rows[0].speedup == rows[0].flops_ratio == 1.0 and rows[2].flops_ratio < 1
    assert rows[2].flops_ratio == rows[2].counts.total / rows[0].counts.total


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    line = ["bench", "llava-shapes", "--plan", "fastv(layer=1, keep=0.25)", "--repeats", "2", "--warmup", "0"]
    assert main([*line, "--new-tokens", "2", "--device", "cpu", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    stock, fastv = record["rows"]
    assert record["attention"] == "sdpa" and record["machine"]["torch"] and record["repeats"] == 2 and record["weights"]
    assert (stock["plan"], stock["flops_ratio"], stock["speedup"]) == ("stock", 1.0, 1.0)
    assert fastv["layers"][0] == stock["layers"][0] > fastv["layers"][1] and fastv["kv_bytes"] < stock["kv_bytes"]
    total = fastv["vision"] + fastv["overhead"] + fastv["flops"]["exact"]["full"] + fastv["rotary"] + fastv["head"]
    assert fastv["total_flops"] == total and set(fastv["milliseconds"]) == {
        "ttft",
        "vision",
        "compress",
        "prefill",
        "decode",
    }
    assert fastv["peak_bytes"] is None and len(fastv["milliseconds"]["ttft"]["all"]) == 2
    assert main(["bench", "llava-shapes", "--op", "match"]) == 2 and "bench kernels" in capsys.readouterr().err
    assert main(["bench", "llava", "--new-tokens", "2"]) == 2 and "--new-tokens" in capsys.readouterr().err
    assert main([*line, "--image", str(tmp_path / "none.png")]) == 2 and "no such file" in capsys.readouterr().err


def test_published_conventions_are_not_told_of_layers_that_they_do_not_know() -> None:
    """Experts: counted by their modules; FLOPs of linear attention that no module tells stay in the total, and are named."""
    for name, note in (("qwen3_vl_moe", None), ("qwen3_5", "counted with the overhead: linear_attn")):
        model = architectures.build(name)
        found = count(model, architectures.prompts(model, [[5, "0", 4]]))
        assert set(found.flops) == {"exact"}
        assert (
            (found.overhead == 0) == (note is None) and any(note in n for n in found.notes) if note else not found.notes
        )
        assert found.total == found.vision + found.overhead + found.flops["exact"]["full"] + found.rotary + found.head


def test_counts_are_plain_values() -> None:
    made = Counts("stock", [4, 4], 1, 3, {"exact": {"full": 10, "visual_only": 5}}, 5, 0, 0, 5, 64)
    assert made.total == 20 and made.vision_share == 0.25 and made.visual_mean == 3


def test_the_commit_of_a_record_is_dirty_where_code_differs_not_where_a_record_does(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    code, record = tmp_path / "eval" / "code.py", tmp_path / "results" / "record.json"
    for file in (code, record):
        file.parent.mkdir()
        file.write_text("1")
    assert commit(code.parent) is None
    git("init")
    git("add", ".")
    git("-c", "user.name=x", "-c", "user.email=x@x", "commit", "-m", "all")
    clean = commit(code.parent)
    assert clean and "dirty" not in clean
    record.write_text("2")
    assert commit(code.parent) == clean
    code.write_text("2")
    assert commit(code.parent) == f"{clean}-dirty"
