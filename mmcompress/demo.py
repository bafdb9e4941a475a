# SPDX-License-Identifier: Apache-2.0
"""`mmcompress demo`: what compression costs and saves, in two minutes: an answer, accuracy, real time, one sentence, a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .api import compressed, trace
from .assets import model_path
from .demo_tables import change
from .eval.cost.record import Cost, costs
from .eval.machine import machine
from .eval.statistics import Difference
from .eval.synthetic.benchmark import Score, encode, evaluate, items, load, prepare, same, takes_any_shape
from .eval.widen import widen
from .explain.beside import explained
from .plan import as_pipeline
from .presets import preset
from .records import write_json
from .visualize import page

WIDER = (8, 4)
"""How much wider the copy is whose time is measured: language model, vision encoder."""
CONTROL = "random(keep=0.25)"
"""What any method must beat."""
STOCK = "stock model"


@dataclass(frozen=True)
class Row:
    """One plan. accuracy: on the model itself; cost: of a wider copy that answers the same; change: of the accuracy."""

    name: str
    plan: str
    accuracy: float
    change: Difference | None
    cost: Cost

    @property
    def milliseconds(self) -> float:
        """To the first token."""
        return self.cost.times.spread("ttft").median

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        moved = asdict(self.change) if self.change else None
        return {
            "name": self.name,
            "plan": self.plan,
            "accuracy": self.accuracy,
            "change": moved,
            "cost": self.cost.to_dict(),
        }


def plans_of(model: Any) -> dict[str, str]:
    """What is compared: the stock model, two presets and the control."""
    family = model.config.model_type
    named = {f"{name}: {preset(name, family).plan}": preset(name, family).plan for name in ("balanced", "fast")}
    return {STOCK: "", **named, CONTROL: CONTROL}


def run(
    out: Path, name: str = "llava-shapes", count: int = 70, console: Console | None = None, repeats: int = 5
) -> list[Row]:
    """The demo on one embedded model: a question and its answers first, then `count` questions, then the clock; a page and a record
    in `out`."""
    console = console or Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    model, processor = load(model_path(name))
    plans = plans_of(model)
    balanced = preset("balanced", model.config.model_type).plan
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"{name}: {millions:.1f} million parameters, trained to answer questions about drawn scenes")
    questions = items(count, stretched=takes_any_shape(model))
    first = questions[0]
    say(f'\nasked      "{first.question.text}" (right: {first.question.answer})')
    for label, plan in ((STOCK, ""), ("compressed", balanced)):
        answer, tokens = _answer(model, processor, first, plan)
        say(f'{label:<11}"{answer}" from {tokens} visual tokens{f", {plan}" if plan else ""}')
    rows = _measure(model, processor, questions, plans, repeats, say)
    console.print(_table(rows, name, count))
    found = explained(model, processor, [first.picture], first.question.text, balanced, max_new_tokens=8)
    path = page(found).save(out / "explain.html")
    record = {"model": name, "questions": count, "wider": WIDER, "machine": machine()}
    write_json(out / "first.json", {**record, "rows": [row.to_dict() for row in rows]})
    say(f"\n{conclusion(rows, count)}")
    say(f"what it looked at, and what was kept: {path.resolve().as_uri()}")
    say(
        "more: mmcompress demo --full (every model, tables and pictures); which plan for yours: mmcompress suggest MODEL"
    )
    return rows


def _measure(
    model: Any,
    processor: Any,
    questions: Sequence[Any],
    plans: dict[str, str],
    repeats: int,
    say: Callable[[str], None],
) -> list[Row]:
    """Accuracy of the model and time of its wider copy."""
    say(f"\n{len(questions)} questions, with {len(plans)} plans ...")
    batches = prepare(processor, questions)
    scores: dict[str, Score] = {}
    for label, plan in plans.items():
        with compressed(model, plan) if plan else nullcontext():
            scores[label] = evaluate(model, processor, batches)
    say(f"the clock, on a copy with a language model {WIDER[0]} and a vision encoder {WIDER[1]} times as wide ...")
    wide = widen(model, *WIDER)
    prompt = encode(processor, [questions[0]]).to(wide.device)
    for plan in ("", plans[next(label for label in plans if label != STOCK)]):
        ours, theirs = (_answer(one, processor, questions[0], plan)[0] for one in (model, wide))
        if not same(ours, theirs):
            raise AssertionError(f"the wider copy says {theirs!r} where the model says {ours!r}, with {plan or STOCK}")
    timed = costs(wide, prompt, [plan for plan in plans.values() if plan], repeats, 1, 4)
    by_plan = {cost.counts.plan: cost for cost in timed}
    stock = scores[STOCK]
    return [
        Row(
            label, plan, score.accuracy(), change(stock, score) if plan else None,
            by_plan[repr(as_pipeline(plan))] if plan else timed[0],
        )
        for (label, plan), score in zip(plans.items(), scores.values(), strict=True)
    ]  # fmt: skip


@torch.no_grad()
def _answer(model: Any, processor: Any, item: Any, plan: str) -> tuple[str, int]:
    """The answer, and how many visual tokens entered the language model."""
    inputs = encode(processor, [item]).to(model.device)
    with compressed(model, plan or "uniform(keep=1.0)"):
        out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        kept = sum(visual.kept for visual in trace(model).visuals)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip(), kept


def _table(rows: Sequence[Row], name: str, count: int) -> Table:
    table = Table(
        title=f"{name}: {count} held-out questions; time on its wider copy, which answers the same",
        caption="tokens: visual, mean over the LLM layers; FLOPs: of the whole prefill, vision included; first token: median",
    )
    for heading in ("plan", "tokens", "right", "FLOPs", "first token", "speed-up"):
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    for row in rows:
        table.add_row(
            row.name, f"{row.cost.counts.visual_mean:.0f}", f"{row.accuracy:.1%}", f"{row.cost.flops_ratio:.0%}",
            f"{row.milliseconds:.0f} ms", f"{row.cost.speedup:.2f}x",
        )  # fmt: skip
    return table


def conclusion(rows: Sequence[Row], count: int) -> str:
    """The whole of it in one sentence."""
    stock, kept, *_, control = rows
    assert kept.change is not None
    plan = kept.name.partition(": ")[2] or kept.plan
    times = f"({stock.milliseconds:.0f} ms, then {kept.milliseconds:.0f} ms)"
    return (
        f"{plan} answers {kept.accuracy:.1%} of {count} questions right, the stock model {stock.accuracy:.1%} "
        f"({kept.change.verdict}), as many random tokens {control.accuracy:.1%}; the first token comes {kept.cost.speedup:.1f} "
        f"times as soon {times}, for {kept.cost.flops_ratio:.0%} of the FLOPs."
    )
