# SPDX-License-Identifier: Apache-2.0
"""`mmcompress demo --full`: every embedded model at several ratios, in tables and in pictures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .api import compress, compressed, report, trace, uncompress
from .assets import MODELS, model_path, split
from .eval.cost.counts import count
from .eval.machine import machine, synchronize
from .eval.statistics import Difference, bootstrap, unsettled
from .eval.synthetic import CHANCE, KINDS, Item, Score, evaluate, items, prepare
from .eval.synthetic.benchmark import encode, load, same, takes_any_shape
from .eval.widen import widen
from .flops import WHOLE
from .records import read, update
from .trace import Shape, kv_bytes, prefill_flops
from .visualize import Panel, kept_figure, kept_overlay, page
from .visualize.figure import cannot_draw

PLANS = {
    "random": "random(keep={keep})",
    "uniform": "uniform(keep={keep})",
    "visionzip": "visionzip(keep={keep})",
    "divprune": "divprune(keep={keep})",
    "tome": "tome(keep={keep})",
    "fastv": "fastv(layer=2, keep={keep})",
    "visionzip >> fastv": "visionzip(keep={double}) >> fastv(layer=2, keep=0.5)",
}
"""What the demo compares at each keep ratio; in the row of two stages both together leave that ratio."""


@dataclass(frozen=True)
class Row:
    """One line of the table. Tokens, visual FLOPs and KV bytes are those of the visual tokens of one image in the LLM (computed);
    prefill is the median of single forward passes with one image, vision tower included (measured), and total_flops what torch
    counts in one. change: of the accuracy, against that of the stock model on the same questions."""

    method: str
    plan: str
    keep: float
    tokens: int
    accuracy: float
    by_type: dict[str, float]
    standard_error: float
    visual_flops: int
    visual_kv_bytes: int
    prefill_ms: float
    change: Difference | None = None
    total_flops: int = 0


def sweep(
    model: Any, processor: Any, questions: Sequence[Item], ratios: Sequence[float], show: Progress | None = None
) -> Iterator[Row]:
    """The stock model and every plan at every ratio on the same questions."""
    plans = [("none", "", 1.0)]
    for keep in ratios:
        plans += [
            (name, text.format(keep=keep, double=round(2 * keep, 4)), keep)
            for name, text in PLANS.items()
            if "{double}" not in text or 2 * keep <= 1
        ]
    bar = show.add_task("questions", total=len(plans)) if show else None
    batches = prepare(processor, questions)
    alone = [encode(processor, [item]).to(model.device) for item in questions[:10]]
    with compressed(model, "uniform(keep=1.0)"), torch.no_grad():
        model(**alone[-1])
        tokens = trace(model).visuals[0].tokens
    shape = Shape.of(model.config.text_config)
    width = next(model.parameters()).dtype.itemsize
    stock: Score | None = None
    full = count(model, alone[-1])
    for name, plan, keep in plans:
        if show and bar is not None:
            show.update(bar, description=f"{name} {keep:.0%}")
        if plan:
            compress(model, plan)
        score: Score = evaluate(model, processor, batches)
        milliseconds = prefill_milliseconds(model, alone)
        per_layer = visual_tokens_per_layer(model) if plan else [tokens] * shape.layers
        uncompress(model)
        if show and bar is not None:
            show.advance(bar)
        stock = stock or score
        yield Row(
            name, plan, keep, per_layer[-1], score.accuracy(), {kind: score.accuracy(kind) for kind in KINDS},
            score.standard_error, prefill_flops(shape, per_layer), kv_bytes(shape, per_layer, width), milliseconds,
            change(stock, score) if plan else None, count(model, alone[-1], plan, full).total if plan else full.total,
        )  # fmt: skip


def change(stock: Score, score: Score) -> Difference:
    """How the accuracy differs from that of the stock model, question by question."""
    kinds = np.repeat(list(KINDS), [len(stock.right[kind]) for kind in KINDS])
    parts = [kinds == kind for kind in KINDS]
    before, after = (np.concatenate([one.right[kind] for kind in KINDS]).astype(float) for one in (stock, score))
    terms = [[(1 / len(parts), values * part, 1.0 * part) for part in parts] for values in (before, after)]
    return bootstrap(terms[0], terms[1], [str(number) for number in range(len(kinds))])


def visual_tokens_per_layer(model: Any) -> list[int]:
    """Visual tokens of the first row of the last call that entered each LLM layer."""
    last = trace(model)
    text = last.call.counts[0] - sum(v.tokens for v in last.visuals if v.row == 0)
    return [count - text for count in last.tokens_per_layer(0)]


@torch.no_grad()
def prefill_milliseconds(model: Any, inputs: Sequence[Any], rounds: int = 3) -> float:
    """Median of single prefills, synchronised, after a warm-up round."""
    times = []
    for round_ in range(rounds + 1):
        for one in inputs:
            synchronize()
            start = time.perf_counter()
            model(**one, use_cache=True, logits_to_keep=1)
            synchronize()
            if round_:
                times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def accuracy_table(name: str, rows: Sequence[Row], questions: int) -> Table:
    stock = rows[0]
    table = Table(title=f"{name} on {questions} held-out questions (one image each)")
    for heading in (
        "method",
        "tokens kept",
        "accuracy",
        "of stock",
        "verdict",
        "prefill FLOPs",
        "visual KV",
        "prefill ms",
    ):
        table.add_column(heading, justify="left" if heading in ("method", "verdict") else "right")
    previous = 1.0
    for row in rows:
        if row.keep != previous:
            table.add_section()
            previous = row.keep
        table.add_row(
            row.method if row.plan else "stock model",
            f"{row.tokens} ({row.tokens / stock.tokens:.0%})",
            f"{100 * row.accuracy:.1f} %",
            f"{100 * row.accuracy / stock.accuracy:.1f} %",
            row.change.verdict if row.change else "",
            f"{row.total_flops / 1e6:.0f} M ({row.total_flops / stock.total_flops:.0%})",
            f"{row.visual_kv_bytes / 1024:.0f} KiB",
            f"{row.prefill_ms:.1f}",
        )
    return table


def families_table(found: dict[str, list[Row]], keep: float) -> Table:
    """All models side by side at one ratio."""
    table = Table(title=f"accuracy of every embedded model with {keep:.0%} of its visual tokens, %")
    table.add_column("method")
    for name, rows in found.items():
        table.add_column(f"{name}\n{rows[0].tokens} tokens", justify="right")
    for method in ("none", *PLANS):
        cells = []
        for rows in found.values():
            row = next((r for r in rows if r.method == method and r.keep in (keep, 1.0)), None)
            cells.append("-" if row is None else f"{100 * row.accuracy:.1f}")
        table.add_row("stock model" if method == "none" else method, *cells)
        if method == "none":
            table.add_section()
    return table


def type_table(rows: Sequence[Row]) -> Table:
    table = Table(title="accuracy by question type, %")
    table.add_column("method")
    table.add_column("kept", justify="right")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    for row in rows:
        table.add_row(
            row.method if row.plan else "stock model",
            f"{row.keep:.0%}",
            *(f"{100 * row.by_type[k]:.0f}" for k in KINDS),
        )
    table.add_section()
    table.add_row("chance", "", *(f"{100 * CHANCE[k]:.1f}" for k in KINDS), style="dim")
    return table


@torch.no_grad()
def draw_method(
    model: Any, processor: Any, shown: Sequence[Item], name: str, ratios: Sequence[float], path: Path
) -> Path:
    """One PNG: a row per picture, the stock answer and then what `name` keeps and answers at each ratio."""
    rows = []
    for item in shown:
        inputs = encode(processor, [item]).to(model.device)
        panels = []
        for keep in (1.0, *ratios):
            text = PLANS[name].format(keep=keep, double=round(2 * keep, 4))
            with compressed(model, text if keep < 1 else "uniform(keep=1.0)"):
                out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
                (visual,) = trace(model).visuals
                left = visual_tokens_per_layer(model)[-1]
                picture = kept_overlay(item.picture, visual) if keep < 1 else item.picture
            answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            above = item.question.text if keep == 1 else f"{left} of {visual.tokens} tokens"
            panels.append(Panel(picture, above, answer, same(answer, item.question.answer)))
        rows.append(panels)
    return kept_figure(rows, f"{name}: what is left of the visual tokens", path)


KIND = "`mmcompress demo`"


def _with(new: dict[str, Any], known: dict[str, Any] | None) -> dict[str, Any]:
    return {**(known or {}), **new}


def _fits(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, dict) and "rows" in one for one in value.values())


def draw_page(model: Any, processor: Any, item: Item, out: Path) -> Path:
    """The HTML page about one question, stock and compressed side by side."""
    from .explain.beside import explained

    plan = "divprune(keep=0.5) >> fastv(layer=2, keep=0.5)"
    found = explained(model, processor, [item.picture], item.question.text, plan, max_new_tokens=8)
    return page(found).save(out / "explain.html")


def run(
    out: Path,
    count: int = 105,
    ratios: Sequence[float] = (0.5, 0.25, 0.1),
    console: Console | None = None,
    objects: int = 4,
    names: Sequence[str] = MODELS,
) -> Path:
    """The whole demo on scenes with at most `objects` objects; returns the path of the JSON record.

    The first model is shown at all `ratios` and in pictures of every method; the others at all ratios in the record, and
    in one picture.
    """
    console = console or Console()
    record, missing = out / "demo.json", cannot_draw()
    read(record, KIND, _fits)
    found: dict[str, list[Row]] = {}
    for name in names:
        console.print(
            f"{name} answers {count} questions with all and with some of its visual tokens ...", highlight=False
        )
        written, widths = split(name)
        model, processor = load(model_path(written))
        if widths:
            model = widen(model, *widths)
        questions = items(count, most=objects, stretched=takes_any_shape(model))
        with Progress(console=console, transient=True) as progress:
            found[name] = rows = list(sweep(model, processor, questions, ratios, progress))
        console.print(accuracy_table(name, rows, count))
        if text := unsettled([row.change for row in rows if row.change], count):
            console.print(text, markup=False, highlight=False)
        if name == names[0]:
            console.print(type_table(rows))
        by_kind = {item.question.kind: item for item in reversed(questions)}
        shown = [by_kind[kind] for kind in ("relation", "reading", "count")]
        for method in () if missing else PLANS if name == names[0] else ("divprune",):
            file = f"{name}_{method.replace(' >> ', '_')}.png"
            path = draw_method(model, processor, shown, method, ratios, out / file)
            console.print(f"kept tokens: {path}")
        measured = {
            "machine": machine(), "questions": count, "objects": objects, "chance": CHANCE,
            "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        update(record, KIND, partial(_with, {name: measured}), _fits)
    with compressed(model, "divprune(keep=0.25)"), torch.no_grad():
        inputs = encode(processor, questions[:1]).to(model.device)
        model.generate(**inputs, do_sample=False, max_new_tokens=8)
        console.print(
            "\nwhat mm.report(model) says after a call:", str(report(model, inputs)), sep="\n", highlight=False
        )
    console.print(families_table(found, 0.25 if 0.25 in ratios else ratios[0]))
    rows = found[names[0]]
    errors = [row.standard_error for row in rows]
    console.print(
        f"[dim]accuracy: mean over question types, standard error about {100 * errors[0]:.1f} (stock) to {100 * max(errors):.1f} "
        f"points; verdict: against the stock model (95 %), same: within one point; tokens kept: after the last stage, of one "
        f"picture; FLOPs: {WHOLE}, counted; KV: visual tokens in the LLM, computed; ms: measured, batch 1, median (so "
        f"small a model is all overhead: --model {MODELS[0]}@8x4 answers the same and costs what real ones cost)[/dim]"
    )
    try:
        page_ = draw_page(model, processor, questions[0], out)
        console.print(f"what {name} looked at, and what was kept, as a page: {page_}")
    except ImportError as error:
        console.print(f"no page: {error}", markup=False)
    if missing:
        console.print(f"no pictures: {missing}", markup=False)
    console.print(f"record: {record}")
    return record
